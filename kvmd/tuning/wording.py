"""Decisions in words: why, what else was looked at, what limited the step, what is expected. Pure; decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvmd.tuning import constants as c
from kvmd.tuning.decision import Decision, Kind, mib
from kvmd.tuning.hoststate import HostView
from kvmd.tuning.view import GuestView

_LISTED = 6


def no_host_figures(view: GuestView) -> Decision:
    """The host could not be read."""
    return _none(view, "no-host-figures", "the host's memory figures could not be read: no data, no action")


def nothing(view: GuestView, host: HostView) -> Decision:
    """Left alone: the first thing that explains it."""
    if view.bar is not None:
        return _none(view, view.bar.rule, view.bar.why)
    if view.rest is not None and view.rest.rule == "moving":
        return _none(view, "moving", view.rest.why)
    if view.pressed:
        return _none(view, "full", f"{view.pressed}, and it has all of its {mib(view.memory_bytes)}: raise memory.size")
    available = mib(view.available_bytes or 0)
    if view.target_bytes >= view.memory_bytes and view.rest is None:
        return _none(
            view, "content", f"not pressed ({available} available in it) and nobody needs its memory; {host.why}"
        )
    lent = mib(view.memory_bytes - view.target_bytes)
    if view.rest is not None:
        return _none(view, view.rest.rule, f"not pressed ({available} available in it); {view.rest.why}; {host.why}")
    return _none(view, "lent", f"not pressed ({available} available in it), {lent} lent to the host; {host.why}")


def _none(
    view: GuestView, rule: str, why: str, limited_by: str | None = None, considered: tuple[str, ...] = ()
) -> Decision:
    return Decision(
        guest=view.name,
        kind=Kind.NONE,
        from_bytes=view.target_bytes,
        to_bytes=view.target_bytes,
        rule=rule,
        why=why,
        limited_by=limited_by,
        considered=considered,
    )


def guarantee(view: GuestView, host: HostView) -> Decision:
    """Below what its file guarantees: given at once, whatever the host has."""
    return Decision(
        guest=view.name,
        kind=Kind.GIVE,
        from_bytes=view.target_bytes,
        to_bytes=view.guaranteed_bytes,
        rule="guaranteed",
        why=f"it is below its memory.guaranteed of {mib(view.guaranteed_bytes)}; {host.why}",
        expected=f"it reaches {mib(view.guaranteed_bytes)} within {c.SETTLE_S:.0f} s",
        urgent=True,
    )


def relief(
    view: GuestView, host: HostView, want: int, granted: int, to_bytes: int, donors: Mapping[str, int]
) -> Decision:
    """A pressed guest: what it gets now, or what it waits for."""
    sources = tuple(f"{name} gives {mib(amount)}" for name, amount in sorted(donors.items()))[:_LISTED]
    short = f"{view.pressed}; it wants {mib(want)} more (uses {mib(view.used_bytes or 0)}); {host.why}"
    if not granted:
        limit = "waits for its neighbours' memory" if donors else "nobody has memory to spare above its floor"
        return _none(view, "waiting", short, limit, sources)
    return Decision(
        guest=view.name,
        kind=Kind.GIVE,
        from_bytes=view.target_bytes,
        to_bytes=to_bytes,
        rule="relief",
        why=short,
        considered=sources,
        limited_by=None if granted >= want - c.MIB else f"only {mib(granted)} is at hand now",
        expected=f"{mib((view.available_bytes or 0) + granted)} available in it within {c.SETTLE_S:.0f} s",
        urgent=True,
    )


def take(
    view: GuestView,
    host: HostView,
    wants: Mapping[str, int],
    views: Sequence[GuestView],
    takes: Mapping[str, int],
    for_guests: Mapping[str, int],
) -> Decision:
    """A donor: for whom, out of what, and why not more."""
    amount = takes[view.name]
    slewless = host.in_crisis
    to_bytes = view.target_bytes - amount
    available = mib(view.available_bytes or 0)
    for_whom = ", ".join(f"{name} wants {mib(want)} more" for name, want in sorted(wants.items())[:_LISTED])
    if to_bytes >= view.lean_floor_bytes:
        floor = view.lean_floor_bytes if view.name in for_guests or to_bytes < view.floor_bytes else view.floor_bytes
        spare = f"it can spare {mib(view.target_bytes - floor)} above its floor of {mib(floor)}"
        rule = "transfer" if view.name in for_guests else "reclaim"
    else:
        spare = f"the host is short: below its floor of {mib(view.lean_floor_bytes)}, toward the guaranteed "
        spare += mib(view.guaranteed_bytes)
        rule = "reclaim-hard"
    for_whom = for_whom if view.name in for_guests else ""
    why = "; ".join(filter(None, (for_whom, host.why, f"{spare} ({available} available in it)")))
    return Decision(
        guest=view.name,
        kind=Kind.TAKE,
        from_bytes=view.target_bytes,
        to_bytes=to_bytes,
        rule=rule,
        why=why,
        considered=_others(view, views, takes),
        limited_by=_take_limit(view, amount, slewless=slewless),
        expected=f"{_use(amount, for_guests.get(view.name, 0))} within {c.SETTLE_S:.0f} s, "
        f"{mib((view.available_bytes or 0) - amount)} still available in it",
        for_guests_bytes=for_guests.get(view.name, 0),
    )


def _use(amount: int, for_guests: int) -> str:
    parts = [f"{mib(for_guests)} for pressed guests"] if for_guests else []
    if amount - for_guests >= c.MIB:
        parts.append(f"up to {mib(amount - for_guests)} back on the host")
    return " and ".join(parts)


def _others(view: GuestView, views: Sequence[GuestView], takes: Mapping[str, int]) -> tuple[str, ...]:
    """What the other guests were asked for, or why they were not."""
    lines: list[str] = []
    others = [other for other in views if other.name != view.name]
    for other in others[:_LISTED]:
        if other.name in takes:
            lines.append(f"{other.name}: gives {mib(takes[other.name])}")
        elif other.pressed:
            lines.append(f"{other.name}: pressed itself")
        elif other.bar is not None or other.rest is not None:
            reason = other.bar or other.rest
            lines.append(f"{other.name}: {reason.why if reason else ''}")
        elif other.held_s:
            lines.append(
                f"{other.name}: the last take hurt it, for the host it is held for another {other.held_s:.0f} s"
            )
        elif other.yield_bytes < other.least_bytes and other.target_bytes - other.floor_bytes >= other.least_bytes:
            lines.append(f"{other.name}: has never touched what it can spare, so the host would gain nothing")
        else:
            lines.append(f"{other.name}: nothing worth taking above its floor of {mib(other.floor_bytes)}")
    more = len(others) - _LISTED
    return (*lines, f"and {more} more") if more > 0 else tuple(lines)


def _take_limit(view: GuestView, amount: int, *, slewless: bool) -> str | None:
    half = int(c.SPARE_FRACTION * (view.available_bytes or 0))
    near = c.MIB
    if view.target_bytes - amount - view.guaranteed_bytes < near:
        return f"its guaranteed {mib(view.guaranteed_bytes)}"
    if half - amount < near:
        return "half of what it says it can spare"
    if not slewless and c.step_max_bytes(view.memory_bytes) - amount < near:
        return f"the step limit of {mib(c.step_max_bytes(view.memory_bytes))}"
    for floor in (view.floor_bytes, view.lean_floor_bytes):
        if abs(view.target_bytes - amount - floor) < near:
            return f"its floor of {mib(floor)}"
    return None


def give_back(view: GuestView, host: HostView, surplus: int, to_bytes: int) -> Decision:
    """The host has enough: a shrunk guest gets some of its own back."""
    lacking = view.memory_bytes - view.target_bytes
    return Decision(
        guest=view.name,
        kind=Kind.GIVE,
        from_bytes=view.target_bytes,
        to_bytes=to_bytes,
        rule="give-back",
        why=f"{mib(surplus)} are left above {c.OK_ABOVE:.0%} and it lacks {mib(lacking)} of its size; {host.why}",
        limited_by=None if to_bytes >= view.memory_bytes else "half of the host's surplus a tick, by shares",
        expected=f"it reaches {mib(to_bytes)} within {c.SETTLE_S:.0f} s",
    )
