"""The swap file and the zram device that host.toml asks for, and those of ours that it no longer asks for. Pure.

Only what carries kvmd's label is ours; whatever else is swapped to, or lies at the path, is never touched. Swapping
to something ends by bringing back what it holds, so that happens only where RAM has room for it.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from kvmd.actions import Action, EnsureSwapFile, EnsureZram, Problem, RemoveSwapFile, RemoveZram
from kvmd.config.host import Host
from kvmd.facts import Facts, SwapArea, SwapFile, Zram
from kvmd.units import Size

FREE_SHARE = 20  # a twentieth of the file system's free space is left to others
FILE, ZRAM = "swap.file", "swap.zram"


def plan_swap(host: Host, facts: Facts) -> tuple[tuple[Action, ...], tuple[Problem, ...]]:
    """What to remove, then what to make: zram before the file, which is the slower one."""
    steps = [*_old_files(host, facts), *_old_zrams(host, facts), *_zram(host, facts), *_file(host, facts)]
    actions = sorted((s for s in steps if isinstance(s, Action)), key=lambda s: not _removes(s))
    return tuple(actions), tuple(s for s in steps if isinstance(s, Problem))


def no_room(path: str, facts: Facts) -> str | None:
    """Why swapping to `path` cannot end now; None when it can: nothing is in it, or RAM has room for what is."""
    area = in_use(path, facts)
    available = facts.memory.available_bytes
    if area is None or area.used_bytes == 0 or area.used_bytes <= available:
        return None
    return f"it holds {Size(area.used_bytes).human()}, and {Size(available).human()} of RAM are available for that"


def in_use(path: str, facts: Facts) -> SwapArea | None:
    """The area the kernel swaps to at that path."""
    return next((area for area in facts.swaps or () if area.path == path), None)


def _removes(action: Action) -> bool:
    return isinstance(action, RemoveSwapFile | RemoveZram)


def _old_files(host: Host, facts: Facts) -> Iterator[Action | Problem]:
    wish = host.swap.file
    for file in sorted(facts.swap_files, key=lambda file: file.path):
        if not file.ours or (wish is not None and wish.path == file.path and wish.size == file.size_bytes):
            continue
        why = "no file asks for it any more" if wish is None or wish.path != file.path else f"{FILE}.size changed"
        stays = no_room(file.path, facts)
        yield _stays(FILE, file.path, stays) if stays else RemoveSwapFile(path=file.path, why=why)


def _old_zrams(host: Host, facts: Facts) -> Iterator[Action | Problem]:
    kept = _kept(host, facts)
    for zram in facts.zrams or ():
        if not zram.ours or zram == kept:
            continue
        why = "no file asks for it any more" if host.swap.zram is None else f"{ZRAM}.size changed"
        stays = no_room(zram.path, facts)
        yield _stays(ZRAM, zram.path, stays) if stays else RemoveZram(number=zram.number, why=why)


def _kept(host: Host, facts: Facts) -> Zram | None:
    """The device that is as asked for; the lowest, should there be two."""
    wish = host.swap.zram
    fitting = [zram for zram in facts.zrams or () if zram.ours and wish is not None and zram.size_bytes == wish.size]
    return min(fitting, key=lambda zram: (in_use(zram.path, facts) is None, zram.number), default=None)


def _stays(key: str, path: str, reason: str) -> Problem:
    return Problem(
        subject=key,
        message=f"{path} cannot be taken out of use: {reason}",
        hint="stop a guest or let it end first; the next pass tries again",
    )


def _zram(host: Host, facts: Facts) -> Iterator[Action | Problem]:
    wish = host.swap.zram
    if wish is None:
        return
    why = f"{ZRAM}.size is {wish.size}"
    if facts.swaps is None:
        yield _no_swap(ZRAM)
    elif facts.zrams is None:
        yield Problem(
            subject=ZRAM,
            message=f"{why}, and this kernel has no zram (there is no /sys/class/zram-control)",
            hint='add "zram" to modules.load in host.toml, take a kernel that has it, or use [swap.file]',
        )
    elif any(zram.ours and zram.size_bytes != wish.size and no_room(zram.path, facts) for zram in facts.zrams):
        return  # the old one stays, which is said; a second beside it is nobody's wish
    else:
        kept = _kept(host, facts)
        if kept is None or in_use(kept.path, facts) is None:
            yield EnsureZram(size_bytes=int(wish.size), number=kept.number if kept else None, why=why)


def _file(host: Host, facts: Facts) -> Iterator[Action | Problem]:
    wish = host.swap.file
    if wish is None:
        return
    why = f"{FILE}.size is {wish.size}"
    there = next((file for file in facts.swap_files if file.path == wish.path), SwapFile(wish.path))
    if facts.swaps is None:
        yield _no_swap(FILE)
    elif there.size_bytes is not None and not there.ours:
        yield Problem(
            subject=FILE,
            message=f"{wish.path} is there and kvmd did not make it: it stays as it is",
            hint=f"choose another {FILE}.path, or remove it yourself",
        )
    elif there.ours and there.size_bytes != wish.size and no_room(wish.path, facts):
        return  # it stays, which is said
    elif there.ours and there.size_bytes == wish.size:
        if in_use(wish.path, facts) is None:
            yield EnsureSwapFile(path=wish.path, size_bytes=int(wish.size), why=why)
    else:
        yield _new_file(there, int(wish.size), why)


def _new_file(there: SwapFile, size: int, why: str) -> Action | Problem:
    if there.free_bytes is None:
        parent = posixpath.dirname(there.path)
        return Problem(FILE, f"{why}, and there is no directory {parent}", f"mkdir -p {parent}")
    room = there.free_bytes + (there.size_bytes or 0)
    if size > room - room // FREE_SHARE:
        return Problem(
            subject=FILE,
            message=f"{there.path} would take {Size(size).human()}, its file system has {Size(room).human()} free "
            f"and keeps a {FREE_SHARE}th of it",
            hint=f"make {FILE}.size smaller, or choose a {FILE}.path on a larger file system",
        )
    return EnsureSwapFile(path=there.path, size_bytes=size, why=why)


def _no_swap(key: str) -> Problem:
    return Problem(key, "this kernel cannot swap (there is no /proc/swaps)", f"take [{key}] out of host.toml")
