"""The whole plan: what separates the host and its guests from the directory of files, in the order it is done.

Shrink before grow, prepare before start: guests that stop, knobs, pages, networks, pins, guests that start. Pure: the
same files and facts give the same plan in whatever order they come, and a host that is as wanted gives an empty one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvmd.actions import Action, AnyAction, Disruption, Problem, RemoveBridge, RestartGuest, StartGuest, StopGuest
from kvmd.config.desired import Desired
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
from kvmd.plan.admission import Account
from kvmd.plan.entry import Entry, growth, page_needs, promised
from kvmd.plan.yielding import Yielded, give_way

_Part = tuple[tuple[Action, ...], tuple[Problem, ...]]


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions in order, what no action can mend, and tuning knobs left to whoever changed them."""

    actions: tuple[AnyAction, ...] = ()
    problems: tuple[Problem, ...] = ()
    yielded: tuple[Yielded, ...] = ()
    admissions: tuple[Account, ...] = ()  # the sum for each guest a pass would start, or refuse to

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
    sums, refusals = _admissions(desired, facts, growth(actions))
    problems += refusals
    blocked = frozenset(name for problem in problems for name in problem.guests)
    actions += units.plan_units(desired.guests, facts, prune=prune)
    actions += guests.plan_guests(desired.guests, facts.lives, blocked, prune=prune)
    actions.sort(key=_turn)
    kept, yielded = give_way(actions, ksm.driven(host.ksm), facts, retake=retake)  # type: ignore[arg-type]
    return Plan(kept, tuple(sorted(set(problems), key=lambda p: (p.subject, p.message))), yielded, tuple(sums))


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
    held = promised(desired, facts)
    return hugepages.plan_hugepages(host.hugepages, needs, facts, reserve=reserve, promised=held, originals=originals)


def _devices(desired: Desired, facts: Facts) -> tuple[_Part, ...]:
    """PCI: what comes back first, then pools, for which nothing may be in use."""
    pools, pool_problems = sriov.plan_sriov(desired.host.sriov, facts)
    coming = frozenset(action.pool for action in pools if action.new)
    releases, problems = vfio.plan_passthrough(desired, facts, coming)
    return (releases, problems), (pools, pool_problems)


def _starting(desired: Desired, facts: Facts) -> tuple[str, ...]:
    """Guests that a pass would start, in start order."""
    lives = {life.name: life for life in facts.lives}
    wanted = (lives.get(name) for name in guests.start_order(desired.guests))
    return tuple(life.name for life in wanted if life and life.wanted and not life.alive and not life.held)


def _admissions(desired: Desired, facts: Facts, growing_bytes: int) -> tuple[list[Account], list[Problem]]:
    """The sum for each wanted guest beside those that start before it, and a refusal for each that does not fit."""
    entry = Entry(desired, facts, growing_bytes=growing_bytes)
    sums, problems = [], []
    for name in _starting(desired, facts):
        sums.append(entry.account(name))
        if sums[-1].refused and (problem := entry.problem(name)):
            problems.append(problem)
    return sums, problems
