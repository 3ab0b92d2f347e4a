"""May one more guest run? The sum over all guests against what the host can back, never free memory.

Counting guests' full sizes against memory that is free *now* would count the running ones twice and believe in
pages their guests have not touched yet. Merged pages (KSM) and ballooned ones never count as room.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from kvmd.actions import Problem
from kvmd.facts import Memory, Usage
from kvmd.units import Size

MIB = 1 << 20
GIB = 1 << 30

OVERHEAD_BASE_BYTES = 256 * MIB  # QEMU itself and its devices, until it is measured
OVERHEAD_SHARE = 256  # page tables and bitmaps: one byte in 256 of the guest's memory
MEASURED_SLACK = 1.25  # of what was measured: clients of a display and bursts of I/O come and go
MEASURED_SAMPLES = 12  # fewer, and the estimate counts
PAGE_TABLE_SHARE = 512  # 8 bytes for each ordinary page of the guest, at most
ZRAM_WORTH = 0.5  # of a zram device is RAM gained: 2:1 is what its documentation expects
DAY_S = 86_400.0
HISTORY_SPAN_S = 0.9 * DAY_S  # a day of history, and
HISTORY_SAMPLES = 60  # five hours of running in it, before demand decides
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


def measured_overhead(usage: Usage | None, memory_bytes: int, *, in_hugepages: bool) -> int | None:
    """Overhead from samples, with slack and all the page tables the guest may come to need; None: not known yet."""
    if usage is None or usage.overhead_bytes is None or usage.samples < MEASURED_SAMPLES:
        return None
    tables = 0 if in_hugepages else memory_bytes // PAGE_TABLE_SHARE
    return int(MEASURED_SLACK * usage.overhead_bytes) + tables


def known_demand(usage: Usage | None) -> int | None:
    """P95 of demand over a day; None while there is less than a day of it."""
    if usage is None or usage.span_s < HISTORY_SPAN_S or usage.samples < HISTORY_SAMPLES:
        return None
    return usage.demand_p95_bytes


def swap_bytes(memory: Memory) -> int:
    """Swap as far as it is room beside RAM: zram takes RAM for what it holds."""
    return memory.swap_total_bytes - int((1 - ZRAM_WORTH) * memory.zram_bytes)


def reserve_bytes(reserve: Size | str, total_bytes: int) -> int:
    """`host.memory.reserve` in bytes: "auto" is 1 GiB and 2 %, on machines below 2 GiB never more than half."""
    if not isinstance(reserve, str):
        return int(reserve)
    return min(GIB + total_bytes // 50, total_bytes // 2)


def usable_bytes(memory: Memory, *, reserve: int, foreign_qemu_bytes: int = 0) -> int:
    """Memory for guests outside the hugepage pools; may be negative when the reserve alone is too much."""
    return memory.total_bytes - reserve - memory.hugetlb_bytes - foreign_qemu_bytes


@dataclass(frozen=True, slots=True)
class Account:
    """The sum that decides about one guest: what each side counts, and how the host's side is made up."""

    guest: str
    rule: str
    own_bytes: int
    others_bytes: int
    others: int  # guests that run or start before it
    limit_bytes: int
    terms: str  # "31 GiB RAM - 1.6 GiB reserve"
    note: str | None = None  # why another rule than the declared one decided
    refused: bool = False

    @property
    def remaining_bytes(self) -> int:
        """What is left when it runs; negative: so much is missing."""
        return self.limit_bytes - self.own_bytes - self.others_bytes

    def line(self) -> str:
        """One line for people."""
        others = f" + {self.others} other{'' if self.others == 1 else 's'} {_size(self.others_bytes)}"
        left = self.remaining_bytes
        verdict = f"{_size(left)} remain" if left >= 0 else f"{_size(-left)} short"
        note = f"; {self.note}" if self.note else ""
        return (
            f"{self.guest} {_size(self.own_bytes)}{others if self.others else ''} of {_size(self.limit_bytes)} "
            f"({self.terms}): {verdict} (rule {self.rule}{note})"
        )


@dataclass(frozen=True, slots=True)
class _Verdict:
    """A rule that says no: what it counted for each guest, and what there is."""

    rule: str
    charges: Mapping[str, int]
    limit: int

    @property
    def needed(self) -> int:
        return sum(self.charges.values())

    @property
    def short(self) -> int:
        return self.needed - self.limit


@dataclass(frozen=True, slots=True)
class Case:
    """One question: may `name` run beside the others? All of them, it included, are in `guests`.

    `reserve` and `foreign` in bytes, `swap_factor` is the share of swap that counts. A changed copy of a case is how a
    piece of advice is tried before it is given.
    """

    name: str
    guests: tuple[Candidate, ...]
    memory: Memory
    rule: str
    reserve: int
    foreign: int
    swap_factor: float

    @property
    def asking(self) -> Candidate:
        return next(guest for guest in self.guests if guest.name == self.name)

    @property
    def usable(self) -> int:
        return usable_bytes(self.memory, reserve=self.reserve, foreign_qemu_bytes=self.foreign)

    def refusal(self) -> _Verdict | None:
        """The first rule that is broken."""
        return next((verdict for verdict in self._verdicts() if verdict.short > 0), None)

    def _verdicts(self) -> Iterator[_Verdict]:
        charges = {guest.name: guest.charge_bytes for guest in self.guests}
        if self.rule == Rule.STRICT:
            yield _Verdict(Rule.STRICT, charges, self.usable)
            return
        if self.asking.is_resident:
            resident = {guest.name: guest.charge_bytes for guest in self.guests if guest.is_resident}
            yield _Verdict("swap_backed for memory that cannot be swapped", resident, self.usable)
        swap = int(self.swap_factor * swap_bytes(self.memory))
        yield _Verdict(Rule.SWAP_BACKED, charges, self.usable + swap)
        if self.rule == Rule.STATISTICAL and not falls_back(self.rule, self.name, self.guests):
            demands = {guest.name: guest.demand_bytes(is_new=guest.name == self.name) for guest in self.guests}
            yield _Verdict(Rule.STATISTICAL, demands, int(STATISTICAL_FILL * self.usable))

    def account(self) -> Account:
        found = self.refusal() or max(self._verdicts(), key=lambda verdict: verdict.short)
        own = found.charges[self.name]
        return Account(
            guest=self.name,
            rule=found.rule,
            own_bytes=own,
            others_bytes=found.needed - own,
            others=len(found.charges) - 1,
            limit_bytes=found.limit,
            terms=self._sum(found.rule),
            note=falls_back(self.rule, self.name, self.guests),
            refused=found.short > 0,
        )

    def problem(self) -> Problem | None:
        """The refusal in words, with what would change it."""
        found = self.refusal()
        if found is None:
            return None
        own, others = found.charges[self.name], len(found.charges) - 1
        return Problem(
            subject=f"guest {self.name}",
            message=(
                f"not enough memory (rule {found.rule}): {self.name} counts {_size(own)}, "
                f"{others} other guest{'' if others == 1 else 's'} {_size(found.needed - own)}, "
                f"together {_size(found.needed)}; "
                f"there is {_size(found.limit)} ({self._sum(found.rule)}): {_size(found.short)} short"
            ),
            hint="one of these makes it fit: " + "; ".join(self._remedies(found)),
            guests=frozenset({self.name}),
        )

    def _sum(self, rule: str) -> str:
        terms = f"{_size(self.memory.total_bytes)} RAM - {_size(self.reserve)} reserve"
        if self.memory.hugetlb_bytes:
            terms += f" - {_size(self.memory.hugetlb_bytes)} hugepages"
        if self.foreign:
            terms += f" - {_size(self.foreign)} other QEMUs"
        if rule == Rule.SWAP_BACKED:
            terms += f" + {self.swap_factor:g} of {_size(swap_bytes(self.memory))} swap"
            if self.memory.zram_bytes:
                terms += f", half of {_size(self.memory.zram_bytes)} zram in it"
        return f"{STATISTICAL_FILL:.0%} of {terms}" if rule == Rule.STATISTICAL else terms

    def _remedies(self, found: _Verdict) -> list[str]:
        """Single changes that were tried and are enough."""
        ways = {text: case for text, case in self._changes(found) if case.refusal() is None}
        return list(ways) or ["more memory, or several of: a smaller guest, fewer guests, more swap"]

    def _changes(self, found: _Verdict) -> Iterator[tuple[str, Case]]:
        asking, is_statistical = self.asking, found.rule == Rule.STATISTICAL
        smaller = _down(asking.memory_bytes - found.short / (STATISTICAL_NEW if is_statistical else 1))
        if not asking.in_hugepages and smaller >= SMALLEST_ADVISED_BYTES:
            shrunk = replace(asking, memory_bytes=smaller)
            rest = tuple(shrunk if guest.name == self.name else guest for guest in self.guests)
            yield f'memory.size = "{Size(smaller)}"', replace(self, guests=rest)
        without = (
            (name, replace(self, guests=tuple(guest for guest in self.guests if guest.name != name)))
            for _, name in sorted((charge, name) for name, charge in found.charges.items() if name != self.name)
        )
        enough = next(((name, case) for name, case in without if case.refusal() is None), None)
        if enough:
            yield f"stop {enough[0]}", enough[1]
        if found.rule == Rule.SWAP_BACKED and self.swap_factor > 0:
            more = _up(found.short / self.swap_factor)
            memory = replace(self.memory, swap_total_bytes=self.memory.swap_total_bytes + more)
            yield f"{_size(more)} more swap", replace(self, memory=memory)
        if self.rule == Rule.STRICT:
            yield 'memory.admission = "swap_backed" in host.toml', replace(self, rule=Rule.SWAP_BACKED)
        reserve = _down(self.reserve - found.short / (STATISTICAL_FILL if is_statistical else 1))
        if reserve >= SMALLEST_RESERVE_BYTES:
            yield f'memory.reserve = "{Size(reserve)}" in host.toml', replace(self, reserve=reserve)


def account(case: Case) -> Account:
    """The sum that decides: of the rule that refuses the guest, else of the tightest."""
    return case.account()


def admit(case: Case) -> Problem | None:
    """None when the guest may run; else the refusal, with the rule, the sum and what would make it fit."""
    return case.problem()


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
