"""Reading QMP's figures, the host's states, the guest model and eligibility."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.tuning import constants as c
from kvmd.tuning.eligible import bar_of
from kvmd.tuning.hoststate import HostState, HostView, judge
from kvmd.tuning.model import GuestModel, learn
from kvmd.tuning.snapshot import (
    BalloonReading,
    GuestFacts,
    GuestLimits,
    GuestSample,
    HostSample,
    Mode,
    spare_bytes,
    stats_seen_at,
    usable_bytes,
)

MIB, GIB = 1 << 20, 1 << 30
M = 2 * GIB


def reading(available: int | None, *, actual: int = M, update: int = 1, **more: int) -> BalloonReading:
    return BalloonReading(actual, update, available, **more)


def sample(
    time_s: float, available: int | None, *, actual: int = M, psi: float | None = None, **more: int
) -> GuestSample:
    facts = GuestFacts("web", M, booted_s=3600)
    found = reading(available, actual=actual, update=int(time_s) + 1, **more)
    return GuestSample(facts, found, time_s, time_s, psi_some=psi)


def taught(*samples: GuestSample) -> GuestModel:
    model: GuestModel | None = None
    for one in samples:
        model = learn(model, one)
    assert model is not None
    return model


class TestReading:
    def test_linux_guest(self) -> None:
        stats = {
            "stats": {
                "stat-available-memory": 400 * MIB,
                "stat-free-memory": 300 * MIB,
                "stat-total-memory": 500 * MIB,
                "stat-swap-in": 0,
                "stat-major-faults": 12,
                "stat-htlb-pgalloc": 2**64 - 1,
            },
            "last-update": 1700000000,
        }
        found = BalloonReading.from_qmp(M, stats)
        assert found == BalloonReading(M, 1700000000, 400 * MIB, 300 * MIB, 500 * MIB, 0, 12)

    def test_unknown_is_none_and_not_a_number(self) -> None:
        found = BalloonReading.from_qmp(M, {"stats": {"stat-available-memory": 2**64 - 1}, "last-update": 0})
        assert found == BalloonReading(M)
        assert BalloonReading.from_qmp(M, {"stats": {"stat-swap-in": -1}}).swap_in_bytes is None

    json = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    )
    keys = st.sampled_from(["stats", "last-update", "stat-available-memory", "stat-swap-in", "stat-free-memory"])

    @given(st.dictionaries(keys, json | st.dictionaries(keys, json)))
    def test_any_answer_is_read_without_error(self, answer: dict[str, object]) -> None:
        found = BalloonReading.from_qmp(M, answer)
        for figure in (found.available_bytes, found.swap_in_bytes, found.free_bytes, found.last_update):
            assert figure is None or 0 <= figure < 1 << 62

    def test_age_counts_from_when_figures_changed(self) -> None:
        first = reading(1, update=1000)
        seen = stats_seen_at(None, None, first, now_s=50.0, wall_s=1003.0)
        assert seen == 48.0
        assert stats_seen_at(first, seen, reading(1, update=1000), now_s=60.0, wall_s=1013.0) == 48.0
        assert stats_seen_at(first, seen, reading(1, update=1010), now_s=60.0, wall_s=1013.0) == 60.0
        # a clock set back makes no figure young or old
        assert stats_seen_at(first, seen, reading(1, update=1000), now_s=70.0, wall_s=5.0) == 48.0
        assert stats_seen_at(first, seen, reading(1, update=0), now_s=70.0, wall_s=5.0) is None


class TestHostState:
    total = 100 * GIB

    def see(self, *shares: float, psi: float | None = None) -> list[HostState]:
        states: list[HostState] = []
        view: HostView | None = None
        for share in shares:
            view = judge(view, HostSample(self.total, int(share * self.total), psi_full=psi), 0)
            states.append(view.state)
        return states

    def test_thresholds(self) -> None:
        assert [self.see(share)[0].name for share in (0.5, 0.0801, 0.079, 0.039, 0.019)] == [
            "OK",
            "OK",
            "SOFT",
            "HARD",
            "CRIT",
        ]

    def test_worse_at_once(self) -> None:
        assert self.see(0.5, 0.01) == [HostState.OK, HostState.CRIT]

    def test_better_only_after_three_samples_and_above_the_hysteresis(self) -> None:
        assert self.see(0.03, 0.045, 0.045, 0.045, 0.045)[-1] is HostState.HARD
        assert [s.name for s in self.see(0.03, 0.06, 0.06, 0.06)] == ["HARD", "HARD", "HARD", "SOFT"]

    def test_between_soft_and_ok_nothing_changes(self) -> None:
        assert set(self.see(0.07, *[0.10] * 9)[1:]) == {HostState.SOFT}
        assert set(self.see(0.2, *[0.10] * 9)) == {HostState.OK}
        assert self.see(0.07, 0.12, 0.12, 0.12)[-1] is HostState.OK

    def test_a_dip_begins_the_count_anew(self) -> None:
        assert self.see(0.03, 0.06, 0.06, 0.041, 0.06, 0.06)[-1] is HostState.HARD

    def test_stalls_count_only_while_memory_is_scarce(self) -> None:
        assert self.see(0.1, psi=0.02) == [HostState.HARD]
        assert self.see(0.1, psi=0.2) == [HostState.CRIT]
        assert self.see(0.6, psi=0.5) == [HostState.OK]

    def test_reserve_and_pages_make_the_host_small(self) -> None:
        host = HostSample(24 * GIB, 21 * GIB, hugetlb_bytes=2 * GIB)
        assert usable_bytes(host, 20 * GIB) == 2 * GIB
        assert spare_bytes(host, 20 * GIB) == GIB
        assert judge(None, host, 20 * GIB).share == 0.5
        assert judge(None, host, 30 * GIB).state is HostState.CRIT

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
    def test_never_better_than_the_figures(self, shares: list[float]) -> None:
        for share, state in zip(shares, self.see(*shares), strict=True):
            assert state >= self.see(share)[0]


class TestModel:
    def test_used_is_actual_less_available(self) -> None:
        model = taught(sample(0, 1536 * MIB))
        assert model.used_bytes == 512 * MIB
        assert model.pressed is None

    def test_demand_rises_at_once_and_falls_slowly(self) -> None:
        model = taught(sample(0, 1536 * MIB), sample(2, 512 * MIB))
        assert model.demand_bytes == 1536 * MIB
        model = taught(sample(0, 512 * MIB), sample(100, 1536 * MIB))
        assert 512 * MIB + 0.36 * 1024 * MIB < model.demand_bytes < 512 * MIB + 0.38 * 1024 * MIB

    def test_old_figures_teach_nothing(self) -> None:
        first = sample(0, 1536 * MIB)
        model = taught(first)
        assert learn(model, replace(first, read_at_s=5.0)) is model

    def test_a_deflating_balloon_invents_no_demand(self) -> None:
        """Size is up to date, figures are a poll old: 512 MiB just given must not look used."""
        before = sample(0, 100 * MIB, actual=GIB)
        model = taught(before, sample(2, 100 * MIB, actual=GIB + 512 * MIB))
        assert model.used_bytes == GIB - 100 * MIB

    def test_pressed_by_what_is_available_and_headroom_grows(self) -> None:
        model = taught(*(sample(2 * tick, 10 * MIB) for tick in range(20)))
        assert model.pressed is not None
        assert "10 MiB available" in model.pressed
        assert model.headroom == c.HEADROOM_MAX
        calm = taught(*(sample(2 * tick, 10 * MIB) for tick in range(20)), sample(4000, GIB))
        assert c.HEADROOM_MIN < calm.headroom < 0.15

    def test_pressed_by_swapping_in(self) -> None:
        low, much = sample(0, 200 * MIB, swap_in_bytes=0), sample(2, 200 * MIB, swap_in_bytes=2 * MIB)
        assert "swaps in" in (taught(low, much).pressed or "")
        plenty = sample(2, 900 * MIB, swap_in_bytes=2 * MIB)
        assert taught(sample(0, 900 * MIB, swap_in_bytes=0), plenty).pressed is None

    def test_pressed_by_major_faults_against_its_own_baseline(self) -> None:
        calm = [sample(2.0 * tick, 300 * MIB, major_faults=tick * 30) for tick in range(40)]  # 15 a second always
        storm = sample(80, 300 * MIB, major_faults=39 * 30 + 110)
        assert taught(*calm).pressed is None
        assert taught(*calm, storm).pressed is None  # 55/s is below 4 x 15
        worse = sample(80, 300 * MIB, major_faults=39 * 30 + 140)
        assert "major faults" in (taught(*calm, worse).pressed or "")

    def test_pressed_by_its_own_stalls(self) -> None:
        assert taught(sample(0, 1000 * MIB, psi=0.06)).pressed is not None
        assert taught(sample(0, 1000 * MIB, psi=0.04)).pressed is None

    def test_a_reboot_of_the_guest_is_no_paging(self) -> None:
        before, after = sample(0, 200 * MIB, swap_in_bytes=GIB), sample(2, 200 * MIB, swap_in_bytes=0)
        assert taught(before, after).pressed is None

    def test_floor_and_wants_stay_between_guarantee_and_size(self) -> None:
        model = taught(sample(0, 1900 * MIB))
        assert model.floor_bytes(GIB, M) == GIB
        assert model.floor_bytes(0, M) == model.used_bytes + int(c.HEADROOM_MIN * M) + 1
        full = taught(sample(0, 0))
        assert full.wanted_bytes(0, M) == full.floor_bytes(0, M) == M

    def test_lean_floor_forgets_half_of_a_peak(self) -> None:
        model = taught(sample(0, 48 * MIB), sample(2, 1048 * MIB))
        assert model.floor_bytes(0, M, lean=True) < model.floor_bytes(0, M) - 300 * MIB

    @given(st.lists(st.tuples(st.integers(0, M), st.integers(0, 2 * M)), min_size=1, max_size=20))
    def test_any_figures_give_sane_needs(self, figures: list[tuple[int, int]]) -> None:
        model = taught(*(sample(2.0 * n, available, actual=actual) for n, (actual, available) in enumerate(figures)))
        assert 0 <= model.demand_bytes <= M
        assert c.HEADROOM_MIN <= model.headroom <= c.HEADROOM_MAX
        assert 0 <= model.floor_bytes(0, M, lean=True) <= model.floor_bytes(0, M) <= M
        assert 0 <= model.wanted_bytes(0, M) <= M


class TestEligible:
    limits = GuestLimits(GIB, mode=Mode.APPLY)
    now = 1000.0

    def rule(self, one: GuestSample, limits: GuestLimits | None = limits) -> str | None:
        model = learn(None, one)
        bar = bar_of(one, limits, model, self.now)
        return bar.rule if bar else None

    @property
    def good(self) -> GuestSample:
        return sample(self.now, GIB)

    def test_a_running_guest_with_fresh_figures_may_give(self) -> None:
        assert self.rule(self.good) is None

    @pytest.mark.parametrize(
        ("change", "rule"),
        [
            ({"hugepages": True, "balloon": False}, "hugepages"),
            ({"locked": True}, "locked"),
            ({"vfio": True}, "vfio"),
            ({"confidential": True}, "confidential"),
            ({"balloon": False}, "no-balloon"),
            ({"migrating": True, "state": "paused"}, "migrating"),
            ({"state": "paused"}, "state"),
            ({"state": "unreachable"}, "state"),
            ({"booted_s": 30.0}, "booting"),
        ],
    )
    def test_first_reason(self, change: dict[str, object], rule: str) -> None:
        facts = replace(self.good.facts, **change)  # type: ignore[arg-type]
        assert self.rule(replace(self.good, facts=facts)) == rule

    def test_reasons_of_the_figures(self) -> None:
        assert self.rule(replace(self.good, reading=None)) == "unread"
        assert self.rule(replace(self.good, stats_at_s=None)) == "no-driver"
        assert self.rule(replace(self.good, stats_at_s=self.now - 7)) == "stale"
        assert self.rule(replace(self.good, stats_at_s=self.now - 11, poll_s=30.0)) == "ageing"
        assert self.rule(replace(self.good, reading=reading(None))) == "no-figures"

    def test_reasons_of_the_files(self) -> None:
        assert self.rule(self.good, None) == "opted-out"
        assert self.rule(self.good, replace(self.limits, mode=Mode.OFF)) == "opted-out"
        assert self.rule(self.good, replace(self.limits, dedicated=True)) == "dedicated"

    def test_nonsense_twice_is_not_believed(self) -> None:
        lies = [sample(self.now - 2, 3 * M), sample(self.now, 3 * M)]
        bar = bar_of(lies[1], self.limits, taught(*lies), self.now)
        assert bar is not None
        assert (bar.rule, bar.give) == ("contradiction", True)

    def test_a_guest_that_has_settled_has_booted(self) -> None:
        samples = [sample(self.now - 30 + 2 * n, GIB) for n in range(16)]
        young = replace(samples[-1], facts=replace(samples[-1].facts, booted_s=40.0))
        assert bar_of(young, self.limits, taught(*samples), self.now) is None

    def test_blind_guests_may_be_given_to_and_untouchable_ones_not(self) -> None:
        blind = bar_of(replace(self.good, stats_at_s=None), self.limits, None, self.now)
        paused = bar_of(replace(self.good, facts=replace(self.good.facts, state="paused")), self.limits, None, self.now)
        assert blind is not None
        assert blind.give
        assert paused is not None
        assert not paused.give
