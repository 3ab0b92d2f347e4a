"""From samples to what admission counts."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from kvmd.effects.records import Sample
from kvmd.tuning.usage import summarise

samples_st = st.lists(
    st.builds(
        Sample,
        time=st.floats(0, 1e6),
        guest=st.sampled_from(["a", "b"]),
        demand_bytes=st.integers(0, 1 << 40),
        overhead_bytes=st.none() | st.integers(0, 1 << 30),
    )
)


def test_of_a_day_with_a_short_spike() -> None:
    day = [Sample(300.0 * n, "web", 1 << 30, 50 << 20) for n in range(280)]
    spike = [Sample(300.0 * n, "web", 4 << 30, 90 << 20) for n in range(280, 288)]
    usage = summarise([*spike, *day], 86_400.0)["web"]
    assert (usage.samples, usage.span_s) == (288, 86_400.0)
    assert usage.demand_p95_bytes == 1 << 30, "eight of 288 are less than five per cent"
    assert usage.overhead_bytes == 90 << 20, "of which the most counts"
    assert summarise([], 0) == {}


@given(samples_st, st.randoms())
def test_order_is_irrelevant_and_the_number_is_one_that_was_seen(samples: list[Sample], rnd) -> None:  # type: ignore[no-untyped-def]
    found = summarise(samples, 2e6)
    rnd.shuffle(samples)
    assert summarise(samples, 2e6) == found
    for guest, usage in found.items():
        demands = [sample.demand_bytes for sample in samples if sample.guest == guest]
        assert usage.demand_p95_bytes in demands
        assert sum(demand <= usage.demand_p95_bytes for demand in demands) >= math.ceil(0.95 * len(demands))
