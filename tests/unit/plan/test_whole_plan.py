"""The whole plan on a whole (fake) host: order is irrelevant, every walk arrives, nothing is lost to a kill."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import RestartGuest, StartGuest, StopGuest
from kvmd.config.desired import Desired
from tests.rig.fakewishes import everything, shuffled, some
from tests.rig.fakeworld import Died, FakeWorld

CHANCES = st.randoms(use_true_random=False)
NOTHING = Desired()


def arrived(desired: Desired, wanted: dict[str, bool]) -> str:
    """What a machine that never had another wish looks like."""
    world = FakeWorld(wanted=dict(wanted))
    world.settle(desired)
    return lasting(world)


def lasting(world: FakeWorld) -> str:
    """What stays, without which CPUs the kernel shall isolate: those of guests that run, wherever they came to sit."""
    return re.sub(r"\b(isolcpus|nohz_full|rcu_nocbs|irqaffinity)=(\D*)[\d,-]+", r"\1=\2CPUS", world.lasting())


@given(CHANCES)
def test_the_order_of_files_and_facts_is_irrelevant(chance: Random) -> None:
    world = FakeWorld()
    world.settle(some(chance))
    world.desired = some(chance)
    plan = world.plan(prune=True)
    for name in ("links", "hugepages", "dnsmasq", "guests", "units", "tuned"):
        mixed = list(getattr(world.facts, name))
        chance.shuffle(mixed)
        world.drift(**{name: tuple(mixed)})
    world.drift(knobs=dict(reversed(world.facts.knobs.items())))
    world.desired = shuffled(world.desired, chance)
    assert world.plan(prune=True) == plan


def walk(chance: Random, states: int) -> None:
    world = FakeWorld()
    beginning = world.text()
    for number in range(states):
        desired = some(chance)
        world.wanted = {name: chance.random() < 0.7 for name in desired.guests if chance.random() < 0.3}
        first = world.reconcile(desired, prune=True)
        if not any(isinstance(action, StartGuest | StopGuest | RestartGuest) for action in first):
            assert world.plan(prune=True).actions == (), f"state {number}: a second plan is not empty"
        world.settle(desired)
        assert lasting(world) == arrived(desired, world.wanted), f"state {number}"
    world.wanted = {}
    world.settle(replace(world.desired, networks={}, guests={}))
    world.release()
    assert world.text() == beginning
    assert world.facts.journal == () and world.facts.tuned == ()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_walk_through_fifty_states_arrives_in_each_and_release_gives_the_beginning_back(seed: int) -> None:
    walk(Random(seed), 50)


@pytest.mark.long
@pytest.mark.parametrize("seed", [3, 4])
def test_a_walk_through_a_thousand_states(seed: int) -> None:
    walk(Random(seed), 1000)


def steps_of(world: FakeWorld, desired: Desired) -> int:
    """How many steps the pass has between which kvmd may be killed."""
    world.dies_after = 1_000_000
    world.reconcile(desired, prune=True)
    return 1_000_000 - world.dies_after


def at(start: Desired, wanted: dict[str, bool]) -> FakeWorld:
    world = FakeWorld(wanted=dict(wanted))
    world.settle(start)
    return world


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_between_any_two_steps_is_mended_by_the_next_pass(seed: int) -> None:
    chance = Random(seed)
    start, end = some(chance), some(chance)
    beginning = FakeWorld().text()
    expected = arrived(end, {})
    for step in range(steps_of(at(start, {}), end)):
        world = at(start, {})
        world.dies_after = step
        with pytest.raises(Died):
            world.reconcile(end, prune=True)
        world.dies_after = None
        world.settle(end, passes=4)
        assert lasting(world) == expected, f"killed after step {step}"
        assert world.plan().yielded == (), "kvmd takes its own unfinished work for somebody else's"
        world.settle(replace(end, networks={}, guests={}))
        world.release()
        assert world.text() == beginning, f"killed after step {step}"


def test_a_release_killed_between_any_two_steps_is_finished_by_the_next() -> None:
    def prepared() -> FakeWorld:
        world = at(everything(), {})
        world.settle(replace(everything(), guests={}))
        return world

    beginning = FakeWorld().text()
    step = 0
    while True:
        world = prepared()
        world.dies_after = step
        try:
            world.release()
        except Died:
            world.dies_after = None
            world.release()
            assert world.text() == beginning, f"killed after step {step}"
            assert world.facts.journal == ()
            step += 1
            continue
        break
    assert step >= 20
