"""Who gets which CPU: rules, refusals, stability, and the search against trying everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import PinGuest, Problem
from kvmd.config.desired import Desired
from kvmd.config.guest import Guest
from kvmd.config.host import Host, HostCpu
from kvmd.errors import Refused
from kvmd.facts import CpuTopology, Facts, GuestLife, Process, RunningGuest, Thread
from kvmd.plan.cores import Machine, Smt, _Chooser, best_set, speed_classes
from kvmd.plan.cpus import (
    CpuWish,
    Placement,
    Placements,
    housekeeping_of,
    nodes_of,
    place,
    place_all,
    place_guest,
    plan_pins,
)
from kvmd.units import CpuSet
from tests.rig.hosts import hwloc_names, load, topology, unpack_hwloc

AUTO = HostCpu()
SMT8 = topology(cores=4, threads=2)  # cores 0-1 2-3 4-5 6-7


def dedicated(vcpus: int, **more: Any) -> CpuWish:
    return CpuWish(vcpus, "dedicated", **more)


def cpus_of(answer: Placements, name: str) -> str:
    return " ".join(str(vcpu) for vcpu in answer.of[name].vcpus)


def refusal(wishes: Mapping[str, CpuWish], shape: CpuTopology, name: str, host: HostCpu = AUTO) -> Problem:
    found = place(name, wishes, shape, host)
    assert isinstance(found, Problem)
    return found


# ---- housekeeping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "wanted", "chosen"),
    [
        (topology(cores=1), "auto", "0"),
        (topology(cores=2), "auto", "0"),
        (topology(cores=1, threads=2), "auto", "0"),
        (SMT8, "auto", "0-1"),
        (topology(nodes=2, cores=4), "auto", "0,4"),
        (topology(nodes=2, cores=1), "auto", "0"),
        (topology(cores=4, isolated=[0, 1]), "auto", "2"),
        (topology(cores=4, isolated=[1, 2, 3]), "auto", "0"),
        (topology(cores=2, isolated=[0, 1]), "auto", "0"),
        (topology(cores=4, offline=[0]), "auto", "1"),
        (SMT8, CpuSet([2, 3]), "2-3"),
        (SMT8, CpuSet([40]), "0-1"),
        (topology(cores=4, isolated=[3]), CpuSet([0, 3]), "0"),
    ],
)
def test_housekeeping_is_never_empty(shape: CpuTopology, wanted: Any, chosen: str) -> None:
    assert str(housekeeping_of(shape, HostCpu(housekeeping=wanted))) == chosen


# ---- dedicated --------------------------------------------------------------------------------------------------


def test_whole_cores_outside_housekeeping() -> None:
    answer = place_all({"web": dedicated(2), "db": dedicated(3)}, SMT8, AUTO)
    assert cpus_of(answer, "db") == "2 3 4"
    assert cpus_of(answer, "web") == "6 7"
    assert answer.of["web"].emulator == CpuSet([0, 1])
    assert not answer.problems


def test_two_cpus_are_enough_for_one_dedicated_guest() -> None:
    two = topology(cores=2)
    answer = place_all({"web": dedicated(1), "other": CpuWish(2)}, two, AUTO)
    assert cpus_of(answer, "web") == "1"
    assert cpus_of(answer, "other") == "0 0"
    assert place_all({"web": dedicated(1)}, topology(cores=1, threads=2), AUTO).of["web"].cpus == CpuSet([1])
    problem = refusal({"web": dedicated(1)}, topology(cores=1), "web")
    assert "web wants 1 dedicated CPU, 0 are left outside housekeeping (1 CPU; housekeeping 0)" in problem.message


def test_refusals_carry_the_arithmetic() -> None:
    wishes = {"db": dedicated(4), "web": dedicated(4)}
    problem = refusal(wishes, SMT8, "web")
    assert problem.guests == {"web"}
    assert (
        "web wants 4 dedicated CPUs, 2 are left outside housekeeping "
        "(8 CPUs; housekeeping 0-1; dedicated 2-5 (db))" in problem.message
    )
    assert "cpu.vcpus = 2" in (problem.hint or "")
    needs_isolated = refusal({"web": dedicated(1, isolated="require")}, SMT8, "web")
    assert "0 isolated are left" in needs_isolated.message
    assert "isolcpus=" in (needs_isolated.hint or "")


def test_isolated_cpus_are_preferred_required_or_avoided() -> None:
    shape = topology(cores=8, isolated=[5, 6, 7])
    for wish, expected in (("prefer", "5 6"), ("require", "5 6"), ("avoid", "1 2")):
        assert cpus_of(place_all({"web": dedicated(2, isolated=wish)}, shape, AUTO), "web") == expected
    assert cpus_of(place_all({"web": dedicated(4)}, shape, AUTO), "web") == "1 2 3 4", "all of one kind"
    assert cpus_of(place_all({"web": dedicated(6)}, shape, AUTO), "web") == "1 2 3 4 5 6", "both kinds before none"
    both = {"a": dedicated(2), "b": dedicated(2, isolated="require")}
    answer = place_all(both, shape, AUTO)
    assert cpus_of(answer, "b") == "5 6", "who needs them comes before who likes them"


def test_smt_rules() -> None:
    assert cpus_of(place_all({"a": dedicated(2, smt="isolate")}, SMT8, AUTO), "a") == "2 4"
    assert cpus_of(place_all({"a": dedicated(4, smt="require")}, SMT8, AUTO), "a") == "2 3 4 5"
    assert "(whole cores of 2 threads)" in refusal({"a": dedicated(3, smt="require")}, SMT8, "a").message
    assert "(this host has no SMT)" in refusal({"a": dedicated(2, smt="require")}, topology(cores=8), "a").message
    answer = place_all({"a": dedicated(2, smt="isolate"), "b": CpuWish(1), "c": dedicated(2)}, SMT8, AUTO)
    assert str(answer.of["b"].vcpus[0]) == "0-1", "nobody runs beside an isolating guest"
    assert cpus_of(answer, "c") == "6 7"
    assert (
        "kept empty beside them 3,5"
        in refusal({"a": dedicated(2, smt="isolate"), "d": dedicated(3)}, SMT8, "d").message
    )


def test_ids_that_count_threads_last() -> None:
    shape = topology(cores=4, threads=2, siblings_last=True)
    assert cpus_of(place_all({"a": dedicated(4)}, shape, AUTO), "a") == "1 5 2 6"


def test_best_fit_keeps_large_gaps_for_large_guests() -> None:
    shape = topology(caches=2, cores=6)  # L3 0-5 and 6-11, housekeeping 0
    answer = place_all({"a": dedicated(5), "b": dedicated(6)}, shape, AUTO)
    assert cpus_of(answer, "a") == "1 2 3 4 5"
    assert cpus_of(answer, "b") == "6 7 8 9 10 11"
    numa = topology(nodes=2, cores=4)
    assert nodes_of(place_all({"a": dedicated(3)}, numa, AUTO).of["a"].cpus, numa) == (0,)
    assert nodes_of(place_all({"a": dedicated(4)}, numa, AUTO).of["a"].cpus, numa) == (0, 1)


def test_fast_cores_first_and_never_mixed_without_need() -> None:
    cpus = tuple(replace(cpu, capacity=1024 - cpu.id if cpu.id < 4 else 600) for cpu in topology(cores=8).cpus)
    shape = replace(topology(cores=8), cpus=cpus)
    assert set(speed_classes(shape).values()) == {0, 1}
    assert cpus_of(place_all({"a": dedicated(3)}, shape, AUTO), "a") == "1 2 3"
    assert cpus_of(place_all({"a": dedicated(4)}, shape, AUTO), "a") == "4 5 6 7"
    assert cpus_of(place_all({"a": dedicated(5)}, shape, AUTO), "a") == "1 2 3 4 5"


# ---- manual, shared, none ---------------------------------------------------------------------------------------


def manual(*pins: int) -> CpuWish:
    return CpuWish(len(pins), "manual", pin=pins)


def test_manual_pins_are_obeyed_and_others_make_room() -> None:
    answer = place_all({"hand": manual(3, 2), "auto": dedicated(2)}, SMT8, AUTO)
    assert cpus_of(answer, "hand") == "3 2"
    assert cpus_of(answer, "auto") == "4 5"
    warned = place_all({"hand": manual(0)}, SMT8, AUTO)
    assert "housekeeping CPUs 0" in warned.problems[0].message
    assert not warned.problems[0].guests


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (manual(3, 99), "names CPUs 99; online and allowed are 0-6"),
        (CpuWish(2, "manual", pin=(3,)), "names 1 CPUs for 2 vCPUs"),
        (CpuWish(1, "manual"), "names 0 CPUs"),
        (manual(6, 6), "several vCPUs on isolated CPUs 6"),
        (manual(5), "CPUs 5, which another guest has to itself"),
    ],
)
def test_manual_pins_that_cannot_be(wish: CpuWish, message: str) -> None:
    shape = topology(cores=8, isolated=[6], offline=[7])
    assert message in refusal({"zz": wish, "aa": manual(5)}, shape, "zz").message


def test_shared_stays_off_what_others_have_and_none_is_warned_about() -> None:
    shape = topology(cores=8, isolated=[7])
    wishes = {"web": CpuWish(2), "db": dedicated(2, isolated="avoid"), "free": CpuWish(1, "none")}
    answer = place_all(wishes, shape, AUTO)
    assert cpus_of(answer, "web") == "0,3-6 0,3-6"
    assert cpus_of(answer, "free") == "0-6"
    assert answer.of["web"].emulator == CpuSet.parse("0,3-6")
    assert [problem.subject for problem in answer.problems] == ["cpu.placement"]
    assert "free may run on CPUs 1-2" in answer.problems[0].message


def test_emulator_cpus() -> None:
    shape = topology(cores=4, isolated=[3])
    answer = place_all({"a": dedicated(1, emulator=CpuSet([1])), "b": dedicated(1)}, shape, AUTO)
    assert answer.of["a"].emulator == CpuSet([1])
    assert CpuSet([1]) not in answer.of["b"].vcpus
    assert "isolated" in refusal({"a": CpuWish(1, emulator=CpuSet([3]))}, shape, "a").message
    assert "offline" in refusal({"a": CpuWish(1, emulator=CpuSet([9]))}, shape, "a").message
    numa = place_all({"a": dedicated(2, emulator=None)}, topology(nodes=2, cores=4, isolated=[6, 7]), AUTO)
    assert numa.of["a"].emulator == CpuSet([4]), "housekeeping of the same node"


def test_more_vcpus_than_cpus() -> None:
    two = topology(cores=2)
    problem = refusal({"web": CpuWish(3)}, two, "web")
    assert "web has 3 vCPUs, this host has 2 CPUs" in problem.message
    answer = place_all({"web": CpuWish(3, allow_overcommit=True)}, two, AUTO)
    assert "web" in answer.of
    assert [problem.guests for problem in answer.problems] == [frozenset()]


def test_overcommit_ratio_warns() -> None:
    wishes = {name: CpuWish(2) for name in "abcde"}
    answer = place_all(wishes, topology(cores=2), AUTO)
    assert len(answer.of) == 5
    assert (
        "10 vCPUs of 5 guests share 2 CPUs (0-1): 5.0 each, the ratio in host.toml is 4" in answer.problems[0].message
    )


# ---- what runs stays --------------------------------------------------------------------------------------------


def masks(*lists: str) -> tuple[CpuSet, ...]:
    return tuple(CpuSet.parse(text) for text in lists)


def test_running_guests_keep_their_cpus_as_long_as_the_rules_hold() -> None:
    wishes = {"a": dedicated(2), "z": dedicated(2)}
    taken = {"z": masks("2", "3")}
    answer = place_all(wishes, SMT8, AUTO, taken=taken)
    assert (cpus_of(answer, "z"), cpus_of(answer, "a")) == ("2 3", "4 5")
    for broken in (masks("0", "3"), masks("2-3", "2-3"), masks("3", "3"), masks("2", "9")):
        assert cpus_of(place_all(wishes, SMT8, AUTO, taken={"z": broken}), "z") != " ".join(map(str, broken))
    strict = {"z": dedicated(2, smt="isolate")}
    assert cpus_of(place_all(strict, SMT8, AUTO, taken=taken), "z") == "2 4"


def test_a_guest_without_a_file_keeps_what_it_has_to_itself() -> None:
    answer = place_all({"a": dedicated(2)}, SMT8, AUTO, taken={"gone": masks("2", "3"), "float": masks("0-7")})
    assert cpus_of(answer, "a") == "4 5"


def test_a_running_guest_is_placed_with_the_vcpus_it_has() -> None:
    answer = place_all({"a": dedicated(4)}, SMT8, AUTO, taken={"a": masks("2", "3")})
    assert cpus_of(answer, "a") == "2 3"
    pinned = CpuWish(4, "manual", pin=(2, 3, 4, 5))
    assert cpus_of(place_all({"a": pinned}, SMT8, AUTO, taken={"a": masks("0-7", "0-7")}), "a") == "2 3"


def guest(**cpu: Any) -> Guest:
    return Guest.model_validate({"cpu": cpu, "memory": {"size": "1GiB"}})


def up(name: str, *affinity: str, emulator: str = "") -> RunningGuest:
    main = (Thread(1, "qemu-system-x86", emulator),) if emulator else ()
    return RunningGuest(name, "uuid", Process(1, 1), 1 << 30, affinity=affinity, others=main)


def test_pins_bring_running_guests_where_they_belong() -> None:
    guests = {"web": guest(vcpus=2), "db": guest(vcpus=2, placement="dedicated")}
    facts = Facts(cpus=SMT8, guests=(up("web", "0-7", "0-7"), up("db", "0-7", "0-7"), up("gone", "1-2")))
    actions, problems = plan_pins(guests, Host(), facts)
    assert [action.line() for action in actions] == [
        "~ guest db: vCPUs on 0-7 0-7 -> 2 3",
        "~ guest web: vCPUs on 0-7 0-7 -> 0-1,4-7 0-1,4-7",
    ]
    assert not problems
    pins = [action for action in actions if isinstance(action, PinGuest)]
    done = replace(facts, guests=tuple(up(pin.guest, *pin.vcpus, emulator=pin.emulator) for pin in pins))
    assert plan_pins(guests, Host(), done) == ((), ())
    strayed = replace(facts, guests=(up("db", "2", "3", emulator="0-7"),))
    assert [action.line() for action in plan_pins(guests, Host(), strayed)[0]] == [
        "~ guest db: qemu-system-x86 on 0-7 -> 0-1"
    ]


def test_a_wanted_guest_without_room_is_known_before_its_start() -> None:
    guests = {"web": guest(vcpus=8, placement="dedicated"), "off": guest(vcpus=8, placement="dedicated")}
    lives = (GuestLife("web", alive=False, wanted=True), GuestLife("off", alive=False, wanted=False))
    actions, problems = plan_pins(guests, Host(), Facts(cpus=SMT8, lives=lives))
    assert not actions
    assert [problem.guests for problem in problems] == [{"web"}]


def test_place_guest_for_a_start() -> None:
    guests = {"a": guest(vcpus=2, placement="dedicated"), "b": guest(vcpus=6, placement="dedicated")}
    desired = Desired(guests=guests)
    assert place_guest("nobody", desired, SMT8, ["a"]) is None
    found = place_guest("a", desired, SMT8, [], taken={"b": masks("2", "3")})
    assert isinstance(found, Placement)
    assert found.cpus == CpuSet([4, 5])
    with pytest.raises(Refused, match="b wants 6 dedicated CPUs, 4 are left") as caught:
        place_guest("b", desired, SMT8, ["a", "gone"])
    assert caught.value.hint


# ---- properties -------------------------------------------------------------------------------------------------

shapes_st = st.builds(
    topology,
    nodes=st.integers(1, 2),
    caches=st.integers(1, 2),
    cores=st.integers(1, 3),
    threads=st.integers(1, 2),
    isolated=st.sets(st.integers(0, 23), max_size=8),
    offline=st.sets(st.integers(1, 7), max_size=2),
    siblings_last=st.booleans(),
).filter(lambda shape: 0 in shape.online)
wishes_st = st.dictionaries(
    st.sampled_from("abcdef"),
    st.builds(
        CpuWish,
        vcpus=st.integers(1, 6),
        placement=st.sampled_from(["none", "shared", "dedicated", "dedicated", "dedicated"]),
        isolated=st.sampled_from(["avoid", "prefer", "require"]),
        smt=st.sampled_from(["prefer", "require", "isolate"]),
        emulator=st.none() | st.sets(st.integers(0, 7), min_size=1, max_size=2).map(CpuSet),
        allow_overcommit=st.booleans(),
    ),
    max_size=5,
)
housekeeping_st = st.just("auto") | st.sets(st.integers(0, 8), min_size=1, max_size=3).map(CpuSet)


def check_rules(answer: Placements, wishes: Mapping[str, CpuWish], shape: CpuTopology) -> None:
    refused = {name for problem in answer.problems for name in problem.guests}
    assert refused.isdisjoint(answer.of)
    assert refused | answer.of.keys() == wishes.keys(), "every guest is placed or refused"
    assert answer.housekeeping
    core_of = {cpu.id: cpu.core for cpu in shape.cpus}
    owners: dict[int, str] = {}
    for name, placement in answer.of.items():
        wish = wishes[name]
        assert len(placement.vcpus) == wish.vcpus
        assert placement.emulator
        assert placement.emulator <= shape.online
        assert not placement.emulator & shape.isolated or shape.isolated >= shape.online
        if wish.placement == "dedicated":
            assert all(len(vcpu) == 1 for vcpu in placement.vcpus)
            assert len(placement.cpus) == wish.vcpus
            assert not placement.cpus & answer.housekeeping
            for cpu in placement.cpus:
                assert cpu not in owners, "a dedicated CPU holds one vCPU"
                owners[cpu] = name
            if wish.isolated == "require":
                assert placement.cpus <= shape.isolated
            if wish.isolated == "avoid":
                assert not placement.cpus & shape.isolated
    for name, placement in answer.of.items():
        wish = wishes[name]
        if wish.placement in ("none", "shared"):
            assert not placement.cpus & shape.isolated or shape.isolated >= shape.online
        if wish.placement == "shared":
            assert not placement.cpus & owners.keys()
        if wish.placement == "dedicated" and wish.smt != "prefer":
            mine = {core_of[cpu] for cpu in placement.cpus}
            beside = {cpu for cpu in shape.online if core_of[cpu] in mine} - placement.cpus
            assert not beside & owners.keys()
            if wish.smt == "require":
                assert not beside
            else:
                assert len(mine) == wish.vcpus
                assert not any(beside & each.cpus for n, each in answer.of.items() if wishes[n].placement == "shared")


@given(shapes_st, wishes_st, housekeeping_st)
def test_rules_hold_and_a_second_plan_is_the_same(shape: CpuTopology, wishes: dict[str, CpuWish], keep: Any) -> None:
    host = HostCpu(housekeeping=keep)
    answer = place_all(wishes, shape, host)
    check_rules(answer, wishes, shape)
    assert place_all(dict(reversed(wishes.items())), shape, host) == answer
    turned = replace(shape, cpus=tuple(reversed(shape.cpus)))
    assert place_all(wishes, turned, host).of == answer.of
    taken = {name: placement.vcpus for name, placement in answer.of.items()}
    again = place_all(wishes, shape, host, taken=taken)
    assert {name: again.of.get(name) for name in answer.of} == dict(answer.of), "what runs stays"
    check_rules(again, wishes, shape)


@given(shapes_st, wishes_st, st.data())
def test_any_state_of_the_host_is_brought_in_order(
    shape: CpuTopology, wishes: dict[str, CpuWish], data: st.DataObject
) -> None:
    """Whatever affinities are found, the placement obeys the rules, and applied it is stable."""
    some = st.sets(st.sampled_from(sorted(shape.online)), min_size=1, max_size=2).map(CpuSet)
    taken = {
        name: tuple(data.draw(st.lists(some, min_size=wish.vcpus, max_size=wish.vcpus)))
        for name, wish in wishes.items()
        if data.draw(st.booleans())
    }
    answer = place_all(wishes, shape, AUTO, taken=taken)
    check_rules(answer, wishes, shape)
    after = {name: answer.of[name].vcpus if name in answer.of else has for name, has in taken.items()}
    again = place_all(wishes, shape, AUTO, taken=after)
    assert again == answer, "who was refused stays as it is, and still is"


@given(
    st.builds(
        topology,
        nodes=st.integers(1, 2),
        caches=st.integers(1, 2),
        cores=st.integers(1, 3),
        threads=st.integers(1, 2),
    ),
    st.integers(1, 6),
    st.sets(st.integers(0, 11), max_size=5),
    st.sampled_from(list(Smt)),
    st.sets(st.integers(0, 11), max_size=4),
)
def test_as_good_as_trying_every_set(
    shape: CpuTopology, count: int, busy: set[int], smt: Smt, slow_cores: set[int]
) -> None:
    slower = tuple(replace(cpu, capacity=600) if cpu.core in slow_cores else cpu for cpu in shape.cpus)
    shape = replace(shape, cpus=slower)
    pool = sorted(shape.online - busy)[:12]
    machine = Machine.of(shape)
    found = best_set(machine, pool, count, smt, busy=busy)
    chooser = _Chooser(machine, pool, count, smt, busy)
    legal = [cpus for cpus in combinations(pool, count) if is_legal(cpus, shape, busy, smt)]
    if not legal:
        assert found is None
        return
    assert found is not None
    assert is_legal(found, shape, busy, smt)
    assert chooser.score(found)[:-1] == min(chooser.score(cpus)[:-1] for cpus in legal)


def is_legal(cpus: tuple[int, ...], shape: CpuTopology, busy: set[int], smt: Smt) -> bool:
    core_of = {cpu.id: cpu.core for cpu in shape.cpus}
    cores = [core_of[cpu] for cpu in cpus]
    members = {core: {cpu for cpu in shape.online if core_of[cpu] == core} for core in cores}
    if smt is Smt.ISOLATE:
        return len(set(cores)) == len(cores) and not any(members[core] & busy for core in cores)
    if smt is Smt.REQUIRE:
        return all(len(members[core]) > 1 and members[core] <= set(cpus) for core in cores)
    return True


# ---- machines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*hwloc_names(), "synthetic-2node-smt"])
def test_real_machines_take_guests_of_every_size(name: str, tmp_path: Any) -> None:
    is_made = name.startswith("synthetic")
    shape = (load(name, tmp_path) if is_made else unpack_hwloc(name, tmp_path)).observe_cpus()
    wishes = {f"g{size}": dedicated(size) for size in (1, 2, 3, 4)} | {
        "i": dedicated(2, smt="isolate"),
        "s": CpuWish(2),
    }
    answer = place_all(wishes, shape, AUTO)
    check_rules(answer, wishes, shape)
    if len(shape.online & shape.allowed) > 20:  # what a cgroup left of it, on one of them
        assert not [problem for problem in answer.problems if problem.guests]
        # the smallest nodes have four cores, one of them housekeeping
        assert all(len(nodes_of(answer.of[name].cpus, shape)) == 1 for name in ("g1", "g2", "g3", "i"))
    if name.startswith("20em64t-hybrid"):
        assert answer.of["g4"].cpus <= CpuSet(range(12)), "on the fast cores"
    if is_made:
        assert answer.of["g4"].cpus <= shape.isolated
