"""Placement and NUMA nodes: cpu.nodes, memory beside the vCPUs, and CPUs that come and go between two passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import PinGuest, Problem
from kvmd.config.desired import Desired
from kvmd.config.guest import Guest
from kvmd.config.host import Host, HostCpu
from kvmd.errors import Refused
from kvmd.facts import CpuTopology, Facts, GuestLife, HugepagePool, Memory, Process, RunningGuest, Thread
from kvmd.plan.cpus import CpuWish, place, place_all, place_guest, plan_pins, preferred_nodes
from kvmd.units import CpuSet
from tests.rig.hosts import GIB, MIB, topology

AUTO = HostCpu()
TWO = topology(nodes=2, cores=4, threads=2)  # node 0: 0-7, node 1: 8-15; housekeeping 0-1,8-9


def wish(vcpus: int, placement: str = "dedicated", nodes: str = "", **more: Any) -> CpuWish:
    return CpuWish(vcpus, placement, nodes=CpuSet.parse(nodes) if nodes else None, **more)


def guest(*, size: str = "1GiB", **cpu: Any) -> Guest:
    return Guest.model_validate({"cpu": cpu, "memory": {"size": size}})


def refusal(found: Any) -> Problem:
    assert isinstance(found, Problem)
    return found


# ---- cpu.nodes ----------------------------------------------------------------------------------------------------


def test_dedicated_cpus_and_memory_stay_on_the_named_nodes() -> None:
    answer = place_all({"far": wish(2, nodes="1"), "wide": wish(10, nodes="0-1"), "any": wish(1)}, TWO, AUTO)
    assert answer.of["far"].cpus == CpuSet([10, 11])
    assert answer.of["far"].emulator == CpuSet([8, 9]), "housekeeping of the same node"
    assert answer.of["far"].nodes == (1,)
    assert answer.of["any"].nodes == (0,)
    assert "wide wants 10 dedicated CPUs, 9 on nodes 0-1 are left" in answer.problems[0].message


def test_a_shared_guest_floats_over_its_nodes_only() -> None:
    answer = place_all(
        {"far": wish(2, "shared", "1"), "free": wish(1, "none", "1"), "any": wish(1, "shared")}, TWO, AUTO
    )
    assert str(answer.of["far"].vcpus[0]) == str(answer.of["far"].emulator) == "8-15"
    assert answer.of["far"].nodes == answer.of["free"].nodes == (1,)
    assert answer.of["any"].nodes == (), "wherever it runs, the kernel finds memory there"


@pytest.mark.parametrize(
    ("asks", "message"),
    [
        (wish(2, nodes="0,2"), "names nodes 2, which have no CPU that is online and allowed; those that have: 0-1"),
        (wish(7, nodes="1"), "7 dedicated CPUs, 6 on nodes 1 are left outside housekeeping (16 CPUs, 8 on these"),
        (wish(9, "shared", "1"), "web has 9 vCPUs, nodes 1 (cpu.nodes) have 8 CPUs"),
        (wish(1, "manual", "1", pin=(3,)), "cpu.pin names CPUs 3, which are not on nodes 1 (cpu.nodes)"),
    ],
)  # fmt: skip
def test_what_the_nodes_cannot_give_is_refused_with_the_sum(asks: CpuWish, message: str) -> None:
    assert message in refusal(place("web", {"web": asks}, TWO, AUTO)).message


def test_a_node_whose_cpus_are_all_taken_has_none_to_share() -> None:
    shape = topology(nodes=2, cores=2, isolated=[2, 3])
    found = refusal(place("web", {"web": wish(1, "shared", "1")}, shape, AUTO))
    assert "web shares CPUs of nodes 1 (cpu.nodes), and of 2-3 there none is left: isolated 2-3" in found.message
    assert found.hint == "take cpu.nodes out, or name nodes of CPUs 0-1"


def test_a_running_guest_stays_on_the_nodes_of_its_memory_until_it_is_restarted() -> None:
    running = RunningGuest("web", "u", Process(7, 7), GIB, affinity=("2", "3"), nodes=CpuSet([0]))
    guests = {"web": guest(vcpus=2, placement="dedicated", nodes="1")}
    assert plan_pins(guests, Host(), Facts(cpus=TWO, guests=(running,))) == ((), ())
    strayed = replace(running, affinity=("10", "11"))
    (pin,), _ = plan_pins(guests, Host(), Facts(cpus=TWO, guests=(strayed,)))
    assert isinstance(pin, PinGuest)
    assert pin.vcpus == ("2", "3"), "back to where its memory is"
    other = Desired(guests={**guests, "new": guest(vcpus=6, placement="dedicated", nodes="0")})
    with pytest.raises(Refused, match="new wants 6 dedicated CPUs, 4 on nodes 0 are left"):
        place_guest("new", other, TWO, ["web"], taken={"web": (CpuSet([2]), CpuSet([3]))}, nodes={"web": CpuSet([0])})


# ---- memory beside the vCPUs ----------------------------------------------------------------------------------------


def test_a_dedicated_guest_goes_where_its_memory_fits() -> None:
    memory = Memory(node_free_bytes={0: 2 * GIB, 1: 40 * GIB})
    big = guest(size="8GiB", vcpus=2, placement="dedicated")
    assert preferred_nodes(big, memory, ()) == (1,)
    desired = Desired(guests={"big": big})
    found = place_guest("big", desired, TWO, [], preferred=preferred_nodes(big, memory, ()))
    assert found
    assert found.nodes == (1,)
    kept = place_guest("big", desired, TWO, ["big"], taken={"big": (CpuSet([2]), CpuSet([3]))}, preferred=[1])
    assert kept
    assert kept.nodes == (0,), "what runs stays"
    wide = Desired(guests={"big": guest(size="8GiB", vcpus=8, placement="dedicated")})
    over = place_guest("big", wide, TWO, [], preferred=[1])
    assert over
    assert over.nodes == (0, 1), "a preference: no node holds it"


def test_pages_of_the_guests_size_count_when_it_wants_them() -> None:
    huge = Guest.model_validate({"memory": {"size": "64MiB", "backing": "hugepages", "page_size": "2MiB"}})
    pools = (
        HugepagePool(0, 2 * MIB, 64, 31),
        HugepagePool(1, 2 * MIB, 64, 40, reserved=8),
        HugepagePool(2, 1 << 30, 4, 4),
        HugepagePool(3, 2 * MIB, 64, 40, reserved=9),
    )
    assert preferred_nodes(huge, Memory(node_free_bytes={0: GIB, 7: GIB}), pools) == (1,)


def test_devices_come_before_memory_and_both_before_either() -> None:
    memory = Memory(node_free_bytes={0: 9 * GIB, 1: 9 * GIB, 2: GIB, 3: 9 * GIB})
    big = guest(size="8GiB")
    assert preferred_nodes(big, memory, (), [1, 2]) == (1, 2, 0, 3)
    kept = Guest.model_validate({"memory": {"size": "8GiB", "nodes": "3"}})
    assert preferred_nodes(kept, memory, (), [1]) == (1, 3)
    isolated = topology(nodes=2, cores=4, isolated=[2, 3])
    wants = Desired(guests={"a": guest(vcpus=2, placement="dedicated")})
    found = place_guest("a", wants, isolated, [], preferred=[1])
    assert found
    assert found.cpus == CpuSet([2, 3]), "isolated CPUs were asked for, a node was not"


# ---- every thread ---------------------------------------------------------------------------------------------------


def test_a_pin_is_planned_for_any_thread_that_may_run_elsewhere() -> None:
    guests = {"web": guest(vcpus=1, placement="dedicated")}
    threads = (Thread(7, "qemu-system-x86", "0-1"), Thread(9, "IO iothread0", "0-1"), Thread(11, "vhost-7", "0-1"))
    running = RunningGuest("web", "u", Process(7, 7), GIB, affinity=("2",), others=threads)
    facts = Facts(cpus=TWO, guests=(running,))
    assert plan_pins(guests, Host(), facts) == ((), ())
    for stray in range(3):
        moved = tuple(replace(each, cpus="0-15") if index == stray else each for index, each in enumerate(threads))
        drifted = replace(facts, guests=(replace(running, others=moved),))
        (pin,), _ = plan_pins(guests, Host(), drifted)
        assert pin.line() == f"~ guest web: {threads[stray].name} on 0-15 -> 0-1"
        settling = replace(drifted, lives=(GuestLife("web", alive=True, wanted=True, settling=True),))
        assert plan_pins(guests, Host(), settling)[0] == (), "its start pins it"
    all_moved = replace(
        running, others=tuple(replace(each, cpus=f"{n}") for n, each in enumerate((*threads, *threads), 2))
    )
    (pin,), _ = plan_pins(guests, Host(), replace(facts, guests=(all_moved,)))
    assert pin.line().endswith("and 3 more -> 0-1")


# ---- CPUs that come and go ------------------------------------------------------------------------------------------


def without(shape: CpuTopology, gone: set[int]) -> CpuTopology:
    cpus = [cpu for cpu in shape.cpus if cpu.id not in gone]
    first = {cpu.core: min(other.id for other in cpus if other.core == cpu.core) for cpu in cpus}
    cache = {cpu.l3: min(other.id for other in cpus if other.l3 == cpu.l3) for cpu in cpus}
    left = tuple(replace(cpu, core=first[cpu.core], l3=cache[cpu.l3]) for cpu in cpus)
    online = CpuSet(cpu.id for cpu in left)
    isolated = CpuSet(shape.isolated & online)
    return replace(shape, cpus=left, allowed=online, isolated=isolated, offline=CpuSet(gone))


def as_the_kernel_leaves_it(mask: CpuSet, online: CpuSet) -> CpuSet:
    """The mask of a thread after hot-unplug: what is left of it, or everything (select_fallback_rq, kernel/sched)."""
    return CpuSet(mask & online) or online


wishes_st = st.dictionaries(
    st.sampled_from("abcd"),
    st.builds(
        wish,
        st.integers(1, 3),
        st.sampled_from(["none", "shared", "dedicated", "dedicated"]),
        st.sampled_from(["", "", "0", "1"]),
        smt=st.sampled_from(["prefer", "require", "isolate"]),
    ),
    min_size=1,
)


@given(
    st.builds(topology, nodes=st.just(2), cores=st.integers(2, 3), threads=st.integers(1, 2)),
    wishes_st,
    st.sets(st.integers(0, 11), max_size=3),
)
def test_cpus_that_go_and_come_back(shape: CpuTopology, wishes: dict[str, CpuWish], gone: set[int]) -> None:
    """After each change one pass brings everybody it can on CPUs that are there; a second one has nothing to do."""
    gone &= shape.online - {0, max(shape.online)}  # the kernel keeps the first, and each node one
    has = {name: found.vcpus for name, found in place_all(wishes, shape, AUTO).of.items()}
    started = {name: wishes[name] for name in has}
    for now in (without(shape, gone), shape):
        found = {
            name: tuple(as_the_kernel_leaves_it(mask, now.online) for mask in masks) for name, masks in has.items()
        }
        answer = place_all(started, now, AUTO, taken=found)
        owners: set[int] = set()
        for name, placement in answer.of.items():
            assert placement.cpus <= now.online
            assert placement.emulator
            assert placement.emulator <= now.online
            if started[name].nodes is not None:
                assert {cpu.node for cpu in now.cpus if cpu.id in placement.cpus} <= set(started[name].nodes or ())
            if started[name].placement == "dedicated":
                assert not placement.cpus & owners
                owners |= placement.cpus
        placed = {name: placement.vcpus for name, placement in answer.of.items()}
        refused = {name for problem in answer.problems for name in problem.guests}
        assert refused.isdisjoint(placed)
        assert refused | placed.keys() == started.keys()
        has = {name: placed.get(name, found[name]) for name in started}
        again = place_all(started, now, AUTO, taken=has)
        assert {name: each.vcpus for name, each in again.of.items()} == placed
