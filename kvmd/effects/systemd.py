"""systemd as kvmd meets it: readiness, watchdog, passed sockets, the journal, and one unit per guest.

Everything degrades to nothing when kvmd was not started by systemd; `supervised()` is the one test of that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from systemd.daemon import listen_fds_with_names
from systemd.daemon import notify as sd_notify
from systemd.journal import JournalHandler

from kvmd.effects.files import write_atomic
from kvmd.errors import HostFailed, TimedOut

SYSTEMCTL_TIMEOUT_S = 20.0


def supervised() -> bool:
    """Whether this process is kvmd.service of a running systemd."""
    try:
        cgroup = Path("/proc/self/cgroup").read_text()
    except OSError:
        return False
    return "kvmd.service" in cgroup.replace("\n", "/").split("/") and Path("/run/systemd/system").is_dir()


def guest_unit(name: str) -> str:
    """The unit that runs this guest. Guest names need no escaping, except `-`, which %i keeps as it is."""
    return f"kvmd-guest@{name}.service"


def notify(*assignments: str) -> None:
    """sd_notify(3): "READY=1", "WATCHDOG=1", "STOPPING=1", "STATUS=…". No-op without systemd."""
    sd_notify("\n".join(assignments))


def watchdog_interval_s() -> float | None:
    """Half of WatchdogSec, the interval systemd asks services to keep; None when there is no watchdog."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdigit() else None


def passed_sockets() -> Mapping[str, socket.socket]:
    """Listening sockets from kvmd.socket by FileDescriptorName ("kvmd.sock", "launch.sock")."""
    found = {}
    for fd, name in listen_fds_with_names().items():
        os.set_inheritable(fd, False)
        found[name] = socket.socket(fileno=fd)
    return found


def log_handler() -> logging.Handler:
    """The journal under systemd (with KVMD_GUEST= and friends from `extra`), stderr elsewhere."""
    if os.environ.get("JOURNAL_STREAM"):
        with contextlib.suppress(OSError):
            to_journal: logging.Handler = JournalHandler(SYSLOG_IDENTIFIER="kvmd")
            return to_journal
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


class Units:
    """Guest units: started through systemctl, enabled by links, told what a guest needs more by drop-ins."""

    def __init__(self, etc: Path = Path("/etc/systemd/system")) -> None:
        self._etc = etc

    async def start(self, guest: str) -> None:
        """Queue the start of a guest's unit; its launcher then asks for the hand-over. HostFailed, TimedOut."""
        await self._systemctl("start", "--no-block", guest_unit(guest))

    def enabled(self, guest: str) -> bool:
        """Whether systemd starts this guest at boot."""
        return self._link(guest).is_symlink()

    def enable(self, guest: str, *, on: bool) -> None:
        """Make or remove the link of `systemctl enable`, as that command would. HostFailed."""
        link = self._link(guest)
        try:
            if on:
                link.parent.mkdir(mode=0o755, exist_ok=True)
                link.symlink_to("/lib/systemd/system/kvmd-guest@.service")
            else:
                link.unlink(missing_ok=True)
        except FileExistsError:
            return
        except OSError as error:
            raise HostFailed(f"guest {guest}: cannot change {link}: {error.strerror}") from None

    async def write_drop_in(self, guest: str, text: str) -> bool:
        """Make the guest's drop-in say exactly this (empty: none). True if it changed and systemd was reloaded."""
        path = self._etc / f"{guest_unit(guest)}.d" / "50-kvmd.conf"
        try:
            old = path.read_text()
        except OSError:
            old = ""
        if old == text:
            return False
        if text:
            path.parent.mkdir(mode=0o755, exist_ok=True)
            write_atomic(path, text.encode(), mode=0o644)
        else:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()
        await self._systemctl("daemon-reload")
        return True

    async def exit_status(self, guest: str) -> int | None:
        """How the guest's last QEMU ended, as waitpid would say (negative: signal); None if systemd forgot."""
        shown = await self._systemctl("show", "-p", "ExecMainCode", "-p", "ExecMainStatus", guest_unit(guest))
        values = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
        code, status = values.get("ExecMainCode", "0"), values.get("ExecMainStatus", "0")
        if code == "0":
            return None
        return int(status) if code == "1" else -int(status)

    def _link(self, guest: str) -> Path:
        return self._etc / "kvmd-guests.target.wants" / guest_unit(guest)

    async def _systemctl(self, *arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            "systemctl", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        try:
            async with asyncio.timeout(SYSTEMCTL_TIMEOUT_S):
                output, errors = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise TimedOut(f"systemctl {' '.join(arguments)} did not end in {SYSTEMCTL_TIMEOUT_S:g} s") from None
        if process.returncode:
            words = errors.decode("utf-8", "replace").strip()
            raise HostFailed(f"systemctl {' '.join(arguments)} failed: {words}")
        return output.decode("utf-8", "replace")
