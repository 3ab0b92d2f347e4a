"""What the policy remembers between ticks, and how one more snapshot changes it. Pure: old state in, new state out.

Targets are remembered and only ever changed by steps: QEMU does not tell a balloon's target, so on first sight (and
after a restart of kvmd) the size found is the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from kvmd.tuning import constants as c
from kvmd.tuning.constants import MIB
from kvmd.tuning.decision import Decision, Kind, Seen, mib
from kvmd.tuning.hoststate import HostView, judge
from kvmd.tuning.model import GuestModel, learn
from kvmd.tuning.snapshot import GuestSample, Limits, Snapshot


@dataclass(frozen=True, slots=True)
class Move:
    """An applied step whose end has not been seen. `start_bytes` is the balloon size it started from."""

    kind: Kind
    to_bytes: int
    start_bytes: int
    last_bytes: int  # at the last progress seen
    start_s: float
    progress_s: float
    available_bytes: int | None
    rss_bytes: int | None
    host_spare_bytes: int | None
    for_guests: float = 0.0  # share of a take that is meant for pressed guests


@dataclass(frozen=True, slots=True)
class GuestState:
    """One guest. Times are on the snapshot's clock; None: never."""

    target_bytes: int | None = None
    actual_bytes: int | None = None
    rss_bytes: int | None = None
    read_at_s: float | None = None
    booted_s: float = 0.0
    model: GuestModel | None = None
    move: Move | None = None
    last_take_s: float | None = None
    last_give_s: float | None = None
    hold_s: float = 0.0
    hold_until_s: float | None = None
    ineffective: int = 0
    barred_until_s: float | None = None
    fruitless_rss_bytes: int | None = None  # RSS at which taking from it gave the host nothing: never touched memory


@dataclass(frozen=True, slots=True)
class Return:
    """Memory for the host that has come back out of a balloon."""

    at_s: float
    size_bytes: int
    spare_bytes: int  # what the host had left when it was taken


@dataclass(frozen=True, slots=True)
class PolicyState:
    """All of the policy's memory. `pot_bytes`: taken from donors, arrived, and not yet passed on."""

    host: HostView | None = None
    guests: Mapping[str, GuestState] = field(default_factory=lambda: MappingProxyType({}))
    pot_bytes: int = 0
    gifts: tuple[tuple[float, int], ...] = ()  # (when, bytes) out of the host's own spare memory
    returns: tuple[Return, ...] = ()

    def unseen_bytes(self, now_s: float) -> int:
        """Memory that came back for the host and is not in its figures yet.

        No more than they lack since it was taken, and less with time: somebody else may have taken it meanwhile.
        """
        if self.host is None or not self.returns:
            return 0
        risen = self.host.spare_bytes - min(back.spare_bytes for back in self.returns)
        lacking = sum(back.size_bytes for back in self.returns) - max(0, risen)
        fading = sum(back.size_bytes * max(0.0, 1 - (now_s - back.at_s) / c.RETURN_SETTLE_S) for back in self.returns)
        return max(0, min(lacking, int(fading)))

    def owed_bytes(self, now_s: float) -> int:
        """Gifts the host's figures do not show yet."""
        return sum(int(size * max(0.0, 1 - (now_s - at) / c.GIFT_SETTLE_S)) for at, size in self.gifts)


def observe(state: PolicyState, snapshot: Snapshot, limits: Limits) -> tuple[PolicyState, tuple[Seen, ...]]:
    """The state after one more snapshot, and what was found out about moves under way."""
    now = snapshot.time_s
    host = judge(state.host, snapshot.host, limits.reserve_bytes) if snapshot.host else state.host
    spare = host.spare_bytes if host and snapshot.host else None
    guests: dict[str, GuestState] = {}
    seen: list[Seen] = []
    arrived = 0
    returns = [back for back in state.returns if now - back.at_s < c.RETURN_SETTLE_S]
    for sample in snapshot.guests:
        before = state.guests.get(sample.name, GuestState())
        if sample.facts.booted_s < before.booted_s - 1:
            before = GuestState()  # another QEMU under the same name
        guest, found = _observe_guest(before, sample, now, spare)
        arrived += _arrived_bytes(before, guest, dire=host is not None and host.is_dire)
        returns += _returned(before, guest, now)
        if found is not None:
            seen.append(found)
        guests[sample.name] = guest
    in_need = any(_is_short(guests[sample.name], sample) for sample in snapshot.guests)
    pot = state.pot_bytes + arrived if in_need else 0
    gifts = tuple((at, size) for at, size in state.gifts if now - at < c.GIFT_SETTLE_S)
    return PolicyState(host, MappingProxyType(guests), pot, gifts, tuple(returns)), tuple(seen)


def _arrived_bytes(before: GuestState, after: GuestState, *, dire: bool) -> int:
    """What a donor has delivered for pressed guests since the last look.

    Untouched memory arrives as a right only: the host had never backed it. When things are dire, only what the host
    really got back may be passed on, as far as the donor's RSS tells.
    """
    if before.move is None or before.move.kind is not Kind.TAKE:
        return 0
    arrived = max(0, (before.actual_bytes or 0) - (after.actual_bytes or 0))
    if dire and before.rss_bytes is not None and after.rss_bytes is not None:
        arrived = min(arrived, max(0, before.rss_bytes - after.rss_bytes))
    return int(arrived * before.move.for_guests)


def _returned(before: GuestState, after: GuestState, now: float) -> tuple[Return, ...]:
    """What a donor has delivered for the host since the last look, as far as its RSS tells: the rest it never had."""
    move = before.move
    if move is None or move.kind is not Kind.TAKE or move.host_spare_bytes is None:
        return ()
    size = (before.actual_bytes or 0) - (after.actual_bytes or 0)
    if before.rss_bytes is not None and after.rss_bytes is not None:
        size = min(size, before.rss_bytes - after.rss_bytes)
    size = int(size * (1 - move.for_guests))
    return (Return(now, size, move.host_spare_bytes),) if size > 0 else ()


def _is_short(guest: GuestState, sample: GuestSample) -> bool:
    """Pressed, and a larger balloon target would help it."""
    pressed = guest.model is not None and guest.model.pressed is not None
    return pressed and guest.target_bytes is not None and guest.target_bytes < sample.facts.memory_bytes


def _observe_guest(
    guest: GuestState, sample: GuestSample, now: float, host_spare: int | None
) -> tuple[GuestState, Seen | None]:
    reading = sample.reading
    if reading is None or sample.read_at_s is None or sample.read_at_s == guest.read_at_s:
        return guest, None  # most guests at most ticks
    was_pressed = guest.model is not None and guest.model.pressed is not None
    actual = reading.actual_bytes
    guest = replace(
        guest,
        booted_s=sample.facts.booted_s,
        model=learn(guest.model, sample),
        read_at_s=sample.read_at_s,
        actual_bytes=actual,
        rss_bytes=sample.rss_bytes,
    )
    seen: Seen | None = None
    if guest.move is not None:
        guest, seen = _settle(guest, guest.move, sample, now, host_spare)
    elif guest.target_bytes is None:
        guest = replace(guest, target_bytes=actual)
    elif abs(actual - guest.target_bytes) > c.SETTLE_SLACK_BYTES:
        took_back = actual > guest.target_bytes and guest.last_take_s is not None
        guest = replace(guest, target_bytes=actual)  # somebody else's hand on the balloon, or deflate-on-oom
        guest = _hold(guest, now) if took_back else guest
    is_pressed = guest.model is not None and guest.model.pressed is not None
    if is_pressed and not was_pressed and guest.last_take_s is not None and now - guest.last_take_s <= c.HURT_WINDOW_S:
        guest = _hold(guest, now)
    return guest, seen


def _hold(guest: GuestState, now: float) -> GuestState:
    """Taking from it hurt: leave it alone, twice as long as the last time unless that is long past."""
    if guest.hold_until_s is not None and guest.hold_until_s > now:
        return guest
    forgotten = guest.hold_until_s is None or now - guest.hold_until_s > c.HOLD_MAX_S
    hold_s = c.HOLD_MIN_S if forgotten else min(c.HOLD_MAX_S, guest.hold_s * 2)
    return replace(guest, hold_s=hold_s, hold_until_s=now + hold_s)


def _settle(
    guest: GuestState, move: Move, sample: GuestSample, now: float, host_spare: int | None
) -> tuple[GuestState, Seen | None]:
    """Has the balloon arrived, is it still on its way, or did it stop short?"""
    actual = guest.actual_bytes or 0
    sign = 1 if move.kind is Kind.GIVE else -1
    left, gained = sign * (move.to_bytes - actual), sign * (actual - move.start_bytes)
    if left <= c.SETTLE_SLACK_BYTES:
        arrived = Seen(sample.name, True, _seen_text(move, sample, now, host_spare, "reached"))
        if move.kind is Kind.TAKE:
            guest = replace(guest, fruitless_rss_bytes=guest.rss_bytes if _is_fruitless(move, guest) else None)
        return replace(guest, move=None, ineffective=0), arrived
    if sign * (actual - move.last_bytes) >= MIB:
        return replace(guest, move=replace(move, last_bytes=actual, progress_s=now)), None
    if now - move.progress_s < c.SETTLE_S:
        return guest, None
    effective = gained >= c.EFFECT_FRACTION * (left + max(0, gained))
    text = _seen_text(move, sample, now, host_spare, "stopped short at" if effective else "no effect, still")
    guest = replace(guest, move=None, target_bytes=actual, ineffective=0 if effective else guest.ineffective + 1)
    if guest.ineffective >= c.INEFFECTIVE_MOVES:
        guest = replace(guest, ineffective=0, barred_until_s=now + c.INEFFECTIVE_BAR_S)
    return guest, Seen(sample.name, effective, text)


def _is_fruitless(move: Move, guest: GuestState) -> bool:
    """The host got next to nothing for it: the guest handed over pages it had never touched, and touches no more."""
    if move.rss_bytes is None or guest.rss_bytes is None:
        return False
    gained = move.rss_bytes - guest.rss_bytes
    return -c.SETTLE_SLACK_BYTES <= gained < c.FRUITLESS_FRACTION * (move.start_bytes - move.to_bytes)


def _seen_text(move: Move, sample: GuestSample, now: float, host_spare: int | None, verb: str) -> str:
    reading = sample.reading
    text = f"{verb} {mib(reading.actual_bytes if reading else 0)} after {now - move.start_s:.0f} s"
    if reading and reading.available_bytes is not None and move.available_bytes is not None:
        text += f"; available in it {mib(move.available_bytes)} -> {mib(reading.available_bytes)}"
    if host_spare is not None and move.host_spare_bytes is not None:
        text += f"; left on the host {mib(move.host_spare_bytes)} -> {mib(host_spare)}"
    return text


def commit(state: PolicyState, decision: Decision, now: float) -> PolicyState:
    """The state once a step has been handed to QEMU. Advice is never committed: nothing moved."""
    guest = state.guests.get(decision.guest)
    if guest is None or decision.kind is Kind.NONE:
        return state
    available = guest.model.available_bytes if guest.model else None
    start = guest.actual_bytes if guest.actual_bytes is not None else decision.from_bytes
    move = Move(
        kind=decision.kind,
        to_bytes=decision.to_bytes,
        start_bytes=start,
        last_bytes=start,
        start_s=now,
        progress_s=now,
        available_bytes=available,
        rss_bytes=guest.rss_bytes,
        host_spare_bytes=state.host.spare_bytes if state.host else None,
        for_guests=decision.for_guests_bytes / decision.step_bytes if decision.step_bytes else 0.0,
    )
    is_take = decision.kind is Kind.TAKE
    guest = replace(
        guest,
        target_bytes=decision.to_bytes,
        move=move,
        last_take_s=now if is_take else guest.last_take_s,
        last_give_s=guest.last_give_s if is_take else now,
    )
    guests = MappingProxyType({**state.guests, decision.guest: guest})
    if is_take:
        return replace(state, guests=guests)
    step = decision.step_bytes
    return replace(state, guests=guests, pot_bytes=max(0, state.pot_bytes - step), gifts=(*state.gifts, (now, step)))
