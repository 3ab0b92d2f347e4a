"""Requirements are re-asserted, tuning knobs that somebody else changed are theirs. Pure.

A tuning knob (`WriteKnob.requirement` is False) is left alone when it no longer reads what kvmd wrote and read back in
this boot, as long as the files still wish what they wished then. It is kvmd's again when a file asks for another
value, when a person says `apply`, when its holder puts kvmd's value back, and after a reboot. What kvmd never wrote is
nobody's: then the file is obeyed.

The files of page merging have one driver: who stops it, or hands it to the kernel's advisor, has all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvmd.actions import AnyAction, WriteKnob
from kvmd.facts import Facts, TunedKnob
from kvmd.plan.ksm import KSM

_KSM_DRIVERS = (f"{KSM}/run", f"{KSM}/advisor_mode")


@dataclass(frozen=True, slots=True)
class Yielded:
    """A tuning knob of somebody else's. `told`: it was reported before."""

    path: str
    ours: str
    theirs: str
    why: str
    told: bool = False

    def line(self) -> str:
        """One line for people."""
        return f"{self.path} is {self.theirs}: someone changed it after kvmd wrote {self.ours}"


def give_way(
    actions: Iterable[AnyAction], driven: Mapping[str, str], facts: Facts, *, retake: bool = False
) -> tuple[tuple[AnyAction, ...], tuple[Yielded, ...]]:
    """`actions` without the writes that are others' now, and what was yielded, by path.

    `driven`: knobs no plan sets because the tuning agent does, each with its wish. `retake`: a person said `apply`;
    then nothing is yielded, and driven knobs go back to what kvmd wrote last.
    """
    actions = tuple(actions)
    written = {knob.path: knob for knob in facts.tuned}
    planned = {action.path: action for action in actions if isinstance(action, WriteKnob) and not action.requirement}
    asked = planned | {
        path: WriteKnob(path=path, old=now, new=last.ours, why=why, requirement=False)
        for path, why in driven.items()
        if path not in planned and (last := written.get(path)) and last.why == why
        if (now := facts.knobs.get(path, "")) != last.ours
    }
    if retake:
        return (*actions, *(action for path, action in sorted(asked.items()) if path not in planned)), ()
    taken = _taken(asked, written)
    kept = tuple(a for a in actions if not (isinstance(a, WriteKnob) and a.path in taken and not a.requirement))
    yielded = (_yielded(asked[path], written[path]) for path in sorted(taken) if _is_theirs(asked[path], written))
    return kept, tuple(yielded)


def _taken(asked: Mapping[str, WriteKnob], written: Mapping[str, TunedKnob]) -> frozenset[str]:
    """Paths of `asked` that are not to be written."""
    theirs = {path for path, action in asked.items() if _is_theirs(action, written)}
    merging = {path for path in asked if path.startswith(f"{KSM}/")}
    drivers = [path for path in _KSM_DRIVERS if path in asked]
    if any(path in theirs for path in drivers):
        return frozenset(theirs | merging)
    if drivers:  # kvmd begins anew with it: what the last driver left is nobody's
        return frozenset(theirs - merging)
    return frozenset(theirs)


def _is_theirs(action: WriteKnob, written: Mapping[str, TunedKnob]) -> bool:
    """Somebody changed it since, and the file wishes what it wished then."""
    last = written.get(action.path)
    return last is not None and action.old != last.ours and (action.new == last.ours or action.why == last.why)


def _yielded(action: WriteKnob, last: TunedKnob) -> Yielded:
    return Yielded(action.path, last.ours, action.old, action.why, told=last.theirs is not None)
