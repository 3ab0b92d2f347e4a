"""Files written so that a power failure leaves the old or the new one, and opened so that no link leads astray.

Everything kvmd keeps in plain files goes through `write_atomic`, and every path that came from configuration or
lies where others may write goes through `open_beneath`. Nothing here knows what a file means.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from kvmd.errors import Conflict, Denied, HostFailed, KvmdError, NotFound

_TEMP_SUFFIX = ".kvmd-tmp"
_SYS_OPENAT2 = 437  # the same on every architecture (include/uapi/asm-generic/unistd.h)
_RESOLVE_NO_XDEV = 0x01  # these five: include/uapi/linux/openat2.h
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RENAME_NOREPLACE = 1  # include/uapi/linux/fs.h
_EAGAIN_TRIES = 5  # openat2(2): a rename beside RESOLVE_BENEATH may give EAGAIN, "retry"
_libc = ctypes.CDLL(None, use_errno=True)

_HINTS = {
    errno.ENOSPC: "free space on that file system, then repeat; nothing was changed",
    errno.EDQUOT: "raise the quota or free space, then repeat; nothing was changed",
    errno.EROFS: "that file system is mounted read-only",
    errno.EIO: "the storage reported an error: look at `journalctl -k`; nothing was changed",
}


class _OpenHow(ctypes.Structure):
    """struct open_how of openat2(2)."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def host_failed(doing: str, path: Path | str, error: OSError) -> HostFailed:
    """The one translation of an OSError about a file: "cannot DOING PATH: reason", with a hint where one is known."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    hint = _HINTS.get(error.errno or 0)
    return HostFailed(f"cannot {doing} {path}: {reason}", hint=hint, path=str(path), errno=error.errno)


@contextlib.contextmanager
def directory_fd(path: Path) -> Iterator[int]:
    """An O_PATH descriptor of a trusted directory (symlinks on the way are followed), closed at the end."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes, mode: int = 0o600, *, fsync: Callable[[int], None] = os.fsync) -> None:
    """Replace `path` by `data`, durably: after a crash at any point it holds the old bytes or the new ones.

    Temporary file in the same directory, all bytes, fsync, rename, fsync of the directory. When an fsync fails the
    kernel has already dropped the dirty pages and a second fsync would succeed without having written anything, so
    the temporary file is removed and nothing is retried. Raises HostFailed; unless the message says otherwise the
    old file is untouched. `fsync` is there for tests.
    """
    temp = f".{path.name}.{secrets.token_hex(6)}{_TEMP_SUFFIX}"
    try:
        with directory_fd(path.parent) as directory:
            try:
                _write_new(temp, directory, data, mode, fsync)
                os.rename(temp, path.name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temp, dir_fd=directory)
                raise
            sync_directory(directory, fsync)
    except OSError as error:
        raise host_failed("write", path, error) from error


def _write_new(name: str, directory: int, data: bytes, mode: int, fsync: Callable[[int], None]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=directory)
    try:
        write_all(fd, data)
        os.fchmod(fd, mode)  # not by open(): the umask would take bits away
        fsync(fd)
    finally:
        os.close(fd)


def sync_directory(directory: int, fsync: Callable[[int], None] = os.fsync) -> None:
    """Make names in an open directory (O_PATH will do) durable. HostFailed says the content itself is in place."""
    # fsync refuses an O_PATH descriptor, so the directory is opened for reading once more.
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        fsync(fd)
    except OSError as error:
        raise HostFailed(
            f"the new content is in place but the directory could not be synced: {error.strerror}",
            hint="it may be the old content again after a power failure; look at `journalctl -k`",
            errno=error.errno,
        ) from error
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte; a short write (disk nearly full, signal) goes on where it stopped. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def remove_stale_temps(directory: Path) -> tuple[str, ...]:
    """Remove what an interrupted `write_atomic` left directly in `directory`; returns the names, sorted.

    To be called at start only, when no other writer is at work. An unreadable directory has nothing to remove.
    """
    removed = []
    with contextlib.suppress(OSError):
        for entry in sorted(directory.iterdir()):
            ours = entry.name.startswith(".") and entry.name.endswith(_TEMP_SUFFIX)
            if ours and stat.S_ISREG(entry.lstat().st_mode):
                entry.unlink()
                removed.append(entry.name)
    return tuple(removed)


def ensure_dir(path: Path, mode: int = 0o700, uid: int = 0, gid: int = 0) -> None:
    """Make `path` a directory of exactly this mode and owner. Its parent must exist and be trusted.

    A symlink or file in its place, or a directory of a third user, is refused (Denied): whoever made it could
    still hold it open or swap it. Raises HostFailed for what the kernel refuses.
    """
    try:
        with directory_fd(path.parent) as parent:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path.name, 0o700, dir_fd=parent)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                fd = os.open(path.name, flags, dir_fd=parent)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                raise Denied(
                    f"{path} is not a directory", hint="remove what is in its place", path=str(path)
                ) from error
            try:
                _own_directory(fd, path, mode, uid, gid)
            finally:
                os.close(fd)
    except OSError as error:
        raise host_failed("make directory", path, error) from error


def _own_directory(fd: int, path: Path, mode: int, uid: int, gid: int) -> None:
    found = os.fstat(fd)
    if found.st_uid not in (uid, 0, os.geteuid()):
        message = f"{path} belongs to uid {found.st_uid}, not to root or uid {uid}"
        raise Denied(message, hint="remove that directory, or find out who made it", path=str(path))
    if (found.st_uid, found.st_gid) != (uid, gid):
        os.fchown(fd, uid, gid)
    if stat.S_IMODE(found.st_mode) != mode:
        os.fchmod(fd, mode)


def append_log_fd(path: Path, mode: int = 0o640) -> int:
    """A close-on-exec descriptor that appends to the regular file `path`, made if missing.

    Anything but a regular file with one name is refused (Denied): a log is written by processes that a guest may
    have taken over, and must not lead anywhere else. Raises HostFailed.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise Denied(f"the log {path} is not a regular file", hint="remove it", path=str(path)) from error
        raise host_failed("open the log", path, error) from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(fd)
        raise Denied(f"the log {path} is not a regular file with one name", hint="remove it", path=str(path))
    os.set_blocking(fd, True)
    return fd


def open_beneath(
    root: Path, relative: str, flags: int, mode: int = 0, *, links_of_root: bool = False, openat2: bool = True
) -> int:
    """Open `relative` so that the result lies in `root`'s tree whatever others swap meanwhile. Close-on-exec.

    No symlink and no "..": openat2(2) with RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS, or
    component by component on a kernel (before 5.6) or under a filter without it. `root` itself is trusted and may
    be reached through links. `links_of_root` is for /dev alone: links made by udev are followed if they stay
    beneath `root` and on its file system. Raises Denied, NotFound, Conflict (O_EXCL and it exists), HostFailed.
    """
    parts = relative.split("/")
    if not relative or "\0" in relative or any(part in ("", ".", "..") for part in parts):
        raise Denied(f'"{relative}" is not a plain path beneath {root}', path=relative)
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS
    resolve |= _RESOLVE_NO_XDEV if links_of_root else _RESOLVE_NO_SYMLINKS
    try:
        with directory_fd(root) as directory:
            if openat2:
                try:
                    return _openat2(directory, relative, flags, mode, resolve)
                except OSError as error:
                    # EPERM: what older seccomp filters answer to a call they do not know.
                    if error.errno not in (errno.ENOSYS, errno.EPERM) or links_of_root:
                        raise
            return _open_by_component(directory, parts, flags, mode)
    except OSError as error:
        raise _open_failed(root, relative, error) from error


def _open_failed(root: Path, relative: str, error: OSError) -> KvmdError:
    path = root / relative
    match error.errno:
        case errno.ELOOP:
            return Denied(f"{path}: a part of the path is a symlink", hint="name the file itself", path=str(path))
        case errno.EXDEV:
            return Denied(f"{path} leads outside of {root}", hint="name the file itself", path=str(path))
        case errno.ENOENT:
            return NotFound(f"{path} does not exist", path=str(path))
        case errno.ENOTDIR:
            return NotFound(f"{path} does not exist: a part of the path is no directory", path=str(path))
        case errno.EEXIST:
            return Conflict(f"{path} exists already", path=str(path))
        case _:
            return host_failed("open", path, error)


def _openat2(directory: int, relative: str, flags: int, mode: int, resolve: int) -> int:
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    path = os.fsencode(relative)
    for _ in range(_EAGAIN_TRIES):
        fd = int(
            _libc.syscall(
                ctypes.c_long(_SYS_OPENAT2),
                ctypes.c_int(directory),
                ctypes.c_char_p(path),
                ctypes.byref(how),
                ctypes.c_size_t(ctypes.sizeof(how)),
            )
        )
        if fd >= 0:
            return fd
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            break
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), relative)


def _open_by_component(directory: int, parts: list[str], flags: int, mode: int) -> int:
    """What RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS does, in user space: each step is relative to a held directory."""
    current = os.dup(directory)
    try:
        for part in parts[:-1]:
            below = _step(current, part, os.O_PATH | os.O_DIRECTORY)
            os.close(current)
            current = below
        fd = _step(current, parts[-1], flags, mode)
    finally:
        os.close(current)
    if flags & os.O_PATH and stat.S_ISLNK(os.fstat(fd).st_mode):  # O_PATH | O_NOFOLLOW opens the link itself
        os.close(fd)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), parts[-1])
    return fd


def _step(current: int, part: str, flags: int, mode: int = 0) -> int:
    try:
        return os.open(part, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=current)
    except NotADirectoryError:
        # The kernel says ENOTDIR for a symlink here; openat2 says ELOOP. One answer for both ways.
        if stat.S_ISLNK(os.stat(part, dir_fd=current, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), part) from None
        raise


def rename_new(old: str, new: str, *, directory: int) -> None:
    """Rename within an open directory; FileExistsError if `new` exists (renameat2(2), RENAME_NOREPLACE).

    Where the file system cannot do that in one step (EINVAL: NFS, some FUSE), `new` is looked for first.
    """
    source, target = os.fsencode(old), os.fsencode(new)
    if _libc.renameat2(directory, source, directory, target, ctypes.c_uint(_RENAME_NOREPLACE)) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), old, None, new)
    with contextlib.suppress(FileNotFoundError):
        os.stat(new, dir_fd=directory, follow_symlinks=False)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
    os.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)
