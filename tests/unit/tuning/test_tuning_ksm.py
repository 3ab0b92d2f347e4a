"""The rate of page merging: trial, profit, rest, and whose knob it is."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvmd.tuning.ksm import (
    MAX_PAGES,
    REST_PAGES,
    Gear,
    KsmDecision,
    KsmLimits,
    KsmSample,
    KsmState,
    decide_ksm,
    ksm_applied,
)
from kvmd.tuning.snapshot import Mode

MIB = 1 << 20
OWNED = KsmLimits(owned=True, mode=Mode.APPLY, max_cpu=0.5, members=2)
START = KsmSample(
    run=1, pages_to_scan=100, sleep_ms=20, full_scans=0, pages_sharing=0, profit_bytes=0, pages_scanned=0, cpu_s=0.0
)


class Ksmd:
    """A scanner with a fixed cost per page, on a machine with so many pages to look at."""

    def __init__(self, *, cost_s: float = 2e-6, pages: int = 50_000, mib_per_scan: float = 0) -> None:
        self.sample, self.cost_s, self.pages, self.profit = START, cost_s, pages, mib_per_scan * MIB
        self.state, self.now = KsmState(), 0.0

    def look(self, limits: KsmLimits = OWNED, *, tight: bool = False) -> KsmDecision:
        """Ten seconds pass, then the law is asked and obeyed."""
        scanned = int(self.sample.pages_to_scan * 10 * 1000 / (self.sample.sleep_ms + 1))
        total = (self.sample.pages_scanned or 0) + scanned
        scans = total // self.pages
        self.sample = replace(
            self.sample,
            pages_scanned=total,
            full_scans=scans,
            profit_bytes=int(scans * self.profit),
            cpu_s=(self.sample.cpu_s or 0) + scanned * self.cost_s,
        )
        self.now += 10
        self.state, decision = decide_ksm(self.state, self.sample, limits, host_is_tight=tight, now_s=self.now)
        if decision.pages_to_scan is not None:
            self.sample = replace(self.sample, pages_to_scan=decision.pages_to_scan)
            self.state = ksm_applied(self.state, decision.pages_to_scan)
        return decision


def test_not_ours_not_touched() -> None:
    _, decision = decide_ksm(KsmState(), START, KsmLimits(), host_is_tight=False, now_s=0)
    assert (decision.rule, decision.pages_to_scan) == ("not-owned", None)


def test_no_members_no_scanning() -> None:
    ksmd = Ksmd()
    assert ksmd.look(replace(OWNED, members=1)).pages_to_scan == REST_PAGES


def test_trial_keeps_within_two_per_cent_of_a_cpu() -> None:
    ksmd = Ksmd(pages=10**9)
    for _ in range(5):
        ksmd.look()
    before = ksmd.sample.cpu_s or 0
    for _ in range(10):
        assert ksmd.look().gear is Gear.TRICKLE
    assert 0.01 < ((ksmd.sample.cpu_s or 0) - before) / 100 < 0.03


def test_judged_after_two_scans_and_faster_where_it_pays() -> None:
    ksmd = Ksmd(mib_per_scan=64)
    rules = [ksmd.look().rule for _ in range(12)]
    assert rules[0] == "trial"
    assert "pays" in rules
    assert ksmd.state.gear is Gear.RUN
    while ksmd.look(tight=True).rule != "pays":
        pass
    assert ksmd.state.gear is Gear.BOOST


def test_rests_where_it_does_not_pay_and_ever_longer() -> None:
    ksmd = Ksmd(mib_per_scan=0)
    rests: list[float] = []
    for _ in range(4000):
        if ksmd.look().rule == "does-not-pay":
            rests.append(ksmd.state.rest_s)
    assert rests[:3] == [600, 1200, 2400]
    assert max(rests) <= 4 * 3600
    assert ksmd.sample.pages_to_scan in (REST_PAGES, *range(16, MAX_PAGES))


def test_a_new_guest_ends_the_rest() -> None:
    ksmd = Ksmd(mib_per_scan=0)
    while ksmd.look().rule != "does-not-pay":
        pass
    assert ksmd.look().gear is Gear.REST
    assert ksmd.look(replace(OWNED, members=3)).rule == "trial"


def test_someone_elses_value_is_left_alone() -> None:
    ksmd = Ksmd()
    while ksmd.look().pages_to_scan is None:
        pass
    ksmd.sample = replace(ksmd.sample, pages_to_scan=777)
    decision = ksmd.look()
    assert (decision.rule, decision.pages_to_scan) == ("yielded", None)
    assert "777" in decision.why
    for sample in (replace(START, run=0), replace(START, run=2), replace(START, advisor="scan-time")):
        assert decide_ksm(KsmState(), sample, OWNED, host_is_tight=False, now_s=0)[1].rule == "yielded"


samples = st.builds(
    KsmSample,
    run=st.just(1),
    pages_to_scan=st.integers(0, 10**6),
    sleep_ms=st.integers(0, 10**4),
    full_scans=st.integers(0, 50),
    pages_sharing=st.integers(0, 10**6),
    profit_bytes=st.integers(-(10**9), 10**10),
    pages_scanned=st.none() | st.integers(0, 10**9),
    advisor=st.sampled_from([None, "none"]),
    cpu_s=st.none() | st.floats(0, 10**6),
)


@given(st.lists(samples, min_size=1, max_size=10), st.floats(0, 1))
def test_rate_is_always_sane(seen: list[KsmSample], max_cpu: float) -> None:
    state, now = KsmState(), 0.0
    for sample in seen:
        now += 10
        state, decision = decide_ksm(state, sample, replace(OWNED, max_cpu=max_cpu), host_is_tight=True, now_s=now)
        assert decision.why
        if decision.pages_to_scan is not None:
            assert REST_PAGES <= decision.pages_to_scan <= MAX_PAGES
