"""Who may run beside whom, and whether the advice in a refusal is true."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import Problem
from kvmd.facts import Memory, Usage
from kvmd.plan.admission import (
    Candidate,
    Case,
    account,
    admit,
    falls_back,
    known_demand,
    measured_overhead,
    reserve_bytes,
    usable_bytes,
)
from kvmd.units import Size

MIB, GIB = 1 << 20, 1 << 30
RULES = ("strict", "swap_backed", "statistical")


def ask(
    *guests: Candidate,
    total: int = 16 * GIB,
    swap: int = 0,
    hugetlb: int = 0,
    rule: str = "strict",
    reserve: int = GIB,
    factor: float = 0.8,
    foreign: int = 0,
) -> Problem | None:
    """Ask for the first of `guests` beside the others."""
    return admit(case(*guests, total=total, swap=swap, hugetlb=hugetlb, rule=rule, reserve=reserve, factor=factor,
                      foreign=foreign))  # fmt: skip


def case(
    *guests: Candidate,
    total: int = 16 * GIB,
    swap: int = 0,
    zram: int = 0,
    hugetlb: int = 0,
    rule: str = "strict",
    reserve: int = GIB,
    factor: float = 0.8,
    foreign: int = 0,
) -> Case:
    memory = Memory(total_bytes=total, swap_total_bytes=swap, zram_bytes=zram, hugetlb_bytes=hugetlb)
    return Case(guests[0].name, guests, memory, rule, reserve, foreign, factor)


def guest(name: str, gib: float, **more: bool | int) -> Candidate:
    return Candidate(name, int(gib * GIB), overhead_bytes=0, **more)  # type: ignore[arg-type]


def test_strict_is_the_sum_of_sizes_and_overhead() -> None:
    assert ask(guest("web", 8), guest("db", 7)) is None
    problem = ask(guest("web", 8), guest("db", 7.5))
    assert problem is not None
    assert problem.guests == {"web"}
    assert "rule strict" in problem.message
    assert "web counts 8 GiB, 1 other guest 7.5 GiB, together 15.5 GiB" in problem.message
    assert "there is 15 GiB (16 GiB RAM - 1 GiB reserve): 512 MiB short" in problem.message
    assert Candidate("x", 8 * GIB).charge_bytes == 8 * GIB + 256 * MIB + 32 * MIB


def test_everything_that_is_not_there_is_taken_off() -> None:
    problem = ask(guest("web", 8), hugetlb=4 * GIB, foreign=4 * GIB)
    assert problem is not None
    assert "- 4 GiB hugepages - 4 GiB other QEMUs" in problem.message
    assert usable_bytes(Memory(total_bytes=GIB), reserve=2 * GIB) == -GIB
    assert ask(guest("web", 1), total=GIB, reserve=2 * GIB) is not None


def test_swap_backs_what_can_be_swapped() -> None:
    beside = guest("db", 12)
    assert ask(guest("web", 8), beside, rule="swap_backed", swap=4 * GIB) is not None
    assert ask(guest("web", 6), beside, rule="swap_backed", swap=4 * GIB) is None
    problem = ask(guest("web", 6, locked=True), guest("vfio", 10, locked=True), rule="swap_backed", swap=100 * GIB)
    assert problem is not None
    assert "cannot be swapped" in problem.message
    assert "more swap" not in (problem.hint or "")


def test_hugepage_guests_cost_their_overhead_only() -> None:
    paged = Candidate("web", 8 * GIB, in_hugepages=True)
    assert paged.charge_bytes == 256 * MIB + 32 * MIB
    assert ask(paged, total=10 * GIB, hugetlb=8 * GIB) is None


def test_statistical_counts_demand_and_needs_history() -> None:
    beside = guest("db", 12, demand_p95_bytes=4 * GIB)
    assert ask(guest("web", 12), beside, rule="statistical", swap=16 * GIB) is None
    busy = guest("db", 12, demand_p95_bytes=8 * GIB)
    problem = ask(guest("web", 12), busy, rule="statistical", swap=16 * GIB)
    assert problem is not None
    assert "92%" in problem.message
    blind = guest("db", 12)
    assert ask(guest("web", 12), blind, rule="statistical", swap=16 * GIB) is None, "swap_backed decided"
    assert "no 24 h of history yet for db" in (falls_back("statistical", "web", [guest("web", 1), blind]) or "")
    assert falls_back("strict", "web", [blind]) is None
    guaranteed = guest("db", 12, demand_p95_bytes=GIB, guaranteed_bytes=8 * GIB)
    assert ask(guest("web", 12), guaranteed, rule="statistical", swap=16 * GIB) is not None


def test_hints_name_the_ways_out() -> None:
    problem = ask(guest("web", 8), guest("db", 7), guest("a", 4), swap=8 * GIB)
    assert problem is not None
    hint = problem.hint or ""
    assert 'memory.size = "4GiB"' in hint
    assert "stop a;" in hint, "the smallest that is enough"
    assert 'memory.admission = "swap_backed"' in hint


def test_reserve() -> None:
    assert reserve_bytes("auto", 100 * GIB) == GIB + 2 * GIB
    assert reserve_bytes("auto", GIB) == GIB // 2
    assert reserve_bytes(Size.parse("4GiB"), GIB) == 4 * GIB


def test_the_sum_is_told_for_who_is_admitted_and_for_who_is_not() -> None:
    fits = account(case(guest("web", 8), guest("db", 4), rule="swap_backed", swap=5 * GIB, hugetlb=GIB))
    assert not fits.refused
    assert (fits.own_bytes, fits.others_bytes, fits.others) == (8 * GIB, 4 * GIB, 1)
    assert fits.remaining_bytes == 18 * GIB - 12 * GIB
    assert fits.line() == (
        "web 8 GiB + 1 other 4 GiB of 18 GiB (16 GiB RAM - 1 GiB reserve - 1 GiB hugepages + 0.8 of 5 GiB swap): "
        "6 GiB remain (rule swap_backed)"
    )
    too_much = account(case(guest("web", 12), guest("db", 4)))
    assert too_much.refused
    assert too_much.line().endswith("of 15 GiB (16 GiB RAM - 1 GiB reserve): 1 GiB short (rule strict)")
    known = guest("db", 4, demand_p95_bytes=8 * GIB)
    tightest = account(case(guest("web", 4), known, rule="statistical", swap=8 * GIB))
    assert (tightest.rule, tightest.note) == ("statistical", None), "of the rules that count"
    blind = account(case(guest("web", 4), guest("db", 4), rule="statistical"))
    assert blind.rule == "swap_backed"
    assert "no 24 h of history yet for db: swap_backed decided" in blind.line()


def test_zram_counts_half_since_it_takes_ram_for_what_it_holds() -> None:
    beside = guest("db", 8)
    web = guest("web", 11)
    assert ask(web, beside, rule="swap_backed", swap=6 * GIB) is None
    refused = admit(case(web, beside, rule="swap_backed", swap=6 * GIB, zram=6 * GIB))
    assert refused is not None
    assert "+ 0.8 of 3 GiB swap, half of 6 GiB zram in it" in refused.message


def test_measured_overhead_and_a_day_of_demand_replace_the_guesses() -> None:
    seen = Usage(samples=288, span_s=86_000, demand_p95_bytes=GIB, overhead_bytes=80 * MIB)
    assert measured_overhead(seen, 8 * GIB, in_hugepages=False) == 100 * MIB + 16 * MIB
    assert measured_overhead(seen, 8 * GIB, in_hugepages=True) == 100 * MIB
    assert known_demand(seen) == GIB
    for unknown in (None, replace(seen, samples=11), replace(seen, overhead_bytes=None)):
        assert measured_overhead(unknown, 8 * GIB, in_hugepages=False) is None
    for unknown in (None, replace(seen, span_s=70_000), replace(seen, samples=59)):
        assert known_demand(unknown) is None


guests_st = st.lists(
    st.builds(
        Candidate,
        name=st.text("abcdefgh", min_size=1, max_size=3),
        memory_bytes=st.integers(16, 64 * 1024).map(lambda mib: mib * MIB),
        in_hugepages=st.booleans(),
        locked=st.booleans(),
        guaranteed_bytes=st.integers(0, 4 * GIB),
        demand_p95_bytes=st.none() | st.integers(0, 32 * GIB),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda each: each.name,
)
host_st = st.fixed_dictionaries(
    {
        "total": st.integers(1, 128).map(lambda gib: gib * GIB),
        "swap": st.integers(0, 64).map(lambda gib: gib * GIB),
        "hugetlb": st.integers(0, 4).map(lambda gib: gib * GIB),
        "reserve": st.integers(0, 4096).map(lambda mib: mib * MIB),
        "foreign": st.sampled_from([0, GIB]),
    }
)


@given(guests_st, host_st, st.sampled_from(RULES), st.randoms())
def test_order_is_irrelevant_and_never_beyond_the_host(guests, host, rule, rnd) -> None:  # type: ignore[no-untyped-def]
    first, *others = guests
    rnd.shuffle(others)
    problem = ask(first, *others, rule=rule, **host)
    assert problem == ask(first, *reversed(others), rule=rule, **host)
    if problem is None:
        outside = sum(each.charge_bytes for each in guests)
        usable = host["total"] - host["reserve"] - host["hugetlb"] - host["foreign"]
        assert outside <= usable + (0 if rule == "strict" else 0.8 * host["swap"])


@given(guests_st, host_st, st.sampled_from(RULES))
def test_advised_sizes_are_true(guests, host, rule) -> None:  # type: ignore[no-untyped-def]
    first, *others = guests
    problem = ask(first, *others, rule=rule, **host)
    if problem is None:
        return
    assert problem.hint
    if found := re.search(r'memory\.size = "([^"]+)"', problem.hint):
        assert ask(replace(first, memory_bytes=int(Size.parse(found[1]))), *others, rule=rule, **host) is None
    if found := re.search(r"stop (\w+)", problem.hint):
        rest = [each for each in others if each.name != found[1]]
        assert ask(first, *rest, rule=rule, **host) is None
    if found := re.search(r'memory\.reserve = "([^"]+)"', problem.hint):
        eased = host | {"reserve": int(Size.parse(found[1]))}
        assert ask(first, *others, rule=rule, **eased) is None
    if 'admission = "swap_backed"' in problem.hint:
        assert ask(first, *others, rule="swap_backed", **host) is None


@given(guests_st, host_st, st.sampled_from(RULES))
def test_the_sum_says_what_the_refusal_says(guests, host, rule) -> None:  # type: ignore[no-untyped-def]
    first, *others = guests
    asked = case(first, *others, rule=rule, **host)
    found, problem = account(asked), admit(asked)
    assert found.refused == (problem is not None) == (found.remaining_bytes < 0)
    assert found == account(case(first, *reversed(others), rule=rule, **host))
    if problem is not None:
        assert f"(rule {found.rule})" in problem.message


@pytest.mark.parametrize("rule", RULES)
def test_one_guest_on_an_empty_host(rule: str) -> None:
    assert ask(Candidate("web", 4 * GIB), rule=rule) is None
