"""Memory moves between real Linux guests: advised, applied, and gone on with after kvmd was killed with SIGKILL.

One pair of guests serves all tests in this order: a guest needs half a minute until it may be asked for memory, and
each test begins by making of them what it needs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.rig import memoryscene as scene
from tests.rig.guestconsole import GuestConsole
from tests.rig.kvmdhost import KvmdHost, kvmd_host

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

PAIR = ("hungry", "idle")
MOVED_BYTES = 64 * scene.MIB


@dataclass
class Scene:
    """The host and the consoles of its two guests."""

    host: KvmdHost
    consoles: dict[str, GuestConsole]

    def mode(self, mode: str) -> None:
        """A host that has enough, with this mode."""
        self.host.write("host.toml", scene.host_toml(mode=mode))
        self.host.call("host.reconcile")

    def until_movable(self) -> None:
        """Both have all their memory and may be asked for some."""

        def ready() -> bool:
            whole = all(size == scene.GUEST_BYTES for size in scene.sizes(self.host).values())
            return whole and scene.settled(self.host, *PAIR) and scene.all_movable(self.host, *PAIR)

        scene.until("both are whole and may be asked for memory", ready, self.host, timeout_s=120)

    def transfer(self) -> None:
        """The host becomes small, hungry starves, and gets what idle has."""
        since = time.time()
        small = scene.SmallHost(self.host)
        start = scene.until("both gave some", lambda: scene.both_gave(self.host, *PAIR), self.host, small=small)
        for name in PAIR:
            (*_, last) = self.carried_out(name, since)
            assert last["action"] == "take"
            assert "left for guests" in last["why"]
        since = time.time()
        hunger = scene.starve(self.consoles["hungry"])
        scene.until(
            "memory moved from idle to hungry",
            lambda: scene.moved(self.host, giver="idle", taker="hungry", start=start, least_bytes=MOVED_BYTES),
            self.host,
            small=small,
        )
        assert {one["action"] for one in self.carried_out("idle", since)} == {"take"}
        given = [one for one in self.carried_out("hungry", since) if one["action"] == "give"]
        assert any("available in it (below" in one["why"] for one in given)
        assert scene.sizes(self.host)["idle"] >= scene.GUARANTEED_BYTES
        hunger.wait()

    def carried_out(self, name: str, since: float) -> list[Any]:
        """Applied decisions that moved something."""
        return [one for one in scene.decisions(self.host, name, since) if one["applied"]]


@pytest.fixture(scope="module")
def pair() -> Iterator[Scene]:
    """Two booted guests with page cache to spare, beside a kvmd that only advises yet."""
    with kvmd_host() as host:
        host.write("host.toml", scene.host_toml(mode="advise"))
        for name in PAIR:
            host.guest(name, scene.guest_toml(host, name))
        host.start()
        for name in PAIR:
            host.call("guest.start", name=name)
        consoles = {name: GuestConsole(host.run / f"guests/{name}/serial-console.sock") for name in PAIR}
        for console in consoles.values():
            console.wait_ready(timeout_s=120)
        for filling in [scene.fill_cache(console) for console in consoles.values()]:
            filling.wait()
        yield Scene(host, consoles)
        for console in consoles.values():
            console.close()


def test_advice_is_recorded_and_moves_nothing(pair: Scene) -> None:
    pair.until_movable()
    since = time.time()
    small = scene.SmallHost(pair.host)

    def advised() -> list[Any]:
        return [one for name in PAIR for one in scene.decisions(pair.host, name, since) if one["action"] == "take"]

    scene.until("it says what it would take", advised, pair.host, small=small, timeout_s=40)
    time.sleep(5)  # a tick or two, in which a balloon would have moved
    decisions = advised()
    assert {one["guest"] for one in decisions} == set(PAIR)
    assert not any(one["applied"] for one in decisions)
    assert all(one["to_bytes"] < one["from_bytes"] and "left for guests" in one["why"] for one in decisions)
    assert scene.sizes(pair.host) == dict.fromkeys(PAIR, scene.GUEST_BYTES)
    for name in PAIR:
        assert pair.host.show(name)["balloon_bytes"] == scene.GUEST_BYTES


def test_a_starving_guest_gets_its_neighbours_memory(pair: Scene) -> None:
    pair.mode("apply")
    pair.until_movable()
    pair.transfer()


def test_after_sigkill_the_agent_goes_on_from_the_sizes_it_finds(pair: Scene) -> None:
    """The sizes stay through the crash, and what is given back begins at them; then the same transfer, adopted."""
    host = pair.host
    pair.consoles["hungry"].check("memactor free")
    scene.until("no balloon is on its way", lambda: scene.settled(host, *PAIR), host)
    host.kill()
    # Whoever starts next finds a host with room, so the first thing it does is to give back.
    host.write("host.toml", scene.host_toml(mode="advise"))
    host.start()
    found = scene.until("the sizes are read", lambda: _sizes_of_both(host), host)
    assert found["idle"] <= scene.GUEST_BYTES - MOVED_BYTES, "the new kvmd did not let idle have all at once"
    assert host.call("host.plan")["actions"] == []
    pair.mode("apply")
    given = scene.until("idle gets something back", lambda: _given(pair, "idle"), host)
    assert given["from_bytes"] == found["idle"]
    assert "it lacks" in given["why"]
    scene.until("idle gets all of it back", lambda: scene.sizes(host)["idle"] == scene.GUEST_BYTES, host)

    # A guest that was just given memory is left alone for a minute: a third kvmd knows nothing of that.
    for filling in [scene.fill_cache(console) for console in pair.consoles.values()]:
        filling.wait()
    host.restart()
    pair.until_movable()
    pair.transfer()


def _sizes_of_both(host: KvmdHost) -> dict[str, int]:
    found = scene.sizes(host)
    return found if set(PAIR) <= found.keys() else {}


def _given(pair: Scene, name: str) -> Any:
    return next((one for one in pair.carried_out(name, 0) if one["why"].find("it lacks") >= 0), None)
