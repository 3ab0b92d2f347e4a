"""Swap that kvmd makes: a file and a zram device, each recognised by the label in its signature, and taken away.

A swap file comes into being under a temporary name and gets its own when it is complete, so whatever is at its path
is whole. Nothing without our label is ever written to, swapped off or removed. All of this may take long: callers in
the event loop use a thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from kvmd.effects import syscalls
from kvmd.effects.files import directory_fd, host_failed, rename_new, sync_directory, write_all
from kvmd.effects.tree import Tree
from kvmd.errors import HostFailed, NotSupported
from kvmd.facts import SwapArea, SwapFile, Zram

LABEL = b"kvmd-swap"
ZRAM_PRIORITY = 100  # the kernel gives negative ones to what asks for none, our file among them
PAGE = os.sysconf("SC_PAGE_SIZE")
MAGIC = b"SWAPSPACE2"  # at the end of the first page; this and the header: include/linux/swap.h, union swap_header
SWAPS, CONTROL = "/proc/swaps", "/sys/class/zram-control"
_HEADER, _LABEL_BYTES = 1024, 16
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS, _FS_NOCOW_FL = 0x80086601, 0x40086602, 0x00800000  # include/uapi/linux/fs.h


# ---- what is there


def observe_swaps(tree: Tree, known: Iterable[str] = ()) -> tuple[SwapArea, ...] | None:
    """/proc/swaps; None on a kernel without swap. Areas of the `known` paths are called as these are.

    The file has a path as its reader's mount namespace sees it, and kvmd.service has one of its own: what was swapped
    to in another one is shown below the root of its file system. So ours are found by asking them whether they are in
    use, and then by the end of their path and their size.
    """
    text = tree.read(SWAPS)
    if text is None:
        return None
    areas = [area for line in text.splitlines()[1:] if (area := _area(line))]
    for path in known:
        real = os.path.realpath(path)
        size = _busy_bytes(real) if tree.is_live else None
        exact = (n for n, area in enumerate(areas) if area.path == real)
        fitting = (n for n, area in enumerate(areas) if area.size_bytes == size and real.endswith(area.path))
        found = next(exact, None)
        found = next(fitting, None) if found is None and size is not None else found
        if found is not None:
            areas[found] = replace(areas[found], path=path)
    return tuple(areas)


def _area(line: str) -> SwapArea | None:
    fields = line.split()
    if len(fields) != 5 or not all(field.lstrip("-").isdigit() for field in fields[2:]):
        return None
    path = fields[0].encode().decode("unicode_escape")  # a blank is \040
    size, used, priority = map(int, fields[2:])
    return SwapArea(path, size << 10, used << 10, priority)


def _busy_bytes(path: str) -> int | None:
    """Bytes of the area that is at `path`, None when the kernel does not swap to it.

    Cutting a swap file to the length it has is refused with ETXTBSY (fs/attr.c, inode_newsize_ok), opening a device
    for oneself with EBUSY.
    """
    # read-only: udev looks again at every device that was open for writing
    flags = os.O_RDONLY | os.O_EXCL | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        status = os.lstat(path)
        if stat.S_ISBLK(status.st_mode):
            os.close(os.open(path, flags))
        elif stat.S_ISREG(status.st_mode) and _label(Path(path)) == LABEL:
            os.truncate(path, status.st_size)
    except OSError as error:
        if error.errno not in (errno.ETXTBSY, errno.EBUSY):
            return None
        with open(path, "rb") as file:
            return file.seek(0, os.SEEK_END) - PAGE
    return None


def observe_file(tree: Tree, path: str) -> SwapFile:
    """What is at a path of a swap file. Never waits: what is no regular file is somebody else's."""
    here = tree.path(path)
    try:
        parent = os.statvfs(here.parent)
    except OSError:
        return SwapFile(path)
    free = parent.f_bavail * parent.f_frsize
    try:
        status = here.lstat()
    except OSError:
        return SwapFile(path, free_bytes=free)
    ours = stat.S_ISREG(status.st_mode) and _label(here) == LABEL
    return SwapFile(path, status.st_size, ours=ours, free_bytes=free)


def observe_zrams(tree: Tree) -> tuple[Zram, ...] | None:
    """All zram devices; None without /sys/class/zram-control, which also is so while the module is not loaded."""
    if not tree.exists(CONTROL):
        return None
    found = []
    for number in tree.numbered("/sys/block", "zram"):
        size = tree.number(f"/sys/block/zram{number}/disksize") or 0
        ours = size > 0 and _label(tree.path(f"/dev/zram{number}")) == LABEL
        found.append(Zram(number, size, ours=ours))
    return tuple(found)


def _label(path: Path) -> bytes | None:
    """The label of a swap signature, None where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        page = os.pread(fd, PAGE, 0)
    except OSError:
        return None
    finally:
        os.close(fd)
    if not page.endswith(MAGIC) or len(page) != PAGE:
        return None
    _, _, _, _, label = struct.unpack_from(f"=III16s{_LABEL_BYTES}s", page, _HEADER)
    return bytes(label).rstrip(b"\0")


def signature(size_bytes: int) -> bytes:
    """The first page of a swap area of ours: version 1, its last page, no bad ones, a random UUID, our label."""
    header = struct.pack(f"=III16s{_LABEL_BYTES}s", 1, size_bytes // PAGE - 1, 0, secrets.token_bytes(16), LABEL)
    return (bytes(_HEADER) + header).ljust(PAGE - len(MAGIC), b"\0") + MAGIC


# ---- the file


def ensure_file(tree: Tree, path: str, size_bytes: int) -> None:
    """Swap to our file of that size at `path`; made if it is not there. HostFailed, with nothing left behind.

    A file of ours with another size is refused: it is removed first, by `remove_file`.
    """
    found = observe_file(tree, path)
    here = tree.path(path)
    if found.size_bytes is not None and (not found.ours or found.size_bytes != size_bytes):
        raise HostFailed(
            f"{path} is there and is not the swap file kvmd wants: it stays as it is",
            hint="remove it, or choose another swap.file.path",
        )
    made = found.size_bytes is None
    if made:
        _make_file(here, size_bytes)
    if _used(tree, path):
        return
    try:
        syscalls.swapon(str(here), None)
    except OSError as error:
        if made:
            here.unlink(missing_ok=True)
        raise _swapon_failed(path, error) from error
    if not _used(tree, path):
        raise HostFailed(f"swapping to {path} was asked for, and {SWAPS} does not show it")


def remove_file(tree: Tree, path: str) -> None:
    """Stop swapping to our file and remove it; one that is not there is fine. HostFailed."""
    found = observe_file(tree, path)
    if found.size_bytes is None:
        return
    if not found.ours:
        raise HostFailed(f"{path} does not carry kvmd's label: it stays as it is", hint="whoever made it removes it")
    _swapoff(tree, path)
    try:
        tree.path(path).unlink(missing_ok=True)
    except OSError as error:
        raise host_failed("remove", path, error) from error


def _make_file(path: Path, size_bytes: int) -> None:
    """Complete, or not at all: a swap file with holes is refused by the kernel (swapon(2))."""
    temp = f".{path.name}.kvmd-new"
    try:
        with directory_fd(path.parent) as directory:
            _trusted(directory, path.parent)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temp, dir_fd=directory)  # of a kvmd that was killed here
            try:
                _fill(temp, directory, size_bytes)
                rename_new(temp, path.name, directory=directory)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temp, dir_fd=directory)
                raise
            sync_directory(directory)
    except OSError as error:
        raise host_failed("make the swap file", path, error) from error


def _trusted(directory: int, path: Path) -> None:
    """Only where nobody but root can swap names: what is in the file is every guest's memory."""
    status = os.stat(".", dir_fd=directory)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise HostFailed(
            f"{path} can be changed by others than root (uid {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o})",
            hint=f"chown root {path} && chmod go-w {path}, or choose another swap.file.path",
        )


def _fill(name: str, directory: int, size_bytes: int) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=directory)
    try:
        os.fchmod(fd, 0o600)
        _no_copy_on_write(fd)
        os.posix_fallocate(fd, 0, size_bytes)  # writes zeros where the file system cannot allocate
        write_all(fd, signature(size_bytes))
        os.fsync(fd)
    finally:
        os.close(fd)


def _no_copy_on_write(fd: int) -> None:
    """btrfs swaps only to files without it; others do not know the flag."""
    with contextlib.suppress(OSError):
        (now,) = struct.unpack("i", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, struct.pack("i", 0)))
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("i", now | _FS_NOCOW_FL))


# ---- zram


def add_zram() -> int:
    """A new device of this machine, not set up; its number. NotSupported, HostFailed."""
    try:
        fd = os.open(f"{CONTROL}/hot_add", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotSupported("this kernel has no zram", hint='modules.load = ["zram"] in host.toml') from None
    try:
        return int(os.read(fd, 32))  # each read adds one
    except (OSError, ValueError) as error:
        raise HostFailed(f"the kernel adds no zram device: {error}") from error
    finally:
        os.close(fd)


def start_zram(tree: Tree, number: int, size_bytes: int) -> None:
    """Give the device its size and our signature, and swap to it before all else. HostFailed.

    Its compression is the kernel's choice.
    """
    device, here = f"/dev/zram{number}", f"/sys/block/zram{number}"
    if _used(tree, device):
        return
    size = tree.number(f"{here}/disksize")
    if size and size != size_bytes:
        tree.write(f"{here}/reset", "1")
    if size != size_bytes:
        tree.write(f"{here}/disksize", str(size_bytes))
    try:
        fd = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
        try:
            write_all(fd, signature(size_bytes))
            os.fsync(fd)
        finally:
            os.close(fd)
        syscalls.swapon(device, ZRAM_PRIORITY)
    except OSError as error:
        raise _swapon_failed(device, error) from error


def remove_zram(tree: Tree, number: int) -> None:
    """Stop swapping to our device and take it away; one that is not there is fine. HostFailed."""
    found = next((zram for zram in observe_zrams(tree) or () if zram.number == number), None)
    if found is None:
        return
    if found.size_bytes and not found.ours:
        raise HostFailed(f"{found.path} does not carry kvmd's label: it stays as it is")
    discard_zram(tree, number)


def discard_zram(tree: Tree, number: int) -> None:
    """Take away a device that was added here, whatever became of it since. HostFailed."""
    _swapoff(tree, f"/dev/zram{number}")
    tree.write(f"{CONTROL}/hot_remove", str(number))


# ---- both


def _used(tree: Tree, path: str) -> bool:
    return any(area.path == path for area in observe_swaps(tree, [path]) or ())


def _swapoff(tree: Tree, path: str) -> None:
    if not _used(tree, path):
        return
    try:
        syscalls.swapoff(str(tree.path(path)))
    except OSError as error:
        hint = "there is too little memory for what it holds" if error.errno == errno.ENOMEM else None
        raise HostFailed(f"cannot stop swapping to {path}: {error.strerror}", hint=hint, path=path) from error


def _swapon_failed(path: str, error: OSError) -> HostFailed:
    hint = None
    if error.errno == errno.EINVAL:
        hint = "its file system cannot hold a swap file (ext4, xfs and btrfs can)"
    elif error.errno == errno.EPERM:
        hint = "swapping needs CAP_SYS_ADMIN, or there are 30 areas already"
    return HostFailed(f"cannot swap to {path}: {error.strerror}", hint=hint, path=path, errno=error.errno)
