"""Processes: proof of identity, pidfds, last words. The only way kvmd ends a process is here.

A pid alone proves nothing: every record is (pid, start time, boot), every wait and every signal goes through a pidfd
that was opened *before* the identity was checked, so a recycled pid can never be hit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from kvmd.effects.proc import observe_process
from kvmd.effects.tree import Tree
from kvmd.errors import HostFailed
from kvmd.facts import Process

LAST_WORDS_BYTES = 4096
_TREE = Tree()
LAUNCHER = Path(__file__).parent.parent / "launch.py"


def pids_of_uid(uid: int) -> tuple[int, ...]:
    """All processes whose real uid is `uid`."""
    found = []
    with os.scandir("/proc") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and entry.stat().st_uid == uid:
                    found.append(int(entry.name))
    return tuple(found)


class Watched:
    """A live process held by a pidfd. `exited` resolves once, to the wait status if it was our child, else None."""

    def __init__(self, process: Process, pidfd: int) -> None:
        self.process = process
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int | None] = self._loop.create_future()
        self._loop.add_reader(pidfd, self._on_exit)

    @classmethod
    def open(cls, process: Process) -> Watched | None:
        """Watch a process if it is still the one that was recorded; None when it is gone or another."""
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            return None
        if observe_process(_TREE, process.pid) != process:
            os.close(pidfd)
            return None
        return cls(process, pidfd)

    def _on_exit(self) -> None:
        status: int | None = None
        with contextlib.suppress(ChildProcessError):
            pid, raw = os.waitpid(self.process.pid, os.WNOHANG)
            if pid:
                status = os.waitstatus_to_exitcode(raw)
        self.close()
        if not self.exited.done():
            self.exited.set_result(status)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; a process that has ended already is fine."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        return self.exited.done()

    def close(self) -> None:
        """Stop watching. The process goes on."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


def spawn_launcher(run_dir: Path, guest: str, output_fd: int) -> Process:
    """Start the launcher for one guest in a session of its own; it will ask for its hand-over on launch.sock.

    `output_fd` becomes stdout and stderr. Raises HostFailed.
    """
    argv = [sys.executable, "-I", "-S", str(LAUNCHER), str(run_dir), guest]
    try:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output_fd,
            stderr=output_fd,
            env={},
            cwd="/",
            close_fds=True,
            start_new_session=True,
        )
    except OSError as error:
        raise HostFailed(f"guest {guest}: cannot start the launcher: {error}") from None
    child.returncode = 0  # the pidfd reaps it; Popen must not
    process = observe_process(_TREE, child.pid)
    if process is None:
        raise HostFailed(f"guest {guest}: the launcher ended at once")
    return process


def limit_core(pid: int) -> None:
    """No core dump of a guest's memory, ever. Harmless when the process is gone."""
    with contextlib.suppress(OSError):
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


def allow_locking(guest: str, pid: int, amount: int | None) -> None:
    """Let a launcher's QEMU lock so many bytes (mlockall(2), VFIO), None: all it comes to need. HostFailed.

    A unit has the same from its drop-in; there it is in force already.
    """
    try:
        _, hard = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
        if hard == resource.RLIM_INFINITY or (amount is not None and hard >= amount):
            amount = hard
        limit = resource.RLIM_INFINITY if amount is None else amount
        resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (limit, limit))
    except ProcessLookupError:
        return
    except OSError as error:
        raise HostFailed(
            f"guest {guest}: cannot raise RLIMIT_MEMLOCK, which memory.lock and devices of the host need: "
            f"{error.strerror}",
            hint="kvmd needs CAP_SYS_RESOURCE",
        ) from None


def last_words(log: Path) -> str:
    """The last line a QEMU wrote, without control characters; empty when it wrote none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return "".join(char if char.isprintable() else " " for char in lines[-1]).strip() if lines else ""
