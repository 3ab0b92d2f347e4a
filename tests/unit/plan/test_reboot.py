"""plan/reboot.py: what will be otherwise after a reboot, proved against a fake world that is really booted again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmd.actions import GuestAction
from kvmd.facts import GuestUnit, HugepagePool
from kvmd.plan.ksm import KSM, SWAPPINESS
from kvmd.plan.network import FORWARDING
from kvmd.plan.reboot import Change, Difference, NextBoot, after_reboot, booted
from tests.rig.fakewishes import everything, guest
from tests.rig.fakeworld import FakeWorld, fresh
from tests.rig.hosts import MIB

SAME = NextBoot("root=/dev/sda1 quiet", "root=/dev/sda1 quiet", "/boot/grub/grub.cfg")


@pytest.fixture
def world() -> FakeWorld:
    made = FakeWorld()
    made.settle(everything())
    return made


def differences(world: FakeWorld, boot: NextBoot = SAME) -> tuple[Difference, ...]:
    facts = replace(world.facts, lives=world._lives())
    uuids = {name: name for name in world.desired.guests}
    return after_reboot(world.desired, facts, boot, macs=world.macs(), uuids=uuids)


def lines(world: FakeWorld, kind: Change, boot: NextBoot = SAME) -> list[str]:
    return [found.line for found in differences(world, boot) if found.kind is kind]


def test_what_is_made_again_is_what_the_next_boot_makes(world: FakeWorld) -> None:
    told = lines(world, Change.REMADE)
    after = FakeWorld(facts=replace(fresh(), units=world.facts.units, swap_files=world.facts.swap_files,
                                    boot=world.facts.boot))  # fmt: skip
    done = after.reconcile(world.desired)
    assert told == [action.line() for action in done if not isinstance(action, GuestAction)]
    assert f"~ {KSM}/run: 0 -> 1" in told and "+ bridge kvlan 192.168.50.1/24" in told
    assert lines(world, Change.GONE) == [] and lines(world, Change.KERNEL) == []


def test_the_world_after_a_reboot_has_nothing_of_kvmd_s(world: FakeWorld) -> None:
    then = booted(world.desired, world.facts)
    assert dict(then.knobs) == dict(fresh().knobs)
    assert {link.name for link in then.links} == {link.name for link in fresh().links}
    assert all(pool.total == 0 for pool in then.hugepages)
    assert (then.nft, then.dnsmasq, then.guests, then.journal) == (None, (), (), ())
    assert {area.path for area in then.swaps or ()} == {"/dev/sda2"}


def test_pages_the_kernel_was_given_at_boot_are_there_again() -> None:
    facts = replace(fresh(), hugepages=(HugepagePool(0, 2 * MIB, 64, 60), HugepagePool(1, 2 * MIB, 0, 0)))
    assert [pool.total for pool in booted(everything(), facts).hugepages] == [64, 0]


def test_guests_start_by_their_files_not_by_what_runs(world: FakeWorld) -> None:
    world.wanted = {"db": False}
    world.end_guest("db")
    world.desired = replace(
        world.desired, guests={**world.desired.guests, "web": guest("128MiB", nics=("lan",), auto=False, pages=True)}
    )
    told = lines(world, Change.GUEST)
    assert told == ["+ guest db: starts", "- guest web: stays off"]
    # without the key the link of its unit rules
    world.desired = replace(world.desired, guests={"web": guest("128MiB", nics=("lan",), auto=None, pages=True)})
    world.drift(units=(GuestUnit("web", enabled=True),))
    assert lines(world, Change.GUEST) == []


def test_a_pending_change_comes_with_it(world: FakeWorld) -> None:
    bigger = guest("256MiB", nics=("lan",), pages=True)
    world.desired = replace(world.desired, guests={**world.desired.guests, "web": bigger})
    assert lines(world, Change.PENDING) == ["~ guest web: memory.size"]


def test_what_nobody_asks_for_any_more_ends(world: FakeWorld) -> None:
    world.settle(replace(world.desired, networks={}, guests={}))
    assert f"~ {FORWARDING}: 1 -> 0" in lines(world, Change.GONE)
    world.drift_knob(SWAPPINESS, "77")
    assert f"~ {SWAPPINESS}: 77 of somebody else's ends" in lines(world, Change.GONE)


@pytest.mark.parametrize(
    ("running", "configured", "told"),
    [
        ("BOOT_IMAGE=/a quiet", "BOOT_IMAGE=/b quiet", []),
        ("quiet initrd=x", "quiet isolcpus=2-3", ["+ kernel argument isolcpus=2-3"]),
        ("quiet hugepages=4", "quiet", ["- kernel argument hugepages=4"]),
        ("a=1 a=1", "a=2", ["+ kernel argument a=2", "- kernel argument a=1"]),
        ("quiet", None, []),
    ],
)
def test_kernel_arguments(world: FakeWorld, running: str, configured: str | None, told: list[str]) -> None:
    boot = NextBoot(running, configured, "/boot/grub/grub.cfg")
    assert lines(world, Change.KERNEL, boot) == told
    unknown = any(found.line == "? kernel arguments" for found in differences(world, boot))
    assert unknown == (configured is None), "not knowing is told, not hidden"
