"""A small deterministic world that turns the real policy and rails: a host, guests with demand traces, balloons with a
speed. A trace is data (JSON), so a new situation needs no code.

What it models: a guest's working set and page cache, reclaim and shortage when the balloon leaves too little, pages
that once touched stay the host's burden until the balloon takes them. What it does not: CPU, I/O, NUMA, real latency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmd.tuning import constants as c
from kvmd.tuning.constants import MIB
from kvmd.tuning.decision import Decision, Kind
from kvmd.tuning.engine import EngineState, applied, tick
from kvmd.tuning.snapshot import (
    BalloonReading,
    GuestFacts,
    GuestLimits,
    GuestSample,
    HostSample,
    Limits,
    Mode,
    Snapshot,
    spare_bytes,
    stats_seen_at,
)

WALL_START_S = 1_700_000_000.0
KERNEL_SHARE = 0.03  # of M: what a guest's kernel keeps from being "available"
CACHE_BPS = 64 * MIB  # how fast page cache grows into free memory
STEP_S = 1.0


@dataclass(frozen=True, slots=True)
class GuestTrace:
    """One guest. `demand` is its working set as (second, MiB) corners, linear between, constant after the last.

    `stats`: "honest", "none" (no driver), "liar" (claims everything is available), "greedy" (claims nothing is), or
    "silent" (stops reporting at `silent_at_s`).
    """

    name: str
    memory_mib: int
    demand: tuple[tuple[float, float], ...]
    guaranteed_mib: int = 0
    shares: int = 100
    cache_mib: float = 0.0
    start_mib: int | None = None  # balloon size at the start, M by default
    booted_s: float = 3600.0
    stats: str = "honest"
    silent_at_s: float = 0.0
    hugepages: bool = False
    vfio: bool = False
    mode: str = "apply"
    balloon_mib_per_s: float = 400.0

    def demand_bytes(self, time_s: float) -> int:
        """The working set at this second."""
        before_s, before = self.demand[0]
        for at_s, mib in self.demand:
            if time_s < at_s:
                part = (time_s - before_s) / (at_s - before_s) if at_s > before_s else 1.0
                return int((before + (mib - before) * max(0.0, part)) * MIB)
            before_s, before = at_s, mib
        return int(before * MIB)


@dataclass(frozen=True, slots=True)
class Trace:
    """A situation: host sizes in MiB; `own_mib` is what the host itself uses."""

    name: str
    duration_s: float
    total_mib: int
    guests: tuple[GuestTrace, ...]
    own_mib: int = 0
    reserve_mib: int = 0
    hugetlb_mib: int = 0
    host_blind_at_s: float | None = None  # from then on the host's figures cannot be read
    host_late_s: float = 0.0  # memory that came back shows in MemAvailable so much later

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trace:
        """From the data of a trace file. Raises TypeError or KeyError on a malformed one."""
        guests = []
        for guest in data["guests"]:
            corners = tuple((float(at), float(mib)) for at, mib in guest["demand"])
            guests.append(GuestTrace(**{**guest, "demand": corners}))
        return cls(**{**data, "guests": tuple(guests)})

    def limits(self) -> Limits:
        """The configuration this trace runs under."""
        guests = {
            guest.name: GuestLimits(guest.guaranteed_mib * MIB, guest.shares, Mode(guest.mode)) for guest in self.guests
        }
        return Limits(Mode.APPLY, self.reserve_mib * MIB, guests)


@dataclass(slots=True)
class SimGuest:
    """The moving parts of one guest. `touched_bytes` is what the host has had to back."""

    trace: GuestTrace
    actual_bytes: int
    target_bytes: int
    cache_bytes: int = 0
    touched_bytes: int = 0
    shortage_bytes: int = 0
    swapped_in_bytes: int = 0
    major_faults: int = 0
    reported: BalloonReading | None = None
    reading: BalloonReading | None = None
    read_at_s: float | None = None
    stats_at_s: float | None = None
    poll_s: float = c.TICK_S

    def live(self, time_s: float, dt_s: float) -> None:
        """One step of life: the balloon moves, the working set is what the trace says, cache takes what is free."""
        pace = int(self.trace.balloon_mib_per_s * MIB * dt_s)
        if self.actual_bytes > self.target_bytes:
            self.actual_bytes = max(self.target_bytes, self.actual_bytes - pace)
        else:
            self.actual_bytes = min(self.target_bytes, self.actual_bytes + pace)
        kernel = int(KERNEL_SHARE * self.trace.memory_mib * MIB)
        room = max(0, self.actual_bytes - kernel)
        demand = self.trace.demand_bytes(time_s)
        self.shortage_bytes = max(0, demand - room)
        free = max(0, room - demand)
        self.cache_bytes = min(free, int(self.trace.cache_mib * MIB), self.cache_bytes + int(CACHE_BPS * dt_s))
        self.touched_bytes = min(
            self.actual_bytes, max(self.touched_bytes, kernel + min(demand, room) + self.cache_bytes)
        )
        self.swapped_in_bytes += int(self.shortage_bytes * 0.05 * dt_s)
        self.major_faults += int(self.shortage_bytes / MIB * dt_s)
        self._report(time_s, free)

    def _report(self, time_s: float, available: int) -> None:
        """What its driver says this second."""
        stats = self.trace.stats
        if stats == "none" or (stats == "silent" and time_s >= self.trace.silent_at_s):
            return
        if stats == "liar":
            available = self.trace.memory_mib * MIB * 2
        elif stats == "greedy":
            available = 0
        self.reported = BalloonReading(
            actual_bytes=self.actual_bytes,
            last_update=int(WALL_START_S + time_s) + 1,
            available_bytes=available,
            swap_in_bytes=self.swapped_in_bytes,
            major_faults=self.major_faults,
        )

    @property
    def rss_bytes(self) -> int:
        """What /proc says of its QEMU."""
        return self.touched_bytes + c.QEMU_OWN_BYTES

    def read(self, time_s: float) -> None:
        """The agent's poll."""
        last = self.reported or BalloonReading(self.actual_bytes)
        reading = BalloonReading(
            actual_bytes=self.actual_bytes,
            last_update=last.last_update,
            available_bytes=last.available_bytes,
            swap_in_bytes=last.swap_in_bytes,
            major_faults=last.major_faults,
        )
        wall_s = WALL_START_S + time_s
        self.stats_at_s = stats_seen_at(self.reading, self.stats_at_s, reading, now_s=time_s, wall_s=wall_s)
        self.reading, self.read_at_s = reading, time_s

    def sample(self, time_s: float) -> GuestSample:
        """What the agent knows of it."""
        trace = self.trace
        facts = GuestFacts(
            trace.name,
            trace.memory_mib * MIB,
            booted_s=trace.booted_s + time_s,
            hugepages=trace.hugepages,
            vfio=trace.vfio,
        )
        return GuestSample(facts, self.reading, self.read_at_s, self.stats_at_s, self.poll_s, self.rss_bytes)


@dataclass(frozen=True, slots=True)
class Point:
    """The world after one tick: per guest (actual, target, shortage), in trace order; the host's spare bytes."""

    time_s: float
    guests: tuple[tuple[int, int, int], ...]
    host_spare_bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """An applied decision, with the sample it was made on."""

    time_s: float
    decision: Decision
    sample: GuestSample


@dataclass(slots=True)
class Run:
    """All that happened, for the measures below."""

    trace: Trace
    points: list[Point] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)
    vetoes: list[tuple[float, Decision]] = field(default_factory=list)


def run(trace: Trace) -> Run:
    """Play the trace with the real engine: ticks of 2 s, quiet guests polled more rarely, exactly as the agent does."""
    world = [
        SimGuest(guest, start := (guest.start_mib or guest.memory_mib) * MIB, start, touched_bytes=0)
        for guest in trace.guests
    ]
    by_name = {guest.trace.name: guest for guest in world}
    limits, state, result = trace.limits(), EngineState(), Run(trace)
    busy: frozenset[str] = frozenset(by_name)
    held: list[int] = []
    time_s = 0.0
    while time_s < trace.duration_s:
        for guest in world:
            guest.live(time_s, STEP_S)
        held.append(_held_bytes(world))
        seen = max(held[-1 - round(trace.host_late_s / STEP_S) :])
        if time_s % c.TICK_S == 0:
            for guest in world:
                guest.poll_s = c.TICK_S if guest.trace.name in busy else c.QUIET_TICK_S
                if guest.read_at_s is None or time_s - guest.read_at_s >= guest.poll_s:
                    guest.read(time_s)
            host = _host(trace, seen, time_s)
            snapshot = Snapshot(time_s, WALL_START_S + time_s, host, tuple(guest.sample(time_s) for guest in world))
            outcome = tick(state, snapshot, limits)
            state, busy = outcome.state, outcome.busy
            samples = {sample.name: sample for sample in snapshot.guests}
            for wanted, decision in zip(outcome.wanted, outcome.decisions, strict=True):
                result.decisions.append((time_s, decision))
                if wanted != decision:
                    result.vetoes.append((time_s, decision))
                if decision.kind is not Kind.NONE and limits.guests[decision.guest].mode is Mode.APPLY:
                    by_name[decision.guest].target_bytes = decision.to_bytes
                    state = applied(state, decision, time_s)
                    result.steps.append(Step(time_s, decision, samples[decision.guest]))
        spare = spare_bytes(_host(trace, held[-1], 0.0) or HostSample(0, 0), limits.reserve_bytes)
        sizes = tuple((guest.actual_bytes, guest.target_bytes, guest.shortage_bytes) for guest in world)
        result.points.append(Point(time_s, sizes, spare))
        time_s += STEP_S
    return result


def _held_bytes(world: Sequence[SimGuest]) -> int:
    return sum(guest.rss_bytes for guest in world if not guest.trace.hugepages)


def _host(trace: Trace, held: int, time_s: float) -> HostSample | None:
    if trace.host_blind_at_s is not None and time_s >= trace.host_blind_at_s:
        return None
    total, hugetlb = trace.total_mib * MIB, trace.hugetlb_mib * MIB
    return HostSample(total, max(0, total - trace.own_mib * MIB - hugetlb - held), hugetlb)


def shortage_gib_s(result: Run, guest: str | None = None) -> float:
    """Sum over time of what working sets lacked, GiB times seconds; of one guest or of all."""
    names = [trace.name for trace in result.trace.guests]
    wanted = [index for index, name in enumerate(names) if guest is None or name == guest]
    return sum(point.guests[index][2] for point in result.points for index in wanted) * STEP_S / c.GIB


def time_to_relief_s(result: Run, guest: str) -> float | None:
    """Seconds from a guest's first shortage to the end of its last one; 0 without any, None if it never ended."""
    index = [trace.name for trace in result.trace.guests].index(guest)
    short = [point.time_s for point in result.points if point.guests[index][2] > 0]
    if not short:
        return 0.0
    if result.points and short[-1] == result.points[-1].time_s:
        return None
    return short[-1] + STEP_S - short[0]


def reversals(result: Run, guest: str | None = None, *, after_s: float = 0.0) -> int:
    """How often a step of a guest went the other way than its last one."""
    last: dict[str, Kind] = {}
    count = 0
    for step in result.steps:
        decision = step.decision
        if guest is not None and decision.guest != guest:
            continue
        turned = last.get(decision.guest) not in (None, decision.kind)
        count += turned and step.time_s >= after_s
        last[decision.guest] = decision.kind
    return count
