"""plan/yielding.py: requirements are re-asserted, tuning knobs of others are theirs until someone wants otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import WriteKnob
from kvmd.facts import Facts, TunedKnob
from kvmd.plan.ksm import KSM, SWAPPINESS
from kvmd.plan.yielding import Yielded, give_way

RUN, ADVISOR, PAGES, SLEEP = (f"{KSM}/{name}" for name in ("run", "advisor_mode", "pages_to_scan", "sleep_millisecs"))
WHY = "ksm.mode is kvmd"


def write(path: str, old: str, new: str, why: str = WHY, *, requirement: bool = False) -> WriteKnob:
    return WriteKnob(path=path, old=old, new=new, why=why, requirement=requirement)


def world(knobs: dict[str, str], **ours: tuple[str, str]) -> Facts:
    """Knobs as they are; `ours` by the last part of their path: value and wish."""
    paths = {path.rpartition("/")[2]: path for path in (RUN, ADVISOR, PAGES, SLEEP, SWAPPINESS)}
    tuned = tuple(TunedKnob(paths[name], value, why) for name, (value, why) in sorted(ours.items()))
    return Facts(knobs=knobs, tuned=tuned)


SWAP_WHY = "swap.swappiness is 10"


@pytest.mark.parametrize(
    ("now", "action", "stays"),
    [
        ({}, write(SWAPPINESS, "60", "10", SWAP_WHY), True),  # kvmd never wrote it
        ({"swappiness": ("10", SWAP_WHY)}, write(SWAPPINESS, "60", "10", SWAP_WHY), False),  # someone put 60
        ({"swappiness": ("10", SWAP_WHY)}, write(SWAPPINESS, "60", "20", "swap.swappiness is 20"), True),  # a new wish
        ({"swappiness": ("10", SWAP_WHY)}, write(SWAPPINESS, "10", "20", "swap.swappiness is 20"), True),
        ({"swappiness": ("10", SWAP_WHY)}, write(SWAPPINESS, "60", "10", SWAP_WHY, requirement=True), True),
    ],
)
def test_one_knob(now: dict[str, tuple[str, str]], action: WriteKnob, *, stays: bool) -> None:
    facts = world({SWAPPINESS: action.old}, **now)
    kept, yielded = give_way([action], {}, facts)
    assert kept == ((action,) if stays else ())
    assert yielded == (() if stays else (Yielded(SWAPPINESS, "10", "60", SWAP_WHY),))
    assert give_way([action], {}, facts, retake=True) == ((action,), ())


def test_what_was_told_stays_told() -> None:
    facts = world({SWAPPINESS: "60"}, swappiness=("10", SWAP_WHY))
    facts = replace(facts, tuned=(replace(facts.tuned[0], theirs="60"),))
    _, (knob,) = give_way([write(SWAPPINESS, "60", "10", SWAP_WHY)], {}, facts)
    assert knob.told and "someone changed it after kvmd wrote 10" in knob.line()


def test_who_stops_merging_has_all_of_it() -> None:
    facts = world({RUN: "0", PAGES: "800", SLEEP: "20"}, run=("1", WHY), pages_to_scan=("800", WHY))
    planned = [write(SLEEP, "20", "50"), write(PAGES, "800", "1000"), write(RUN, "0", "1")]
    kept, yielded = give_way(planned, {}, facts)
    assert kept == () and [knob.path for knob in yielded] == [RUN]


def test_a_new_driver_begins_anew_with_all_of_it() -> None:
    """The kernel's advisor moved pages_to_scan by itself: that is nobody's will."""
    facts = world({ADVISOR: "scan-time", PAGES: "4321"}, advisor_mode=("scan-time", "m"), pages_to_scan=("1000", WHY))
    planned = [write(ADVISOR, "scan-time", "none"), write(PAGES, "4321", "1000")]
    assert give_way(planned, {PAGES: WHY}, facts) == (tuple(planned), ())


def test_the_agent_s_knob_is_yielded_and_taken_back_too() -> None:
    facts = world({RUN: "1", PAGES: "5000"}, run=("1", WHY), pages_to_scan=("800", WHY))
    assert give_way([], {PAGES: WHY}, facts) == ((), (Yielded(PAGES, "800", "5000", WHY),))
    (back,), _ = give_way([], {PAGES: WHY}, facts, retake=True)
    assert back.line() == f"~ {PAGES}: 5000 -> 800"
    assert give_way([], {PAGES: "another wish"}, facts)[1] == ()
    assert give_way([], {}, facts)[1] == (), "nobody drives it any more"


VALUES = st.sampled_from(["0", "1", "2"])


@given(st.fixed_dictionaries(dict.fromkeys((RUN, ADVISOR, PAGES, SLEEP, SWAPPINESS), VALUES)), st.data())
def test_a_pass_never_writes_over_a_value_it_told_of_and_one_apply_ends_all(
    now: dict[str, str], data: st.DataObject
) -> None:
    tuned = tuple(TunedKnob(path, data.draw(VALUES), WHY) for path in sorted(now) if data.draw(st.booleans()))
    facts = Facts(knobs=now, tuned=tuned)
    wished = {path: data.draw(VALUES) for path in now}
    planned = [write(path, now[path], new) for path, new in wished.items() if now[path] != new]
    kept, yielded = give_way(planned, {}, facts)
    assert not {knob.path for knob in yielded} & {action.path for action in kept if isinstance(action, WriteKnob)}
    written = {knob.path for knob in tuned}
    assert all(action in kept for action in planned if action.path not in written and not action.path.startswith(KSM))
    assert give_way(planned, {}, facts, retake=True) == (tuple(planned), ())
