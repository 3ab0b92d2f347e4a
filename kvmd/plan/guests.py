"""Which guests to start, to restart for their pending changes, and to stop. Pure.

A guest runs because it is *wanted*: what was last asked for, or what boot gives it. Guests whose file is gone are
never stopped unless pruning was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvmd.actions import Action, Disruption, RestartGuest, StartGuest, StopGuest
from kvmd.config.guest import Guest
from kvmd.facts import GuestLife


def start_order(guests: Mapping[str, Guest]) -> tuple[str, ...]:
    """All names so that each comes after those its `start.after` lists; otherwise alphabetical.

    A cycle is a fault of the files; what is in one comes last, alphabetically.
    """
    left = {name: {other for other in guest.start.after if other in guests} for name, guest in guests.items()}
    order: list[str] = []
    while left:
        ready = sorted(name for name, after in left.items() if not after & left.keys())
        for name in ready or sorted(left):
            order.append(name)
            del left[name]
    return tuple(order)


def plan_guests(
    guests: Mapping[str, Guest], lives: Iterable[GuestLife], blocked: frozenset[str], *, prune: bool
) -> tuple[Action, ...]:
    """Starts in start order, then restarts, then stops; `blocked` guests have a problem and are left alone."""
    lives = tuple(lives)
    known = {life.name: life for life in lives if not life.settling}
    settling = {life.name for life in lives if life.settling}
    starts: list[Action] = []
    restarts: list[Action] = []
    for name in start_order(guests):
        if name in settling:
            continue
        life = known.get(name, GuestLife(name, alive=False, wanted=False))
        if not life.alive and life.wanted and not life.held and name not in blocked:
            starts.append(StartGuest(guest=name, why="it is wanted running"))
        elif life.alive and life.wanted and life.pending:
            change = ", ".join(life.pending)
            restarts.append(
                RestartGuest(guest=name, change=change, why="only a new QEMU has it", disruption=Disruption.GUEST)
            )
    return (*starts, *restarts, *_stops(guests, known, prune=prune))


def _stops(guests: Mapping[str, Guest], known: Mapping[str, GuestLife], *, prune: bool) -> Iterable[Action]:
    for name, life in sorted(known.items()):
        if not life.alive:
            continue
        if name in guests and not life.wanted:
            yield StopGuest(guest=name, why="a stop was asked for and did not end")
        elif name not in guests and prune:
            why = "its file is gone and pruning was asked for"
            yield StopGuest(guest=name, why=why, disruption=Disruption.GUEST)
