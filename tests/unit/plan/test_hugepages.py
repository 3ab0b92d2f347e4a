"""Pools: what is declared, what the guests need, what is in use, and what the host cannot give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import Action, SetHugepages
from kvmd.config.host import Host, HugepagePoolConfig
from kvmd.facts import Facts, HugepagePool, Process, RunningGuest
from kvmd.plan.hugepages import PageNeed, plan_hugepages
from tests.rig.hosts import GIB, MIB, memory_facts

P2, P1 = 2 * MIB, GIB


def wish(pages: Any = "auto", **more: Any) -> Mapping[str, HugepagePoolConfig]:
    return Host.model_validate({"hugepages": {"2MiB": {"pages": pages, **more}}}).hugepages


def pool(node: int = 0, total: int = 0, free: int | None = None, **more: int) -> HugepagePool:
    return HugepagePool(node, more.pop("page_bytes", P2), total, total if free is None else free, **more)


def running(name: str, pages: int, page_bytes: int = P2) -> RunningGuest:
    return RunningGuest(name, "uuid", Process(1, 1), pages * page_bytes, page_bytes)


def sizes(actions: Iterable[Action]) -> dict[int, tuple[int, int]]:
    return {each.node: (each.old, each.new) for each in actions if isinstance(each, SetHugepages)}


def apply(facts: Facts, actions: Iterable[Action]) -> Facts:
    """The kernel after the writes: unused pages come and go, surplus turns into ordinary pages."""
    pools = {(each.node, each.page_bytes): each for each in facts.hugepages}
    for action in actions:
        assert isinstance(action, SetHugepages)
        old = pools[action.node, action.page_bytes]
        assert action.old == old.total - old.surplus
        assert action.new >= old.used, "never below what is in use"
        pools[action.node, action.page_bytes] = replace(old, total=action.new, free=action.new - old.used, surplus=0)
    after = tuple(pools.values())
    grown = sum(each.total * each.page_bytes for each in after) - facts.memory.hugetlb_bytes
    available = facts.memory.available_bytes - grown
    assert available >= 0, "never beyond the host's memory"
    memory = replace(
        facts.memory, available_bytes=available, hugetlb_bytes=sum(each.total * each.page_bytes for each in after)
    )
    return replace(facts, hugepages=after, memory=memory)


def test_auto_is_the_sum_of_the_needs_and_the_spare() -> None:
    needs = {"web": PageNeed(P2, 512), "db": PageNeed(P2, 256)}
    actions, problems = plan_hugepages(wish(spare="1GiB"), needs, memory_facts(pool()), reserve=GIB)
    assert not problems
    assert sizes(actions) == {0: (0, 512 + 256 + 512)}
    assert actions[0].why == "hugepages.2MiB.pages: db 256, web 512, spare 512"
    assert actions[0].line() == "~ hugepages 2MiB node 0: 0 -> 1280 pages"


def test_a_start_changes_nothing_and_a_guest_that_goes_gives_its_pages_back() -> None:
    needs = {"web": PageNeed(P2, 512), "db": PageNeed(P2, 256)}
    facts = memory_facts(pool(total=768, free=256))
    facts = replace(facts, guests=(running("web", 512),))
    originals = {(0, P2): 0}
    assert plan_hugepages(wish(), needs, facts, reserve=GIB, originals=originals) == ((), ())
    actions, _ = plan_hugepages(wish(), {"web": needs["web"]}, facts, reserve=GIB, originals=originals)
    assert sizes(actions) == {0: (768, 512)}
    actions, _ = plan_hugepages(wish(), {}, facts, reserve=GIB, originals=originals)
    assert sizes(actions) == {0: (768, 512)}, "still in use"


def test_pages_that_were_there_before_kvmd_stay() -> None:
    facts = memory_facts(pool(total=1000))
    assert plan_hugepages(wish(), {}, facts, reserve=GIB) == ((), ())
    needs = {"web": PageNeed(P2, 600)}
    assert plan_hugepages(wish(), needs, facts, reserve=GIB) == ((), ()), "and serve guests first"
    actions, _ = plan_hugepages(wish(), {}, facts, reserve=GIB, originals={(0, P2): 200})
    assert sizes(actions) == {0: (1000, 200)}
    actions, _ = plan_hugepages(wish(pages=10), {}, facts, reserve=GIB)
    assert sizes(actions) == {0: (1000, 10)}, "a number is a number"


def test_pages_others_use_come_on_top() -> None:
    facts = memory_facts(pool(total=100, free=0))
    actions, _ = plan_hugepages(wish(), {"web": PageNeed(P2, 512)}, facts, reserve=GIB, originals={(0, P2): 0})
    assert sizes(actions) == {0: (100, 612)}
    assert "in use 100" in actions[0].why


def test_reserved_pages_count_as_used() -> None:
    facts = memory_facts(pool(total=512, free=512, reserved=500))
    actions, _ = plan_hugepages(wish(pages=0), {}, facts, reserve=GIB)
    assert sizes(actions) == {0: (512, 500)}


def test_nothing_declared_leaves_the_pool_and_names_the_guests() -> None:
    needs = {
        "db": PageNeed(P2, 100),
        "web": PageNeed(P2, 512),
        "soft": PageNeed(P2, 512, fallback=True),
        "up": PageNeed(P2, 50),
    }
    facts = replace(memory_facts(pool(total=200, free=150)), guests=(running("up", 50),))
    actions, problems = plan_hugepages({}, needs, facts, reserve=GIB)
    assert not actions
    by_subject = {problem.subject: problem for problem in problems}
    assert by_subject.keys() == {"guest web", "guest soft"}
    assert "web wants 512 pages of 2MiB (1 GiB), 50 are left for it" in by_subject["guest web"].message
    assert by_subject["guest web"].guests == {"web"}
    assert "[hugepages.2MiB]" in (by_subject["guest web"].hint or "")
    assert not by_subject["guest soft"].guests, "it may start without"
    assert "transparent" in by_subject["guest soft"].message


def test_a_number_is_spread_over_the_nodes() -> None:
    pools = (pool(0), pool(1), pool(2, total=40, free=0))
    actions, _ = plan_hugepages(wish(pages=101), {}, memory_facts(*pools, nodes=3), reserve=GIB)
    assert sizes(actions) == {0: (0, 31), 1: (0, 30)}
    actions, _ = plan_hugepages(wish(pages=10), {}, memory_facts(*pools, nodes=3), reserve=GIB)
    assert sizes(actions) == {}, "node 2 holds more than all of it already"


def test_numbers_by_node_leave_the_others_alone() -> None:
    facts = memory_facts(pool(0), pool(1, total=7), nodes=2)
    actions, problems = plan_hugepages(wish(pages={"node0": 512, "node5": 1}), {}, facts, reserve=GIB)
    assert sizes(actions) == {0: (0, 512)}
    assert "names node5, this host has node0, node1" in problems[0].message


def test_bound_guests_get_their_node_and_others_the_roomier_one() -> None:
    needs = {"a": PageNeed(P2, 512, nodes=(1,)), "b": PageNeed(P2, 256), "c": PageNeed(P2, 10, nodes=(7,))}
    actions, problems = plan_hugepages(wish(), needs, memory_facts(pool(0), pool(1), nodes=2), reserve=GIB)
    assert sizes(actions) == {0: (0, 256), 1: (0, 512)}
    assert [problem.guests for problem in problems] == [{"c"}]


def test_policies_of_several_nodes() -> None:
    facts = memory_facts(pool(0), pool(1), pool(2), nodes=3, total=12 * GIB)
    both = PageNeed(P2, 101, nodes=(0, 2), policy="interleave")
    assert sizes(plan_hugepages(wish(), {"a": both}, facts, reserve=GIB)[0]) == {0: (0, 51), 2: (0, 50)}
    rather = PageNeed(P2, 100, nodes=(2,), policy="preferred")
    assert sizes(plan_hugepages(wish(), {"a": rather}, facts, reserve=GIB)[0]) == {2: (0, 100)}
    large = replace(rather, pages=3000)
    (actions, problems) = plan_hugepages(wish(), {"a": large}, facts, reserve=GIB)
    assert not problems
    assert sizes(actions)[2] == (0, 2048), "what node 2 has, and the rest elsewhere"
    assert sum(new for _, new in sizes(actions).values()) == 3000
    (_, problems) = plan_hugepages(wish(), {"a": replace(large, policy="bind")}, facts, reserve=GIB)
    assert "(5.9 GiB) on node 2, 0 are left for it" in problems[0].message
    uneven = replace(both, pages=5000)
    (actions, problems) = plan_hugepages(wish(), {"a": uneven}, facts, reserve=GIB)
    assert not problems
    assert sizes(actions) == {0: (0, 2048), 1: (0, 904), 2: (0, 2048)}


def test_more_than_the_host_can_keep_is_refused_with_the_sum() -> None:
    actions, problems = plan_hugepages(wish(pages=8192), {}, memory_facts(pool()), reserve=GIB)
    assert not actions
    assert "8192 pages = 16 GiB" in problems[0].message
    assert "16 GiB RAM - 1 GiB reserve" in problems[0].message
    needs = {"big": PageNeed(P2, 8000), "small": PageNeed(P2, 100)}
    actions, problems = plan_hugepages(wish(), needs, memory_facts(pool()), reserve=GIB)
    assert sizes(actions) == {0: (0, 100)}, "who fits is served"
    assert [problem.guests for problem in problems] == [{"big"}]
    assert "the host cannot keep so many" in problems[0].message


def test_no_growth_beyond_what_is_available_now() -> None:
    facts = memory_facts(pool(total=100), available=GIB)
    actions, problems = plan_hugepages(wish(pages=2000), {}, facts, reserve=GIB)
    assert not actions
    assert "available now" in problems[0].message


def test_spare_that_does_not_fit_is_a_warning() -> None:
    actions, problems = plan_hugepages(wish(spare="20GiB"), {}, memory_facts(pool()), reserve=GIB)
    assert not actions
    assert "no room for the spare" in problems[0].message
    assert not problems[0].guests


def test_a_size_this_host_does_not_have() -> None:
    needs = {"web": PageNeed(P1, 1)}
    declared = Host.model_validate({"hugepages": {"1GiB": {}}}).hugepages
    for wishes in (declared, {}):
        actions, problems = plan_hugepages(wishes, needs, memory_facts(pool()), reserve=GIB)
        assert not actions
        assert "this host has no pages of 1GiB (it has: 2MiB); wanted by web" in problems[0].message
        assert problems[0].guests == {"web"}


def test_gigantic_pages_say_what_makes_them_sure_and_come_first() -> None:
    declared = Host.model_validate({"hugepages": {"1GiB": {"pages": 2}, "2MiB": {"pages": 5}}}).hugepages
    facts = memory_facts(pool(), pool(1, total=50), pool(page_bytes=P1), pool(1, page_bytes=P1), nodes=2)
    actions, _ = plan_hugepages(declared, {}, facts, reserve=GIB)
    assert [action.line() for action in actions] == [
        "~ hugepages 2MiB node 1: 50 -> 2 pages",
        "~ hugepages 1GiB node 0: 0 -> 1 pages",
        "~ hugepages 1GiB node 1: 0 -> 1 pages",
        "~ hugepages 2MiB node 0: 0 -> 3 pages",
    ]
    assert "hugepagesz=1G hugepages=0:1,1:1" in actions[1].why


def test_declared_below_use_is_told() -> None:
    facts = memory_facts(pool(total=100, free=20))
    actions, problems = plan_hugepages(wish(pages=10), {}, facts, reserve=GIB)
    assert sizes(actions) == {0: (100, 80)}
    assert "10 pages are declared, 80 are in use" in problems[0].message


# ---- properties -------------------------------------------------------------------------------------------------

pools_st = st.integers(0, 400).flatmap(
    lambda total: st.integers(0, total).flatmap(
        lambda free: st.tuples(st.just(total), st.just(free), st.integers(0, total - free), st.integers(0, free))
    )
)
needs_st = st.dictionaries(
    st.sampled_from("abcdef"),
    st.builds(
        PageNeed,
        page_bytes=st.just(P2),
        pages=st.integers(1, 3000),
        nodes=st.sets(st.integers(0, 2), max_size=2).map(lambda found: tuple(sorted(found))),
        policy=st.sampled_from(["bind", "preferred", "interleave"]),
        fallback=st.booleans(),
    ),
)
wishes_st = st.sampled_from(
    [
        {},
        wish(),
        wish(spare="100MiB"),
        wish(pages=0),
        wish(pages=300),
        wish(pages=3000),
        wish(pages={"node0": 64}),
        wish(pages={"node1": 900}),
    ]
)


@given(
    wishes_st,
    needs_st,
    st.lists(pools_st, min_size=1, max_size=2),
    st.sets(st.sampled_from("abcdef")),
    st.booleans(),
    st.integers(2, 16),
)
def test_planned_twice_is_planned_once_in_any_order(
    wishes: Mapping[str, HugepagePoolConfig],
    needs: dict[str, PageNeed],
    shapes: list[tuple[int, int, int, int]],
    alive: set[str],
    touched: bool,
    gib: int,
) -> None:
    pools = [
        HugepagePool(node, P2, total, free, surplus=surplus, reserved=reserved)
        for node, (total, free, surplus, reserved) in enumerate(shapes)
    ]
    facts = memory_facts(*pools, total=gib * GIB, nodes=len(pools))
    guests = tuple(running(name, 50) for name in sorted(alive))
    facts = replace(facts, guests=guests)
    originals = {(each.node, P2): 10 for each in pools} if touched else {}
    first = plan_hugepages(wishes, needs, facts, reserve=GIB, originals=originals)

    turned = replace(facts, hugepages=tuple(reversed(pools)), guests=tuple(reversed(guests)))
    backwards = dict(reversed(needs.items()))
    assert plan_hugepages(wishes, backwards, turned, reserve=GIB, originals=originals) == first

    after = apply(facts, first[0])
    # from the first write on the journal knows what was there before
    journal = originals or {(each.node, P2): each.total - each.surplus for each in pools}
    assert plan_hugepages(wishes, needs, after, reserve=GIB, originals=journal)[0] == ()
    if not wishes:
        assert first[0] == ()

    blocked = {name for problem in first[1] for name in problem.guests}
    free = {each.node: each.free - each.reserved for each in after.hugepages}
    served = [need for name, need in needs.items() if name not in blocked | alive and not need.fallback]
    for nodes in ({0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2}, {0, 1, 2}):
        bound = sum(need.pages for need in served if need.bound and nodes >= set(need.bound))
        room = sum(pages for node, pages in free.items() if node in nodes)
        assert bound <= room, "a guest that is not refused finds its pages where they must be"
    assert sum(need.pages for need in served) <= sum(free.values())
