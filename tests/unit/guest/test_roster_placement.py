"""CPUs that a start was promised stay its own until it is through, whatever the host looks like meanwhile."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvmd.config.desired import Desired, Loaded
from kvmd.config.guest import Guest
from kvmd.errors import Refused
from kvmd.facts import GuestLife, Process, RunningGuest
from kvmd.guest.lifecycle import State
from kvmd.guest.roster import Roster
from kvmd.units import CpuSet
from tests.rig.hosts import load

DEDICATED = {"cpu": {"vcpus": 2, "placement": "dedicated"}, "memory": {"size": "20GiB"}}


def starting(name: str, state: State = State.STARTING) -> Any:
    return SimpleNamespace(name=name, state=state, vcpu_threads=(), record=None, status=SimpleNamespace(process=None))


def roster_of(root: Path, *names: str) -> Roster:
    """Two nodes of 8 CPUs; guests of these names are declared and on their way up."""
    guests = {name: Guest.model_validate(DEDICATED) for name in names}
    loaded = Loaded(desired=Desired(guests=guests))
    services = SimpleNamespace(tree=load("synthetic-node-without-memory", root), loaded=loaded, guest=guests.get)
    roster = Roster(cast(Any, services), cast(Any, None))
    roster.supervisors = {name: starting(name) for name in names}
    return roster


def free_memory(root: Path, **gib: int) -> None:
    for node, free in gib.items():
        path = root / f"sys/devices/system/node/{node}/meminfo"
        number = node.removeprefix("node")
        path.write_text(f"Node {number} MemTotal: {64 << 20} kB\nNode {number} MemFree: {free << 20} kB\n")


def place(roster: Roster, name: str) -> CpuSet:
    found = roster.services.place(name)
    assert found is not None
    return found.cpus


def test_two_starts_at_once_get_different_cpus_and_keep_them(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, "a", "z")
    free_memory(tmp_path, node0=2, node1=40)
    promised = place(roster, "z")
    assert promised == CpuSet([10, 11]), "where its memory fits"
    free_memory(tmp_path, node0=40, node1=2)  # z's memory was taken meanwhile
    assert not place(roster, "a") & promised
    assert place(roster, "z") == promised, "its memory is there already"


def test_a_promise_ends_with_its_start(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, "a", "z")
    free_memory(tmp_path, node0=2, node1=40)
    assert place(roster, "z") == CpuSet([10, 11])
    roster.supervisors["z"] = starting("z", State.FAILED)
    roster.touch("z")
    free_memory(tmp_path, node0=40, node1=2)
    roster.supervisors["z"] = starting("z")
    assert place(roster, "z") == CpuSet([4, 5]), "looked for anew; 2-3 are kept for a, whose start was first"


def test_without_room_the_start_is_refused_with_the_sum(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, *"abcdefg")
    for name in "abcdef":
        place(roster, name)
    with pytest.raises(Refused, match="g wants 2 dedicated CPUs, 0 are left"):
        roster.services.place("g")


def test_others_leave_the_cpus_of_a_guest_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared guest that runs is moved off them at once, not at the next pass."""
    roster = roster_of(tmp_path, "a", "z")
    shared = Guest.model_validate({"memory": {"size": "1GiB"}})
    roster.services.loaded.desired.guests["z"] = shared  # type: ignore[index]
    pinned: dict[str, str] = {}
    monkeypatch.setattr(
        Roster, "all_running", lambda _self: (running("a", *promised(roster, "a")), running("z", "0-15"))
    )
    monkeypatch.setattr(Roster, "lives", lambda _self: (GuestLife("a", alive=True, wanted=True, settling=True),))
    monkeypatch.setattr(Roster, "pin", lambda _self, action: pinned.update({action.guest: action.vcpus[0]}))
    assert place(roster, "a") == CpuSet([2, 3])
    roster.services.make_room("a")
    assert pinned == {"z": "0-1,4-15"}


def promised(roster: Roster, name: str) -> tuple[str, ...]:
    return tuple(str(cpus) for cpus in roster._has(roster.supervisors[name]))


def running(name: str, *affinity: str) -> RunningGuest:
    return RunningGuest(name, "u", Process(7, 7), 1 << 30, affinity=affinity)
