"""Disk images, kernels and ISO files opened for guests, who get descriptors and never a path.

A path counts only beneath a declared storage root, without links, as a regular file with one name or a block
device. What is opened is judged by its header (kvmd.qemu.imageheader) in the declared format and locked before any
QEMU sees it. New images are made here too; no image tool is ever run on what a guest could have written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvmd.effects.files import directory_fd, host_failed, open_beneath, rename_new, sync_directory, write_all
from kvmd.effects.imagelock import Use, find_holder, lock_image
from kvmd.errors import Conflict, Denied, NotFound, Refused
from kvmd.qemu.imageheader import HEADER_BYTES, MAX_VIRTUAL_BYTES, ImageInfo, detect, empty_qcow2, inspect
from kvmd.units import Size

MAX_BOOT_BYTES = 1 << 30  # kernels and initrds: they are copied into memory, which is the host's
_COPY_BYTES = 1 << 20
_DEV = Path("/dev")
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISLNK, "a symlink"),
)


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """An image that passed every check. Whoever gets it closes `fd`; the lock goes with the last copy of it."""

    fd: int
    path: str
    info: ImageInfo
    is_block: bool
    file_bytes: int  # length of the file or device
    allocated_bytes: int  # what a file occupies; of a device its length
    free_bytes: int | None  # left on the file system; None for a device
    direct_io: bool  # O_DIRECT works: cache "none" is possible


def open_image(
    path: str,
    *,
    writable: bool,
    format: str,  # noqa: A002
    roots: Sequence[Path],
    media: Literal["disk", "cdrom"] = "disk",
    backing: str | None = None,
    shared: bool = False,
    lock: bool = True,
) -> OpenedImage:
    """Open and lock a guest's image; the descriptor is close-on-exec.

    `backing` is the declared backing file name in the header, `shared` lets other guests write too (their file
    system must know how), `lock=False` is for looking only. A block device for writing is also claimed (O_EXCL), so
    one that is mounted or part of a volume is refused. Raises Denied (outside the roots, links), NotFound, Refused
    (not an image to open), Conflict (in use, names the holder), HostFailed.
    """
    fd = _open_checked(path, roots, os.O_RDWR if writable else os.O_RDONLY, claim=writable and lock and not shared)
    try:
        if lock:
            _lock(fd, path, _use(writable=writable, shared=shared))
        found = os.fstat(fd)
        is_block = stat.S_ISBLK(found.st_mode)
        file_bytes = _length(fd, path, media) if is_block else found.st_size
        info = _inspect(fd, path, file_bytes, format, backing)
        if not (is_block and media == "cdrom"):  # QEMU polls an empty drive through a non-blocking descriptor
            os.set_blocking(fd, True)
        space = os.fstatvfs(fd)
        return OpenedImage(
            fd=fd,
            path=path,
            info=info,
            is_block=is_block,
            file_bytes=file_bytes,
            allocated_bytes=file_bytes if is_block else found.st_blocks * 512,
            free_bytes=None if is_block else space.f_bavail * space.f_frsize,
            direct_io=supports_o_direct(fd),
        )
    except OSError as error:
        os.close(fd)
        raise host_failed("read the image", path, error) from error
    except BaseException:
        os.close(fd)
        raise


def inspect_image(path: str, *, format: str, roots: Sequence[Path]) -> ImageInfo:  # noqa: A002
    """What the header says, for `check` and `show`: not locked, so it works while a guest runs. As `open_image`."""
    opened = open_image(path, writable=False, format=format, roots=roots, lock=False)
    os.close(opened.fd)
    return opened.info


def suggest_format(path: str, roots: Sequence[Path]) -> str:
    """What an image's header looks like ("qcow2", "raw", "vmdk", ...): for a suggestion to a person, nothing else."""
    fd = _open_checked(path, roots, os.O_RDONLY, claim=False)
    try:
        content = detect(os.pread(fd, HEADER_BYTES, 0))
    except OSError as error:
        raise host_failed("read the image", path, error) from error
    finally:
        os.close(fd)
    return "raw" if content in ("iso9660", "luks") else content


def supports_o_direct(fd: int) -> bool:
    """Whether the file can be opened with O_DIRECT (some file systems answer EINVAL)."""
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def sealed_copy(path: str, roots: Sequence[Path], max_bytes: int = MAX_BOOT_BYTES) -> int:
    """A memfd with the file's bytes that nobody can change any more, for kernels and initrds; close-on-exec.

    Only regular files beneath a root, up to `max_bytes`. Raises as `open_image` does.
    """
    source = _open_checked(path, roots, os.O_RDONLY, claim=False)
    try:
        found = os.fstat(source)
        if not stat.S_ISREG(found.st_mode):
            raise Refused(f"{path} is not a regular file")
        return _copy_sealed(source, path, max_bytes)
    except OSError as error:
        raise host_failed("copy", path, error) from error
    finally:
        os.close(source)


def _copy_sealed(source: int, path: str, max_bytes: int) -> int:
    memfd = os.memfd_create(f"kvmd:{Path(path).name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        copied = 0
        while chunk := os.read(source, _COPY_BYTES):
            copied += len(chunk)
            if copied > max_bytes:
                raise Refused(f"{path} is larger than {Size(max_bytes).human()}, too large for a kernel or initrd")
            write_all(memfd, chunk)
        if not copied:
            raise Refused(f"{path} is empty")
        os.lseek(memfd, 0, os.SEEK_SET)
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(memfd)
        raise
    return memfd


def create_image(path: str, *, format: str, size_bytes: int, roots: Sequence[Path]) -> None:  # noqa: A002
    """Make a new, empty, sparse image of mode 0600; it appears complete or not at all, and replaces nothing.

    Raises Conflict when the path exists, Refused for a size or format kvmd does not make, Denied, NotFound (the
    directory), HostFailed.
    """
    if format not in ("raw", "qcow2"):
        raise Refused(f'cannot make an image of format "{format}"', hint='use "raw" or "qcow2"')
    if not 0 < size_bytes <= MAX_VIRTUAL_BYTES or size_bytes % 512:
        limit = Size(MAX_VIRTUAL_BYTES)
        raise Refused(f"{path}: a disk of {size_bytes} bytes is not a whole number of 512-byte sectors up to {limit}")
    root, relative = declared_root(path, roots)
    if not relative or root == _DEV or _DEV in root.parents:
        raise Denied(f"{path}: images are made in a storage root that is a directory, not beneath {root}")
    content = empty_qcow2(size_bytes) if format == "qcow2" else b""
    try:
        with _parent_fd(root, relative) as directory:
            _make(directory, Path(path).name, content, size_bytes if format == "raw" else len(content))
    except FileExistsError as error:
        raise Conflict(f"{path} exists already; kvmd overwrites no image", hint="choose another name") from error
    except OSError as error:
        raise host_failed("make the image", path, error) from error


@contextlib.contextmanager
def _parent_fd(root: Path, relative: str) -> Iterator[int]:
    above = relative.rpartition("/")[0]
    if not above:
        with directory_fd(root) as fd:
            yield fd
        return
    fd = open_beneath(root, above, os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def _make(directory: int, name: str, content: bytes, length: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.stat(name, dir_fd=directory, follow_symlinks=False)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
    temp = f".{secrets.token_hex(8)}.kvmd-tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temp, flags, 0o600, dir_fd=directory)
    try:
        try:
            write_all(fd, content)
            os.ftruncate(fd, length)
            os.fsync(fd)
        finally:
            os.close(fd)
        rename_new(temp, name, directory=directory)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp, dir_fd=directory)
        raise
    sync_directory(directory)


# ---- from a path to a descriptor ----------------------------------------------------------------------------------


def declared_root(path: str, roots: Sequence[Path]) -> tuple[Path, str]:
    """The innermost declared root that contains `path`, and the rest of it ("" when the path is the root itself)."""
    if not path.startswith("/") or "\0" in path or any(part in ("", ".", "..") for part in path[1:].split("/")):
        raise Denied(f'"{path}" is not a plain absolute path', hint='write it from "/", without ".", ".." or "//"')
    whole = Path(path)
    containing = [root for root in roots if root == whole or root in whole.parents]
    if not containing:
        declared = ", ".join(map(str, roots)) or "none"
        hint = f'add "{whole.parent}" to storage.roots in kvmd.toml, or move the file'
        raise Denied(f"{path} lies in no storage root (declared: {declared})", hint=hint, path=path)
    root = max(containing, key=lambda root: len(root.parts))
    return root, "" if root == whole else str(whole.relative_to(root))


def _open_checked(path: str, roots: Sequence[Path], flags: int, *, claim: bool) -> int:
    """Open a regular file with one name, or a block device; non-blocking and close-on-exec.

    First by O_PATH, which has no side effect whatever lies there (opening a FIFO waits, opening a watchdog starts
    it); what passes is reopened through /proc/self/fd, which is the same inode however the path changed meanwhile.
    """
    place = _find(path, roots)
    try:
        found = os.fstat(place)
        _check_kind(found, path)
        if claim and stat.S_ISBLK(found.st_mode):
            flags |= os.O_EXCL
        return os.open(f"/proc/self/fd/{place}", flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            hint = "see `lsblk` and /proc/mounts; a guest needs a device the host does not use"
            raise Conflict(f"{path} is in use by the host: mounted, swap, or part of a volume", hint=hint) from error
        failed = host_failed("open the image", path, error)
        if error.errno == errno.EROFS:
            failed.hint = "that file system is mounted read-only: set the disk's readonly = true"
        raise failed from error
    finally:
        os.close(place)


def _find(path: str, roots: Sequence[Path]) -> int:
    root, relative = declared_root(path, roots)
    if _DEV in Path(path).parents:
        # Volumes are udev's links there (/dev/vg0/data -> ../dm-3); only root can make one, on that file system.
        return open_beneath(_DEV, str(Path(path).relative_to(_DEV)), os.O_PATH, links_of_root=True)
    if relative:
        return open_beneath(root, relative, os.O_PATH)
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)  # the declared root itself: the administrator's own link
    except FileNotFoundError as error:
        raise NotFound(f"{path} does not exist", path=path) from error


def _check_kind(found: os.stat_result, path: str) -> None:
    if stat.S_ISBLK(found.st_mode):
        return
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "no file")
        raise Refused(f"{path} is {kind}; an image is a regular file or a block device", path=path)
    if found.st_nlink != 1:
        message = f"{path} has {found.st_nlink} names (hard links): it may be a file of the host under another name"
        raise Denied(message, hint="copy it to a file of its own", path=path)


def _use(*, writable: bool, shared: bool) -> Use:
    if not writable:
        return Use.READ
    return Use.SHARED_WRITE if shared else Use.EXCLUSIVE


def _lock(fd: int, path: str, use: Use) -> None:
    if lock_image(fd, use):
        return
    holder = find_holder(fd)
    hint = "stop that, or give the guest a disk of its own"
    by = str(holder) if holder else "a process that cannot be seen from here (another container or host?)"
    details = {"pid": holder.pid, "guest": holder.guest} if holder else {}
    raise Conflict(f"{path} is in use by {by}", hint=hint, path=path, **details)


def _length(fd: int, path: str, media: str) -> int:
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        if error.errno == errno.ENOMEDIUM and media == "cdrom":
            return 0
        raise host_failed("measure", path, error) from error


def _inspect(fd: int, path: str, file_bytes: int, declared_format: str, backing: str | None) -> ImageInfo:
    header = os.pread(fd, HEADER_BYTES, 0) if file_bytes else b""
    try:
        return inspect(header, file_bytes, declared_format, backing=backing)
    except Refused as refused:
        raise Refused(f"{path} {refused.message}", hint=refused.hint, path=path) from None
