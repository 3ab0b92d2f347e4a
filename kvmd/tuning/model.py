"""What one guest needs, learnt from its balloon's figures: demand, head-room, floor, pressure. Pure.

used = actual - available. Not total - free: with deflate-on-oom MemTotal does not follow the balloon, and free memory
misreads page cache. The model only moves on figures it has not seen before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from kvmd.tuning import constants as c
from kvmd.tuning.decision import mib
from kvmd.tuning.snapshot import BalloonReading, GuestSample


@dataclass(frozen=True, slots=True)
class GuestModel:
    """State of the law for one guest, all of it from its own figures."""

    stats_at_s: float
    actual_bytes: int  # balloon size seen with the previous figures
    available_bytes: int
    used_bytes: int
    demand_bytes: float
    headroom: float = c.HEADROOM_MIN  # share of M
    growth_bps: float = 0.0
    pressed: str | None = None  # why, with the numbers
    steady_since_s: float = 0.0  # use has not risen by a dead band since
    steady_bytes: int = 0
    fault_baseline: float | None = None  # major faults a second while not pressed
    swap_in_bytes: int | None = None
    major_faults: int | None = None
    contradictions: int = 0

    def floor_bytes(self, guaranteed_bytes: int, memory_bytes: int, *, lean: bool = False) -> int:
        """f: what it keeps while others are served, demand plus head-room, between its guarantee and M.

        `lean` is for a starving neighbour: insurance against the guest's own next peak must not outweigh a need that
        is there now, so it counts the least head-room and only part of the past peak.
        """
        demand, headroom = self.demand_bytes, self.headroom
        if lean:
            demand, headroom = self.used_bytes + c.LEAN_DEMAND * (demand - self.used_bytes), c.HEADROOM_MIN
        return min(memory_bytes, max(guaranteed_bytes, math.ceil(demand + headroom * memory_bytes)))

    def wanted_bytes(self, guaranteed_bytes: int, memory_bytes: int) -> int:
        """The size that would end its pressure, foreseeing what it grows until it can be asked again."""
        wanted = self.demand_bytes + c.WANT_HEADROOMS * self.headroom * memory_bytes
        wanted += self.growth_bps * c.GROWTH_LOOKAHEAD_S
        return min(memory_bytes, max(guaranteed_bytes, math.ceil(wanted)))


def learn(model: GuestModel | None, sample: GuestSample) -> GuestModel | None:
    """The model after this sample; None while there are no figures to learn from."""
    reading, at_s = sample.reading, sample.stats_at_s
    if reading is None or at_s is None or reading.available_bytes is None:
        return model
    if model is not None and at_s <= model.stats_at_s:
        return model
    memory = sample.facts.memory_bytes
    if reading.available_bytes > reading.actual_bytes * c.CONTRADICTION + c.SETTLE_SLACK_BYTES:
        return _contradicted(model, reading, at_s)
    if model is None:
        used = max(0, reading.actual_bytes - reading.available_bytes)
        fresh = GuestModel(
            at_s,
            reading.actual_bytes,
            reading.available_bytes,
            used,
            float(used),
            steady_since_s=at_s,
            steady_bytes=used,
        )
        return _judge_pressure(fresh, reading, memory, sample.psi_some, 0.0, _Rates(None, None))
    return _advance(model, reading, at_s, memory, sample.psi_some)


def _contradicted(model: GuestModel | None, reading: BalloonReading, at_s: float) -> GuestModel:
    """More available than there is. Once may be a balloon on the move; the model keeps what it knew."""
    if model is None:
        return GuestModel(
            at_s, reading.actual_bytes, 0, reading.actual_bytes, float(reading.actual_bytes), contradictions=1
        )
    return replace(
        model,
        stats_at_s=at_s,
        actual_bytes=reading.actual_bytes,
        pressed=None,
        growth_bps=0.0,
        contradictions=model.contradictions + 1,
    )


@dataclass(frozen=True, slots=True)
class _Rates:
    swap_in_bps: float | None
    faults_per_s: float | None


def _rate(before: int | None, after: int | None, dt_s: float) -> float | None:
    """Of a counter; None when unknown or when it went back (the guest rebooted)."""
    if before is None or after is None or after < before:
        return None
    return (after - before) / dt_s


def _advance(
    model: GuestModel, reading: BalloonReading, at_s: float, memory: int, psi_some: float | None
) -> GuestModel:
    available = reading.available_bytes or 0
    dt = max(1.0, at_s - model.stats_at_s)
    # The figures are up to a poll older than the balloon's size. Of all sizes it may have had then, the one
    # counts that changes use the least: a balloon on the move neither invents demand nor hides it.
    sizes = sorted((model.actual_bytes, reading.actual_bytes))
    least, most = (max(0, size - available) for size in sizes)
    used = min(most, max(least, model.used_bytes))
    demand = max(float(used), used + (model.demand_bytes - used) * math.exp(-dt / c.DEMAND_DECAY_S))
    grown = used > model.steady_bytes + c.dead_band_bytes(memory)
    advanced = replace(
        model,
        stats_at_s=at_s,
        actual_bytes=reading.actual_bytes,
        available_bytes=available,
        used_bytes=used,
        demand_bytes=demand,
        growth_bps=max(0.0, (used - model.used_bytes) / dt),
        steady_since_s=at_s if grown else model.steady_since_s,
        steady_bytes=used if grown else min(model.steady_bytes, used),
        contradictions=0,
    )
    rates = _Rates(
        _rate(model.swap_in_bytes, reading.swap_in_bytes, dt), _rate(model.major_faults, reading.major_faults, dt)
    )
    return _judge_pressure(advanced, reading, memory, psi_some, dt, rates)


def _judge_pressure(
    model: GuestModel, reading: BalloonReading, memory: int, psi_some: float | None, dt: float, rates: _Rates
) -> GuestModel:
    available = reading.available_bytes or 0
    pressed = _pressure(model, available, memory, psi_some, rates)
    baseline = model.fault_baseline
    if rates.faults_per_s is not None and pressed is None:
        weight = 1 - math.exp(-dt / c.FAULT_BASELINE_S)
        baseline = rates.faults_per_s if baseline is None else baseline + weight * (rates.faults_per_s - baseline)
    if pressed is not None:
        headroom = min(c.HEADROOM_MAX, model.headroom * c.HEADROOM_GROWTH)
    else:
        headroom = c.HEADROOM_MIN + (model.headroom - c.HEADROOM_MIN) * math.exp(-dt / c.HEADROOM_DECAY_S)
    return replace(
        model,
        pressed=pressed,
        headroom=headroom,
        fault_baseline=baseline,
        swap_in_bytes=reading.swap_in_bytes,
        major_faults=reading.major_faults,
    )


def _pressure(model: GuestModel, available: int, memory: int, psi_some: float | None, rates: _Rates) -> str | None:
    """Why the guest is short of memory now, with figures and threshold; None when it is not."""
    least = int(c.PRESSED_FRACTION * model.headroom * memory)
    least = max(least, c.pressed_min_bytes(memory))
    if available < least:
        return f"only {mib(available)} available in it (below {mib(least)})"
    if psi_some is not None and psi_some > c.GUEST_PSI_SOME:
        return f"its tasks wait for memory {psi_some:.0%} of the time (above {c.GUEST_PSI_SOME:.0%})"
    if available >= c.PAGING_HEADROOMS * model.headroom * memory:
        return None
    if rates.swap_in_bps is not None and rates.swap_in_bps > c.SWAP_IN_BPS:
        return f"it swaps in {mib(rates.swap_in_bps)}/s (above 256 KiB/s)"
    limit = max(c.MAJOR_FAULTS_PER_S, c.MAJOR_FAULTS_FACTOR * (model.fault_baseline or 0.0))
    if rates.faults_per_s is not None and rates.faults_per_s > limit:
        return f"{rates.faults_per_s:.0f} major faults/s (above {limit:.0f})"
    return None
