"""Pools and guests as `host hugepages` shows them, and how it looks."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from kvmd.cli.hugepages import draw
from kvmd.config.desired import Desired
from kvmd.config.guest import Guest
from kvmd.config.host import Host
from kvmd.facts import FreeBlocks, Process, RunningGuest
from kvmd.plan.host import plan_pools
from kvmd.plan.pagemap import page_map
from tests.rig.hosts import GIB, MIB
from tests.unit.plan.test_hugepages import P1, P2, memory_facts, pool

BLOCKS = FreeBlocks(0, 4096, (100, 0, 0, 0, 0, 0, 0, 0, 5, 10, 3))


def shown() -> dict[str, Any]:
    paged = {"size": "64MiB", "backing": "hugepages"}
    guests = {
        "web": Guest.model_validate({"memory": paged}),
        "soft": Guest.model_validate({"memory": paged | {"fallback": "thp"}}),
        "db": Guest.model_validate({"memory": paged | {"nodes": "1", "size": "2GiB"}}),
    }
    desired = Desired(guests=guests, host=Host.model_validate({"hugepages": {"2MiB": {}}}))
    pools = (pool(0, 40, 8), pool(1), pool(0, page_bytes=P1), pool(1, page_bytes=P1))
    running = (
        RunningGuest("web", "uuid", Process(1, 1), 64 * MIB, P2),
        RunningGuest("soft", "uuid", Process(2, 1), 64 * MIB),
    )
    facts = replace(memory_facts(*pools, nodes=2, total=16 * GIB), free_blocks=(BLOCKS,), guests=running)
    actions, _ = plan_pools(desired, facts, {})
    return {**asdict(page_map(desired, facts, actions)), "problems": ()}


def test_pools_guests_and_the_line_for_boot() -> None:
    found = shown()
    assert [(p["page_bytes"], p["node"], p["total"], p["used"], p["free"], p["wanted"]) for p in found["pools"]] == [
        (P2, 0, 40, 32, 8, 64),
        (P2, 1, 0, 0, 0, 1024),
        (P1, 0, 0, 0, 0, 0),
        (P1, 1, 0, 0, 0, 0),
    ]
    assert [(p["in_one_piece"], p["by_compaction"]) for p in found["pools"]][:2] == [(16, 2), (None, None)]
    assert [(g["name"], g["running"], g["has_pages"]) for g in found["guests"]] == [
        ("db", False, False),
        ("soft", True, False),
        ("web", True, True),
    ]
    assert found["boot"] == ("hugepagesz=2M hugepages=0:64,1:1024",)


def test_how_it_looks() -> None:
    assert draw(shown()).splitlines() == [
        "PAGE  NODE  TOTAL  USED  RESERVED  FREE  WANTED  ONE PIECE  COMPACTED",
        "2MiB     0     40    32         0     8      64         16          2",
        "2MiB     1      0     0         0     0    1024          -          -",
        "1GiB     0      0     0         0     0       0          0          0",
        "1GiB     1      0     0         0     0       0          -          -",
        "",
        "GUEST  PAGE  PAGES  NODES   NOW",
        "db     2MiB   1024  1 bind  off",
        "soft   2MiB     32  any     runs without",
        "web    2MiB     32  any     runs in them",
        "",
        "at boot: hugepagesz=2M hugepages=0:64,1:1024",
    ]
