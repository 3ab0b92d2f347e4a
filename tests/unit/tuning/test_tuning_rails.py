"""Guard rails: each stops its own mistake, whatever the policy believed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmd.tuning.decision import Decision, Kind
from kvmd.tuning.rails import Need, RailState, Track, check, check_all, need_of, record, record_effect, watch
from kvmd.tuning.snapshot import (
    BalloonReading,
    GuestFacts,
    GuestLimits,
    GuestSample,
    HostSample,
    Limits,
    Mode,
    Snapshot,
)

MIB, GIB = 1 << 20, 1 << 30
M = 4 * GIB
NOW = 1000.0
LIMITS = GuestLimits(GIB, mode=Mode.APPLY)
SAMPLE = GuestSample(
    GuestFacts("web", M, booted_s=3600), BalloonReading(3 * GIB, 1, GIB), read_at_s=NOW, stats_at_s=NOW
)
TAKE = Decision(
    guest="web", kind=Kind.TAKE, from_bytes=3 * GIB, to_bytes=3 * GIB - 256 * MIB, rule="reclaim", why="because"
)
GIVE = replace(TAKE, kind=Kind.GIVE, to_bytes=3 * GIB + 256 * MIB)


def judged(
    decision: Decision,
    *,
    sample: GuestSample = SAMPLE,
    limits: GuestLimits | None = LIMITS,
    track: Track | None = None,
    need: Need = Need.NONE,
) -> Decision:
    return check(decision, sample, limits, track or Track(), NOW, need)


def test_good_steps_pass_unchanged() -> None:
    assert judged(TAKE) == TAKE
    assert judged(GIVE) == GIVE


def test_targets_are_clamped_to_guarantee_and_size() -> None:
    deep = replace(TAKE, from_bytes=GIB + 100 * MIB, to_bytes=GIB - 300 * MIB)
    assert judged(deep).to_bytes == GIB
    assert "guard rail" in (judged(deep).limited_by or "")
    assert judged(replace(GIVE, to_bytes=9 * GIB)).to_bytes == M


def test_steps_are_clamped_to_half_of_the_spare_and_to_the_step_limit() -> None:
    far = replace(TAKE, to_bytes=2 * GIB)
    assert judged(far).to_bytes == 3 * GIB - 512 * MIB
    little = replace(SAMPLE, reading=BalloonReading(3 * GIB, 1, 200 * MIB))
    assert judged(far, sample=little).to_bytes == 3 * GIB - 100 * MIB
    assert judged(far, sample=little, need=Need.CRISIS).to_bytes == 3 * GIB - 100 * MIB
    plenty = replace(SAMPLE, reading=BalloonReading(3 * GIB, 1, 2 * GIB))
    assert judged(far, sample=plenty, need=Need.CRISIS).to_bytes == 2 * GIB


@pytest.mark.parametrize(
    "change",
    [
        {"hugepages": True},
        {"locked": True},
        {"vfio": True},
        {"confidential": True},
        {"balloon": False},
        {"migrating": True},
        {"state": "paused"},
    ],
)
def test_untouchable_guests(change: dict[str, object]) -> None:
    sample = replace(SAMPLE, facts=replace(SAMPLE.facts, **change))  # type: ignore[arg-type]
    assert judged(TAKE, sample=sample).rule == "veto-ineligible"
    assert judged(GIVE, sample=sample).rule == "veto-ineligible"


@pytest.mark.parametrize(
    ("sample", "rule"),
    [
        (replace(SAMPLE, stats_at_s=None), "veto-stale"),
        (replace(SAMPLE, stats_at_s=NOW - 11), "veto-stale"),
        (replace(SAMPLE, reading=BalloonReading(3 * GIB, 1)), "veto-stale"),
        (replace(SAMPLE, reading=None), "veto-stale"),
        (replace(SAMPLE, facts=replace(SAMPLE.facts, booted_s=5.0)), "veto-ineligible"),
    ],
)
def test_nothing_is_taken_on_bad_figures_but_given_it_may_be(sample: GuestSample, rule: str) -> None:
    assert judged(TAKE, sample=sample).rule == rule
    assert judged(GIVE, sample=sample) == GIVE


@pytest.mark.parametrize(
    ("track", "rule"),
    [
        (Track(last_give_s=NOW - 30), "veto-reversal"),
        (Track(hold_until_s=NOW + 10, hold_s=60), "veto-hold"),
        (Track(barred_until_s=NOW + 10), "veto-ineffective"),
        (Track(last_write_s=NOW - 0.5), "veto-rate"),
    ],
)
def test_timing(track: Track, rule: str) -> None:
    assert judged(TAKE, track=track).rule == rule


def test_only_dire_need_suspends_holds_and_reversals_and_no_other_rule() -> None:
    track = Track(last_give_s=NOW - 30, hold_until_s=NOW + 10)
    assert judged(TAKE, track=track, need=Need.DIRE) == TAKE
    assert judged(TAKE, track=track, need=Need.CRISIS).kind is Kind.NONE
    assert judged(TAKE, track=Track(barred_until_s=NOW + 10), need=Need.DIRE).kind is Kind.NONE


def test_a_starving_neighbour_waits_for_the_first_minute_of_a_hold_only() -> None:
    track = Track(hold_s=240, hold_until_s=NOW + 100)  # begun 140 s ago
    assert judged(TAKE, track=track).rule == "veto-hold"
    assert judged(replace(TAKE, for_guests_bytes=MIB), track=track).kind is Kind.TAKE


def test_help_in_need_is_not_vetoed_for_timing() -> None:
    track = Track(last_take_s=NOW - 5, barred_until_s=NOW + 10)
    assert judged(GIVE, track=track).kind is Kind.NONE
    assert judged(replace(GIVE, urgent=True), track=track).kind is Kind.GIVE


def test_off_and_unknown_guests() -> None:
    assert judged(TAKE, limits=None).rule == "veto-off"
    assert judged(TAKE, limits=replace(LIMITS, mode=Mode.OFF)).rule == "veto-off"
    assert judged(TAKE, limits=replace(LIMITS, dedicated=True)).rule == "veto-ineligible"


def test_steps_in_the_wrong_direction() -> None:
    assert judged(replace(TAKE, to_bytes=TAKE.from_bytes)).kind is Kind.NONE
    assert judged(replace(GIVE, to_bytes=GIVE.from_bytes - MIB)).kind is Kind.NONE


def test_a_veto_says_what_was_wanted_and_why_not() -> None:
    veto = judged(TAKE, track=Track(last_give_s=NOW - 30))
    assert veto.to_bytes == veto.from_bytes
    assert "given memory 30 s ago" in veto.why
    assert "take 256 MiB" in veto.why


def test_without_host_figures_or_guest_nothing_passes() -> None:
    limits = Limits(Mode.APPLY, 0, {"web": LIMITS})
    blind = Snapshot(NOW, NOW, None, (SAMPLE,))
    assert check_all((TAKE, GIVE), blind, limits, RailState())[0].rule == "veto-no-data"
    empty = Snapshot(NOW, NOW, HostSample(GIB, GIB), ())
    assert check_all((TAKE,), empty, limits, RailState())[0].kind is Kind.NONE


def test_crisis_is_judged_by_raw_figures() -> None:
    assert need_of(HostSample(100 * GIB, 2 * GIB), 0) is Need.DIRE
    assert need_of(HostSample(100 * GIB, 20 * GIB), 0) is Need.NONE
    assert need_of(HostSample(100 * GIB, 20 * GIB), 19 * GIB) is Need.CRISIS
    assert need_of(HostSample(100 * GIB, 20 * GIB), 21 * GIB) is Need.CRISIS
    assert need_of(HostSample(100 * GIB, 20 * GIB), 50 * GIB) is Need.DIRE
    assert need_of(HostSample(100 * GIB, 50 * GIB, psi_full=0.2), GIB) is Need.CRISIS


def test_holds_double_while_taking_keeps_hurting() -> None:
    rails = record(RailState(), TAKE, NOW)
    short = replace(SAMPLE, reading=BalloonReading(3 * GIB, 1, 5 * MIB))

    def at(now: float, sample: GuestSample) -> RailState:
        return watch(rails, Snapshot(now, now, None, (sample,)))

    assert at(NOW + 5, SAMPLE).of("web").hold_until_s is None
    assert at(NOW + 40, short).of("web").hold_until_s is None, "too late to be the take's doing"
    rails = at(NOW + 5, short)
    assert rails.of("web").hold_until_s == NOW + 65
    rails = record(rails, TAKE, NOW + 70)
    rails = at(NOW + 75, short)
    assert rails.of("web").hold_until_s == NOW + 75 + 120
    for _ in range(8):
        later = (rails.of("web").hold_until_s or 0) + 1
        rails = record(rails, TAKE, later)
        rails = at(later + 1, short)
    assert rails.of("web").hold_s == 900


def test_two_steps_without_effect_bar_the_guest() -> None:
    rails = record_effect(RailState(), "web", effective=False, now_s=NOW)
    assert rails.of("web").barred_until_s is None
    assert record_effect(rails, "web", effective=True, now_s=NOW).of("web").without_effect == 0
    rails = record_effect(rails, "web", effective=False, now_s=NOW)
    assert rails.of("web").barred_until_s == NOW + 900
