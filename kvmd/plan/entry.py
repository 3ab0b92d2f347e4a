"""Who may start, as a plan asks it: the guests that run, as they run, and those that start one after the other. Pure.

`admission` has the rules; here is what counts as which guest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from kvmd.actions import Action, Problem, SetHugepages
from kvmd.config.desired import Desired
from kvmd.config.guest import Guest
from kvmd.facts import Facts, RunningGuest, Usage
from kvmd.plan import admission
from kvmd.plan.hugepages import PageNeed


def page_needs(declared: Mapping[str, Guest]) -> Mapping[str, PageNeed]:
    """Hugepages of every declared guest that is backed by them."""
    return {name: need for name, guest in declared.items() if (need := page_need(guest))}


def page_need(guest: Guest) -> PageNeed | None:
    """The hugepages of one guest; None when it wants none."""
    memory, page = guest.memory, guest.memory.hugepage_size
    if page is None:
        return None
    return PageNeed(
        page,
        -(-memory.size // page),
        nodes=tuple(sorted(memory.nodes or guest.cpu.nodes or ())),
        policy=(memory.policy or "bind") if memory.nodes else "preferred",  # beside its vCPUs, if that can be
        fallback=memory.fallback == "thp",
    )


def candidate(name: str, guest: Guest, usage: Usage | None = None, *, has_pages: bool = True) -> admission.Candidate:
    """A declared guest as admission counts it. `has_pages` False: its hugepages will not be there (memory.fallback)."""
    paged = guest.memory.hugepage_size is not None and has_pages
    return admission.Candidate(
        name,
        guest.memory.size,
        in_hugepages=paged,
        locked=guest.memory.lock or bool(guest.passthrough),
        overhead_bytes=admission.measured_overhead(usage, guest.memory.size, in_hugepages=paged),
        guaranteed_bytes=guest.memory.guaranteed or 0,
        demand_p95_bytes=admission.known_demand(usage),
    )


def running_candidate(running: RunningGuest, guest: Guest | None, usage: Usage | None) -> admission.Candidate:
    """A guest as it runs, whatever its file says by now, or if it has none any more."""
    paged = running.page_bytes is not None
    declared = candidate(running.name, guest, usage) if guest else admission.Candidate(running.name, 0)
    return replace(
        declared,
        memory_bytes=running.memory_bytes,
        in_hugepages=paged,
        overhead_bytes=admission.measured_overhead(usage, running.memory_bytes, in_hugepages=paged),
    )


class Entry:
    """The sums for guests that start one after the other beside all that are alive.

    `growing_bytes`: what hugepage pools will take before they do.
    """

    def __init__(self, desired: Desired, facts: Facts, *, growing_bytes: int = 0) -> None:
        self._desired, self._facts = desired, facts
        self._growing_bytes = growing_bytes
        self._counted = {
            guest.name: running_candidate(guest, desired.guests.get(guest.name), facts.usage.get(guest.name))
            for guest in facts.guests
        }
        for life in facts.lives:  # a start that is under way has no QEMU yet
            if life.alive and life.name in desired.guests and life.name not in self._counted:
                self._counted[life.name] = self._declared(life.name)

    def account(self, name: str) -> admission.Account:
        """The sum for a declared guest; who is not refused counts for the next."""
        asking = self._declared(name)
        found = admission.account(self._case(name, asking))
        if not found.refused:
            self._counted[name] = asking
        return found

    def problem(self, name: str) -> Problem | None:
        """Why a declared guest may not start now, with what would change it; None when it may."""
        return admission.admit(self._case(name, self._declared(name)))

    def _case(self, name: str, asking: admission.Candidate) -> admission.Case:
        wish, memory = self._desired.host.memory, self._facts.memory
        return admission.Case(
            name=name,
            guests=tuple({**self._counted, name: asking}.values()),
            memory=replace(memory, hugetlb_bytes=memory.hugetlb_bytes + self._growing_bytes),
            rule=wish.admission,
            reserve=admission.reserve_bytes(wish.reserve, memory.total_bytes),
            foreign=self._facts.foreign_qemu_bytes,
            swap_factor=wish.swap_factor,
        )

    def _declared(self, name: str) -> admission.Candidate:
        guest = self._desired.guests[name]
        need = page_need(guest)
        there = need is None or not need.fallback or _has_pages(need, self._facts)
        return candidate(name, guest, self._facts.usage.get(name), has_pages=there)


def _has_pages(need: PageNeed, facts: Facts) -> bool:
    pools = (p for p in facts.hugepages if p.page_bytes == need.page_bytes and (p.node in need.bound or not need.bound))
    return sum(pool.free - pool.reserved for pool in pools) >= need.pages


def growth(actions: Iterable[Action]) -> int:
    """Bytes by which these actions enlarge hugepage pools."""
    pools = (action for action in actions if isinstance(action, SetHugepages))
    return max(0, sum((action.new - action.old) * action.page_bytes for action in pools))


def promised(desired: Desired, facts: Facts) -> int:
    """RAM outside the pools that guests which run may come to hold, as far as swap does not back it: a pool that took
    it would take it from them."""
    wish = desired.host.memory
    charges = sum(
        running_candidate(guest, desired.guests.get(guest.name), facts.usage.get(guest.name)).charge_bytes
        for guest in facts.guests
    )
    swap = 0 if wish.admission == "strict" else int(wish.swap_factor * admission.swap_bytes(facts.memory))
    return max(0, charges - swap)
