"""Who gives how much memory to whom, and why: `decide` is a pure function of state, snapshot and limits.

Order of service: the guarantee, then pressed guests (from the host's own spare memory and from what donors have
already delivered), then the host's reserve, then giving back. Steps are relative to the present target; what is on its
way back is counted. Nothing is decided without host figures. Guard rails (`rails.py`) check every step again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvmd.tuning import constants as c
from kvmd.tuning import wording
from kvmd.tuning.decision import Decision, Seen
from kvmd.tuning.hoststate import HostState, HostView
from kvmd.tuning.share_out import Claim, Excess, by_water_level, in_proportion
from kvmd.tuning.snapshot import Limits, Mode, Snapshot
from kvmd.tuning.state import GuestState, PolicyState, observe
from kvmd.tuning.view import GuestView, view_of


@dataclass(frozen=True, slots=True)
class Outlook:
    """One tick's result: one decision per guest, by name. `busy` are the guests to be looked at again soon."""

    state: PolicyState
    decisions: tuple[Decision, ...]
    views: tuple[GuestView, ...]
    seen: tuple[Seen, ...] = ()
    busy: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Round:
    """What one allocation works with. `wants` are the bytes by which each pressed guest is short."""

    host: HostView
    views: tuple[GuestView, ...]
    wants: dict[str, int]
    credit_bytes: int  # of the host's own spare memory, for pressed guests
    surplus_bytes: int  # of the host's own spare memory, for giving back
    pot_bytes: int  # delivered by donors
    unseen_bytes: int  # delivered by donors for the host, and not in its figures yet
    advice_only: bool = False  # nothing will arrive: grants count on this very tick's takes


def decide(state: PolicyState, snapshot: Snapshot, limits: Limits) -> Outlook:
    """One tick. Steps handed to QEMU must be reported back by `state.commit`; advice must not."""
    state, seen = observe(state, snapshot, limits)
    host, now = state.host, snapshot.time_s
    dire = host is not None and host.is_dire
    views = tuple(
        view_of(sample, state.guests.get(sample.name, GuestState()), limits, now, dire=dire)
        for sample in sorted(snapshot.guests, key=lambda sample: sample.name)
    )
    if host is None or snapshot.host is None:
        blind = tuple(wording.no_host_figures(view) for view in views)
        return Outlook(state, blind, views, seen)
    applied = [view for view in views if view.mode is Mode.APPLY]
    real = _allocate(_round(state, host, applied, now, advice_only=False))
    advised: dict[str, Decision] = {}
    if any(view.mode is Mode.ADVISE for view in views):
        advised = _allocate(_round(state, host, [v for v in views if v.mode is not Mode.OFF], now, advice_only=True))
    steps = {view.name: (real if view.mode is Mode.APPLY else advised).get(view.name) for view in views}
    decisions = tuple(steps[view.name] or wording.nothing(view, host) for view in views)
    return Outlook(state, decisions, views, seen, _busy(views, host))


def _busy(views: Sequence[GuestView], host: HostView) -> frozenset[str]:
    """Pressed and moving guests; all that might give, as soon as anyone needs anything."""
    pressed = {view.name for view in views if view.pressed and view.may_receive}
    need = bool(pressed) or host.state is not HostState.OK
    soon = {view.name for view in views if view.move or (view.bar and view.bar.rule in ("unread", "booting"))}
    able = {view.name for view in views if need and (view.bar is None or view.bar.rule == "ageing")}
    return frozenset(pressed | soon | able)


def _round(state: PolicyState, host: HostView, views: Sequence[GuestView], now: float, *, advice_only: bool) -> Round:
    owed = state.owed_bytes(now)
    lenient = host.state <= HostState.SOFT
    return Round(
        host=host,
        views=tuple(views),
        wants={view.name: want for view in views if (want := _want_bytes(view)) > 0},
        credit_bytes=max(0, host.room_above(c.GRANT_KEEP) - owed) if lenient else 0,
        surplus_bytes=max(0, host.room_above(c.OK_ABOVE) - owed) if host.state is HostState.OK else 0,
        pot_bytes=state.pot_bytes,
        unseen_bytes=state.unseen_bytes(now),
        advice_only=advice_only,
    )


def _base_bytes(view: GuestView) -> int:
    """What a gift starts from: a take that has not arrived is simply not insisted on."""
    return max(view.target_bytes, view.actual_bytes) if view.giving else view.target_bytes


def _want_bytes(view: GuestView) -> int:
    """By how much a pressed guest is short, at least one step; 0 when it is not, or cannot be helped."""
    room = view.memory_bytes - _base_bytes(view)
    if not view.pressed or not view.may_receive or room <= 0:
        return 0
    return min(room, max(view.wanted_bytes - _base_bytes(view), view.least_bytes))


def _allocate(round_: Round) -> dict[str, Decision]:
    """All steps of one tick; guests that are left alone are absent."""
    steps = {view.name: wording.guarantee(view, round_.host) for view in round_.views if _is_below_guarantee(view)}
    donors = _takes(round_)
    for view in round_.views:
        if view.name in donors.total:
            steps[view.name] = wording.take(
                view, round_.host, round_.wants, round_.views, donors.total, donors.for_guests
            )
    grants = _grants(round_, sum(donors.for_guests.values()))
    gifts = _gifts(round_, sum(grants.values()))
    for view in round_.views:
        if view.name in steps:
            continue
        if view.name in round_.wants:
            granted = grants.get(view.name, 0)
            steps[view.name] = wording.relief(
                view, round_.host, round_.wants[view.name], granted, _to(view, granted), donors.for_guests
            )
        elif view.name in gifts:
            steps[view.name] = wording.give_back(view, round_.host, round_.surplus_bytes, _to(view, gifts[view.name]))
    return steps


def _to(view: GuestView, step_bytes: int) -> int:
    """The new target of a gift; the last odd part of a MiB goes with it."""
    to = _base_bytes(view) + step_bytes
    return view.memory_bytes if view.memory_bytes - to < c.MIB else to


def _is_below_guarantee(view: GuestView) -> bool:
    return view.may_receive and view.target_bytes < view.guaranteed_bytes


def _host_need_bytes(round_: Round, aim: float) -> int:
    """What the host lacks up to this share, less what already comes back for it or has come unseen."""
    if round_.host.state is HostState.OK:
        return 0
    coming = sum(view.returning_bytes - view.returning_for_guests_bytes for view in round_.views)
    missing = -round_.host.room_above(aim) - coming - round_.unseen_bytes
    return missing if missing >= c.DEAD_BAND_BYTES else 0


def _unmet_bytes(round_: Round) -> int:
    """What pressed guests lack that is neither at hand nor on its way."""
    coming = sum(view.returning_for_guests_bytes for view in round_.views)
    return max(0, sum(round_.wants.values()) - max(round_.credit_bytes, round_.pot_bytes) - coming)


@dataclass(frozen=True, slots=True)
class Takes:
    """Bytes to take by guest, and which part of each is meant for pressed guests."""

    total: dict[str, int]
    for_guests: dict[str, int]


def _takes(round_: Round) -> Takes:
    """What donors give now: above their floors by price; in HARD and CRIT toward the guarantees as well.

    Pressed guests come first; when things are dire, the host does. The host takes only what it would gain by: memory
    that a guest has never touched is no use to it, but moves as a right to one that needs it.
    """
    hard = round_.host.state >= HostState.HARD
    donors = [view for view in round_.views if view.may_donate]
    caps = {view.name: view.take_cap_bytes(slewless=round_.host.in_crisis) for view in donors}
    total: dict[str, int] = {}
    for_guests: dict[str, int] = {}
    if not round_.host.is_dire:
        for_guests = _above_floors(donors, caps, total, _unmet_bytes(round_), yielding=False, hard=hard)
        _add(total, for_guests)
    _add(total, _above_floors(donors, caps, total, _host_need_bytes(round_, c.RECLAIM_AIM), yielding=True, hard=hard))
    if round_.host.is_dire:
        for_guests = _above_floors(donors, caps, total, _unmet_bytes(round_), yielding=False, hard=hard)
        _add(total, for_guests)
    if hard:
        missing = _host_need_bytes(round_, c.WATER_AIM) - (sum(total.values()) - sum(for_guests.values()))
        _add(total, _water(donors, caps, total, missing))
    return Takes(total, for_guests)


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for name, amount in more.items():
        total[name] = total.get(name, 0) + amount


def _above_floors(
    donors: Sequence[GuestView], caps: dict[str, int], taken: dict[str, int], need: int, *, yielding: bool, hard: bool
) -> dict[str, int]:
    """Shares of `need` out of what lies above the floors, by spare size, idleness and shares; at least one step."""
    if need <= 0:
        return {}
    claims = []
    for view in donors:
        mine = taken.get(view.name, 0)
        spare = view.target_bytes - (view.floor_bytes if yielding and not hard else view.lean_floor_bytes)
        gain = spare if not yielding else 0 if view.held_s else view.yield_bytes
        cap = min(spare, caps[view.name], gain) - mine
        weight = max(0, spare) / max(1, view.shares) * view.idle_price()
        claims.append(Claim(view.name, weight, cap, 0 if mine else view.least_bytes))
    smallest = min(
        (max(c.MIB, claim.least_bytes) for claim in claims if claim.cap_bytes >= claim.least_bytes), default=0
    )
    return in_proportion(max(need, smallest), claims)


def _water(donors: Sequence[GuestView], caps: dict[str, int], takes: dict[str, int], missing: int) -> dict[str, int]:
    """Below the floors: toward the guaranteed sizes, by shares."""
    able = []
    for view in donors:
        excess = view.target_bytes - takes.get(view.name, 0) - view.guaranteed_bytes
        gain = 0 if view.held_s else view.yield_bytes
        cap = min(excess, min(caps[view.name], gain) - takes.get(view.name, 0))
        able.append(Excess(view.name, excess, max(1, view.shares), cap, view.least_bytes))
    return by_water_level(missing, able)


def _grants(round_: Round, taken_bytes: int) -> dict[str, int]:
    """Relief for pressed guests: what is at hand, by want and shares; in advice also what donors would give."""
    at_hand = max(round_.credit_bytes, round_.pot_bytes + (taken_bytes if round_.advice_only else 0))
    views = {view.name: view for view in round_.views}
    return in_proportion(
        at_hand,
        [
            Claim(name, float(want) * max(1, views[name].shares), want, min(want, views[name].least_bytes))
            for name, want in round_.wants.items()
        ],
    )


def _gifts(round_: Round, granted_bytes: int) -> dict[str, int]:
    """Giving back to shrunk guests from the host's surplus, by shares and what they lack; slowly."""
    surplus = int((round_.surplus_bytes - granted_bytes) * c.GIVE_BACK_FRACTION)
    claims = []
    for view in round_.views:
        settled = view.took_s_ago is None or view.took_s_ago >= c.REVERSAL_S
        obeys = view.rest is None or view.rest.rule not in ("ineffective", "moving")
        lacking = view.memory_bytes - view.target_bytes
        if view.may_receive and view.name not in round_.wants and settled and obeys and lacking > 0:
            weight = float(lacking) * max(1, view.shares)
            claims.append(Claim(view.name, weight, lacking, min(lacking, view.least_bytes)))
    return in_proportion(surplus, claims)
