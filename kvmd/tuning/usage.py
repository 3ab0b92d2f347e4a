"""What a guest was seen to need: from samples to the two numbers that admission counts. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

from kvmd.facts import Usage

PERCENTILE = 0.95


class Sample(Protocol):
    """One row of history.db."""

    @property
    def time(self) -> float: ...

    @property
    def guest(self) -> str: ...

    @property
    def demand_bytes(self) -> int: ...

    @property
    def overhead_bytes(self) -> int | None: ...


def summarise(samples: Iterable[Sample], now: float) -> Mapping[str, Usage]:
    """By guest; the order of samples is irrelevant. `now` in UNIX seconds."""
    by_guest: dict[str, list[Sample]] = {}
    for sample in samples:
        by_guest.setdefault(sample.guest, []).append(sample)
    return {guest: _usage(found, now) for guest, found in by_guest.items()}


def _usage(samples: list[Sample], now: float) -> Usage:
    demands = sorted(sample.demand_bytes for sample in samples)
    overheads = [sample.overhead_bytes for sample in samples if sample.overhead_bytes is not None]
    return Usage(
        samples=len(samples),
        span_s=max(0.0, now - min(sample.time for sample in samples)),
        demand_p95_bytes=demands[math.ceil(PERCENTILE * len(demands)) - 1],
        overhead_bytes=max(overheads, default=None),
    )
