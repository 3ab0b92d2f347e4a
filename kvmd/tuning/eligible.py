"""Who may be ballooned: the first reason that says no, in a fixed order, and whether giving is still allowed. Pure.

A hugepage or VFIO guest would lose the memory and the host would gain none; figures that are missing, old or
contradict themselves allow no taking, but memory may always be given back on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmd.tuning import constants as c
from kvmd.tuning.model import GuestModel
from kvmd.tuning.snapshot import GuestLimits, GuestSample, Mode


@dataclass(frozen=True, slots=True)
class Bar:
    """Why nothing is taken from a guest. `rule` is the short name; `give` says whether it may be given to."""

    rule: str
    why: str
    give: bool = False


def bar_of(sample: GuestSample, limits: GuestLimits | None, model: GuestModel | None, now_s: float) -> Bar | None:
    """The first reason against taking memory from this guest, None when it may give.

    What lies in the guest's nature comes before what it does, and that before what it says.
    """
    return (
        _bar_nature(sample)
        or _bar_state(sample, limits)
        or _bar_figures(sample, model, now_s)
        or _bar_now(sample, limits, model, now_s)
    )


def _bar_nature(sample: GuestSample) -> Bar | None:
    facts = sample.facts
    if facts.hugepages:
        return Bar("hugepages", "its memory is hugepages: the balloon would take from it and give the host nothing")
    if facts.locked:
        return Bar("locked", "its memory is locked")
    if facts.vfio:
        return Bar("vfio", "a passed-through device pins its memory")
    if facts.confidential:
        return Bar("confidential", "its memory is encrypted for it alone")
    if not facts.balloon:
        return Bar("no-balloon", "it has no balloon device")
    return None


def _bar_state(sample: GuestSample, limits: GuestLimits | None) -> Bar | None:
    if sample.facts.migrating:
        return Bar("migrating", "it is being migrated")
    if sample.facts.state != "running":
        return Bar("state", f"it is {sample.facts.state}")
    if limits is None or limits.mode is Mode.OFF:
        return Bar("opted-out", "tuning.balloon is off for it")
    return None


def _bar_figures(sample: GuestSample, model: GuestModel | None, now_s: float) -> Bar | None:
    age = sample.stats_age_s(now_s)
    if sample.reading is None:
        return Bar("unread", "its balloon has not answered yet")
    if age is None:
        return Bar("no-driver", "no balloon driver answers inside it: memory is only given back", give=True)
    if age > c.STALE_POLLS * sample.poll_s:
        stale = f"its figures are {age:.0f} s old (older than {c.STALE_POLLS} polls): memory is only given back"
        return Bar("stale", stale, give=True)
    if sample.reading.available_bytes is None:
        return Bar("no-figures", "its driver does not report available memory: memory is only given back", give=True)
    if model is not None and model.contradictions > 1:
        return Bar(
            "contradiction", "it reports more memory available than it has: memory is only given back", give=True
        )
    return None


def _bar_now(sample: GuestSample, limits: GuestLimits | None, model: GuestModel | None, now_s: float) -> Bar | None:
    facts = sample.facts
    steady_s = now_s - model.steady_since_s if model is not None else 0.0
    if facts.booted_s < c.BOOT_S and steady_s < c.BOOT_STEADY_S:
        booting = f"it started {facts.booted_s:.0f} s ago and its use has been steady for only {steady_s:.0f} s"
        return Bar("booting", booting, give=True)
    if limits is not None and limits.dedicated:
        return Bar("dedicated", "it has dedicated CPUs: its memory is left alone", give=True)
    age = sample.stats_age_s(now_s)
    if age is None or age > c.TAKE_FRESH_S:
        return Bar("ageing", f"its figures are {age or 0:.0f} s old: asked again before anything is taken", give=True)
    return None
