"""Who of the guests being started takes which hugepages: two starts never count on the same ones.

A pool shows pages as free until the QEMU that will have them maps them. From its claim on they are promised; when it
answers it has them all, and the pool tells the truth again. In between a start that would fit without the promises
waits for them to be settled, and is not refused for what may be counted twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from kvmd.config.guest import Guest
from kvmd.errors import Refused
from kvmd.facts import HugepagePool
from kvmd.plan.entry import page_need
from kvmd.plan.hugepages import PageNeed
from kvmd.units import CpuSet, Size

Pools = Callable[[], Sequence[HugepagePool]]


@dataclass(frozen=True, slots=True)
class Backing:
    """Where a guest's memory is to come from: with or without its hugepages, from which nodes (() for any)."""

    nodes: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    hugepages: bool = True


class PageBook:
    """The promises of one host."""

    def __init__(self) -> None:
        self._promised: dict[str, tuple[int, dict[int, int]]] = {}  # guest -> page size, pages by node
        self._settled = asyncio.Event()

    async def back(
        self,
        name: str,
        guest: Guest,
        beside: tuple[int, ...],
        pools: Pools,
        provide: Callable[[], Awaitable[str | None]],
    ) -> Backing:
        """What the guest's file asks for; hugepages are promised to it until `settle(name)`.

        `beside`: the nodes of its vCPUs, where its pages shall be if possible. `provide` gets automatic pools what
        they lack and says why it could not. Refused when there are no pages and no fallback.
        """
        need = page_need(guest)
        if need is None:
            return Backing(beside)
        near = replace(need, nodes=beside, policy="bind") if beside else None
        failure = None
        for attempt in range(2):
            if near and await self.claim(name, near, pools):
                return Backing(beside)
            if await self.claim(name, need, pools):
                if near is None:
                    return Backing()
                shown = f"{_free(near, pools)} free on node {CpuSet(beside)}, {need.pages} needed"
                return Backing(warnings=(f"its hugepages are not all beside its vCPUs: {shown}",))
            if attempt == 0:
                failure = await provide()
        if need.fallback:
            return Backing(beside, hugepages=False)
        where = f" on node {CpuSet(need.bound)}" if need.bound else ""
        wanted = f"{guest.memory.size} of {Size(need.page_bytes)} hugepages{where}"
        raise Refused(
            f"guest {name}: {wanted} are wanted and not to be had"
            + (f": {failure}" if failure else f"; {_free(need, pools)} are free"),
            hint='reserve more in host.toml ([hugepages]), or set memory.fallback = "thp"',
        )

    async def claim(self, name: str, need: PageNeed, pools: Pools) -> bool:
        """Promise the guest its pages; False when they are not there, whatever becomes of others' promises.

        The promise holds until `settle(name)`, which must come.
        """
        while True:
            free = {pool.node: pool.free - pool.reserved for pool in pools() if pool.page_bytes == need.page_bytes}
            found = _taken(need, {node: pages - self._of(need.page_bytes, node) for node, pages in free.items()})
            if found is not None:
                self._promised[name] = need.page_bytes, found
                return True
            if _taken(need, free) is None:
                return False
            self._settled.clear()
            await self._settled.wait()

    def settle(self, name: str) -> None:
        """The guest's QEMU has its pages, or will never ask for them. Without a promise nothing happens."""
        if self._promised.pop(name, None):
            self._settled.set()

    def _of(self, page_bytes: int, node: int) -> int:
        return sum(parts.get(node, 0) for size, parts in self._promised.values() if size == page_bytes)


def _free(need: PageNeed, pools: Pools) -> int:
    """Pages that are free where the need may take them."""
    able = (p for p in pools() if p.page_bytes == need.page_bytes and (p.node in need.bound or not need.bound))
    return sum(pool.free - pool.reserved for pool in able)


def _taken(need: PageNeed, free: dict[int, int]) -> dict[int, int] | None:
    """Pages by node that the kernel would take: from the nodes asked for first. None: there are too few."""
    parts: dict[int, int] = {}
    left = need.pages
    for node in sorted(free, key=lambda node: (node not in need.nodes, -free[node], node)):
        if node in need.bound or not need.bound:
            parts[node] = min(left, max(0, free[node]))
            left -= parts[node]
    return parts if left == 0 else None
