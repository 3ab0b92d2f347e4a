"""Who counts as what at admission: guests as they run, those that start before, pools that still grow."""

from __future__ import annotations

from typing import Any

from kvmd.config.desired import Desired
from kvmd.config.guest import Guest
from kvmd.config.host import Host
from kvmd.facts import Facts, GuestLife, HugepagePool, Process, RunningGuest, Usage
from kvmd.plan.entry import Entry, promised
from kvmd.plan.host import plan, plan_pools
from tests.rig.hosts import GIB, MIB, memory_facts

P2 = 2 * MIB


def guest(size: str, **memory: Any) -> Guest:
    return Guest.model_validate({"memory": {"size": size, **memory}})


def desired(guests: dict[str, Guest], **host: Any) -> Desired:
    return Desired(guests=guests, host=Host.model_validate({"memory": {"reserve": "1GiB"}, **host}))


def facts(*guests: RunningGuest, lives: tuple[GuestLife, ...] = (), pools: int = 0, **more: Any) -> Facts:
    found = memory_facts(HugepagePool(0, P2, pools, pools), total=16 * GIB)
    alive = tuple(GuestLife(each.name, alive=True, wanted=True) for each in guests)
    return Facts(
        cpus=found.cpus, memory=found.memory, hugepages=found.hugepages, guests=guests, lives=(*alive, *lives), **more
    )


def running(name: str, gib: float, page_bytes: int | None = None) -> RunningGuest:
    return RunningGuest(name, "uuid", Process(1, 1), int(gib * GIB), page_bytes)


def wanted(*names: str) -> tuple[GuestLife, ...]:
    return tuple(GuestLife(name, alive=False, wanted=True) for name in names)


def test_guests_count_as_they_run() -> None:
    """Not as their file says by now: one was made smaller, one has no file any more, one lacks its pages."""
    declared = {
        "shrunk": guest("1GiB"),
        "paged": guest("4GiB", backing="hugepages"),
        "soft": guest("4GiB", backing="hugepages", fallback="thp"),
        "new": guest("1GiB"),
    }
    there = facts(running("shrunk", 4), running("gone", 2), running("paged", 4, P2), running("soft", 4))
    found = Entry(desired(declared), there).account("new")
    overhead = 5 * 256 * MIB + (4 + 2 + 4 + 4 + 1) * 4 * MIB
    assert found.own_bytes + found.others_bytes == (4 + 2 + 4 + 1) * GIB + overhead
    assert found.others == 4


def test_what_was_measured_replaces_the_estimate() -> None:
    usage = {"db": Usage(samples=20, span_s=6000, demand_p95_bytes=GIB, overhead_bytes=40 * MIB)}
    there = facts(running("db", 4), usage=usage)
    found = Entry(desired({"db": guest("4GiB"), "web": guest("1GiB")}), there).account("web")
    assert found.others_bytes == 4 * GIB + 50 * MIB + 8 * MIB


def test_pages_a_pool_will_take_are_gone_for_others() -> None:
    declared = {"paged": guest("8GiB", backing="hugepages"), "plain": guest("8GiB")}
    wish = desired(declared, hugepages={"2MiB": {}})
    before = facts(lives=wanted("paged", "plain"))
    found = plan(wish, before, macs={}, uuids={}, originals={})
    assert "~ hugepages 2MiB node 0: 0 -> 4096 pages" in [action.line() for action in found.actions]
    refused = {one.guest: one.refused for one in found.admissions}
    assert refused == {"paged": False, "plain": True}, "the pool takes 8 of 15 GiB in this very pass"
    assert "- 8 GiB hugepages" in next(one.terms for one in found.admissions)
    assert [problem.subject for problem in found.problems] == ["guest plain"]


def test_a_pool_takes_nothing_from_guests_that_run() -> None:
    """They may not have touched it yet, so that it looks available."""
    declared = {"plain": guest("10GiB"), "paged": guest("8GiB", backing="hugepages")}
    wish = desired(declared, hugepages={"2MiB": {}})
    there = facts(running("plain", 10), lives=wanted("paged"))
    assert promised(wish, there) == 10 * GIB + 256 * MIB + 40 * MIB
    actions, problems = plan_pools(wish, there, {})
    assert not actions
    assert "16 GiB RAM - 1 GiB reserve - 10.3 GiB of guests that run" in problems[0].message


def test_a_guest_that_falls_back_counts_in_ram() -> None:
    soft = guest("8GiB", backing="hugepages", fallback="thp")
    found = Entry(desired({"soft": soft}), facts()).account("soft")
    assert found.own_bytes == 8 * GIB + 256 * MIB + 32 * MIB
    found = Entry(desired({"soft": soft}), facts(pools=4096)).account("soft")
    assert found.own_bytes == 256 * MIB + 32 * MIB


def test_one_after_the_other_and_who_is_refused_takes_no_room() -> None:
    entry = Entry(desired({name: guest("6GiB") for name in "abcd"} | {"big": guest("12GiB")}), facts())
    assert [entry.account(name).refused for name in ("a", "big", "b", "c")] == [False, True, False, True]
    assert entry.problem("d") is not None


def test_a_start_under_way_counts_though_it_has_no_qemu_yet() -> None:
    there = facts(lives=(GuestLife("a", alive=True, wanted=True, settling=True),))
    found = Entry(desired({"a": guest("8GiB"), "b": guest("1GiB")}), there).account("b")
    assert found.others == 1
