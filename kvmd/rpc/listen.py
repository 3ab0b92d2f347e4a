"""A listening Unix socket for a kvmd that systemd gave none: one server at a time, no window with wrong rights."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from pathlib import Path

from kvmd.errors import Conflict, HostFailed
from kvmd.unixpath import ShortPath

_BACKLOG = 512


class UnixListener:
    """A bound and listening socket together with the lock that makes it the only one. `close` removes both."""

    def __init__(self, sock: socket.socket, path: Path, lock_fd: int) -> None:
        self.sock = sock
        self._path = path
        self._lock_fd = lock_fd
        self._inode = path.stat().st_ino

    def close(self) -> None:
        """Stop listening and remove the socket file, unless someone put another in its place."""
        self.sock.close()
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        os.close(self._lock_fd)


def listen_unix(path: Path, *, mode: int = 0o666) -> UnixListener:
    """Listen on `path` (any length) with these rights from the first moment.

    A lock file beside it decides who serves; a socket file nobody listens on is a leftover and replaced. Conflict
    when someone serves there or the path is no socket, HostFailed when the directory does not allow it. Changes
    the process's umask for an instant: call it before threads start.
    """
    try:
        lock_fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise HostFailed(f"{path}.lock: {error.strerror}", hint="does the directory exist, and is it ours?") from error
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with ShortPath(path) as address:
            _remove_stale(path, address)
            previous = os.umask(0o777 & ~mode)
            try:
                sock.bind(address)
            finally:
                os.umask(previous)
        sock.listen(_BACKLOG)
        return UnixListener(sock, path, lock_fd)
    except BlockingIOError:
        fault: Conflict | HostFailed = _taken(path)
    except Conflict as error:
        fault = error
    except OSError as error:
        fault = HostFailed(f"{path}: {error.strerror or error}", hint="is the directory writable, the name short?")
    sock.close()
    os.close(lock_fd)
    raise fault


def _taken(path: Path) -> Conflict:
    return Conflict(f"{path}: another kvmd is serving here", hint="systemctl status kvmd")


def _remove_stale(path: Path, address: str) -> None:
    """Remove a socket file without a listener; Conflict for one that has one and for anything else."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise Conflict(f"{path}: exists and is no socket", hint="move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # a full backlog is a listener too
    raise _taken(path)
