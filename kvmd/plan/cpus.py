"""Which host CPUs each guest runs on: dedicated, manual, shared or anywhere, and where QEMU's own threads go.

A dedicated CPU holds exactly one vCPU, a CPU of `isolcpus=` never anything but one vCPU (a mask over several would
put every thread on the first of them, for nobody balances there), and housekeeping is never empty and never
dedicated. Guests that run keep the CPUs they have as long as these still satisfy the rules.

The books of who has which CPU are in `assignment`, the search for the best set in `cores`; here is the order, and
what becomes of guests that run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvmd.actions import Action, PinGuest, Problem
from kvmd.config.desired import Desired
from kvmd.config.guest import Guest
from kvmd.config.host import Host, HostCpu
from kvmd.errors import Refused
from kvmd.facts import EMPTY, CpuTopology, Facts, HugepagePool, Memory, RunningGuest
from kvmd.plan.assignment import Assignment, CpuWish, Placement, housekeeping_of
from kvmd.units import CpuSet

__all__ = [
    "CpuWish",
    "Placement",
    "Placements",
    "housekeeping_of",
    "nodes_of",
    "pins_of",
    "place",
    "place_all",
    "place_guest",
    "place_running",
    "plan_pins",
    "preferred_nodes",
    "taken_by",
]


Taken = Mapping[str, tuple[CpuSet, ...]]  # CPUs each vCPU of a guest may run on now, in vCPU order


@dataclass(frozen=True, slots=True)
class Placements:
    """The answer for all guests: who goes where, and who or what cannot be had."""

    of: Mapping[str, Placement] = field(default_factory=lambda: EMPTY)
    housekeeping: CpuSet = field(default_factory=CpuSet)
    problems: tuple[Problem, ...] = ()


def place_all(
    wishes: Mapping[str, CpuWish],
    topology: CpuTopology,
    host: HostCpu,
    *,
    taken: Taken = EMPTY,
    preferred: Mapping[str, Sequence[int]] = EMPTY,
) -> Placements:
    """Place every guest of `wishes` (those that run or should run).

    `taken`: CPUs that the vCPUs of running guests have now; kept while they obey the rules. `preferred`: NUMA nodes
    that are better than others for a guest that is looked for, best first. Manual pins come first, then what runs,
    then `isolated = "require"`, then the others, each by name.
    """
    state = Assignment(topology, host, preferred)
    wishes = {name: _as_it_runs(wish, taken.get(name)) for name, wish in wishes.items()}
    for name in sorted(taken.keys() - wishes.keys()):
        state.respect(taken[name])
    order = sorted(wishes, key=lambda name: _rank(name, wishes[name], taken))
    for name in order:
        state.check_nodes(name, wishes[name])
        if wishes[name].emulator is not None:
            state.claim_emulator(name, wishes[name])
        state.check_count(name, wishes[name])
    for name in order:
        if name not in state.refused:
            state.place_exclusive(name, wishes[name], taken.get(name))
    for name in order:
        if name not in state.refused:
            state.place_floating(name, wishes[name])
    state.warn_overcommit(wishes)
    return Placements(
        of={name: state.placed[name] for name in sorted(state.placed)},
        housekeeping=state.housekeeping,
        problems=tuple(sorted(state.problems, key=lambda problem: (problem.subject, problem.message))),
    )


def place(
    name: str,
    wishes: Mapping[str, CpuWish],
    topology: CpuTopology,
    host: HostCpu,
    *,
    taken: Taken = EMPTY,
    preferred: Mapping[str, Sequence[int]] = EMPTY,
) -> Placement | Problem:
    """One guest's placement beside all others of `wishes`, or why it cannot be had."""
    answer = place_all(wishes, topology, host, taken=taken, preferred=preferred)
    if name in answer.of:
        return answer.of[name]
    return next(problem for problem in answer.problems if name in problem.guests)


def taken_by(facts: Facts) -> Taken:
    """CPUs of the running guests' vCPUs, by name, for `place_all`."""
    return {
        guest.name: tuple(CpuSet.parse(mask) for mask in guest.affinity) for guest in facts.guests if guest.affinity
    }


def place_guest(
    name: str,
    desired: Desired,
    topology: CpuTopology,
    alive: Collection[str],
    *,
    taken: Taken = EMPTY,
    nodes: Mapping[str, CpuSet | None] = EMPTY,
    preferred: Sequence[int] = (),
) -> Placement | None:
    """Where guest `name` goes beside those that are alive; None when it has no file. Raises Refused with the sum.

    `nodes`: cpu.nodes of the guests that run, as they were started; `preferred`: nodes that are better for
    this one, best first.
    """
    if name not in desired.guests:
        return None
    names = {other for other in alive if other in desired.guests} | {name}
    wishes = {other: _started(CpuWish.of(desired.guests[other]), other, nodes) for other in names}
    found = place(name, wishes, topology, desired.host.cpu, taken=taken, preferred={name: preferred})
    if isinstance(found, Problem):
        raise Refused(found.message, hint=found.hint)
    return found


def preferred_nodes(
    guest: Guest, memory: Memory, pools: Iterable[HugepagePool], devices: Collection[int] = ()
) -> tuple[int, ...]:
    """Nodes where the guest would be better than elsewhere, best first: its whole memory fits there now, and its
    devices are there (`devices`: their nodes); then devices alone, then memory alone.

    Memory fits where there are free pages of its size, or free memory, and where memory.nodes lets it be.
    """
    page, size = guest.memory.hugepage_size, guest.memory.size
    if page:
        free = {pool.node: (pool.free - pool.reserved) * page for pool in pools if pool.page_bytes == page}
    else:
        free = dict(memory.node_free_bytes)
    allowed = guest.memory.nodes
    fits = {node for node, there in free.items() if there >= size and (allowed is None or node in allowed)}
    return tuple(sorted(fits | set(devices), key=lambda node: (node not in devices, node not in fits, node)))


def plan_pins(guests: Mapping[str, Guest], host: Host, facts: Facts) -> tuple[tuple[Action, ...], tuple[Problem, ...]]:
    """Pins for the running guests of which any thread may run elsewhere than placed.

    Guests that are wanted and not up yet are placed with them, so that a plan tells beforehand who would be refused.
    """
    return pins_of(place_running(guests, host, facts), facts)


def pins_of(placements: Placements, facts: Facts) -> tuple[tuple[Action, ...], tuple[Problem, ...]]:
    """`plan_pins` of placements that are made already."""
    settling = {life.name for life in facts.lives if life.settling}
    actions = []
    for guest in sorted(facts.guests, key=lambda guest: guest.name):
        placement = placements.of.get(guest.name)
        if placement is None or not guest.affinity or guest.name in settling:
            continue
        pin = _pin(guest, placement)
        if pin.old != pin.vcpus or pin.strays:
            actions.append(pin)
    return tuple(actions), placements.problems


def place_running(guests: Mapping[str, Guest], host: Host, facts: Facts) -> Placements:
    """All guests that run or should run, where they belong now."""
    shall_run = {guest.name for guest in facts.guests}
    shall_run |= {life.name for life in facts.lives if life.wanted and not life.alive and not life.held}
    nodes = {guest.name: guest.nodes for guest in facts.guests}
    wishes = {name: _started(CpuWish.of(guests[name]), name, nodes) for name in shall_run if name in guests}
    return place_all(wishes, facts.cpus, host.cpu, taken=taken_by(facts))


def _pin(guest: RunningGuest, placement: Placement) -> PinGuest:
    emulator = str(placement.emulator)
    return PinGuest(
        guest=guest.name,
        vcpus=tuple(str(cpus) for cpus in placement.vcpus),
        emulator=emulator,
        old=guest.affinity,
        strays=tuple(f"{thread.name} on {thread.cpus}" for thread in guest.others if thread.cpus != emulator),
        why="its threads may run elsewhere than placed",
    )


def _started(wish: CpuWish, name: str, nodes: Mapping[str, CpuSet | None]) -> CpuWish:
    """A running guest stays on the nodes it was started on, for its memory does."""
    return replace(wish, nodes=nodes[name]) if name in nodes else wish


def _as_it_runs(wish: CpuWish, has: tuple[CpuSet, ...] | None) -> CpuWish:
    """A running guest keeps its number of vCPUs until it is restarted, whatever its file says by now."""
    if has is None or len(has) == wish.vcpus:
        return wish
    return replace(wish, vcpus=len(has), pin=wish.pin[: len(has)] if wish.pin else None)


def _rank(name: str, wish: CpuWish, taken: Taken) -> tuple[bool, bool, bool, str]:
    return (wish.placement != "manual", name not in taken, wish.isolated != "require", name)


def nodes_of(cpus: Iterable[int], topology: CpuTopology) -> tuple[int, ...]:
    """NUMA nodes of these CPUs, ascending."""
    wanted = set(cpus)
    return tuple(sorted({cpu.node for cpu in topology.cpus if cpu.id in wanted}))
