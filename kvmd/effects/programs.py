"""Programs that a guest's file names and kvmd runs as root: who may have written them, and how long they may take.

They see nothing of kvmd: a clean environment, no descriptor but what they are given, a session of their own that is
killed as a whole when its time is up.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

from kvmd.errors import HostFailed, Refused, TimedOut

DEADLINE_S = 20.0  # a launcher waits 60 s for its guest (kvmd/launch.py, ANSWER_TIMEOUT_S)
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_SAID_BYTES = 500


def check_program(path: str) -> None:
    """Refused unless it is an executable file that only root can have written, wherever its links lead."""
    real = os.path.realpath(path)
    for place in (*reversed(Path(real).parents), Path(real)):
        try:
            status = place.stat()
        except OSError as error:
            raise Refused(f"cannot run {path}: {place}: {error.strerror}") from None
        sticky = place.is_dir() and status.st_mode & stat.S_ISVTX  # nobody replaces root's entry there
        if status.st_uid not in (0, os.geteuid()) or (status.st_mode & 0o022 and not sticky):
            hint = f"chown root:root {place} && chmod go-w {place}"
            raise Refused(f"{path} is not run as root: others than root can write to {place}", hint=hint)
    if not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o100:
        raise Refused(f"{path} is no executable file", hint=f"chmod +x {path}")


async def run(argv: Sequence[str], *, deadline_s: float = DEADLINE_S) -> None:
    """Run a program of root's to its end. Refused, HostFailed with what it said last, TimedOut."""
    check_program(argv[0])
    await _wait(argv, await _spawn(argv), deadline_s)


async def receive_descriptor(argv: Sequence[str], *, deadline_s: float = DEADLINE_S) -> int:
    """Run a program with `--fd=N` put behind the first of its arguments; the descriptor it sends by N (SCM_RIGHTS).

    As QEMU runs its bridge helper (net/tap.c, net_bridge_run_helper). Raises as `run`.
    """
    check_program(argv[0])
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            words = (argv[0], f"--fd={theirs.fileno()}", *argv[1:])
            child = await _spawn(words, pass_fds=(theirs.fileno(),))
        ours.settimeout(deadline_s)
        try:
            _, fds, _, _ = await asyncio.to_thread(socket.recv_fds, ours, 1, 4)
        except TimeoutError:
            fds = []
    for fd in fds:
        os.set_inheritable(fd, False)
        os.set_blocking(fd, False)
    try:
        await _wait(words, child, deadline_s)
        if len(fds) != 1:
            raise HostFailed(f"{argv[0]} handed over {len(fds)} descriptors instead of one")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds[0]


async def _spawn(argv: Sequence[str], pass_fds: tuple[int, ...] = ()) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=_ENVIRONMENT,
            cwd="/",
            pass_fds=pass_fds,
            start_new_session=True,
        )
    except OSError as error:
        raise HostFailed(f"cannot run {argv[0]}: {error.strerror}", hint="has it a #! line?") from None


async def _wait(argv: Sequence[str], child: asyncio.subprocess.Process, deadline_s: float) -> None:
    said = b""
    try:
        async with asyncio.timeout(deadline_s):
            said, _ = await child.communicate()
    except TimeoutError:
        hint = "it was killed with all it had started"
        raise TimedOut(f"{' '.join(argv)} did not end within {deadline_s:g} s", hint=hint) from None
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()
    if child.returncode:
        words = re.sub(r"[^ -~]+", " ", said.decode("utf-8", "replace")).strip()[-_SAID_BYTES:]
        raise HostFailed(f"{' '.join(argv)} failed with {child.returncode}" + (f": {words}" if words else ""))
