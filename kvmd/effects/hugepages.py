"""Hugepage pools through sysfs: reading them, and setting one so that it either holds or is as before.

The kernel takes what it can get and reports success (Documentation/admin-guide/mm/hugetlbpage.rst), so every write
is read back. All of this can take seconds to minutes: callers in the event loop use a thread.
"""

from __future__ import annotations

import os

from kvmd.effects.tree import Tree
from kvmd.errors import HostFailed, NotSupported
from kvmd.facts import FreeBlocks, HugepagePool
from kvmd.plan.fragmentation import boot_arguments, explain
from kvmd.units import Size

NODE = "/sys/devices/system/node"
GLOBAL = "/sys/kernel/mm/hugepages"
BUDDYINFO = "/proc/buddyinfo"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def observe_pools(tree: Tree) -> tuple[HugepagePool, ...]:
    """Every pool by node and page size; without NUMA directories the host's own, as node 0.

    Reservations (mapped, not yet touched) exist for the whole host only: they are shown on the first nodes that have
    the free pages to honour them.
    """
    directories = [
        (node, page_kib, _directory(tree, node, page_kib))
        for node in tree.numbered(NODE, "node")
        for page_kib in _sizes(tree, f"{NODE}/node{node}/hugepages")
    ] or [(0, page_kib, _directory(tree, 0, page_kib)) for page_kib in _sizes(tree, GLOBAL)]
    unplaced = {page_kib: _count(tree, f"{_pool(GLOBAL, page_kib)}/resv_hugepages") for _, page_kib, _ in directories}
    pools = []
    for node, page_kib, directory in directories:
        free = _count(tree, f"{directory}/free_hugepages")
        reserved = min(free, unplaced[page_kib])
        unplaced[page_kib] -= reserved
        pools.append(
            HugepagePool(
                node=node,
                page_bytes=page_kib << 10,
                total=_count(tree, f"{directory}/nr_hugepages"),
                free=free,
                surplus=_count(tree, f"{directory}/surplus_hugepages"),
                reserved=reserved,
            )
        )
    return tuple(pools)


def observe_blocks(tree: Tree) -> tuple[FreeBlocks, ...]:
    """/proc/buddyinfo by node, ascending; () where it cannot be read."""
    nodes: dict[int, list[int]] = {}
    for line in (tree.read(BUDDYINFO) or "").splitlines():
        fields = line.replace(",", " ").split()  # Node 0, zone Normal 1 85 363 ...
        node, counts = fields[1:2], fields[4:]
        if len(fields) < 5 or fields[3] == "DMA" or not all(field.isdigit() for field in (*node, *counts)):
            continue
        known = nodes.get(int(node[0]), [0] * len(counts))
        nodes[int(node[0])] = [have + int(count) for have, count in zip(known, counts, strict=False)]
    return tuple(FreeBlocks(node, PAGE_BYTES, tuple(counts)) for node, counts in sorted(nodes.items()))


def set_pool(tree: Tree, node: int, page_bytes: int, count: int, *, compact: bool = True) -> int:
    """Make the pool hold `count` pages that stay, and return what it then holds.

    Never asks for fewer than are in use (the rest would only turn into surplus). Too few: memory is compacted
    once (where wanted), asked again, else the old number is restored. Raises HostFailed with both numbers,
    NotSupported for a size or node that is not there.
    """
    page_kib = page_bytes >> 10
    directory = _directory(tree, node, page_kib)
    knob = f"{directory}/nr_hugepages"
    old = _persistent(tree, directory)
    if old is None:
        raise NotSupported(f"node {node} of this host has no pool of {Size(page_bytes)} pages", path=knob)
    used = _count(tree, knob) - _count(tree, f"{directory}/free_hugepages")
    wanted = max(count, used)
    if old == wanted:
        return old
    _ask(tree, knob, node, wanted, page_bytes)
    got = _persistent(tree, directory) or 0
    if got < wanted and compact:
        _compact(tree, node)
        _ask(tree, knob, node, wanted, page_bytes)
        got = _persistent(tree, directory) or 0
    if got >= wanted:
        return got
    blocks = next((found for found in observe_blocks(tree) if found.node == node), None)
    restored = _roll_back(tree, directory, old)
    raise HostFailed(
        f"asked {wanted} pages of {Size(page_bytes)} on node {node}, the host gave {got}; back to {restored}"
        + (f" ({explain(blocks, page_bytes)} besides these {got})" if blocks else ""),
        hint=_hint(tree, node, page_bytes, wanted),
        node=node,
        page_bytes=page_bytes,
        asked=wanted,
        got=got,
        restored=restored,
    )


def _ask(tree: Tree, knob: str, node: int, count: int, page_bytes: int) -> None:
    try:
        tree.write(knob, str(count))
    except HostFailed as error:
        if error.hint is None:
            error.hint = _hint(tree, node, page_bytes, count)
        raise


def _roll_back(tree: Tree, directory: str, old: int) -> int:
    used = _count(tree, f"{directory}/nr_hugepages") - _count(tree, f"{directory}/free_hugepages")
    tree.write(f"{directory}/nr_hugepages", str(max(old, used)))
    return _persistent(tree, directory) or 0


def _compact(tree: Tree, node: int) -> None:
    """Any write compacts (Documentation/admin-guide/sysctl/vm.rst); a kernel that cannot only spoils the retry."""
    for knob in (f"{NODE}/node{node}/compact", "/proc/sys/vm/compact_memory"):
        if tree.exists(knob):
            try:
                tree.write(knob, "1")
            except HostFailed:
                continue
            return


def _hint(tree: Tree, node: int, page_bytes: int, count: int) -> str:
    """What would give them: the command line with what all nodes have by then."""
    pools = {pool.node: pool.total - pool.surplus for pool in observe_pools(tree) if pool.page_bytes == page_bytes}
    boot = f'at boot they are sure: "{boot_arguments(page_bytes, pools | {node: count})}" on the kernel command line'
    if page_bytes >= 1 << 30:
        return boot
    return f"stop a guest, drop caches (echo 3 > /proc/sys/vm/drop_caches), or ask for fewer pages; {boot}"


def _persistent(tree: Tree, directory: str) -> int | None:
    """nr_hugepages counts surplus pages too, and what is written to it does not."""
    total = tree.number(f"{directory}/nr_hugepages")
    return None if total is None else total - _count(tree, f"{directory}/surplus_hugepages")


def _directory(tree: Tree, node: int, page_kib: int) -> str:
    own = _pool(f"{NODE}/node{node}/hugepages", page_kib)
    if node == 0 and not any(_sizes(tree, f"{NODE}/node{n}/hugepages") for n in tree.numbered(NODE, "node")):
        return _pool(GLOBAL, page_kib)
    return own


def _pool(parent: str, page_kib: int) -> str:
    return f"{parent}/hugepages-{page_kib}kB"


def _sizes(tree: Tree, parent: str) -> list[int]:
    names = [name.removeprefix("hugepages-").removesuffix("kB") for name in tree.names(parent)]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def _count(tree: Tree, path: str) -> int:
    return max(0, tree.number(path) or 0)
