"""Who sits where: every CPU of the host with its role and the vCPUs that have it, every guest with its threads. Pure.

What is shown is what runs (the threads' affinities); beside it, per guest, where its placement would have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvmd.actions import Problem
from kvmd.config.desired import Desired
from kvmd.facts import Facts, RunningGuest
from kvmd.plan.assignment import CpuWish, Placement
from kvmd.plan.cpus import place_running
from kvmd.plan.interrupts import plan_interrupts
from kvmd.units import CpuSet


@dataclass(frozen=True, slots=True)
class Seat:
    """One CPU. `roles`: housekeeping, isolated, nohz_full, forbidden (our cpuset), offline; () is ordinary."""

    id: int
    node: int | None  # None: offline, the kernel does not tell
    package: int | None
    l3: int | None  # lowest CPU id that shares it
    core: int | None  # lowest CPU id of its threads
    capacity: int | None  # 1024 is the fastest core of this host
    roles: tuple[str, ...]
    vcpus: tuple[str, ...]  # "web:0": guests' vCPUs that may run here and nowhere else


@dataclass(frozen=True, slots=True)
class GuestSeats:
    """One running guest."""

    name: str
    placement: str  # cpu.placement, "" when its file is gone
    nodes: str | None  # cpu.nodes as it was started
    vcpus: tuple[str, ...]
    threads: tuple[tuple[str, str], ...]  # name and CPUs of every other thread
    wanted_vcpus: tuple[str, ...] | None  # None: refused, or no file
    wanted_others: str | None
    placed: bool  # every thread is where it belongs


@dataclass(frozen=True, slots=True)
class IrqSeat:
    """One interrupt that some device uses, looked at while cpu.irq_affinity asks for it."""

    number: int
    device: str
    cpus: str  # where it may arrive
    arrives: str  # where it does
    kept: bool  # the kernel lets nobody move it


@dataclass(frozen=True, slots=True)
class CpuMap:
    """The answer to `host cpus`."""

    housekeeping: str
    cpus: tuple[Seat, ...]
    guests: tuple[GuestSeats, ...]
    interrupts: tuple[IrqSeat, ...]
    problems: tuple[Problem, ...]


def cpu_map(desired: Desired, facts: Facts) -> CpuMap:
    """The host's CPUs and the running guests on them."""
    placements = place_running(desired.guests, desired.host, facts)
    holders = _holders(facts)
    topology = facts.cpus
    seats = [
        Seat(
            cpu.id,
            cpu.node,
            cpu.package,
            cpu.l3,
            cpu.core,
            cpu.capacity,
            tuple(
                role
                for role, members in (
                    ("housekeeping", placements.housekeeping),
                    ("isolated", topology.isolated),
                    ("nohz_full", topology.nohz_full),
                    ("forbidden", topology.online - topology.allowed),
                )
                if cpu.id in members
            ),
            holders.get(cpu.id, ()),
        )
        for cpu in sorted(topology.cpus, key=lambda cpu: (cpu.node, cpu.l3, cpu.core, cpu.id))
    ]
    gone = [Seat(cpu, None, None, None, None, None, ("offline",), ()) for cpu in sorted(topology.offline)]
    return CpuMap(
        housekeeping=str(placements.housekeeping),
        cpus=(*seats, *gone),
        guests=tuple(
            _guest(guest, desired, placements.of.get(guest.name))
            for guest in sorted(facts.guests, key=lambda guest: guest.name)
        ),
        interrupts=tuple(
            IrqSeat(each.number, each.device, str(each.affinity), str(each.arrives), each.fixed)
            for each in facts.interrupts
        ),
        problems=(*placements.problems, *plan_interrupts(placements, desired.host, facts)[1]),
    )


def _holders(facts: Facts) -> Mapping[int, tuple[str, ...]]:
    found: dict[int, tuple[str, ...]] = {}
    for guest in sorted(facts.guests, key=lambda guest: guest.name):
        for index, mask in enumerate(guest.affinity):
            cpus = CpuSet.parse(mask)
            if len(cpus) == 1:
                (cpu,) = cpus
                found[cpu] = (*found.get(cpu, ()), f"{guest.name}:{index}")
    return found


def _guest(guest: RunningGuest, desired: Desired, placement: Placement | None) -> GuestSeats:
    file = desired.guests.get(guest.name)
    vcpus = tuple(str(cpus) for cpus in placement.vcpus) if placement else None
    others = str(placement.emulator) if placement else None
    return GuestSeats(
        name=guest.name,
        placement=CpuWish.of(file).placement if file else "",
        nodes=None if guest.nodes is None else str(guest.nodes),
        vcpus=guest.affinity,
        threads=tuple((thread.name, thread.cpus) for thread in guest.others),
        wanted_vcpus=vcpus,
        wanted_others=others,
        placed=vcpus == guest.affinity and all(thread.cpus == others for thread in guest.others),
    )
