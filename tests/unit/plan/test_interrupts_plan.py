"""Interrupts kept off guests' CPUs: which are moved, which are left alone and why, and the rival."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import WriteKnob
from kvmd.config.guest import Guest
from kvmd.config.host import Host
from kvmd.facts import Facts, Interrupt, Irqbalance, Process, RunningGuest
from kvmd.plan.cpus import place_running
from kvmd.plan.interrupts import DEFAULT, plan_interrupts
from kvmd.units import CpuSet
from tests.rig.hosts import topology

KEPT = Host.model_validate({"cpu": {"irq_affinity": "housekeeping"}})
TWO = topology(nodes=2, cores=4)  # housekeeping 0,4
WEB = {"web": Guest.model_validate({"cpu": {"vcpus": 2, "placement": "dedicated"}, "memory": {"size": "1GiB"}})}


def irq(number: int, cpus: str, device: str = "", **more: Any) -> Interrupt:
    return Interrupt(number, device or f"eth0-{number}", CpuSet.parse(cpus), **more)


def planned(facts: Facts, host: Host = KEPT, guests: dict[str, Guest] | None = None) -> tuple[list[str], list[str]]:
    actions, problems = plan_interrupts(place_running(guests or {}, host, facts), host, facts)
    assert all(isinstance(action, WriteKnob) and not action.requirement for action in actions)
    return [action.line() for action in actions], [f"{problem.message} | {problem.hint}" for problem in problems]


def test_nothing_is_touched_unless_asked() -> None:
    assert planned(Facts(cpus=TWO, interrupts=(irq(24, "0-7"),)), Host()) == ([], [])


def test_interrupts_go_to_the_housekeeping_of_their_node() -> None:
    interrupts = (
        irq(24, "0-7"),
        irq(25, "5", node=1),
        irq(26, "0"),
        irq(27, "0-7", node=7),
        irq(28, "1", "nvme0q2", fixed=True),
        irq(29, "1", "vfio-msix[0](0000:3b:00.0)"),
    )
    facts = Facts(cpus=TWO, interrupts=interrupts, knobs={DEFAULT: "ff"})
    lines, problems = planned(facts)
    assert lines == [
        f"~ {DEFAULT}: ff -> 11",
        "~ /proc/irq/24/smp_affinity_list: 0-7 -> 0,4",
        "~ /proc/irq/25/smp_affinity_list: 5 -> 4",
        "~ /proc/irq/27/smp_affinity_list: 0-7 -> 0,4",
    ]
    assert not problems, "nvme0q2 fires on CPU 1, and nobody has CPU 1 to himself"


@pytest.mark.parametrize(
    ("now", "new"),
    [
        ("ff", "11"),
        ("000000ff", "00000011"),
        ("ff,ffffffff", "00,00000011"),
        ("00000011", None),
        ("", None),
        ("1", None),
    ],
)
def test_the_default_mask_is_written_as_the_kernel_prints_it(now: str, new: str | None) -> None:
    lines, _ = planned(Facts(cpus=TWO, knobs={DEFAULT: now} if now else {}))
    assert lines == ([f"~ {DEFAULT}: {now} -> {new}"] if new else [])


def test_an_interrupt_that_stays_on_a_guests_cpu_is_told() -> None:
    running = RunningGuest("web", "u", Process(7, 7), 1 << 30, affinity=("1", "2"))
    interrupts = (irq(31, "0-7", "nvme0q2", fixed=True, effective=CpuSet([1])), irq(32, "3", "nvme0q4", fixed=True))
    facts = Facts(cpus=TWO, guests=(running,), interrupts=interrupts)
    lines, problems = planned(facts, guests=WEB)
    assert not lines
    assert [text.split(" | ")[0] for text in problems] == [
        "interrupts 31 (nvme0q2) arrive at CPUs 1 of guests: the kernel manages them itself"
    ]


def test_one_that_was_moved_and_has_not_fired_since_still_arrives_there() -> None:
    running = RunningGuest("web", "u", Process(7, 7), 1 << 30, affinity=("1", "2"))
    interrupts = (
        irq(31, "0", effective=CpuSet([2])),
        irq(32, "0", effective=CpuSet([3])),
        irq(33, "0-7", effective=CpuSet([2])),
    )
    lines, problems = planned(Facts(cpus=TWO, guests=(running,), interrupts=interrupts), guests=WEB)
    assert lines == ["~ /proc/irq/33/smp_affinity_list: 0-7 -> 0,4"]
    assert [text.split(" | ")[0] for text in problems] == [
        "interrupts 31 (eth0-31) arrive at CPUs 2 of guests: each moves when it fires next"
    ]


@pytest.mark.parametrize(
    ("banned", "isolated", "told"),
    [
        (None, [], "1-3,5-7"),
        (None, [1, 2, 3], "5-7"),
        (None, [1, 2, 3, 5, 6, 7], ""),
        ("1-3,5-7", [], ""),
        ("1-3", [1, 2, 3, 5, 6, 7], "5-7"),
    ],
)
def test_irqbalance_is_not_fought(banned: str | None, isolated: list[int], told: str) -> None:
    shape = topology(nodes=2, cores=4, isolated=isolated)
    balancer = Irqbalance(88, None if banned is None else CpuSet.parse(banned))
    facts = Facts(cpus=shape, interrupts=(irq(24, "0-7"),), irqbalance=balancer)
    lines, problems = planned(facts)
    assert bool(lines) != bool(told)
    assert [told in text for text in problems] == [True] * bool(told)
    assert all("IRQBALANCE_BANNED_CPULIST=1-3,5-7" in text for text in problems)


def test_one_cpu_has_nothing_to_keep_off() -> None:
    lines, problems = planned(Facts(cpus=topology(cores=1), interrupts=(irq(24, "0"),)))
    assert (lines, len(problems)) == ([], 1)


@given(
    st.lists(
        st.builds(
            irq,
            st.integers(0, 300),
            st.sets(st.integers(0, 7), min_size=1).map(lambda cpus: str(CpuSet(cpus))),
            node=st.none() | st.integers(0, 3),
            fixed=st.booleans(),
        ),
        unique_by=lambda each: each.number,
    ),
    st.sampled_from(["ff", "11", "000000ff", "1"]),
)
def test_a_second_plan_is_empty_and_order_does_not_matter(interrupts: list[Interrupt], mask: str) -> None:
    facts = Facts(cpus=TWO, interrupts=tuple(interrupts), knobs={DEFAULT: mask})
    actions, _ = plan_interrupts(place_running({}, KEPT, facts), KEPT, facts)
    new = {action.path: action.new for action in actions if isinstance(action, WriteKnob)}
    after = tuple(
        replace(each, affinity=CpuSet.parse(new.get(f"/proc/irq/{each.number}/smp_affinity_list", str(each.affinity))))
        for each in interrupts
    )
    assert planned(replace(facts, interrupts=after, knobs={DEFAULT: new.get(DEFAULT, mask)}))[0] == []
    turned = replace(facts, interrupts=tuple(reversed(interrupts)))
    assert sorted(planned(turned)[0]) == sorted(planned(facts)[0])
    assert all(CpuSet.parse(value) <= CpuSet([0, 4]) for path, value in new.items() if path != DEFAULT)
