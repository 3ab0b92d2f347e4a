"""Guard rails: every step checked once more, from raw facts and the record of steps alone. Pure.

Deliberately knows nothing of the policy's model, views or reasons, so that a mistake there is stopped here. A rail
clamps or vetoes and says so. Deflating for a guest in need is never vetoed for timing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from types import MappingProxyType

from kvmd.tuning import constants as c
from kvmd.tuning.decision import Decision, Kind, mib
from kvmd.tuning.snapshot import (
    GuestLimits,
    GuestSample,
    HostSample,
    Limits,
    Mode,
    Snapshot,
    spare_bytes,
    usable_bytes,
)

Veto = tuple[str, str]  # short name, clause


class Need(IntEnum):
    """How badly the host needs memory: in a CRISIS steps have no limit, when it is DIRE holds protect no more."""

    NONE = 0
    CRISIS = 1
    DIRE = 2


@dataclass(frozen=True, slots=True)
class Track:
    """The steps one guest has had, and how they went. Times are on the snapshot's clock; None: never."""

    last_write_s: float | None = None
    last_take_s: float | None = None
    last_give_s: float | None = None
    hold_s: float = 0.0
    hold_until_s: float | None = None
    without_effect: int = 0
    barred_until_s: float | None = None


@dataclass(frozen=True, slots=True)
class RailState:
    """Per guest, by name."""

    tracks: Mapping[str, Track] = field(default_factory=lambda: MappingProxyType({}))

    def of(self, guest: str) -> Track:
        """The guest's track, empty when it never had a step."""
        return self.tracks.get(guest, Track())


def check_all(
    decisions: tuple[Decision, ...], snapshot: Snapshot, limits: Limits, rails: RailState
) -> tuple[Decision, ...]:
    """`check` for one tick's decisions; without host figures, or for an unknown guest, nothing passes."""
    samples = {sample.name: sample for sample in snapshot.guests}
    checked = []
    for decision in decisions:
        sample = samples.get(decision.guest)
        if decision.kind is Kind.NONE:
            checked.append(decision)
        elif sample is None or snapshot.host is None:
            missing = "there are no host figures" if sample else "there is no such guest"
            checked.append(_vetoed(decision, ("no-data", missing)))
        else:
            need = need_of(snapshot.host, limits.reserve_bytes)
            own = limits.guests.get(decision.guest)
            checked.append(check(decision, sample, own, rails.of(decision.guest), snapshot.time_s, need))
    return tuple(checked)


def check(
    decision: Decision, sample: GuestSample, limits: GuestLimits | None, track: Track, now_s: float, need: Need
) -> Decision:
    """The step as it may be carried out: unchanged, with a nearer target, or turned into no action."""
    if limits is None or limits.mode is Mode.OFF:
        return _vetoed(decision, ("off", "ballooning is off for it"))
    decision = _clamped(decision, sample, limits, slewless=need >= Need.CRISIS)
    veto = _veto(decision, sample, limits, track, now_s, dire=need is Need.DIRE)
    return decision if veto is None else _vetoed(decision, veto)


def need_of(host: HostSample, reserve_bytes: int) -> Need:
    """By the raw figures of this moment, hysteresis included."""
    usable, spare = usable_bytes(host, reserve_bytes), spare_bytes(host, reserve_bytes)
    share = spare / usable if usable else 0.0
    if share >= c.CRIT_BELOW + c.HYSTERESIS and (host.psi_full or 0.0) <= c.CRIT_PSI_FULL:
        return Need.NONE
    return Need.DIRE if spare <= -reserve_bytes // 2 or reserve_bytes == 0 else Need.CRISIS


def watch(rails: RailState, snapshot: Snapshot) -> RailState:
    """Holds for guests that are short soon after something was taken from them; doubling while it keeps hurting."""
    tracks = dict(rails.tracks)
    now = snapshot.time_s
    for sample in snapshot.guests:
        track = tracks.get(sample.name)
        available = sample.reading.available_bytes if sample.reading else None
        if track is None or track.last_take_s is None or available is None:
            continue
        held = track.hold_until_s is not None and now < track.hold_until_s
        hurt = available < c.pressed_min_bytes(sample.facts.memory_bytes)
        if hurt and not held and now - track.last_take_s <= c.HURT_WINDOW_S:
            recent = track.hold_until_s is not None and now - track.hold_until_s <= c.HOLD_MAX_S
            hold_s = min(c.HOLD_MAX_S, track.hold_s * 2) if recent else c.HOLD_MIN_S
            tracks[sample.name] = replace(track, hold_s=hold_s, hold_until_s=now + hold_s)
    return RailState(MappingProxyType(tracks))


def record(rails: RailState, decision: Decision, now_s: float) -> RailState:
    """After a step was handed to QEMU."""
    track = replace(rails.of(decision.guest), last_write_s=now_s)
    track = replace(track, last_take_s=now_s) if decision.kind is Kind.TAKE else replace(track, last_give_s=now_s)
    return RailState(MappingProxyType({**rails.tracks, decision.guest: track}))


def record_effect(rails: RailState, guest: str, *, effective: bool, now_s: float) -> RailState:
    """After it was seen what a step did: two in a row without effect bar the guest."""
    track = rails.of(guest)
    track = replace(track, without_effect=0 if effective else track.without_effect + 1)
    if track.without_effect >= c.INEFFECTIVE_MOVES:
        track = replace(track, without_effect=0, barred_until_s=now_s + c.INEFFECTIVE_BAR_S)
    return RailState(MappingProxyType({**rails.tracks, guest: track}))


def _vetoed(decision: Decision, veto: Veto) -> Decision:
    return replace(
        decision,
        kind=Kind.NONE,
        to_bytes=decision.from_bytes,
        rule=f"veto-{veto[0]}",
        why=f"guard rail: {veto[1]} (wanted: {decision.kind} {mib(decision.step_bytes)}; {decision.why})",
        limited_by=f"guard rail: {veto[1]}",
        expected=None,
    )


def _clamped(decision: Decision, sample: GuestSample, limits: GuestLimits, *, slewless: bool) -> Decision:
    """Within guaranteed and M; a take within the step limit and half of what the guest says it can spare."""
    high = sample.facts.memory_bytes
    low = min(limits.guaranteed_bytes, high)
    to, by = decision.to_bytes, None
    if decision.kind is Kind.TAKE:
        half = ((sample.reading.available_bytes if sample.reading else None) or 0) // 2
        step = half if slewless else min(half, c.step_max_bytes(high))
        if decision.from_bytes - to > step:
            to, by = decision.from_bytes - step, f"a step of at most {mib(step)}"
    if not low <= to <= high:
        to, by = min(high, max(low, to)), f"between guaranteed {mib(low)} and {mib(high)}"
    return decision if by is None else replace(decision, to_bytes=to, limited_by=f"guard rail: {by}")


def _veto(
    decision: Decision, sample: GuestSample, limits: GuestLimits, track: Track, now_s: float, *, dire: bool
) -> Veto | None:
    facts = sample.facts
    if not facts.balloon or facts.hugepages or facts.locked or facts.vfio or facts.confidential:
        return "ineligible", "its memory cannot be ballooned"
    if facts.migrating or facts.state != "running":
        return "ineligible", f"it is {'being migrated' if facts.migrating else facts.state}"
    if track.last_write_s is not None and now_s - track.last_write_s < c.WRITE_INTERVAL_S:
        return "rate", "its balloon was written less than a second ago"
    if decision.kind is Kind.TAKE:
        return _veto_take(decision, sample, limits, track, now_s, dire=dire)
    return _veto_give(decision, track, now_s)


def _veto_take(
    decision: Decision, sample: GuestSample, limits: GuestLimits, track: Track, now_s: float, *, dire: bool
) -> Veto | None:
    age = sample.stats_age_s(now_s)
    if sample.reading is None or sample.reading.available_bytes is None or age is None or age > c.TAKE_FRESH_S:
        return "stale", f"nothing is taken on figures that are missing or older than {c.TAKE_FRESH_S:.0f} s"
    if decision.from_bytes - decision.to_bytes < min(c.DEAD_BAND_BYTES, c.dead_band_bytes(sample.facts.memory_bytes)):
        return "dead-band", "what may be taken is not worth a step"
    if sample.facts.booted_s < c.BOOT_STEADY_S or limits.dedicated:
        return "ineligible", "it is booting" if not limits.dedicated else "it has dedicated CPUs"
    if track.barred_until_s is not None and now_s < track.barred_until_s:
        return "ineffective", "its balloon did not obey twice"
    if dire:
        return None
    full_hold = decision.for_guests_bytes == 0  # a starving neighbour waits for the first minute of a hold only
    if track.hold_until_s is not None:
        until_s = track.hold_until_s if full_hold else track.hold_until_s - track.hold_s + c.HOLD_MIN_S
        if now_s < until_s:
            return "hold", f"the last take hurt it, held for another {until_s - now_s:.0f} s"
    if track.last_give_s is not None and now_s - track.last_give_s < c.REVERSAL_S:
        return "reversal", f"it was given memory {now_s - track.last_give_s:.0f} s ago"
    return None


def _veto_give(decision: Decision, track: Track, now_s: float) -> Veto | None:
    if decision.to_bytes <= decision.from_bytes:
        return "direction", "a gift that would not enlarge it"
    if decision.urgent:
        return None
    if track.barred_until_s is not None and now_s < track.barred_until_s:
        return "ineffective", "its balloon did not obey twice"
    if track.last_take_s is not None and now_s - track.last_take_s < c.REVERSAL_S:
        return "reversal", f"memory was taken from it {now_s - track.last_take_s:.0f} s ago"
    return None
