"""The agent's shell over fakes: a small world that obeys, hangs or vanishes, and a clock that is told the time."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from kvmd.effects.history import History
from kvmd.errors import QemuFailed
from kvmd.rpc.results import Explained, TuneStatus
from kvmd.tuning.agent import Agent, Settings
from kvmd.tuning.ksm import KsmLimits, KsmSample
from kvmd.tuning.logbook import Recorder
from kvmd.tuning.snapshot import BalloonReading, GuestFacts, GuestLimits, HostSample, Limits, Mode

MIB, GIB = 1 << 20, 1 << 30
M = 2 * GIB


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1.7e9 + self.now


@dataclass
class Machine:
    """One guest: its balloon obeys at once unless it is stuck."""

    facts: GuestFacts
    actual: int = M
    used: int = 256 * MIB
    stuck: bool = False
    broken: bool = False
    hangs: bool = False
    interval_s: int = 0
    calls: int = 0


class World:
    """Sensors and actuators in one, as the supervisor's wiring is."""

    def __init__(self, clock: FakeClock, *machines: Machine, share: float = 0.5) -> None:
        self.clock, self.share = clock, share
        self.machines = {machine.facts.name: machine for machine in machines}
        self.blind = False
        self.moved = asyncio.Event()
        self.merging: KsmSample | None = None
        self.written: list[int] = []

    def host(self) -> HostSample | None:
        return None if self.blind else HostSample(100 * GIB, int(self.share * 100 * GIB))

    def ksm(self) -> KsmSample | None:
        return self.merging

    def guests(self) -> Sequence[GuestFacts]:
        return [replace(machine.facts, booted_s=self.clock.now) for machine in self.machines.values()]

    def rss_bytes(self, pid: int) -> int | None:
        return None

    async def balloon(self, name: str) -> BalloonReading:
        machine = self.machines[name]
        machine.calls += 1
        if machine.hangs:
            await asyncio.Event().wait()
        if machine.broken:
            raise QemuFailed("no such device")
        available = max(0, machine.actual - machine.used)
        return BalloonReading(machine.actual, int(self.clock.wall()), available)

    async def set_balloon(self, name: str, target_bytes: int) -> None:
        if self.machines[name].broken:
            raise QemuFailed("no such device")
        if not self.machines[name].stuck:
            self.machines[name].actual = target_bytes
        self.moved.set()

    async def set_stats_interval(self, name: str, interval_s: int) -> None:
        self.machines[name].interval_s = interval_s

    async def write_ksm_pages(self, pages_to_scan: int) -> None:
        self.written.append(pages_to_scan)


@dataclass(frozen=True)
class Row:
    guest: str | None
    data: str


class Book:
    """A recorder in memory."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add_decision(self, guest: str | None, data: str, time: float) -> None:
        self.rows.append(Row(guest, data))

    def decisions(self, guest: str | None, limit: int = 100) -> Sequence[Row]:
        return [row for row in reversed(self.rows) if row.guest == guest][:limit]


class Rig:
    """An agent in a world."""

    def __init__(self, *machines: Machine, share: float = 0.5, mode: Mode = Mode.APPLY) -> None:
        self.clock = FakeClock()
        self.world = World(self.clock, *machines, share=share)
        self.book: Recorder = Book()
        self.modes = {machine.facts.name: mode for machine in machines}
        self.ksm = KsmLimits()
        self.agent = Agent(self.world, self.world, self.book, self.settings, self.clock)

    def settings(self) -> Settings:
        guests = {name: GuestLimits(512 * MIB, mode=mode) for name, mode in self.modes.items()}
        return Settings(Limits(Mode.APPLY, 0, guests), self.ksm)

    async def ticks(self, count: int, *, every_s: float = 2.0) -> None:
        for _ in range(count):
            await self.agent.tick_once()
            self.clock.now += every_s

    def explained(self, name: str, limit: int = 50) -> list[dict[str, object]]:
        decisions: list[dict[str, object]] = self.agent.explain(name, limit)["decisions"]
        return decisions


def machine(name: str, **more: object) -> Machine:
    return Machine(GuestFacts(name, M), **more)  # type: ignore[arg-type]


def starving_pair() -> tuple[Machine, Machine]:
    return machine("idle"), machine("starving", actual=GIB, used=GIB - 8 * MIB)


async def test_memory_moves_from_the_idle_to_the_starving_guest_and_is_explained() -> None:
    rig = Rig(*starving_pair(), share=0.05)
    await rig.ticks(10)
    idle, starving = rig.world.machines["idle"], rig.world.machines["starving"]
    assert idle.actual < M
    assert starving.actual > GIB + 100 * MIB
    taken = next(entry for entry in rig.explained("idle") if entry["action"] == "take")
    assert taken["applied"] is True
    assert "starving wants" in str(taken["why"])
    assert str(taken["seen"]).startswith("reached")
    given = next(entry for entry in rig.explained("starving") if entry["action"] == "give")
    assert "available in it (below" in str(given["why"])


async def test_advice_moves_nothing_and_is_recorded_once_a_reason() -> None:
    rig = Rig(*starving_pair(), share=0.05, mode=Mode.ADVISE)
    await rig.ticks(20)
    assert rig.world.machines["idle"].actual == M
    assert rig.world.machines["starving"].actual == GIB
    entries = rig.explained("idle")
    assert 1 <= len(entries) <= 3
    assert {entry["applied"] for entry in entries} == {False}
    assert "take" in {entry["action"] for entry in entries}


async def test_no_action_is_recorded_with_its_reason_and_only_when_it_changes() -> None:
    rig = Rig(machine("web"))
    await rig.ticks(30)
    entries = rig.explained("web")
    assert [entry["action"] for entry in entries] == ["none"]
    assert "not pressed" in str(entries[0]["why"])


async def test_off_is_not_even_looked_at() -> None:
    rig = Rig(machine("web"), mode=Mode.OFF)
    await rig.ticks(5)
    assert rig.world.machines["web"].calls == 0
    assert rig.agent.status()["guests"][0]["reason"] == "tuning.balloon is off for it"


async def test_results_have_the_shape_clients_get() -> None:
    rig = Rig(*starving_pair(), share=0.05)
    empty = TuneStatus.model_validate(rig.agent.status(), strict=False)
    assert empty.host_state == "unknown"
    await rig.ticks(6)
    status = TuneStatus.model_validate(rig.agent.status(), strict=False)
    assert status.host_state == "SOFT"
    assert [guest.name for guest in status.guests] == ["idle", "starving"]
    assert status.last
    assert Explained.model_validate(rig.agent.explain("idle", 5), strict=False).decisions


async def test_history_is_a_recorder(tmp_path: object) -> None:
    rig = Rig(*starving_pair(), share=0.05)
    history = History(tmp_path, now=rig.clock.wall())  # type: ignore[arg-type]
    agent = Agent(rig.world, rig.world, history, rig.settings, rig.clock)
    for _ in range(6):
        await agent.tick_once()
        rig.clock.now += 2
    found = agent.explain("idle", 10)["decisions"]
    assert found
    assert [entry["time"] for entry in found] == sorted(entry["time"] for entry in found)
    assert json.loads(history.decisions("idle", 1)[0].data)["rule"]
    history.close()


async def test_a_guest_that_hangs_delays_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmd.tuning.agent.CALL_TIMEOUT_S", 0.05)
    rig = Rig(machine("stuck", hangs=True), *starving_pair(), share=0.05)
    await rig.ticks(6)
    assert rig.world.machines["starving"].actual > GIB
    status = {guest["name"]: guest for guest in rig.agent.status()["guests"]}
    assert status["stuck"]["reason"] == "its balloon has not answered yet"
    assert rig.world.machines["stuck"].calls <= 2, "not asked at every tick"


async def test_a_failing_balloon_is_told_twice_lost_and_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvmd.tuning.agent")
    rig = Rig(machine("web", broken=True))
    await rig.ticks(20)
    rig.world.machines["web"].broken = False
    await rig.ticks(20)
    told = [record.getMessage() for record in caplog.records if "web" in record.getMessage()]
    assert len(told) == 2
    assert "does not answer" in told[0]
    assert "answers again" in told[1]


async def test_a_step_qemu_refuses_is_not_believed() -> None:
    idle, starving = starving_pair()
    rig = Rig(idle, starving, share=0.05)
    await rig.ticks(1)
    rig.world.machines["starving"].broken = True
    await rig.ticks(3)
    entries = [entry for entry in rig.explained("starving") if entry["action"] == "give"]
    assert all(entry["applied"] is False for entry in entries)


async def test_a_balloon_that_does_not_move_becomes_ineligible() -> None:
    rig = Rig(machine("idle", stuck=True), share=0.03)
    await rig.ticks(40)
    applied = [entry for entry in rig.explained("idle") if entry["applied"]]
    assert len(applied) == 2
    assert all("no effect" in str(entry["seen"]) for entry in applied)
    assert "did not obey twice" in str(rig.explained("idle")[-1]["why"])


async def test_blind_host_means_hands_off() -> None:
    rig = Rig(*starving_pair(), share=0.05)
    rig.world.blind = True
    await rig.ticks(10)
    assert rig.world.machines["idle"].actual == M
    assert rig.agent.status()["host_state"] == "unknown"


async def test_quiet_guests_are_asked_seldom_and_busy_ones_at_every_tick() -> None:
    quiet = Rig(*(machine(f"g{n:02}") for n in range(60)))
    await quiet.ticks(15, every_s=4.0)
    calls = [one.calls for one in quiet.world.machines.values()]
    assert max(calls) <= 5
    assert min(calls) >= 2
    assert quiet.world.machines["g00"].interval_s >= 15
    busy = Rig(*starving_pair(), share=0.01)
    await busy.ticks(10)
    assert busy.world.machines["starving"].calls == 10
    assert busy.world.machines["starving"].interval_s == 2


async def test_the_budget_of_calls_holds_and_everyone_gets_a_turn() -> None:
    rig = Rig(*(machine(f"g{n:03}") for n in range(200)), share=0.03)
    for _ in range(12):
        before = sum(one.calls for one in rig.world.machines.values())
        await rig.ticks(1)
        assert sum(one.calls for one in rig.world.machines.values()) - before <= 50
    assert all(one.calls for one in rig.world.machines.values())


async def test_restore_gives_all_back_and_then_only_advises() -> None:
    rig = Rig(*starving_pair(), share=0.05)
    await rig.ticks(4)
    assert await rig.agent.restore() == ("idle", "starving")
    assert {one.actual for one in rig.world.machines.values()} == {M}
    await rig.ticks(20)
    assert {one.actual for one in rig.world.machines.values()} == {M}
    rig.agent.resume()
    await rig.ticks(40)
    assert rig.world.machines["idle"].actual < M


async def test_a_guest_no_longer_tuned_gets_its_memory_back() -> None:
    rig = Rig(machine("idle"), share=0.05)
    await rig.ticks(4)
    assert rig.world.machines["idle"].actual < M
    rig.modes["idle"] = Mode.ADVISE
    await rig.ticks(1)
    assert rig.world.machines["idle"].actual == M
    assert rig.explained("idle")[-1]["why"] == "tuning is no longer applied to it"


async def test_a_guest_that_ended_is_forgotten() -> None:
    rig = Rig(machine("idle"), share=0.05)
    await rig.ticks(1)
    taken = rig.world.machines.pop("idle")
    await rig.ticks(1)
    assert rig.agent.status()["guests"] == []
    assert rig.explained("idle")[-1]["seen"] == "the guest ended"
    taken.actual = M
    rig.world.machines["idle"] = taken
    await rig.ticks(1)
    assert rig.agent.status()["guests"][0]["target_bytes"] is not None


async def test_ending_leaves_the_guests_alone_and_closes_the_book() -> None:
    rig = Rig(machine("idle"), share=0.05)
    task = asyncio.create_task(rig.agent.run())
    async with asyncio.timeout(5):
        await rig.world.moved.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert rig.world.machines["idle"].actual < M
    assert rig.explained("idle")[-1]["seen"] == "kvmd ended before its end was seen"


async def test_a_tick_that_fails_does_not_end_the_agent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvmd.tuning.agent")
    monkeypatch.setattr("kvmd.tuning.constants.QUIET_TICK_S", 0.001)
    rig = Rig(machine("web"))
    fails = iter([True, True, True, False])
    good, worked = rig.world.host, asyncio.Event()

    def host() -> HostSample | None:
        if next(fails, False):
            raise ZeroDivisionError("a mistake of ours")
        if rig.agent.status()["host_state"] != "unknown":
            worked.set()  # a whole tick has worked
        return good()

    monkeypatch.setattr(rig.world, "host", host)
    task = asyncio.create_task(rig.agent.run())
    async with asyncio.timeout(5):
        await worked.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    told = [record.getMessage() for record in caplog.records]
    assert sum("tick failed" in line for line in told) == 1
    assert sum("works again" in line for line in told) == 1


async def test_merging_is_driven_only_where_it_is_ours_and_applied() -> None:
    rig = Rig(machine("web"))
    rig.world.merging = KsmSample(1, 100, 20, 0, 0, 0, 0, "none", 0.0)
    await rig.ticks(10)
    assert rig.world.written == []
    rig.ksm = KsmLimits(owned=True, mode=Mode.ADVISE, members=0)
    await rig.ticks(10)
    assert rig.world.written == []
    rig.ksm = KsmLimits(owned=True, mode=Mode.APPLY, members=0)
    await rig.ticks(6)
    assert rig.world.written[:1] == [1]
