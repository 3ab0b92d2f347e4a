"""May one more guest run? The sum over all guests against what the host can back, never free memory.

Counting guests' full sizes against memory that is free *now* would count the running ones twice and believe in
pages their guests have not touched yet. Merged pages (KSM) and ballooned ones never count as room.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from kvmd.actions import Problem
from kvmd.facts import Memory
from kvmd.units import Size

MIB = 1 << 20
GIB = 1 << 30

OVERHEAD_BASE_BYTES = 256 * MIB  # QEMU itself and its devices, until it is measured
OVERHEAD_SHARE = 256  # page tables and bitmaps: one byte in 256 of the guest's memory
STATISTICAL_FILL = 0.92  # of the usable memory may be filled by observed demand
STATISTICAL_NEW = 0.7  # of its size is what a new guest is expected to touch
SMALLEST_ADVISED_BYTES = 64 * MIB  # a guest cut below this would not be the same guest
SMALLEST_RESERVE_BYTES = 512 * MIB  # never advise to leave the host less


class Rule(StrEnum):
    """`host.memory.admission`."""

    STRICT = "strict"
    SWAP_BACKED = "swap_backed"
    STATISTICAL = "statistical"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One guest in the sum: running, starting, or the one that asks."""

    name: str
    memory_bytes: int
    in_hugepages: bool = False  # its memory is in the pool, which is taken off before; only the overhead counts
    locked: bool = False  # mlock or VFIO: never in swap
    overhead_bytes: int | None = None  # measured; None: estimated
    guaranteed_bytes: int = 0
    demand_p95_bytes: int | None = None  # over 24 h; None: no history yet

    @property
    def charge_bytes(self) -> int:
        """What it may come to hold outside the hugepage pool."""
        return (0 if self.in_hugepages else self.memory_bytes) + self.overhead

    @property
    def is_resident(self) -> bool:
        """True when swap is no help to it."""
        return self.locked or self.in_hugepages

    @property
    def overhead(self) -> int:
        """Bytes beside the guest's memory."""
        if self.overhead_bytes is not None:
            return self.overhead_bytes
        return OVERHEAD_BASE_BYTES + self.memory_bytes // OVERHEAD_SHARE

    def demand_bytes(self, *, is_new: bool) -> int:
        """What it is expected to hold: a share of its size while nobody has seen it run."""
        if self.in_hugepages:
            return self.overhead
        expected = int(STATISTICAL_NEW * self.memory_bytes)
        return self.overhead + (expected if is_new else max(self.guaranteed_bytes, self.demand_p95_bytes or 0))


def reserve_bytes(reserve: Size | str, total_bytes: int) -> int:
    """`host.memory.reserve` in bytes: "auto" is 1 GiB and 2 %, on machines below 2 GiB never more than half."""
    if not isinstance(reserve, str):
        return int(reserve)
    return min(GIB + total_bytes // 50, total_bytes // 2)


def usable_bytes(memory: Memory, *, reserve: int, foreign_qemu_bytes: int = 0) -> int:
    """Memory for guests outside the hugepage pools; may be negative when the reserve alone is too much."""
    return memory.total_bytes - reserve - memory.hugetlb_bytes - foreign_qemu_bytes


def admit(
    name: str,
    candidates: Iterable[Candidate],
    memory: Memory,
    *,
    rule: str,
    reserve: int,
    swap_factor: float,
    foreign_qemu_bytes: int = 0,
) -> Problem | None:
    """None when guest `name` may run beside the others; all of them, it included, are in `candidates`.

    `reserve` in bytes (`reserve_bytes`), `swap_factor` is the share of swap that counts. The refusal names the rule,
    the sum and what would make it fit.
    """
    guests = tuple(sorted(candidates, key=lambda guest: guest.name))
    asking = next(guest for guest in guests if guest.name == name)
    case = _Case(asking, guests, memory, reserve, foreign_qemu_bytes, swap_factor)
    charges = {guest.name: guest.charge_bytes for guest in guests}
    if rule == Rule.STRICT:
        return case.judge(Rule.STRICT, charges, case.usable)
    resident = {guest.name: guest.charge_bytes for guest in guests if guest.is_resident}
    if asking.is_resident:
        problem = case.judge("swap_backed for memory that cannot be swapped", resident, case.usable)
        if problem:
            return problem
    problem = case.judge(Rule.SWAP_BACKED, charges, case.usable + case.swap)
    if problem or rule == Rule.SWAP_BACKED or falls_back(rule, name, guests):
        return problem
    demands = {guest.name: guest.demand_bytes(is_new=guest is asking) for guest in guests}
    return case.judge(Rule.STATISTICAL, demands, int(STATISTICAL_FILL * case.usable))


@dataclass(frozen=True, slots=True)
class _Case:
    """The numbers of one question, so that each rule and each sentence uses the same ones."""

    asking: Candidate
    guests: tuple[Candidate, ...]
    memory: Memory
    reserve: int
    foreign: int
    swap_factor: float

    @property
    def usable(self) -> int:
        return usable_bytes(self.memory, reserve=self.reserve, foreign_qemu_bytes=self.foreign)

    @property
    def swap(self) -> int:
        return int(self.swap_factor * self.memory.swap_total_bytes)

    def judge(self, rule: str, charges: Mapping[str, int], limit: int) -> Problem | None:
        """Refuse when the charges exceed the limit."""
        needed = sum(charges.values())
        if needed <= limit:
            return None
        own = charges[self.asking.name]
        others = len(charges) - 1
        return Problem(
            subject=f"guest {self.asking.name}",
            message=(
                f"not enough memory (rule {rule}): {self.asking.name} counts {_size(own)}, "
                f"{others} other guest{'' if others == 1 else 's'} {_size(needed - own)}, together {_size(needed)}; "
                f"there is {_size(limit)} ({self._sum(rule)}): {_size(needed - limit)} short"
            ),
            hint="one of these makes it fit: " + "; ".join(self._remedies(rule, charges, needed - limit)),
            guests=frozenset({self.asking.name}),
        )

    def _sum(self, rule: str) -> str:
        terms = f"{_size(self.memory.total_bytes)} RAM - {_size(self.reserve)} reserve"
        if self.memory.hugetlb_bytes:
            terms += f" - {_size(self.memory.hugetlb_bytes)} hugepages"
        if self.foreign:
            terms += f" - {_size(self.foreign)} other QEMUs"
        if rule == Rule.SWAP_BACKED:
            terms += f" + {self.swap_factor:g} of {_size(self.memory.swap_total_bytes)} swap"
        return f"{STATISTICAL_FILL:.0%} of {terms}" if rule == Rule.STATISTICAL else terms

    def _remedies(self, rule: str, charges: Mapping[str, int], short: int) -> list[str]:
        ways = []
        fill, share = (STATISTICAL_FILL, STATISTICAL_NEW) if rule == Rule.STATISTICAL else (1.0, 1.0)
        smaller = _down(self.asking.memory_bytes - short / share)
        if not self.asking.in_hugepages and smaller >= SMALLEST_ADVISED_BYTES:
            ways.append(f'memory.size = "{Size(smaller)}"')
        others = [(charge, name) for name, charge in charges.items() if name != self.asking.name and charge >= short]
        if others:
            ways.append(f"stop {min(others)[1]}")
        if rule == Rule.SWAP_BACKED and self.swap_factor > 0:
            ways.append(f"{_size(_up(short / self.swap_factor))} more swap")
        if rule == Rule.STRICT and sum(charges.values()) <= self.usable + self.swap:
            ways.append('memory.admission = "swap_backed" in host.toml')
        if self.reserve - short / fill >= SMALLEST_RESERVE_BYTES:
            ways.append(f'memory.reserve = "{Size(_down(self.reserve - short / fill))}" in host.toml')
        return ways or [f"{_size(_up(short / fill))} more RAM"]


def falls_back(rule: str, name: str, candidates: Iterable[Candidate]) -> str | None:
    """What to tell when `statistical` could not be used for want of history and swap_backed decided instead."""
    blind = sorted(guest.name for guest in candidates if guest.name != name and guest.demand_p95_bytes is None)
    if rule != Rule.STATISTICAL or not blind:
        return None
    return f"memory.admission is statistical, no 24 h of history yet for {', '.join(blind)}: swap_backed decided"


def _up(amount: float) -> int:
    return math.ceil(amount / MIB) * MIB


def _down(amount: float) -> int:
    return math.floor(amount / MIB) * MIB


def _size(amount: int) -> str:
    return Size(amount).human() if amount >= 0 else f"-{Size(-amount).human()}"
