"""All guests: their files, their supervisors, what was last asked of each, and what a pass has to know of them.

Starting or killing one guest never waits for another, nor for a pass.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from kvmd.actions import PinGuest
from kvmd.config.desired import Loaded
from kvmd.config.files import fingerprint
from kvmd.config.guest import Guest
from kvmd.config.load import load, save_last_good
from kvmd.effects import birthmark, threads
from kvmd.effects.records import GuestRun
from kvmd.errors import KvmdError, NotFound, Refused
from kvmd.facts import CpuTopology, Facts, GuestLife, RunningGuest
from kvmd.guest import strays
from kvmd.guest.lifecycle import ALIVE, Cause, State
from kvmd.guest.pending import pending_changes
from kvmd.guest.services import Services
from kvmd.guest.started import started_memory, started_nics, started_nodes, started_pages
from kvmd.guest.supervisor import Supervisor
from kvmd.plan import cpus
from kvmd.plan.entry import Entry
from kvmd.units import CpuSet

_log = logging.getLogger(__name__)
BOOT_META = "boot_id"
ADOPT_PATIENCE_S = 2.0  # a hundred guests that answer take a quarter of it
STANDBY_BEGINS_S = 5.0  # from a launcher that left us to the standby's mark
STANDBY_LONGEST_S = 30.0
STANDBY_POLL_S = 0.1


class Roster:
    """The supervisors of all guests, and the files that declare them."""

    def __init__(
        self, services: Services, spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
    ) -> None:
        self.services = services
        self.supervisors: dict[str, Supervisor] = {}
        self.version = 0  # grows with every change of any guest's status: the key of cached answers
        self.topology: CpuTopology = services.tree.observe_cpus()  # as of the last pass
        self._spawn = spawn
        self._fingerprint: object = None
        self._pending: dict[str, tuple[Guest, str, tuple[str, ...]]] = {}
        self._kept: dict[str, tuple[CpuSet, ...]] = {}  # CPUs promised to a guest's vCPUs by its present start
        services.admit = self._admit
        services.place = self._place
        services.make_room = self._make_room

    # ---- files --------------------------------------------------------------------------------------------------

    def load_changes(self) -> Loaded:
        """Read the files if any of them was written, added or removed since; what they say now."""
        return self.load() if fingerprint(self.services.paths.config) != self._fingerprint else self.services.loaded

    def load(self) -> Loaded:
        """Read the files again; what was good before stands in for what is not good now."""
        paths = self.services.paths
        self._fingerprint = fingerprint(paths.config)
        loaded = load(paths.config, last_good_dir=paths.last_good, require_root_owner=True)
        save_last_good(loaded, paths.last_good)
        if loaded.faults != self.services.loaded.faults:
            for fault in loaded.faults:
                _log.log(logging.ERROR if fault.severity == "error" else logging.WARNING, "%s", fault)
        self.services.loaded = loaded
        for name in loaded.desired.guests:
            self.supervisor(name)
        self.touch("")
        return loaded

    async def refresh(self) -> Loaded:
        """Read the files and give every declared guest its identity, so that networks know all MACs beforehand."""
        loaded = self.load_changes()
        for name in loaded.desired.guests:
            await asyncio.sleep(0)  # clients are answered meanwhile
            try:
                await self.services.identify(name)
            except KvmdError as error:
                _log.warning("guest %s has no identity yet: %s", name, error)
        return loaded

    # ---- guests -------------------------------------------------------------------------------------------------

    def supervisor(self, name: str) -> Supervisor:
        """The guest's supervisor, made at first sight."""
        if name not in self.supervisors:
            self.supervisors[name] = Supervisor(name, self.services, self._spawn, self.touch)
        return self.supervisors[name]

    def known(self, name: str) -> Supervisor:
        """The supervisor of a guest that is declared or alive. NotFound with the nearest name."""
        found = self.supervisors.get(name)
        if found and (name in self.services.loaded.desired.guests or found.state in ALIVE):
            return found
        near = self._near(name)
        if near is None:
            self.services.declared(name)  # a file that was never without fault has more to say
        raise NotFound(f"no guest is called {name}", hint=f"did you mean {near}?" if near else "kvmd-cli list")

    def _near(self, name: str) -> str | None:
        close = difflib.get_close_matches(name, self.services.loaded.desired.guests, n=1)
        return close[0] if close else None

    async def start(self, name: str, actor: str, *, wait: bool = True) -> bool:
        """Someone wants the guest running. False when it was."""
        self.load_changes()
        self.services.declared(name)
        supervisor = self.known(name)
        self.services.want(name, "running", actor=actor, reason="start")
        self.services.store.clear_crashes(name)
        return await supervisor.start(actor, wait=wait)

    async def stop(self, name: str, actor: str, *, timeout_s: float | None = None, force: bool = False) -> bool:
        """Someone wants the guest off. TimedOut leaves it running, and wanted running again."""
        supervisor = self.known(name)
        guest = self.services.guest(name)
        if guest and "stop" in guest.guest.protect:
            raise Refused(f"guest {name} is protected from stop", hint="guest.protect in its file")
        patience_s = timeout_s if timeout_s is not None else float(guest.stop.timeout) if guest else 180.0
        self.services.want(name, "stopped", actor=actor, reason="stop")
        try:
            return await supervisor.stop(actor, patience_s, force=force)
        except KvmdError:
            if supervisor.state in ALIVE:
                self.services.want(name, "running", actor=actor, reason="it did not obey a stop")
            raise

    async def kill(self, name: str, actor: str) -> bool:
        """The plug. Nothing is asked of QEMU or the guest."""
        supervisor = self.known(name)
        self.services.want(name, "stopped", actor=actor, reason="kill")
        return await supervisor.kill(actor)

    async def recover(self) -> None:
        """Adopt every guest that runs, end the records of those that do not, forget other boots.

        A guest whose monitor is silent keeps nobody waiting beyond ADOPT_PATIENCE_S; it is adopted when it answers.
        """
        store, tree = self.services.store, self.services.tree
        boot_id = tree.boot_id()
        if store.meta(BOOT_META) != boot_id:
            self._new_boot(boot_id)
        runs = {run.name: run for run in store.runs() if run.boot_id == boot_id}
        alive = {run.name for run in runs.values() if not run.process or tree.process(run.process.pid) == run.process}
        found = {run.name: run for run in strays.find(self.services, alive)}
        born = birthmark.all_held(self.services.paths.birth_marks) - found.keys()
        adoptions = [
            self._spawn(self.supervisor(run.name).adopt(run), f"adopt-{run.name}")
            for run in runs.values()
            if run.name not in found and run.name not in born
        ]
        adoptions += [self._spawn(self._adopt_stray(run), f"adopt-{run.name}") for run in found.values()]
        adoptions += [self._spawn(self.take_up(name), f"adopt-{name}") for name in born]
        if adoptions:
            await asyncio.wait(adoptions, timeout=ADOPT_PATIENCE_S)
        for name in self.services.scripts.guests():
            if self.supervisor(name).state not in ALIVE:
                self._spawn(self.services.scripts.down(name), f"{name}-downscripts")

    async def take_up(self, name: str) -> None:
        """Wait for a guest that is being started without us, and adopt it; if nothing comes of it, it is off."""
        supervisor = self.supervisor(name)
        if supervisor.state in ALIVE:
            return
        supervisor.expect("it is being started without kvmd")
        found = await self._birth_without_us(name)
        if found:
            await self._adopt_stray(found)
            return
        supervisor.end_expectation()
        stale = next((run for run in self.services.store.runs() if run.name == name), None)
        if stale:
            await supervisor.adopt(stale)  # which records its end

    async def _birth_without_us(self, name: str) -> GuestRun | None:
        loop, marks = asyncio.get_running_loop(), self.services.paths.birth_marks
        begun, seen = loop.time(), False
        while True:
            at_it = name in birthmark.all_held(marks)  # looked at before its fruit
            found = strays.find_of(self.services, [name])
            waited_s = loop.time() - begun
            if found:
                return found[0]
            if waited_s > STANDBY_LONGEST_S or (not at_it and (seen or waited_s > STANDBY_BEGINS_S)):
                return None
            seen = seen or at_it
            await asyncio.sleep(STANDBY_POLL_S)

    async def _adopt_stray(self, run: GuestRun) -> None:
        """A QEMU of ours that nobody has on record: from now on it is, and shall run, for nobody asked it to end."""
        store, name = self.services.store, run.name
        notes = birthmark.take_notes(self.services.paths.birth_marks, name)
        words = "; ".join(notes) or "known by its UUID and uid"
        _log.warning("guest %s runs and is on no record: %s", name, words, extra={"KVMD_GUEST": name})
        try:
            if any(known.name == name for known in store.runs()):
                store.end_run(name, Cause.VANISHED, "it ended while kvmd was away", self.services.now())
            store.begin_start(replace(run, process=None, running_at=None))
            if run.process:
                store.record_process(name, run.process.pid, run.process.start_time)
            store.record_running(name, run.running_at or run.begun_at)
            self.services.want(name, "running", actor="kvmd", reason="it was found running")
        except KvmdError as error:  # a full disk: it is looked after all the same
            _log.error("guest %s: %s", name, error, extra={"KVMD_GUEST": name})
        await self.supervisor(name).adopt(run, notes)

    async def learn(self) -> None:
        """The threads of all adopted guests; from then on guests may be started and placed beside them."""
        await asyncio.gather(*(supervisor.learn() for supervisor in self.supervisors.values()))
        self.services.settled.set()

    def _new_boot(self, boot_id: str) -> None:
        """Nothing of an earlier boot is alive; what shall run is what the files and links say."""
        store, units = self.services.store, self.services.units
        for run in store.runs():
            store.end_run(run.name, Cause.HOST_SHUTDOWN, "the host went down", self.services.now())
        store.drop_other_boots(boot_id)
        for name, guest in self.services.loaded.desired.guests.items():
            auto = guest.start.auto if guest.start.auto is not None else bool(units and units.enabled(name))
            self.services.want(name, "running" if auto else "stopped", actor="boot", reason="start.auto")
        store.set_meta(BOOT_META, boot_id)

    def let_go(self) -> None:
        """kvmd ends: stop watching and waiting. Guests go on."""
        for supervisor in self.supervisors.values():
            supervisor.let_go()

    def touch(self, name: str) -> None:
        """Something about a guest changed: cached answers are stale, and the promise of a start that is over ends."""
        if name in self._kept and self.supervisors[name].state is not State.STARTING:
            del self._kept[name]
        self.version += 1

    # ---- what supervisors ask -----------------------------------------------------------------------------------

    def _admit(self, name: str) -> None:
        """Refused when the guest does not fit beside those that are alive."""
        tree = self.services.tree
        ours = frozenset(s.status.process.pid for s in self.supervisors.values() if s.status.process)
        others = tuple(s for s in self.supervisors.values() if s.name != name)
        facts = Facts(
            memory=tree.observe_memory(),
            hugepages=tree.observe_hugepages(),
            lives=tuple(GuestLife(s.name, alive=s.state in ALIVE, wanted=True) for s in others),
            guests=tuple(guest for guest in self.footing() if guest.name != name),
            foreign_qemu_bytes=tree.foreign_qemu(ours),
            usage=self.services.usage(),
        )
        problem = Entry(self.services.loaded.desired, facts).problem(name)
        if problem:
            raise Refused(problem.message, hint=problem.hint)

    def _place(self, name: str) -> cpus.Placement | None:
        """Where the guest's threads go, kept for it while it starts. Refused when there is no room."""
        alive = {s.name: s for s in self.supervisors.values() if s.state in ALIVE}
        guest = self.services.guest(name)
        found = cpus.place_guest(
            name,
            self.services.loaded.desired,
            self.topology,
            alive,
            taken={other: has for other, s in alive.items() if (has := self._has(s))},
            nodes={other: started_nodes(s.record) for other, s in alive.items() if s.record and s.vcpu_threads},
            preferred=self._preferred(guest) if guest else (),
        )
        if found:
            self._kept[name] = found.vcpus
        return found

    def _preferred(self, guest: Guest) -> tuple[int, ...]:
        """NUMA nodes where its memory and its devices are now."""
        tree = self.services.tree
        found = (tree.number(f"/sys/bus/pci/devices/{each.pci}/numa_node") for each in guest.hostdev.values())
        devices = [node for node in found if node is not None and node >= 0]
        return cpus.preferred_nodes(guest, tree.observe_memory(), tree.observe_hugepages(), devices)

    def _make_room(self, name: str) -> None:
        """Others leave the CPUs that guest `name`, which is about to run, has to itself; one that cannot is told."""
        facts = Facts(cpus=self.topology, guests=self.all_running(), lives=self.lives())
        desired = self.services.loaded.desired
        for action in cpus.plan_pins(desired.guests, desired.host, facts)[0]:
            if isinstance(action, PinGuest) and action.guest != name:
                try:
                    self.pin(action)
                    _log.info("%s  (%s has CPUs of its own)", action.line(), name, extra={"KVMD_GUEST": action.guest})
                except KvmdError as error:
                    _log.error("%s", error, extra={"KVMD_GUEST": action.guest})

    def pin(self, action: PinGuest) -> None:
        """Put all threads of a guest where the action says; nothing when it has none (any more). HostFailed."""
        supervisor = self.supervisor(action.guest)
        found, vcpus = supervisor.status.process, self.vcpus_of(supervisor)
        if found is None or len(vcpus) != len(action.vcpus):
            return
        sets = [CpuSet.parse(text) for text in action.vcpus]
        threads.pin(action.guest, found.pid, vcpus, sets, CpuSet.parse(action.emulator))

    def vcpus_of(self, supervisor: Supervisor) -> tuple[int, ...]:
        """A live guest's vCPU threads; by their names where its QEMU does not answer; () while it starts."""
        process = supervisor.status.process
        if supervisor.vcpu_threads or process is None or supervisor.state is State.STARTING:
            return supervisor.vcpu_threads
        return threads.named_vcpus(process.pid)

    def _has(self, supervisor: Supervisor) -> tuple[CpuSet, ...]:
        """CPUs of a live guest's vCPUs: as they are, as they will be when its start is through, () if unknown."""
        vcpus = self.vcpus_of(supervisor)
        if not vcpus and supervisor.state is State.STARTING:
            return self._kept.get(supervisor.name, ())
        return tuple(threads.affinity(tid) for tid in vcpus)

    # ---- facts about guests -------------------------------------------------------------------------------------

    def lives(self) -> tuple[GuestLife, ...]:
        return tuple(self._life(supervisor) for supervisor in self.supervisors.values())

    def all_running(self) -> tuple[RunningGuest, ...]:
        alive = [supervisor for supervisor in self.supervisors.values() if supervisor.state in ALIVE]
        workers = threads.kernel_workers(self.services.tree) if alive else {}
        found = (self.running(supervisor, workers) for supervisor in alive)
        return tuple(running for running in found if running is not None)

    def _life(self, supervisor: Supervisor) -> GuestLife:
        store, name = self.services.store, supervisor.name
        alive = supervisor.state in ALIVE
        guest = self.services.guest(name)
        wanted = store.wanted(name)
        shall = wanted.state == "running" if wanted else bool(guest and guest.start.auto)
        held = next((hold.reason or "held" for hold in store.holds() if hold.guest == name), None)
        if supervisor.state is State.FAILED and supervisor.status.life.cause is not Cause.START_FAILED:
            held = held or supervisor.status.life.reason
        pending = self.pending(supervisor) if alive else ()
        settling = supervisor.state in (State.STARTING, State.STOPPING)
        return GuestLife(name, alive=alive, wanted=shall, held=held, pending=pending, settling=settling)

    def footing(self) -> tuple[RunningGuest, ...]:
        """All guests with a QEMU and their memory; their threads are not looked at."""
        return tuple(found for supervisor in self.supervisors.values() if (found := self._footing(supervisor)))

    def _footing(self, supervisor: Supervisor) -> RunningGuest | None:
        record, found = supervisor.record, supervisor.status.process
        if record is None or found is None or supervisor.state not in ALIVE:
            return None
        return RunningGuest(
            name=supervisor.name,
            uuid=record.uuid,
            process=found,
            memory_bytes=int(started_memory(record).get("size", 0)),
            page_bytes=started_pages(record),
        )

    def running(self, supervisor: Supervisor, workers: threads.Workers | None = None) -> RunningGuest | None:
        """A live guest with all its threads; `workers`: the kernel's threads, when they were listed already."""
        record, found = supervisor.record, supervisor.status.process
        if record is None or found is None or supervisor.state not in ALIVE:
            return None
        memory = started_memory(record)
        vcpus = self.vcpus_of(supervisor)
        if workers is None:
            workers = threads.kernel_workers(self.services.tree) if vcpus else {}
        return RunningGuest(
            name=supervisor.name,
            uuid=record.uuid,
            process=found,
            memory_bytes=int(memory.get("size", 0)),
            page_bytes=started_pages(record),
            vcpu_threads=vcpus,
            affinity=tuple(str(each) for each in self._has(supervisor)),
            others=threads.observe_others(found.pid, vcpus, workers) if vcpus else (),
            nodes=started_nodes(record),
            nics=started_nics(record) if supervisor.state is not State.STARTING else (),
            unplugged=self.services.unplugged(supervisor.name),
        )

    def pending(self, supervisor: Supervisor) -> tuple[str, ...]:
        """Keys of the guest's file that wait for a new QEMU; compared once for each run and each reading of files."""
        run, guest = supervisor.record, self.services.guest(supervisor.name)
        if run is None or guest is None:
            return ()
        known = self._pending.get(supervisor.name)
        if known is None or known[0] is not guest or known[1] != run.config_text:
            known = self._pending[supervisor.name] = guest, run.config_text, pending_changes(run, guest)
        return known[2]
