"""`host hugepages`: pools as they are and shall be, what free memory could still give them, who wants pages. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvmd.actions import Action, SetHugepages
from kvmd.config.desired import Desired
from kvmd.facts import Facts
from kvmd.plan.entry import page_needs
from kvmd.plan.fragmentation import boot_arguments, could_be_compacted, in_one_piece
from kvmd.units import CpuSet


@dataclass(frozen=True, slots=True)
class PoolLine:
    """One node's pool of one size, in pages. None: /proc/buddyinfo does not say."""

    node: int
    page_bytes: int
    total: int
    used: int
    reserved: int
    free: int  # and not reserved
    wanted: int  # what the pool shall hold
    in_one_piece: int | None  # further pages that are free memory as it is
    by_compaction: int | None  # and at most so many more


@dataclass(frozen=True, slots=True)
class PageGuest:
    """A guest that wants pages, or has some."""

    name: str
    page_bytes: int
    pages: int
    nodes: str  # "" for any
    policy: str
    fallback: bool
    running: bool
    has_pages: bool  # it runs, and in them


@dataclass(frozen=True, slots=True)
class PageMap:
    """All of it; `boot` is the kernel command line that would reserve what is wanted, a word group for each size."""

    pools: tuple[PoolLine, ...]
    guests: tuple[PageGuest, ...]
    boot: tuple[str, ...]


def page_map(desired: Desired, facts: Facts, actions: Iterable[Action]) -> PageMap:
    """`actions`: those of the plan made from the same facts."""
    changes = {(a.node, a.page_bytes): a.new for a in actions if isinstance(a, SetHugepages)}
    blocks = {found.node: found for found in facts.free_blocks}
    lines = []
    for pool in sorted(facts.hugepages, key=lambda pool: (pool.page_bytes, pool.node)):
        at, size = blocks.get(pool.node), pool.page_bytes
        lines.append(
            PoolLine(
                node=pool.node,
                page_bytes=size,
                total=pool.total,
                used=pool.used,
                reserved=pool.reserved,
                free=pool.free - pool.reserved,
                wanted=changes.get((pool.node, size), pool.total - pool.surplus),
                in_one_piece=in_one_piece(at, size) if at else None,
                by_compaction=could_be_compacted(at, size) if at else None,
            )
        )
    sizes = sorted({line.page_bytes for line in lines if line.wanted})
    boot = tuple(boot_arguments(s, {line.node: line.wanted for line in lines if line.page_bytes == s}) for s in sizes)
    return PageMap(tuple(lines), tuple(_guests(desired, facts)), boot)


def _guests(desired: Desired, facts: Facts) -> Iterable[PageGuest]:
    running = {guest.name: guest.page_bytes for guest in facts.guests}
    for name, need in sorted(page_needs(desired.guests).items()):
        yield PageGuest(
            name=name,
            page_bytes=need.page_bytes,
            pages=need.pages,
            nodes=str(CpuSet(need.nodes)),
            policy=need.policy if need.nodes else "",
            fallback=need.fallback,
            running=name in running,
            has_pages=running.get(name) is not None,
        )
