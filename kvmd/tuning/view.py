"""One guest as the policy sees it in one tick: figures, needs, and what stands against touching it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from kvmd.tuning import constants as c
from kvmd.tuning.decision import Kind, mib
from kvmd.tuning.eligible import Bar, bar_of
from kvmd.tuning.snapshot import GuestLimits, GuestSample, Limits, Mode
from kvmd.tuning.state import GuestState, Move


@dataclass(frozen=True, slots=True)
class GuestView:
    """All sizes in bytes. `bar` is why it may not be a donor at all, `rest` why not just now."""

    name: str
    mode: Mode
    shares: int
    memory_bytes: int
    guaranteed_bytes: int
    is_read: bool  # the sizes below are its own; otherwise it is taken to have all of its memory
    target_bytes: int
    actual_bytes: int
    available_bytes: int | None
    used_bytes: int | None
    yield_bytes: int  # what the host would gain at most: touched and not in use
    demand_bytes: float
    floor_bytes: int
    lean_floor_bytes: int  # with the least head-room: what it keeps while a neighbour starves
    wanted_bytes: int
    pressed: str | None
    bar: Bar | None
    rest: Bar | None
    held_s: float  # nothing is taken from it for the host for so long
    move: Move | None
    took_s_ago: float | None

    @property
    def may_receive(self) -> bool:
        """Its balloon may be deflated."""
        return (self.bar is None or self.bar.give) and self.target_bytes < self.memory_bytes

    @property
    def may_donate(self) -> bool:
        """Memory may be taken from it now."""
        return self.bar is None and self.rest is None and self.pressed is None

    @property
    def giving(self) -> bool:
        """A take is under way."""
        return self.move is not None and self.move.kind is Kind.TAKE

    @property
    def returning_bytes(self) -> int:
        """What has been asked back and has not arrived."""
        return max(0, self.actual_bytes - self.target_bytes) if self.giving else 0

    @property
    def returning_for_guests_bytes(self) -> int:
        """The part of it that is meant for pressed guests."""
        return int(self.returning_bytes * self.move.for_guests) if self.move else 0

    @property
    def least_bytes(self) -> int:
        """The smallest step worth making."""
        return c.dead_band_bytes(self.memory_bytes)

    def take_cap_bytes(self, *, slewless: bool) -> int:
        """The most that one step may take: half of what it says it can spare, and the step limit."""
        half = int(c.SPARE_FRACTION * (self.available_bytes or 0))
        return half if slewless else min(half, c.step_max_bytes(self.memory_bytes))

    def idle_price(self) -> float:
        """How much dearer its memory is than fully used memory (the idle tax): 1 when all in use, 4 when idle."""
        active = min(1.0, self.demand_bytes / self.target_bytes) if self.target_bytes else 1.0
        return active + (1 - active) / (1 - c.IDLE_TAX)


def view_of(sample: GuestSample, guest: GuestState, limits: Limits, now_s: float, *, dire: bool) -> GuestView:
    """The view of one guest. `dire`: the host is so short that holds no longer protect."""
    mine = limits.guests.get(sample.name)
    own = mine or GuestLimits(guaranteed_bytes=sample.facts.memory_bytes, mode=Mode.OFF)
    memory, model = sample.facts.memory_bytes, guest.model
    guaranteed = min(own.guaranteed_bytes, memory)
    actual = guest.actual_bytes if guest.actual_bytes is not None else memory
    target = guest.target_bytes if guest.target_bytes is not None else actual
    bar = bar_of(sample, mine, model, now_s)
    trusted = model is not None and (bar is None or bar.rule in ("booting", "dedicated", "ageing"))
    known = sample.reading if model is not None else None
    return GuestView(
        name=sample.name,
        mode=own.mode,
        shares=own.shares,
        memory_bytes=memory,
        guaranteed_bytes=guaranteed,
        is_read=guest.actual_bytes is not None,
        target_bytes=target,
        actual_bytes=actual,
        available_bytes=known.available_bytes if known else None,
        used_bytes=model.used_bytes if model else None,
        yield_bytes=_yield_bytes(sample, guest, dire=dire),
        demand_bytes=model.demand_bytes if model else float(actual),
        floor_bytes=model.floor_bytes(guaranteed, memory) if model else memory,
        lean_floor_bytes=model.floor_bytes(guaranteed, memory, lean=True) if model else memory,
        wanted_bytes=model.wanted_bytes(guaranteed, memory) if model else target,
        pressed=model.pressed if model and trusted else None,
        bar=bar,
        rest=_rest(guest, now_s, dire=dire),
        held_s=0.0 if dire else max(0.0, (guest.hold_until_s or 0.0) - now_s),
        move=guest.move,
        took_s_ago=now_s - guest.last_take_s if guest.last_take_s is not None else None,
    )


def _yield_bytes(sample: GuestSample, guest: GuestState, *, dire: bool) -> int:
    """What of the guest's memory the host backs without the guest using it; all it can spare where RSS is unknown."""
    model = guest.model
    if model is None:
        return 0
    if sample.rss_bytes is None:
        return model.available_bytes
    fruitless = guest.fruitless_rss_bytes
    same = fruitless is not None and abs(sample.rss_bytes - fruitless) < c.dead_band_bytes(sample.facts.memory_bytes)
    if same and not dire:
        return 0
    return min(model.available_bytes, max(0, sample.rss_bytes - c.QEMU_OWN_BYTES - model.used_bytes))


def _rest(guest: GuestState, now_s: float, *, dire: bool) -> Bar | None:
    """Why memory is not taken from it just now."""
    if guest.barred_until_s is not None and now_s < guest.barred_until_s:
        return Bar(
            "ineffective", f"its balloon did not obey twice: left alone for {guest.barred_until_s - now_s:.0f} s"
        )
    if guest.move is not None:
        return Bar("moving", f"on its way to {mib(guest.move.to_bytes)}")
    if dire:
        return None
    if guest.hold_until_s is not None and now_s < (until := guest.hold_until_s - guest.hold_s + c.HOLD_MIN_S):
        return Bar("held", f"the last take hurt it: held for another {until - now_s:.0f} s")
    if guest.last_give_s is not None and now_s - guest.last_give_s < c.REVERSAL_S:
        return Bar("reversal", f"it was given memory {now_s - guest.last_give_s:.0f} s ago: nothing back before 60 s")
    return None
