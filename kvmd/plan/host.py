"""The whole plan: what separates the host and its guests from the directory of files, in the order it is done.

Shrink before grow, prepare before start: guests that stop, knobs, pages, networks, pins, guests that start. Pure: the
same files and facts give the same plan in whatever order they come, and a host that is as wanted gives an empty one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvmd.actions import Action, AnyAction, Disruption, Problem, RemoveBridge, RestartGuest, StartGuest, StopGuest
from kvmd.config.desired import Desired
from kvmd.config.guest import Guest
from kvmd.facts import Facts
from kvmd.plan import (
    admission,
    cpus,
    guests,
    hugepages,
    hugetlbfs,
    interrupts,
    kernelargs,
    ksm,
    modules,
    network,
    ports,
    sriov,
    swap,
    units,
    vfio,
)
from kvmd.plan.yielding import Yielded, give_way

_Part = tuple[tuple[Action, ...], tuple[Problem, ...]]


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions in order, what no action can mend, and tuning knobs left to whoever changed them."""

    actions: tuple[AnyAction, ...] = ()
    problems: tuple[Problem, ...] = ()
    yielded: tuple[Yielded, ...] = ()

    def split(self, allow: frozenset[Disruption]) -> tuple[tuple[AnyAction, ...], tuple[AnyAction, ...]]:
        """Those that may be done when only `allow` (and nobody) may be disturbed, and those left over."""
        allowed = allow | {Disruption.NONE}
        now = tuple(action for action in self.actions if action.disruption in allowed)
        return now, tuple(action for action in self.actions if action.disruption not in allowed)


def plan(
    desired: Desired,
    facts: Facts,
    *,
    macs: Mapping[tuple[str, str], str],
    uuids: Mapping[str, str],
    originals: Mapping[tuple[int, int], int],
    prune: bool = False,
    retake: bool = False,
) -> Plan:
    """Everything. `macs` by (guest, nic), `uuids` by guest, of their identities.

    `originals`: pages of (node, page size) before kvmd first changed them. `retake`: a person wants the files obeyed,
    also where someone else turned a tuning knob.
    """
    host = desired.host
    placements = cpus.place_running(desired.guests, host, facts)
    parts = (
        ksm.plan_ksm(host, facts),
        modules.plan_modules(desired, facts),
        swap.plan_swap(host, facts),
        plan_pools(desired, facts, originals),
        hugetlbfs.plan_hugetlbfs(desired.guests, facts),
        *_devices(desired, facts),
        network.plan_network(desired.networks, desired.guests, macs, facts),
        ports.plan_ports(desired.networks, desired.guests, macs, uuids, facts),
        kernelargs.plan_kernel_args(desired, facts),
        interrupts.plan_interrupts(placements, host, facts),
        cpus.pins_of(placements, facts),
    )
    actions = [action for part, _ in parts for action in part]
    problems = [problem for _, found in parts for problem in found]
    problems += _admissions(desired, facts)
    blocked = frozenset(name for problem in problems for name in problem.guests)
    actions += units.plan_units(desired.guests, facts, prune=prune)
    actions += guests.plan_guests(desired.guests, facts.lives, blocked, prune=prune)
    actions.sort(key=_turn)
    kept, yielded = give_way(actions, ksm.driven(host.ksm), facts, retake=retake)  # type: ignore[arg-type]
    return Plan(kept, tuple(sorted(set(problems), key=lambda p: (p.subject, p.message))), yielded)


def _turn(action: Action) -> int:
    """Guests that stop let go of pages and ports first; a bridge goes when those that leave it were restarted."""
    match action:
        case StopGuest():
            return 0
        case RestartGuest():
            return 2
        case RemoveBridge():
            return 3
        case StartGuest():
            return 4
        case _:
            return 1


def plan_pools(
    desired: Desired, facts: Facts, originals: Mapping[tuple[int, int], int]
) -> tuple[tuple[Action, ...], tuple[Problem, ...]]:
    """The hugepage pools alone; of `facts` it needs memory, hugepages and running guests."""
    host = desired.host
    reserve = admission.reserve_bytes(host.memory.reserve, facts.memory.total_bytes)
    needs = page_needs(desired.guests)
    return hugepages.plan_hugepages(host.hugepages, needs, facts, reserve=reserve, originals=originals)


def _devices(desired: Desired, facts: Facts) -> tuple[_Part, ...]:
    """PCI: what comes back first, then pools, for which nothing may be in use."""
    pools, pool_problems = sriov.plan_sriov(desired.host.sriov, facts)
    coming = frozenset(action.pool for action in pools if action.new)
    releases, problems = vfio.plan_passthrough(desired, facts, coming)
    return (releases, problems), (pools, pool_problems)


def page_needs(declared: Mapping[str, Guest]) -> Mapping[str, hugepages.PageNeed]:
    """Hugepages of every declared guest that is backed by them."""
    return {name: need for name, guest in declared.items() if (need := page_need(guest))}


def page_need(guest: Guest) -> hugepages.PageNeed | None:
    """The hugepages of one guest; None when it wants none."""
    memory, page = guest.memory, guest.memory.hugepage_size
    if page is None:
        return None
    return hugepages.PageNeed(
        page,
        -(-memory.size // page),
        nodes=tuple(sorted(memory.nodes or guest.cpu.nodes or ())),
        policy=(memory.policy or "bind") if memory.nodes else "preferred",  # beside its vCPUs, if that can be
        fallback=memory.fallback == "thp",
    )


def candidate(name: str, guest: Guest) -> admission.Candidate:
    """A declared guest as admission counts it."""
    return admission.Candidate(
        name,
        guest.memory.size,
        in_hugepages=guest.memory.hugepage_size is not None,
        locked=guest.memory.lock or bool(guest.passthrough),
        guaranteed_bytes=guest.memory.guaranteed or 0,
    )


def admit(name: str, desired: Desired, facts: Facts, also: frozenset[str] = frozenset()) -> Problem | None:
    """May guest `name` run beside all that are alive, and `also` those that will have been started before it?"""
    counted = {life.name for life in facts.lives if life.alive and life.name in desired.guests} | also | {name}
    return _admit(name, [candidate(other, desired.guests[other]) for other in counted], desired, facts)


def _admit(name: str, counted: list[admission.Candidate], desired: Desired, facts: Facts) -> Problem | None:
    return admission.admit(
        name,
        counted,
        facts.memory,
        rule=desired.host.memory.admission,
        reserve=admission.reserve_bytes(desired.host.memory.reserve, facts.memory.total_bytes),
        swap_factor=desired.host.memory.swap_factor,
        foreign_qemu_bytes=facts.foreign_qemu_bytes,
    )


def _admissions(desired: Desired, facts: Facts) -> list[Problem]:
    """One refusal for each wanted guest that does not fit beside those that start before it."""
    lives = {life.name: life for life in facts.lives}
    declared = {name: candidate(name, guest) for name, guest in desired.guests.items()}
    admitted = [declared[life.name] for life in facts.lives if life.alive and life.name in declared]
    problems = []
    for name in guests.start_order(desired.guests):
        life = lives.get(name)
        if life and life.wanted and not life.alive and not life.held:
            problem = _admit(name, [*admitted, declared[name]], desired, facts)
            if problem:
                problems.append(problem)
            else:
                admitted.append(declared[name])
    return problems
