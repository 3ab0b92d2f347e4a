"""Free memory in pieces, in words and in pages; the command line that would do it at boot."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvmd.config.host import Host
from kvmd.facts import FreeBlocks
from kvmd.plan.fragmentation import boot_arguments, could_be_compacted, explain, in_one_piece
from kvmd.plan.hugepages import PageNeed, plan_hugepages
from tests.rig.hosts import GIB, MIB
from tests.unit.plan.test_hugepages import P1, P2, memory_facts, pool

# 4 KiB to 4 MiB: 100 pages, 10 blocks of 2 MiB, 3 of 4 MiB
BLOCKS = FreeBlocks(0, 4096, (100, 0, 0, 0, 0, 0, 0, 0, 5, 10, 3))
SHORT = "node 0 has 37.4 MiB free: 16 pages of 2MiB in one piece, at most 2 more by compaction"


def test_pages_in_one_piece_and_what_compaction_could_add() -> None:
    assert in_one_piece(BLOCKS, P2) == 16
    assert BLOCKS.free_bytes == 100 * 4096 + 5 * MIB + 20 * MIB + 12 * MIB
    assert could_be_compacted(BLOCKS, P2) == 2
    assert (
        explain(BLOCKS, P2) == "node 0 has 37.4 MiB free: 16 pages of 2MiB in one piece, at most 2 more by compaction"
    )
    assert in_one_piece(BLOCKS, P1) == 0
    assert explain(BLOCKS, P1) == (
        "node 0 has 37.4 MiB free, 3 blocks of 4MiB in it; a page of 1GiB needs 256 of them in a row"
    )


def test_what_the_kernel_is_told_at_boot() -> None:
    assert boot_arguments(P2, {0: 512}) == "hugepagesz=2M hugepages=512"
    assert boot_arguments(P1, {1: 4, 0: 2, 2: 0}) == "hugepagesz=1G hugepages=0:2,1:4"
    assert boot_arguments(64 << 10, {0: 0}) == "hugepagesz=64K hugepages=0"


def test_a_plan_says_that_memory_has_to_be_moved_first() -> None:
    wishes = Host.model_validate({"hugepages": {"2MiB": {}}}).hugepages
    facts = replace(memory_facts(pool()), free_blocks=(BLOCKS,))
    (action,), _ = plan_hugepages(wishes, {"web": PageNeed(P2, 512)}, facts, reserve=GIB)
    assert action.why.endswith(
        "; node 0 has 37.4 MiB free: 16 pages of 2MiB in one piece, at most 2 more by compaction"
    )
    (action,), _ = plan_hugepages(wishes, {"web": PageNeed(P2, 16)}, facts, reserve=GIB)
    assert "piece" not in action.why


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12), st.sampled_from([4096, 64 << 10, P2, P1]))
def test_never_more_pages_than_free_memory(counts: list[int], page_bytes: int) -> None:
    blocks = FreeBlocks(0, 4096, tuple(counts))
    now, more = in_one_piece(blocks, page_bytes), could_be_compacted(blocks, page_bytes)
    assert now >= 0
    assert more >= 0
    assert (now + more) * page_bytes <= blocks.free_bytes < (now + more + 1) * page_bytes
    assert str(page_bytes >> 30) in explain(blocks, page_bytes) or page_bytes < P1
