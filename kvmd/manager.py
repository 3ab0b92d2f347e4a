"""The one way in: load the files, observe the world, plan, apply. RPC, boot, cron and signals all come here.

`reconcile` and `apply` differ only in the disruption they allow; `plan` is the same path without the last step.
Passes are serialised; starting or killing one guest never waits for a pass.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from kvmd.actions import (
    AnyAction,
    Disruption,
    EnableGuest,
    Outcome,
    PinGuest,
    RestartGuest,
    StartGuest,
    StopGuest,
    WriteDropIn,
)
from kvmd.config.catalogue import generic, keys_of
from kvmd.config.desired import Loaded
from kvmd.config.files import fingerprint
from kvmd.config.guest import Guest
from kvmd.config.load import load, save_last_good
from kvmd.effects import nft, process
from kvmd.effects.apply import HostApplier
from kvmd.effects.dnsmasq import Dnsmasqs
from kvmd.effects.records import EffectKind, GuestRun
from kvmd.errors import Conflict, KvmdError, NotFound, PartlyFailed, Refused
from kvmd.facts import Facts, GuestLife, RunningGuest
from kvmd.guest.lifecycle import ALIVE, Cause, State
from kvmd.guest.services import Services, started_config, started_memory
from kvmd.guest.supervisor import Supervisor
from kvmd.plan import cpus, network
from kvmd.plan.host import Plan, admit, plan
from kvmd.plan.ksm import KNOBS
from kvmd.plan.release import plan_release
from kvmd.units import CpuSet

_log = logging.getLogger(__name__)
BOOT_META = "boot_id"
RELEASED_META = "released_in_boot"
ADOPT_PATIENCE_S = 2.0  # a hundred guests that answer take a quarter of it


@dataclass(frozen=True, slots=True)
class Report:
    """What one pass did and left."""

    outcomes: tuple[Outcome, ...]
    skipped: tuple[AnyAction, ...]
    plan: Plan
    loaded: Loaded


class Manager:
    """Desired state, facts, supervisors and the passes that bring them together."""

    def __init__(
        self,
        services: Services,
        applier: HostApplier,
        dnsmasqs: Dnsmasqs,
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
    ) -> None:
        self.services = services
        self.supervisors: dict[str, Supervisor] = {}
        self.version = 0  # grows with every change of any guest's status: the key of cached answers
        self._applier = applier
        self._dnsmasqs = dnsmasqs
        self._spawn = spawn
        self._pass = asyncio.Lock()
        self._fingerprint: object = None
        self._pending: dict[str, tuple[Guest, str, tuple[str, ...]]] = {}
        self._topology = services.tree.observe_cpus()
        self.prepared: Callable[[], None] = lambda: None  # a pass has prepared the host and goes on to start guests
        services.admit = self._admit
        services.place = self._place

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
        runs = [run for run in store.runs() if run.boot_id == boot_id]
        adoptions = [self._spawn(self.supervisor(run.name).adopt(run), f"adopt-{run.name}") for run in runs]
        if adoptions:
            await asyncio.wait(adoptions, timeout=ADOPT_PATIENCE_S)

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

    def touch(self, _name: str) -> None:
        """Something about a guest changed: cached answers are stale."""
        self.version += 1

    # ---- observe, plan, apply -----------------------------------------------------------------------------------

    async def observe(self) -> Facts:
        """One picture of host and guests."""
        tree = self.services.tree
        desired = self.services.loaded.desired
        guests = self._all_running()
        journal = self.services.store.journalled(tree.boot_id())
        knobs = {*KNOBS, *network.KNOBS, *(e.subject for e in journal if e.kind == EffectKind.KNOB)}
        with_networks = bool(desired.networks) or any(entry.kind == EffectKind.BRIDGE for entry in journal)
        self._topology = tree.observe_cpus()
        return Facts(
            boot_id=tree.boot_id(),
            cpus=self._topology,
            memory=tree.observe_memory(),
            hugepages=tree.observe_hugepages(),
            knobs=tree.observe_knobs(knobs),
            links=await self.services.netlink.observe_links() if with_networks else (),
            nft=await nft.observe() if with_networks else None,
            dnsmasq=self._dnsmasqs.observe(),
            guests=guests,
            lives=self._lives(),
            foreign_qemu_bytes=tree.foreign_qemu(frozenset(guest.process.pid for guest in guests)),
            units=self.services.units.observe() if self.services.units else None,
        )

    async def plan(self, *, prune: bool = False) -> Plan:
        """What a pass would do now."""
        return self._plan(await self.observe(), prune=prune)

    def _plan(self, facts: Facts, *, prune: bool) -> Plan:
        desired = self.services.loaded.desired
        journal = self.services.store.journalled(facts.boot_id)
        pools = [entry for entry in journal if entry.kind == EffectKind.HUGEPAGES]
        return plan(
            desired,
            facts,
            macs=self.services.macs(),
            originals={_pool_key(entry.subject): int(entry.original) for entry in pools},
            prune=prune,
        )

    async def apply(self, allow: frozenset[Disruption], actor: str, *, prune: bool = False) -> Report:
        """Load, plan and do what `allow` permits. One failed action does not stop the others."""
        if self.services.store.meta(RELEASED_META):
            self.services.store.set_meta(RELEASED_META, "")
        return await self._pass_once(allow, actor, prune=prune)

    async def _pass_once(self, allow: frozenset[Disruption], actor: str, *, prune: bool) -> Report:
        async with self._pass:
            await self.refresh()
            planned = await self.plan(prune=prune)
            now, skipped = planned.split(allow)
            self._refuse_mass_stop(now)
            outcomes = await self._carry_out(now, actor)
        return Report(tuple(outcomes), skipped, planned, self.services.loaded)

    async def reconcile(self, actor: str) -> Report:
        """What cron, the timer and boot do: nothing that disturbs anyone, unless kvmd.toml allows it.

        A host that was released stays so until someone applies, or until the next boot.
        """
        if self.services.store.meta(RELEASED_META) == self.services.tree.boot_id():
            return Report((), (), Plan(), self.services.loaded)
        allow = frozenset(Disruption(word) for word in self.services.loaded.desired.daemon.apply.allow)
        return await self._pass_once(allow, actor, prune=False)

    def _refuse_mass_stop(self, actions: tuple[AnyAction, ...]) -> None:
        stops = [action.guest for action in actions if isinstance(action, StopGuest | RestartGuest)]
        limit = self.services.loaded.desired.daemon.apply.max_stops
        if len(stops) > limit:
            raise Refused(
                f"this pass would stop {len(stops)} guests ({', '.join(stops[:5])}…); apply.max_stops is {limit}",
                hint="stop them yourself, or raise apply.max_stops in kvmd.toml",
            )

    async def _carry_out(self, actions: tuple[AnyAction, ...], actor: str) -> list[Outcome]:
        outcomes: list[Outcome] = []
        starts = [action for action in actions if isinstance(action, StartGuest)]
        restarts = [action for action in actions if isinstance(action, RestartGuest)]
        for action in actions:
            if not isinstance(action, StartGuest | RestartGuest):
                outcomes.append(await self._do(action, actor))
        if any(isinstance(action, WriteDropIn) for action in actions):
            await self._reload_units()
        self.prepared()
        for restart in restarts:
            outcomes.append(await self._do(restart, actor))
        return outcomes + await self._start_all(starts, actor)

    async def _start_all(self, starts: list[StartGuest], actor: str) -> list[Outcome]:
        """A few at a time, each after those its `start.after` names."""
        wish = self.services.loaded.desired.daemon.guests.start_concurrency
        limit = asyncio.Semaphore(wish if isinstance(wish, int) else max(2, len(self._topology.cpus)))
        done = {action.guest: asyncio.Event() for action in starts}

        async def one(action: StartGuest) -> Outcome:
            guest = self.services.guest(action.guest)
            for other in guest.start.after if guest else ():
                if other in done:
                    await done[other].wait()
            if guest and guest.start.delay:
                await asyncio.sleep(guest.start.delay)
            try:
                async with limit:
                    return await self._do(action, actor)
            finally:
                done[action.guest].set()

        return list(await asyncio.gather(*(one(action) for action in starts)))

    async def _reload_units(self) -> None:
        """One daemon-reload for all drop-ins of a pass. One that failed is made up for by the guest's next start."""
        try:
            if self.services.units:
                await self.services.units.reload()
        except KvmdError as error:
            _log.error("%s", error)

    async def _do(self, action: AnyAction, actor: str) -> Outcome:
        """One action, its log line and its event."""
        try:
            match action:
                case StartGuest():
                    await self.supervisor(action.guest).start(actor)
                case StopGuest():
                    await self.stop(action.guest, actor)
                case RestartGuest():
                    await self.stop(action.guest, actor)
                    await self.start(action.guest, actor)
                case PinGuest():
                    self._pin(action)
                case WriteDropIn() | EnableGuest():
                    self._tell_systemd(action)
                case _:
                    await self._applier.apply(action)
        except KvmdError as error:
            _log.error("%s failed: %s", action.line(), error)
            self.services.publish("action.failed", None, actor, {"line": action.line(), "error": error.message})
            return Outcome(action, error.message)
        guest = getattr(action, "guest", None)
        _log.info("%s  (%s)", action.line(), action.why, extra={"KVMD_GUEST": guest} if guest else None)
        self.services.publish("action.done", None, actor, {"line": action.line(), "why": action.why})
        return Outcome(action)

    async def release(self, actor: str) -> tuple[list[str], list[str]]:
        """Put the host back as it was before kvmd. Conflict while guests run. Returns what was restored and kept."""
        alive = sorted(s.name for s in self.supervisors.values() if s.state in ALIVE)
        if alive:
            raise Conflict(f"guests run: {', '.join(alive)}", hint="kvmd-cli stop them first")
        restored, kept = [], []
        async with self._pass:
            self.services.store.set_meta(RELEASED_META, self.services.tree.boot_id())
            facts = await self.observe()
            entries = [(e.kind, e.subject, e.original, e.new) for e in self.services.store.journalled(facts.boot_id)]
            for undo in plan_release(entries, facts):
                if undo.kept:
                    kept.append(undo.kept)
                if undo.action:
                    outcome = await self._do(undo.action, actor)
                    if outcome.error:
                        raise PartlyFailed(f"{undo.action.line()}: {outcome.error}", failed=[undo.key])
                    restored.append(undo.action.line())
                self.services.store.forget(undo.key)
        return restored, kept

    # ---- what supervisors ask -----------------------------------------------------------------------------------

    def _admit(self, name: str) -> None:
        """Refused when the guest does not fit beside those that are alive."""
        tree = self.services.tree
        ours = frozenset(s.status.process.pid for s in self.supervisors.values() if s.status.process)
        lives = tuple(GuestLife(s.name, alive=s.state in ALIVE, wanted=True) for s in self.supervisors.values())
        facts = Facts(memory=tree.observe_memory(), lives=lives, foreign_qemu_bytes=tree.foreign_qemu(ours))
        problem = admit(name, self.services.loaded.desired, facts)
        if problem:
            raise Refused(problem.message, hint=problem.hint)

    def _place(self, name: str) -> cpus.Placement | None:
        """Where the guest's threads go. Refused when there is no room."""
        alive = {supervisor.name for supervisor in self.supervisors.values() if supervisor.state in ALIVE}
        threads = {s.name: s.vcpu_threads for s in self.supervisors.values() if s.state in ALIVE and s.vcpu_threads}
        taken = {other: tuple(process.affinity(tid) for tid in tids) for other, tids in threads.items()}
        return cpus.place_guest(name, self.services.loaded.desired, self._topology, alive, taken=taken)

    # ---- facts about guests -------------------------------------------------------------------------------------

    def _lives(self) -> tuple[GuestLife, ...]:
        return tuple(self._life(supervisor) for supervisor in self.supervisors.values())

    def _all_running(self) -> tuple[RunningGuest, ...]:
        found = (self.running(supervisor) for supervisor in self.supervisors.values())
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

    def running(self, supervisor: Supervisor) -> RunningGuest | None:
        record, found = supervisor.record, supervisor.status.process
        if record is None or found is None or supervisor.state not in ALIVE:
            return None
        memory = started_memory(record)
        page = memory.get("page_size") or (2 << 20)
        threads = supervisor.vcpu_threads
        return RunningGuest(
            name=supervisor.name,
            uuid=record.uuid,
            process=found,
            memory_bytes=int(memory.get("size", 0)),
            page_bytes=int(page) if memory.get("backing") == "hugepages" else None,
            vcpu_threads=threads,
            affinity=tuple(str(process.affinity(tid)) for tid in threads),
            emulator=str(process.affinity(found.pid)),
        )

    def _tell_systemd(self, action: WriteDropIn | EnableGuest) -> None:
        units = self.services.units
        if units is None:
            return
        if isinstance(action, WriteDropIn):
            units.write_drop_in(action.guest, action.text)
        else:
            units.enable(action.guest, on=action.on)

    def pending(self, supervisor: Supervisor) -> tuple[str, ...]:
        """Keys of the guest's file that wait for a new QEMU; compared once for each run and each reading of files."""
        run, guest = supervisor.record, self.services.guest(supervisor.name)
        if run is None or guest is None:
            return ()
        known = self._pending.get(supervisor.name)
        if known is None or known[0] is not guest or known[1] != run.config_text:
            known = self._pending[supervisor.name] = guest, run.config_text, pending_changes(run, guest)
        return known[2]

    def _pin(self, action: PinGuest) -> None:
        supervisor = self.supervisor(action.guest)
        found = supervisor.status.process
        if found is None:
            return
        sets = [CpuSet.parse(text) for text in action.vcpus]
        process.pin(action.guest, found.pid, supervisor.vcpu_threads, sets, CpuSet.parse(action.emulator))


def pending_changes(run: GuestRun | None, guest: Guest | None) -> tuple[str, ...]:
    """Keys in which the file differs from what the running QEMU was started with, and that need a new one."""
    if run is None or guest is None or not run.config_text:
        return ()
    text = guest.model_dump_json(by_alias=True)
    if text == run.config_text:
        return ()
    old, new = started_config(run), json.loads(text)
    return tuple(key for key in _differences(old, new) if _needs_restart(key))


def _needs_restart(key: str) -> bool:
    found = keys_of("guests.d").get(".".join(generic("guests.d", tuple(key.split(".")))))
    return found is not None and found.applies == "restart"


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted paths of all leaves that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return [] if old == new else [prefix]


def _pool_key(subject: str) -> tuple[int, int]:
    node, page_bytes = subject.split(":")
    return int(node), int(page_bytes)
