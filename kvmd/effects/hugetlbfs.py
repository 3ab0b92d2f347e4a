"""Private mounts of hugetlbfs for guests' memory.path (Documentation/admin-guide/mm/hugetlbpage.rst): seen, made, gone.

Ours are known by their source. They are root's alone: QEMU gets a file of theirs as a descriptor.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from kvmd.effects import syscalls
from kvmd.effects.files import host_failed
from kvmd.effects.tree import Tree
from kvmd.facts import MemoryPath

SOURCE = "kvmd-hugetlbfs"
_MOUNTS = "/proc/self/mountinfo"
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def observe(tree: Tree, paths: Iterable[str]) -> tuple[MemoryPath, ...]:
    """What is at each of `paths`, by path."""
    wished = sorted(paths)
    mounted = _mounted(tree.read(_MOUNTS) or "") if wished else {}
    return tuple(mounted.get(path) or _unmounted(path, tree.path(path)) for path in wished)


def _unmounted(path: str, here: Path) -> MemoryPath:
    if not os.path.lexists(here):
        return MemoryPath(path)
    if not here.is_dir():
        return MemoryPath(path, "file", is_empty=False)
    with os.scandir(here) as entries:
        return MemoryPath(path, "directory", is_empty=next(entries, None) is None)


def _mounted(text: str) -> dict[str, MemoryPath]:
    """Every hugetlbfs by its mount point; of several at one, the topmost (proc(5), mountinfo)."""
    found: dict[str, MemoryPath] = {}
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        fields, (kind, source, options) = head.split(), [*tail.split(), "", "", ""][:3]
        if len(fields) < 5:
            continue
        path = fields[4].encode().decode("unicode_escape")
        found.pop(path, None)  # something else may be mounted over it
        if kind == "hugetlbfs":
            words = dict(word.partition("=")[::2] for word in options.split(","))
            found[path] = MemoryPath(
                path,
                "directory",
                page_bytes=_bytes(words.get("pagesize", "")),
                limit_bytes=_bytes(words.get("size", "")),
                ours=source == SOURCE,
            )
    return found


def _bytes(text: str) -> int | None:
    number = text.rstrip("KMG")
    return int(number) * _UNITS.get(text[len(number) :], 1) if number.isdigit() else None


def mount(path: str, page_bytes: int, limit_bytes: int) -> None:
    """Mount one at `path`, which is made if missing; one of ours that is there goes first. HostFailed."""
    try:
        Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
        _detach_ours(path)
        flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
        syscalls.mount(SOURCE, path, "hugetlbfs", flags, f"pagesize={page_bytes},size={limit_bytes},mode=0700")
    except OSError as error:
        raise host_failed("mount a hugetlbfs on", path, error) from error


def unmount(path: str, *, remove: bool) -> None:
    """Unmount ours at `path`; nothing of ours there is fine. `remove`: the directory as well, if it is empty."""
    try:
        _detach_ours(path)
        if remove and Path(path).is_dir() and not any(Path(path).iterdir()):
            Path(path).rmdir()
    except OSError as error:
        raise host_failed("unmount", path, error) from error


def _detach_ours(path: str) -> None:
    """Off the tree at once; files of running guests live on in what they hold (umount2(2), MNT_DETACH)."""
    while any(found.ours for found in observe(Tree(), [path])):
        syscalls.umount(path, detach=True)
