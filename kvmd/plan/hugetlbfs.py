"""The private hugetlbfs that `memory.path` with a `memory.page_size` needs where nobody mounted one. Pure.

What is mounted there by others is used if its pages are of the size asked for, and never changed. Ours is as large as
all guests of that path together; a new size is a new mount in the old one's place, and what runs keeps its file.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping

from kvmd.actions import Action, MountHugetlbfs, Problem, UnmountHugetlbfs
from kvmd.config.guest import Guest
from kvmd.facts import Facts, MemoryPath
from kvmd.units import Size


def wanted(guests: Mapping[str, Guest]) -> dict[str, tuple[int, int, frozenset[str]]]:
    """By path: page size, bytes of all guests there, and who they are."""
    found: dict[str, tuple[int, int, frozenset[str]]] = {}
    for name, guest in sorted(guests.items()):
        memory = guest.memory
        if memory.backing != "file" or memory.path is None or memory.page_size is None:
            continue
        path = posixpath.normpath(memory.path)
        page, total, names = found.get(path, (int(memory.page_size), 0, frozenset()))
        found[path] = (page, total + int(memory.size), names | {name})
    return found


def plan_hugetlbfs(guests: Mapping[str, Guest], facts: Facts) -> tuple[tuple[Action, ...], tuple[Problem, ...]]:
    """Mounts that are missing or not as they should be, and those of ours that nobody asks for any more."""
    wishes = wanted(guests)
    there = {path.path: path for path in facts.memory_paths}
    steps: list[Action | Problem] = [
        UnmountHugetlbfs(path=path, why="no guest has its memory there")
        for path, found in sorted(there.items())
        if found.ours and path not in wishes
    ]
    for path, (page, total, names) in wishes.items():
        steps += _one(there.get(path, MemoryPath(path)), page, total, names)
    return (
        tuple(step for step in steps if isinstance(step, Action)),
        tuple(step for step in steps if isinstance(step, Problem)),
    )


def _one(there: MemoryPath, page: int, total: int, names: frozenset[str]) -> Iterator[Action | Problem]:
    path, asking = there.path, ", ".join(sorted(names))
    why = f"memory.path of {asking}"
    if there.ours and (there.page_bytes, there.limit_bytes) != (page, total):
        yield MountHugetlbfs(path=path, page_bytes=page, limit_bytes=total, why=why, change="another size")
    elif there.page_bytes is not None and there.page_bytes != page:
        yield Problem(
            subject=f"memory.path {path}",
            message=f"is a hugetlbfs of {Size(there.page_bytes)} pages that kvmd did not mount, {asking} asks for "
            f"{Size(page)}",
            hint=f'memory.page_size = "{Size(there.page_bytes)}", or another memory.path',
            guests=names,
        )
    elif there.page_bytes is None and (there.kind == "file" or not there.is_empty):
        what = "a file" if there.kind == "file" else "a directory with files in it, which a mount would hide"
        yield Problem(
            subject=f"memory.path {path}",
            message=f"is {what}; {asking} asks for a hugetlbfs of {Size(page)} there",
            hint="name an empty directory, or one that does not exist yet",
            guests=names,
        )
    elif there.page_bytes is None:
        yield MountHugetlbfs(path=path, page_bytes=page, limit_bytes=total, why=why, kind=there.kind)
