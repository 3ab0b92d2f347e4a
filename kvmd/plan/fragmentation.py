"""Why a node gives fewer hugepages than it has free memory for, and what would give them at boot. Pure.

A hugepage is one free block of its size. Free memory in smaller blocks can be moved together as far as it is movable;
how far nobody can say beforehand (Documentation/admin-guide/mm/pagemap.rst; mm/page_alloc.c, compaction).
"""

from __future__ import annotations

from collections.abc import Mapping

from kvmd.facts import FreeBlocks
from kvmd.units import Size


def in_one_piece(blocks: FreeBlocks, page_bytes: int) -> int:
    """Pages of that size that are free as they are; 0 for pages larger than the kernel's largest block."""
    return sum(count * (size // page_bytes) for size, count in blocks.by_size() if size >= page_bytes)


def could_be_compacted(blocks: FreeBlocks, page_bytes: int) -> int:
    """Further pages at most, if all free memory in smaller pieces could be moved together."""
    return blocks.free_bytes // page_bytes - in_one_piece(blocks, page_bytes)


def explain(blocks: FreeBlocks, page_bytes: int) -> str:
    """A clause for people: what of the node's free memory is in pieces of the page's size."""
    size, where = Size(page_bytes), f"node {blocks.node}"
    free = Size(blocks.free_bytes).human()
    if page_bytes > blocks.largest_bytes:
        count, largest = blocks.counts[-1] if blocks.counts else 0, Size(blocks.largest_bytes)
        return (
            f"{where} has {free} free, {count} blocks of {largest} in it; a page of {size} needs "
            f"{page_bytes // blocks.largest_bytes} of them in a row"
        )
    now, more = in_one_piece(blocks, page_bytes), could_be_compacted(blocks, page_bytes)
    return f"{where} has {free} free: {now} pages of {size} in one piece, at most {more} more by compaction"


def boot_arguments(page_bytes: int, pages: Mapping[int, int]) -> str:
    """The kernel command line that reserves pages of one size by node at boot, before memory is in pieces.

    One number where there is one node, else one for each (Documentation/admin-guide/kernel-parameters.txt).
    """
    unit = f"{page_bytes >> 30}G" if page_bytes >= 1 << 30 else f"{page_bytes >> 20}M"
    if page_bytes < 1 << 20:
        unit = f"{page_bytes >> 10}K"
    wanted = {node: count for node, count in sorted(pages.items()) if count}
    counts = ",".join(f"{node}:{count}" for node, count in wanted.items())
    if len(pages) < 2:
        counts = str(sum(wanted.values()))
    return f"hugepagesz={unit} hugepages={counts or 0}"
