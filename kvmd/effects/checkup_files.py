"""Files for `doctor`: rights, images, space, accounts and units, below a root path. Reads only; judges nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from kvmd.config.desired import Desired
from kvmd.config.files import DIRECTORIES, FILES, dropping
from kvmd.config.guest import Guest
from kvmd.effects.images import OpenedImage, open_image
from kvmd.effects.tree import Tree
from kvmd.errors import KvmdError
from kvmd.paths import Paths
from kvmd.plan.checks_storage import UNSEEN
from kvmd.plan.hostreport import Accounts, FileStat, ImageReport, Place, UnitState, Unseen

_UNIT_DIRECTORIES = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
_ENABLED = (
    "/etc/systemd/system/multi-user.target.wants/kvmd.service",
    "/etc/systemd/system/sockets.target.wants/kvmd.socket",
)


def file_stat(path: Path) -> FileStat | Unseen | None:
    """What lies there (a link is followed); None when nothing does, Unseen when it may not be looked at."""
    try:
        found = path.stat()
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            return Unseen(f"cannot be seen as uid {os.geteuid()}: run doctor as root")
        return None
    return _stat(found)


def _stat(found: os.stat_result) -> FileStat:
    kind: Literal["file", "directory", "socket", "device", "other"]
    if stat.S_ISREG(found.st_mode):
        kind = "file"
    elif stat.S_ISDIR(found.st_mode):
        kind = "directory"
    elif stat.S_ISSOCK(found.st_mode):
        kind = "socket"
    else:
        kind = "device" if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode) else "other"
    return FileStat(kind, stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid)


def config_files(config: Path) -> Mapping[str, FileStat]:
    """Every directory and file kvmd reads, and the secrets, by path."""
    paths = [config, *(config / name for name in FILES)]
    for name in (*DIRECTORIES, "secrets"):
        paths += [config / name, *_entries(config / name)]
    seen = ((str(path), file_stat(path)) for path in paths)
    return {path: found for path, found in seen if isinstance(found, FileStat)}


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if not dropping(path.name))
    except OSError:
        return []


# ---- images -------------------------------------------------------------------------------------------------------


def images(tree: Tree, desired: Desired) -> tuple[ImageReport, ...]:
    """Every disk, kernel and initrd of every guest, opened for reading as a start would, and closed again."""
    roots = [tree.path(str(root)) for root in (*desired.daemon.storage.roots, desired.daemon.storage.images)]
    return tuple(
        _image(tree, name, key, path, guest, roots)
        for name, guest in sorted(desired.guests.items())
        for key, path in _files_of(guest)
    )


def _files_of(guest: Guest) -> Iterator[tuple[str, str]]:
    for key, disk in guest.disk.items():
        yield f"disk.{key}", disk.file
    if guest.boot.kernel:
        yield "boot.kernel", guest.boot.kernel
    if guest.boot.initrd:
        yield "boot.initrd", guest.boot.initrd


def _image(tree: Tree, name: str, key: str, path: str, guest: Guest, roots: list[Path]) -> ImageReport:
    disk = guest.disk.get(key.removeprefix("disk."))
    where = str(tree.path(path))
    try:
        opened = open_image(
            where,
            writable=False,
            format=disk.format if disk else "raw",
            roots=roots,
            media=disk.media if disk else "disk",
            lock=False,
        )
    except KvmdError as error:
        hidden = error.details.get("errno") in (errno.EACCES, errno.EPERM)
        return ImageReport(
            guest=name,
            key=key,
            path=path,
            slug=UNSEEN if hidden else error.slug,
            message="cannot be opened by this user: run doctor as root" if hidden else error.message,
            hint=error.hint,
        )
    try:
        found = os.fstat(opened.fd)
    finally:
        os.close(opened.fd)
    return ImageReport(
        guest=name,
        key=key,
        path=path,
        mode=stat.S_IMODE(found.st_mode),
        is_block=opened.is_block,
        direct_io=opened.direct_io,
        cache=disk.cache if disk else None,
        growth_bytes=_growth(opened) if disk and disk.writable else 0,
        file_system=found.st_dev,
        free_bytes=opened.free_bytes,
        content=opened.info.content,
        warnings=opened.info.warnings,
    )


def _growth(opened: OpenedImage) -> int:
    """Bytes the file system may still have to find for this image; none for a device."""
    return 0 if opened.is_block else max(0, opened.info.virtual_bytes - opened.allocated_bytes)


# ---- space --------------------------------------------------------------------------------------------------------


def places(tree: Tree, paths: Paths, desired: Desired) -> tuple[Place, ...]:
    """Where state and logs are or will be, and every storage root that is a directory."""
    storage = desired.daemon.storage
    wanted = [("state", _existing(paths.state)), ("logs", _existing(paths.log))]
    wanted += [("images", tree.path(root)) for root in sorted({*storage.roots, storage.images})]
    found = []
    for what, path in wanted:
        try:
            if not path.is_dir():
                continue  # a block device, or `images` says what is missing
            space = os.statvfs(path)
        except OSError:
            continue
        size = space.f_frsize
        readonly = bool(space.f_flag & os.ST_RDONLY)
        found.append(Place(what, str(path), space.f_bavail * size, space.f_blocks * size, readonly))
    return tuple(found)


def _existing(path: Path) -> Path:
    """The directory itself, or the nearest one above it where kvmd has not made it yet."""
    with contextlib.suppress(OSError):
        while not path.exists():
            path = path.parent
    return path


# ---- accounts and units -------------------------------------------------------------------------------------------


def accounts(tree: Tree) -> Accounts:
    """Local users, groups and subordinate uid ranges (passwd(5), group(5), subuid(5))."""
    return Accounts(
        users=_third_field(tree.read("/etc/passwd")),
        groups=_third_field(tree.read("/etc/group")),
        subordinate=tuple(_subordinate(tree.read("/etc/subuid"))),
    )


def _third_field(text: str | None) -> Mapping[str, int]:
    rows = (line.split(":") for line in (text or "").splitlines())
    return {row[0]: int(row[2]) for row in rows if len(row) > 2 and row[2].isdigit()}


def _subordinate(text: str | None) -> Iterator[tuple[str, int, int]]:
    for line in (text or "").splitlines():
        row = line.split(":")
        if len(row) == 3 and row[1].isdigit() and row[2].isdigit() and int(row[2]):
            yield row[0], int(row[1]), int(row[1]) + int(row[2]) - 1


def unit_state(tree: Tree) -> UnitState:
    """Whether systemd runs the host, has kvmd.service, and starts it. Links may dangle below another root."""
    return UnitState(
        systemd=tree.exists("/run/systemd/system"),
        installed=any("kvmd.service" in tree.names(directory) for directory in _UNIT_DIRECTORIES),
        enabled=any(tree.path(link).is_symlink() for link in _ENABLED),
    )


def network_manager(tree: Tree, *, runs: bool) -> Literal["absent", "leaves", "may take"]:
    """Whether NetworkManager runs and leaves kvmd's links alone (NetworkManager.conf(5), unmanaged-devices)."""
    if not runs:
        return "absent"
    directories = (f"{root}/NetworkManager/conf.d" for root in ("/etc", "/run", "/usr/lib"))
    files = ["/etc/NetworkManager/NetworkManager.conf"]
    files += [f"{directory}/{name}" for directory in directories for name in tree.names(directory)]
    lines = (line.strip() for file in files for line in (tree.read(file) or "").splitlines())
    told = any(line.startswith("unmanaged-devices") and "interface-name:kv*" in line for line in lines)
    return "leaves" if told else "may take"


def needrestart(tree: Tree) -> Literal["absent", "exempt", "would restart guests"]:
    """Whether needrestart(1) is installed and has a line about guests."""
    if not tree.exists("/etc/needrestart/needrestart.conf"):
        return "absent"
    files = [
        "/etc/needrestart/needrestart.conf",
        *(f"/etc/needrestart/conf.d/{name}" for name in tree.names("/etc/needrestart/conf.d")),
    ]
    lines = (line for file in files for line in (tree.read(file) or "").splitlines())
    exempt = any("kvmd-guest" in line and not line.lstrip().startswith("#") for line in lines)
    return "exempt" if exempt else "would restart guests"
