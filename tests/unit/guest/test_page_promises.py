"""Two starts never count on the same pages, and neither is refused for what is counted twice for a moment."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from kvmd.facts import HugepagePool
from kvmd.guest.pages import PageBook
from kvmd.plan.hugepages import PageNeed

P2 = 2 << 20


class Host:
    """Pools that a QEMU takes from when it maps its memory."""

    def __init__(self, *free: int) -> None:
        self.pools = [HugepagePool(node, P2, total=pages, free=pages) for node, pages in enumerate(free)]
        self.book = PageBook()

    def take(self, node: int, pages: int) -> None:
        self.pools[node] = replace(self.pools[node], free=self.pools[node].free - pages)

    async def claim(self, name: str, need: PageNeed) -> bool:
        return await self.book.claim(name, need, lambda: self.pools)


def test_the_second_start_waits_and_gets_what_is_left() -> None:
    async def scene() -> None:
        host = Host(1024)
        need = PageNeed(P2, 512)
        assert await host.claim("a", need)
        assert await host.claim("b", need), "both fit"
        third = asyncio.create_task(host.claim("c", need))
        await asyncio.sleep(0)
        assert not third.done(), "512 look free besides the promises, so it is not refused yet"
        host.take(0, 512)
        host.take(0, 512)
        host.book.settle("a")
        assert not await third, "now it is certain"

    asyncio.run(scene())


def test_a_start_that_fails_gives_its_pages_to_who_waits() -> None:
    async def scene() -> None:
        host = Host(512)
        assert await host.claim("a", PageNeed(P2, 512))
        waiting = asyncio.create_task(host.claim("b", PageNeed(P2, 100)))
        await asyncio.sleep(0)
        assert not waiting.done()
        host.book.settle("a")
        assert await waiting
        assert not await host.claim("c", PageNeed(P2, 513)), "more than there is waits for nobody"
        host.book.settle("nobody")

    asyncio.run(scene())


def test_bound_memory_counts_its_nodes_and_reserved_pages_are_not_free() -> None:
    async def scene() -> None:
        host = Host(100, 100)
        host.pools[1] = replace(host.pools[1], reserved=40)
        assert not await host.claim("a", PageNeed(P2, 61, nodes=(1,)))
        assert await host.claim("a", PageNeed(P2, 60, nodes=(1,)))
        assert await host.claim("b", PageNeed(P2, 100, nodes=(1,), policy="preferred")), "node 0 will do"
        assert not await host.claim("c", PageNeed(1 << 30, 1))

    asyncio.run(scene())
