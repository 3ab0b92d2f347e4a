"""A guest's memory as a file (memory.backing = "file"): opened here, for QEMU has no path it could open.

In a directory it is a file without a name, which goes with its QEMU; otherwise the file that memory.path names, made
where it is missing and kept. Whoever holds it locks it, so that two guests never have one memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import stat
import struct
from pathlib import Path

from kvmd.effects.files import host_failed
from kvmd.errors import Conflict, HostFailed, NotFound, Refused
from kvmd.units import Size

HUGETLBFS_MAGIC = 0x958458F6  # include/uapi/linux/magic.h
_STATFS = struct.Struct("=qq")  # f_type and f_bsize, the first members of struct statfs on 64-bit Linux
_STATFS_BYTES = 256  # more than any architecture's struct
_libc = ctypes.CDLL(None, use_errno=True)
_KEPT = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def open_ram(path: str, size_bytes: int, page_bytes: int | None, uid: int, gid: int) -> int:
    """The guest's memory, `size_bytes` long and owned by `uid`; zeros where it is new.

    `page_bytes`: the hugetlbfs page size there must be, None where there must be none. Raises NotFound (no such
    directory), Refused (another page size, a file of another size), Conflict (another guest's), HostFailed.
    """
    here = Path(path)
    try:
        fd, is_new = _nameless(here) if here.is_dir() else _named(here)
        try:
            _check_pages(fd, path, page_bytes)
            _check_file(fd, path, size_bytes)
            if is_new or os.fstat(fd).st_size == 0:
                os.ftruncate(fd, size_bytes)
            os.fchown(fd, uid, gid)
            os.fchmod(fd, 0o600)
        except BaseException:
            os.close(fd)
            if is_new and not here.is_dir():
                here.unlink(missing_ok=True)
            raise
    except FileNotFoundError as error:
        raise NotFound(f"memory.path: there is no directory {here.parent}", path=path) from error
    except OSError as error:
        raise host_failed("open the memory file", path, error) from error
    return fd


def page_bytes_of(fd: int) -> int | None:
    """The page size of the hugetlbfs a file is on, None on any other file system (statfs(2))."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, buffer):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    kind, block = _STATFS.unpack_from(buffer.raw)
    return int(block) if kind & 0xFFFFFFFF == HUGETLBFS_MAGIC else None


def _nameless(directory: Path) -> tuple[int, bool]:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), True
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    name = directory / f".kvmd-{secrets.token_hex(8)}"  # a file system without O_TMPFILE
    fd = os.open(name, _KEPT | os.O_CREAT | os.O_EXCL, 0o600)
    name.unlink()
    return fd, True


def _named(path: Path) -> tuple[int, bool]:
    with contextlib.suppress(FileExistsError):
        return os.open(path, _KEPT | os.O_CREAT | os.O_EXCL, 0o600), True
    return os.open(path, _KEPT), False


def _check_pages(fd: int, path: str, wanted: int | None) -> None:
    found = page_bytes_of(fd)
    if found == wanted:
        return
    has = f"is on a hugetlbfs of {Size(found)} pages" if found else "is on no hugetlbfs"
    asked = f"asks for {Size(wanted)}" if wanted else "is not set"
    hint = f'memory.page_size = "{Size(found)}"' if found else "kvmd-cli apply mounts one where nothing is mounted yet"
    raise Refused(f"memory.path: {path} {has}, and memory.page_size {asked}", hint=hint)


def _check_file(fd: int, path: str, size_bytes: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise Refused(f"memory.path: {path} is neither a directory nor a regular file")
    if status.st_nlink > 1:
        raise Refused(f"memory.path: {path} has another name too", hint="a file that is memory has one name")
    if status.st_size not in (0, size_bytes):
        raise Refused(
            f"memory.path: {path} has {Size(status.st_size).human()}, memory.size is {Size(size_bytes)}: it stays as "
            "it is",
            hint="remove it, or name another",
        )
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Conflict(f"memory.path: {path} is the memory of a guest that runs") from None
    except OSError as error:  # a file system without locks: the owner of the name keeps order
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOLCK):
            raise HostFailed(f"cannot lock {path}: {error.strerror}") from error
