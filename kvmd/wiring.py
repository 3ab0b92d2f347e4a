"""The tuning agent's eyes and hands: host sensors, the supervisors' monitors, the journalled knobs.

Guests are looked up by name at each call; nothing here judges.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from kvmd.actions import WriteKnob
from kvmd.effects.apply import HostApplier
from kvmd.effects.history import History
from kvmd.effects.records import Sample
from kvmd.effects.sensors import KSM, HostSensors
from kvmd.errors import QemuFailed
from kvmd.guest.lifecycle import ALIVE
from kvmd.guest.started import started_memory, started_pages
from kvmd.guest.supervisor import Supervisor
from kvmd.manager import Manager
from kvmd.plan.ksm import rate_wish
from kvmd.tuning.agent import Agent, Settings
from kvmd.tuning.ksm import KsmSample
from kvmd.tuning.limits import advise_only, ksm_limits_of, limits_of
from kvmd.tuning.snapshot import BalloonReading, GuestFacts, HostSample

SAMPLE_S = 300.0
SETTLED_S = 120.0  # a guest that boots has not touched what it needs
BALLOON = "/machine/peripheral/balloon"
PAGES = f"{KSM}/pages_to_scan"


class GuestMemory:
    """Sensors and actuators of one Agent."""

    def __init__(self, manager: Manager, applier: HostApplier) -> None:
        self._manager = manager
        self._applier = applier
        self._host = HostSensors()
        self._total_bytes = manager.services.tree.observe_memory().total_bytes

    def settings(self) -> Settings:
        """What the files say now."""
        desired = self._manager.services.loaded.desired
        limits = limits_of(desired.host, desired.guests, total_bytes=self._total_bytes)
        merging = ksm_limits_of(desired.host, desired.guests)
        if self._manager.is_released:  # also by a kvmd before this one: nothing is moved until someone applies
            return Settings(advise_only(limits), replace(merging, owned=False))
        return Settings(limits, replace(merging, written=self._rate_written()) if merging.owned else merging)

    def _rate_written(self) -> int | None:
        """What kvmd last wrote to pages_to_scan, as long as the file wishes the same; then the present rate is ours."""
        services = self._manager.services
        wish = rate_wish(services.loaded.desired.host.ksm)
        last = next((knob for knob in services.store.tuned(services.tree.boot_id()) if knob.path == PAGES), None)
        if last is None:
            return None
        return int(last.ours) if last.why == wish else services.tree.number(PAGES)

    # ---- eyes

    def host(self) -> HostSample | None:
        """/proc now."""
        return self._host.host()

    def ksm(self) -> KsmSample | None:
        """/sys/kernel/mm/ksm now."""
        return self._host.ksm()

    def rss_bytes(self, pid: int) -> int | None:
        """Resident memory of a QEMU."""
        return self._host.rss_bytes(pid)

    def guests(self) -> Sequence[GuestFacts]:
        """All guests with a QEMU, as they were started."""
        alive = (s for s in self._manager.guests.supervisors.values() if s.state in ALIVE and s.record)
        return [self._facts(supervisor) for supervisor in alive]

    def _facts(self, supervisor: Supervisor) -> GuestFacts:
        run, status = supervisor.record, supervisor.status
        memory = started_memory(run) if run else {}
        begun = run.running_at or run.begun_at if run else 0.0
        return GuestFacts(
            name=supervisor.name,
            memory_bytes=int(memory.get("size", 0)),
            state=status.life.state.value,
            booted_s=max(0.0, self._manager.services.now() - begun),
            balloon=status.balloon_bytes is not None,
            hugepages=run is not None and started_pages(run) is not None,
            locked=bool(memory.get("lock")),
            pid=status.process.pid if status.process else None,
        )

    async def balloon(self, name: str) -> BalloonReading:
        """The driver's last report and the present size. KvmdError."""
        supervisor = self._manager.guests.known(name)
        stats = await supervisor.qmp("qom-get", path=BALLOON, property="guest-stats")
        actual = await supervisor.qmp("query-balloon")
        if not isinstance(actual, dict) or not isinstance(actual.get("actual"), int):
            raise QemuFailed(f"guest {name}: query-balloon answered something else than a size")
        supervisor.note_balloon(actual["actual"])
        return BalloonReading.from_qmp(actual["actual"], stats if isinstance(stats, dict) else None)

    # ---- hands

    async def set_balloon(self, name: str, target_bytes: int) -> None:
        """Ask the guest's driver for this size. KvmdError."""
        await self._manager.guests.known(name).qmp("balloon", value=target_bytes)

    async def set_stats_interval(self, name: str, interval_s: int) -> None:
        """How often the driver reports. KvmdError."""
        await self._manager.guests.known(name).qmp(
            "qom-set", path=BALLOON, property="guest-stats-polling-interval", value=interval_s
        )

    async def write_ksm_pages(self, pages_to_scan: int) -> None:
        """Journalled, as every write to the host. KvmdError."""
        services = self._manager.services
        old, why = services.tree.read(PAGES) or "", rate_wish(services.loaded.desired.host.ksm)
        await self._applier.apply(WriteKnob(path=PAGES, old=old, new=str(pages_to_scan), why=why, requirement=False))


class Sampler:
    """Keeps what each running guest needs, a row a guest every SAMPLE_S, for admission (`facts.Usage`)."""

    def __init__(self, manager: Manager, agent: Agent, history: History) -> None:
        self._manager = manager
        self._agent = agent
        self._history = history
        self._host = HostSensors()

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            await self.sample_once()

    async def sample_once(self) -> None:
        """All guests that run long enough to have touched what they need. Demand is what the balloon's figures say,
        else what the guest holds."""
        demands, now = self._agent.demands(), self._manager.services.now()
        for guest in self._manager.guests.footing():
            supervisor = self._manager.guests.supervisors[guest.name]
            begun = supervisor.record.running_at if supervisor.record else None
            if begun is None or now - begun < SETTLED_S:
                continue
            found = await asyncio.to_thread(self._host.footprint, guest.process.pid, guest.memory_bytes)
            if found is not None:
                demand = min(demands.get(guest.name, found.guest_bytes), guest.memory_bytes)
                self._history.add_sample(Sample(now, guest.name, demand, found.other_bytes))
