"""plan/release.py and plan/needs.py: everything of ours goes back, nothing that a running guest stands on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmd.plan.needs import needed_by
from kvmd.plan.network import FORWARDING
from kvmd.plan.release import Undo, plan_release, refusal
from tests.rig.fakewishes import everything, guest, network
from tests.rig.fakeworld import FakeWorld
from tests.rig.hosts import MIB

POOL = f"0:{2 * MIB}"


@pytest.fixture
def world() -> FakeWorld:
    """db on lab and office, web on lan with pages."""
    made = FakeWorld()
    made.settle(everything())
    return made


def undos(world: FakeWorld) -> dict[str, Undo]:
    entries = [(e.kind, e.subject, e.original, e.new) for e in world.facts.journal]
    return {undo.subject: undo for undo in plan_release(entries, world.facts)}


def test_each_thing_names_the_guests_that_stand_on_it(world: FakeWorld) -> None:
    needed = {subject: undo.needed_by for subject, undo in undos(world).items() if undo.needed_by}
    assert needed == {
        "hugepages 2MiB node 0": ("web",),
        "bridge kvlab": ("db",),
        "bridge kvlan": ("web",),
        "nft table inet kvmd": ("db", "web"),
        "nft table bridge kvmd": ("db", "web"),  # which ports it guards is in no fact
        FORWARDING: ("db", "web"),
        "dnsmasq lab": ("db",),
        "dnsmasq lan": ("web",),
    }
    text = refusal(undos(world).values())
    assert text is not None and text.startswith("db needs bridge kvlab, nft table inet kvmd, ")
    assert "; web needs hugepages 2MiB node 0, bridge kvlan, " in text


def test_a_guest_without_network_and_pages_of_ours_stands_in_nobody_s_way() -> None:
    world = FakeWorld()
    alone = guest("1GiB", nics=("office",))
    world.settle(replace(everything(), guests={"db": alone}))
    assert [one.name for one in world.facts.guests] == ["db"]
    assert refusal(undos(world).values()) is None


def test_pages_that_were_there_before_kvmd_are_not_needed_from_it(world: FakeWorld) -> None:
    assert needed_by("hugepages", POOL, "0", "9", world.facts) == ("web",)
    assert needed_by("hugepages", POOL, "64", "99", world.facts) == (), "web's 64 pages were there already"


def test_what_a_dead_guest_left_behind_is_nobody_s(world: FakeWorld) -> None:
    """Its TAP is gone a moment after QEMU; in between nobody needs what it hangs on."""
    world.drift(guests=())
    assert refusal(undos(world).values()) is None


def test_networks_of_others_are_in_no_answer() -> None:
    world = FakeWorld()
    world.settle(replace(everything(), networks={"office": network("bridge", bridge="br0")}, guests={}))
    assert not [subject for subject in undos(world) if "br0" in subject or "virbr0" in subject]


def test_a_knob_somebody_changed_stays_theirs(world: FakeWorld) -> None:
    world.drift_knob("/proc/sys/vm/swappiness", "33")
    undo = undos(world)["/proc/sys/vm/swappiness"]
    assert undo.action is None and "someone changed it after kvmd wrote 10" in (undo.kept or "")
