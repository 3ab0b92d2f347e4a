"""One kvmd per state directory: a lock held for life, also where systemd hands over the sockets.

The kernel lets go of it with the process, however that ends (flock(2)); nothing stale can be left behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from kvmd.errors import Conflict, HostFailed

_PID_BYTES = 20
_READ_ONLY = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def lock_state(state_dir: Path) -> Iterator[None]:
    """Alone with this state until the block ends. Conflict names the pid of who has it; HostFailed."""
    path = state_dir / "lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno in _READ_ONLY:  # nothing can be written by the other one either
            yield
            return
        raise HostFailed(f"{path}: {error.strerror}", hint="does the directory exist, and is it ours?") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, _PID_BYTES).decode("ascii", "replace").strip()
            raise Conflict(
                f"{state_dir}: another kvmd{f' (pid {holder})' if holder.isdecimal() else ''} has this state",
                hint="systemctl status kvmd; a second kvmd needs a --state-dir and a --run-dir of its own",
            ) from None
        _sign(fd)
        yield
    finally:
        os.close(fd)


def _sign(fd: int) -> None:
    """Say who has it; on a full disk nobody is named."""
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
