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
from kvmd.facts import GuestUnit

SYSTEMCTL_TIMEOUT_S = 20.0
STATUS_POLL_S = 0.05
STATUS_TRIES = 60
CLD_EXITED = 1  # siginfo(7): anything else is a signal
TEMPLATE = "/usr/local/lib/systemd/system/kvmd-guest@.service"  # where scripts/install puts it
DROP_IN = "50-kvmd.conf"
_DROP_INS = "kvmd-guest@*.service.d"


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


def network_unit(network: str) -> str:
    """The unit of a network's DHCP and DNS server."""
    return f"kvmd-net@{network}.service"


def _instance(name: str) -> str:
    """The guest of a unit's or drop-in directory's name."""
    return name.removeprefix("kvmd-guest@").split(".service", 1)[0]


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
            to_journal.setFormatter(logging.Formatter("%(message)s"))  # the rest are fields
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

    async def check_start(self, guest: str) -> None:
        """For a start whose launcher has not asked yet. HostFailed when the unit failed.

        One that is inactive is started again: the first request came while systemd had not yet seen the end of the
        QEMU before, and was nothing to it.
        """
        shown = await self._show(guest, "ActiveState", "Result", "Job")
        if shown["Job"] != "0" and shown["Job"]:
            return
        if shown["ActiveState"] == "failed":
            raise HostFailed(
                f"guest {guest}: systemd could not start its launcher ({shown['Result']})",
                hint=f"journalctl -u {guest_unit(guest)}",
            )
        if shown["ActiveState"] == "inactive":
            await self.start(guest)

    def observe(self) -> tuple[GuestUnit, ...]:
        """Every guest that has a drop-in of ours or is enabled, by name. HostFailed."""
        try:
            texts = {_instance(path.parent.name): path.read_text() for path in self._etc.glob(f"{_DROP_INS}/{DROP_IN}")}
        except OSError as error:
            raise HostFailed(f"cannot read the drop-ins in {self._etc}: {error.strerror}") from None
        enabled = {_instance(link.name) for link in self._link("*").parent.glob("kvmd-guest@*.service")}
        names = sorted(texts.keys() | enabled)
        return tuple(GuestUnit(name, texts.get(name, ""), name in enabled) for name in names)

    def enabled(self, guest: str) -> bool:
        """Whether systemd starts this guest at boot."""
        return self._link(guest).is_symlink()

    def enable(self, guest: str, *, on: bool) -> None:
        """Make or remove the link of `systemctl enable`, as that command would. HostFailed."""
        link = self._link(guest)
        try:
            if on:
                link.parent.mkdir(mode=0o755, exist_ok=True)
                link.parent.chmod(0o755)  # whatever our umask is
                link.symlink_to(TEMPLATE)
            else:
                link.unlink(missing_ok=True)
        except FileExistsError:
            return
        except OSError as error:
            raise HostFailed(f"guest {guest}: cannot change {link}: {error.strerror}") from None

    def write_drop_in(self, guest: str, text: str) -> bool:
        """Make the guest's drop-in say exactly this (empty: none). True if it changed: then `reload`. HostFailed."""
        path = self._etc / f"{guest_unit(guest)}.d" / DROP_IN
        try:
            if (path.read_text() if path.exists() else "") == text:
                return False
            if text:
                path.parent.mkdir(mode=0o755, exist_ok=True)
                path.parent.chmod(0o755)
                write_atomic(path, text.encode(), mode=0o644)
            else:
                path.unlink()
                with contextlib.suppress(OSError):  # someone else's drop-ins are there too
                    path.parent.rmdir()
        except OSError as error:
            raise HostFailed(f"guest {guest}: cannot change {path}: {error.strerror}") from None
        return True

    async def start_network(self, network: str) -> None:
        """Start a network's DHCP and DNS server, anew if it runs; back when it serves. HostFailed, TimedOut.

        kvmd has its own patience with one that keeps failing: systemd's is reset.
        """
        with contextlib.suppress(HostFailed):  # a unit that has not failed
            await self._systemctl("reset-failed", network_unit(network))
        await self._systemctl("restart", network_unit(network))

    async def stop_network(self, network: str) -> None:
        """Stop a network's server; one that does not run is stopped. HostFailed, TimedOut."""
        await self._systemctl("stop", network_unit(network))

    async def reload(self) -> None:
        """Make systemd read drop-ins again. HostFailed, TimedOut."""
        await self._systemctl("daemon-reload")

    async def exit_status(self, guest: str, pid: int) -> int | None:
        """How the QEMU with this pid ended, as waitpid would say (negative: signal); None if that cannot be known.

        Waits a moment for systemd to see it. A unit that ended well is forgotten: that is 0; one that did not is kept.
        """
        for _ in range(STATUS_TRIES):
            shown = await self._show(guest, "ActiveState", "ExecMainPID", "ExecMainCode", "ExecMainStatus")
            if shown["ExecMainPID"] == str(pid) and shown["ExecMainCode"] != "0":
                status = int(shown["ExecMainStatus"])
                return status if shown["ExecMainCode"] == str(CLD_EXITED) else -status
            if shown["ExecMainPID"] not in ("0", str(pid)):
                return None  # it runs again already
            if shown["ActiveState"] == "inactive":
                return 0
            await asyncio.sleep(STATUS_POLL_S)
        return None

    def _link(self, guest: str) -> Path:
        return self._etc / "kvmd-guests.target.wants" / guest_unit(guest)

    async def _show(self, guest: str, *names: str) -> Mapping[str, str]:
        """Properties of a guest's unit (org.freedesktop.systemd1(5)); "" for one it does not have."""
        shown = await self._systemctl("show", *(f"--property={name}" for name in names), guest_unit(guest))
        return dict.fromkeys(names, "") | dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)

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
