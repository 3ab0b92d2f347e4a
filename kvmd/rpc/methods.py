"""The methods of the API: each a few lines between the manager and the shapes in results.py.

`guest.list` is answered from cached bytes: the same state is encoded once, however often it is asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from kvmd import __version__
from kvmd.actions import AnyAction, Disruption, Outcome, Problem, RestartGuest
from kvmd.config.desired import Fault
from kvmd.effects.records import Hold, WantedState
from kvmd.guest.lifecycle import ALIVE
from kvmd.guest.supervisor import Supervisor
from kvmd.manager import Manager, Report
from kvmd.plan import kernelargs
from kvmd.plan.admission import Account
from kvmd.plan.cpumap import GuestSeats, cpu_map
from kvmd.plan.groups import when
from kvmd.plan.host import Plan
from kvmd.plan.links import tap_name
from kvmd.plan.pagemap import page_map
from kvmd.plan.reboot import Difference
from kvmd.plan.yielding import Yielded
from kvmd.rpc import results
from kvmd.rpc.protocol import RawJson
from kvmd.rpc.registry import Call, Handler, NoParams, Registry

if TYPE_CHECKING:
    from kvmd.tuning.agent import Agent

FIRST_LINES = 5  # of each kind of drift, in daemon.status
_WORD = re.compile(r"(?<!^)(?=[A-Z])")


class Methods:
    """Answers every method except the protocol's own."""

    def __init__(self, manager: Manager, agent: Callable[[], Agent], *, started_at: float) -> None:
        self._manager = manager
        self._agent = agent
        self._started_at = started_at
        self._list: tuple[int, RawJson] | None = None

    def add_to(self, registry: Registry) -> None:
        """Register all of them."""
        table: tuple[tuple[str, str, type[BaseModel], type[BaseModel], Handler[Any]], ...] = (
            ("guest.list", "viewer", NoParams, results.GuestList, self.guest_list),
            ("guest.show", "viewer", results.GuestParams, results.GuestDetail, self.guest_show),
            ("guest.explain", "viewer", results.GuestParams, results.Derived, self.guest_explain),
            ("guest.start", "operator", results.GuestVerbParams, results.GuestVerbResult, self.guest_start),
            ("guest.stop", "operator", results.GuestVerbParams, results.GuestVerbResult, self.guest_stop),
            ("guest.kill", "operator", results.GuestVerbParams, results.GuestVerbResult, self.guest_kill),
            ("guest.reboot", "operator", results.GuestVerbParams, results.GuestVerbResult, self.guest_reboot),
            ("guest.reset", "operator", results.GuestVerbParams, results.GuestVerbResult, self.guest_reset),
            ("host.plan", "viewer", results.PlanParams, results.Plan, self.host_plan),
            ("host.admission", "viewer", results.AdmissionParams, results.Admissions, self.host_admission),
            ("host.apply", "admin", results.ApplyParams, results.Applied, self.host_apply),
            ("host.reconcile", "operator", NoParams, results.Applied, self.host_reconcile),
            ("host.release", "admin", results.ReleaseParams, results.Released, self.host_release),
            ("host.facts", "viewer", NoParams, results.HostFacts, self.host_facts),
            ("host.cpus", "viewer", NoParams, results.HostCpus, self.host_cpus),
            ("host.hugepages", "viewer", NoParams, results.HostHugepages, self.host_hugepages),
            ("host.kernel_args", "viewer", NoParams, results.KernelArgs, self.host_kernel_args),
            (
                "host.write_kernel_args",
                "admin",
                results.KernelArgsParams,
                results.KernelArgsWritten,
                self.host_write_kernel_args,
            ),
            ("tune.status", "viewer", NoParams, results.TuneStatus, self.tune_status),
            ("tune.explain", "viewer", results.ExplainParams, results.Explained, self.tune_explain),
            ("daemon.status", "viewer", NoParams, results.DaemonStatus, self.daemon_status),
            ("daemon.version", "viewer", NoParams, results.DaemonVersion, self.daemon_version),
            ("daemon.ping", "viewer", NoParams, results.Pong, self.daemon_ping),
        )
        for name, role, params, result, handler in table:
            registry.method(name, role=role, params=params, result=result)(handler)

    # ---- guests -------------------------------------------------------------------------------------------------

    async def guest_list(self, _params: NoParams, _call: Call) -> RawJson:
        """All guests, from what is known without asking any QEMU"""
        if self._list is None or self._list[0] != self._manager.guests.version:
            version = self._manager.guests.version
            asked = {wanted.guest: wanted.state for wanted in self._manager.services.store.all_wanted()}
            held = {hold.guest: hold for hold in self._manager.services.store.holds()}
            guests = tuple(self._summary(s, asked.get(s.name), held.get(s.name)) for s in self._listed())
            shown = results.GuestList(guests=guests)
            self._list = (version, RawJson(shown.model_dump_json().encode()))
        return self._list[1]

    async def guest_show(self, params: results.GuestParams, _call: Call) -> results.GuestDetail:
        """Everything about one guest"""
        services, name = self._manager.services, params.name
        supervisor = self._manager.guests.known(name)
        guest = services.guest(name)
        identity = services.identity(name)
        run = supervisor.record
        wanted = services.store.wanted(name)
        return results.GuestDetail(
            **self._summary(supervisor, wanted.state if wanted else None, services.hold(name)).model_dump(),
            description=guest.guest.description or None if guest else None,
            owner=guest.guest.owner if guest else None,
            tags=guest.guest.tags if guest else (),
            machine=identity.machine if identity else guest.machine.type if guest else None,
            accel=guest.machine.accel if guest else None,
            display=str(services.paths.guest_display(name) / "vnc.sock")
            if guest and guest.display.type == "vnc"
            else None,
            disks=tuple(
                results.Disk(name=disk, file=table.file or "", format=table.format or "", size_bytes=None)
                for disk, table in (guest.disk.items() if guest else ())
            ),
            nics=tuple(
                results.Nic(
                    name=nic,
                    network=table.network,
                    mac=identity.macs.get(nic, "") if identity else "",
                    ipv4=str(table.ipv4) if table.ipv4 else None,
                    tap=tap_name(identity.uuid, nic) if identity and table.network else None,
                )
                for nic, table in (guest.nic.items() if guest else ())
            ),
            placement=self._placement(supervisor),
            warnings=supervisor.status.warnings,
            argv=run.argv if run else (),
            log_dir=str(services.paths.guest_log(name)),
        )

    async def guest_explain(self, params: results.GuestParams, _call: Call) -> results.Derived:
        """Where each value comes from that a guest's file does not give"""
        lines = await self._manager.services.explain(params.name)
        return results.Derived(
            values=tuple(results.DerivedValue(key=key, value=value, reason=reason) for key, value, reason in lines)
        )

    async def guest_start(self, params: results.GuestVerbParams, call: Call) -> results.GuestVerbResult:
        """Bring a guest to running"""
        changed = await self._manager.guests.start(params.name, call.actor, wait=params.wait)
        return self._verb(params.name, changed=changed)

    async def guest_stop(self, params: results.GuestVerbParams, call: Call) -> results.GuestVerbResult:
        """Ask a guest to power off; with force, pull the plug when it does not obey in time"""
        timeout_s = params.timeout_s
        changed = await self._manager.guests.stop(params.name, call.actor, timeout_s=timeout_s, force=params.force)
        return self._verb(params.name, changed=changed)

    async def guest_kill(self, params: results.GuestVerbParams, call: Call) -> results.GuestVerbResult:
        """Pull the plug of a guest"""
        changed = await self._manager.guests.kill(params.name, call.actor)
        return self._verb(params.name, changed=changed)

    async def guest_reboot(self, params: results.GuestVerbParams, _call: Call) -> results.GuestVerbResult:
        """Ask a guest to reboot itself, in the same QEMU"""
        await self._manager.guests.known(params.name).reboot()
        return self._verb(params.name, changed=True)

    async def guest_reset(self, params: results.GuestVerbParams, _call: Call) -> results.GuestVerbResult:
        """Press a guest's reset button"""
        await self._manager.guests.known(params.name).reset()
        return self._verb(params.name, changed=True)

    def _verb(self, name: str, *, changed: bool) -> results.GuestVerbResult:
        return results.GuestVerbResult(name=name, state=self._manager.guests.known(name).state.value, changed=changed)

    def _listed(self) -> list[Supervisor]:
        declared = self._manager.services.loaded.desired.guests
        found = (s for s in self._manager.guests.supervisors.values() if s.name in declared or s.state in ALIVE)
        return sorted(found, key=lambda supervisor: supervisor.name)

    def _summary(self, supervisor: Supervisor, wanted: WantedState | None, hold: Hold | None) -> results.GuestSummary:
        services, name, status = self._manager.services, supervisor.name, supervisor.status
        guest = services.guest(name)
        run = supervisor.record
        return results.GuestSummary(
            name=name,
            state=status.life.state.value,
            reason=status.life.reason or None,
            uuid=run.uuid if run else guest.guest.uuid if guest else None,
            pid=status.process.pid if status.process else None,
            vcpus=len(supervisor.vcpu_threads) or (guest.cpu.vcpus if guest else 0),
            memory_bytes=int(guest.memory.size) if guest else 0,
            balloon_bytes=status.balloon_bytes,
            wanted=wanted,
            held=(hold.reason or f"by {hold.actor}") if hold else None,
            since=status.since or None,
            pending=self._manager.guests.pending(supervisor),
            stale=name in services.loaded.desired.stale,
            observed_at=status.observed_at,
        )

    def _placement(self, supervisor: Supervisor) -> results.PlacementShape | None:
        running = self._manager.guests.running(supervisor)
        if running is None or not running.affinity:
            return None
        return results.PlacementShape(vcpus=running.affinity, emulator=running.emulator)

    # ---- host ---------------------------------------------------------------------------------------------------

    async def host_plan(self, params: results.PlanParams, _call: Call) -> results.Plan:
        """What a pass would do now, with the reason of each action, whom it disturbs and when it takes effect"""
        loaded = await self._manager.guests.refresh()
        plan = await self._manager.plan(retake=params.retake)
        reboot = await self._manager.after_reboot() if params.reboot else None
        return results.Plan(
            actions=tuple(_action(action) for action in plan.actions),
            problems=_problems(plan.problems),
            yielded=_yielded(plan.yielded),
            admissions=_admissions(plan.admissions),
            faults=_faults(loaded.faults),
            reboot=None if reboot is None else tuple(_difference(each) for each in reboot),
        )

    async def host_admission(self, params: results.AdmissionParams, _call: Call) -> results.Admissions:
        """Whether these guests may start now, one after the other, each with the sum; nothing is started"""
        await self._manager.guests.refresh()
        return results.Admissions(admissions=_admissions(await self._manager.admissions(params.names)))

    async def host_apply(self, params: results.ApplyParams, call: Call) -> results.Applied:
        """Make host and guests as the files say, within the disruption allowed"""
        allow = frozenset(Disruption(word) for word in params.allow)
        self._agent().resume()
        return _applied(await self._manager.apply(allow, call.actor, prune=params.prune))

    async def host_reconcile(self, _params: NoParams, call: Call) -> results.Applied:
        """The same for cron: only what disturbs nobody, unless kvmd.toml allows more"""
        return _applied(await self._manager.reconcile(call.actor))

    async def host_release(self, params: results.ReleaseParams, call: Call) -> results.Released:
        """Put the host back as it was before kvmd touched it, its guests' memory included"""
        restored, kept = await self._manager.release(call.actor, partial=params.partial)
        whole = [f"~ guest {name}: all of its memory back" for name in await self._agent().restore()]
        return results.Released(restored=(*restored, *whole), kept=tuple(kept))

    async def host_facts(self, _params: NoParams, _call: Call) -> results.HostFacts:
        """The host as it is, read now"""
        return results.HostFacts(json.loads(json.dumps(asdict(await self._manager.observe()), default=_plain)))

    async def host_cpus(self, _params: NoParams, _call: Call) -> results.HostCpus:
        """Who sits where: every CPU with its role and its vCPUs, every running guest with all its threads"""
        found = cpu_map(self._manager.services.loaded.desired, await self._manager.observe())
        return results.HostCpus(
            housekeeping=found.housekeeping,
            cpus=tuple(results.CpuShape.model_validate(asdict(seat)) for seat in found.cpus),
            guests=tuple(
                results.GuestCpus.model_validate(asdict(guest) | {"threads": _threads(guest)}) for guest in found.guests
            ),
            interrupts=tuple(results.IrqShape.model_validate(asdict(each)) for each in found.interrupts),
            problems=_problems(found.problems),
        )

    async def host_hugepages(self, _params: NoParams, _call: Call) -> results.HostHugepages:
        """Every pool of hugepages as it is and as it shall be, and who wants pages"""
        facts, plan = await self._manager.look()
        found = page_map(self._manager.services.loaded.desired, facts, plan.actions)
        guests = {guest.name for guest in found.guests}
        about = [p for p in plan.problems if p.subject.startswith("hugepages") or p.guests & guests]
        return results.HostHugepages(
            pools=tuple(results.PoolShape.model_validate(asdict(line)) for line in found.pools),
            guests=tuple(results.PageGuestShape.model_validate(asdict(guest)) for guest in found.guests),
            boot=found.boot,
            problems=_problems(about),
        )

    async def host_kernel_args(self, _params: NoParams, _call: Call) -> results.KernelArgs:
        """The kernel's command line as it is and as the guests' files want it"""
        found, line = await self._manager.kernel_args()
        return results.KernelArgs(
            cmdline=line.cmdline,
            words=tuple(results.KernelWordShape.model_validate(asdict(word)) for word in found.words),
            loader=line.loader,
            path=kernelargs.DROP_IN if line.loader == "grub" else None,
            now=line.drop_in,
            text=found.drop_in,
            command=kernelargs.command(line.loader, " ".join(word.wanted for word in found.missing)),
            problems=_problems(found.problems),
        )

    async def host_write_kernel_args(self, params: results.KernelArgsParams, call: Call) -> results.KernelArgsWritten:
        """Write the boot loader's drop-in, or take it away; the boot loader is not run and nothing is rebooted"""
        done = await self._manager.write_kernel_args(call.actor, remove=params.remove)
        return results.KernelArgsWritten(
            line=done.line() if done else None, path=kernelargs.DROP_IN, command=kernelargs.COMMANDS["grub"]
        )

    # ---- tuning -------------------------------------------------------------------------------------------------

    async def tune_status(self, _params: NoParams, _call: Call) -> RawJson:
        """The tuning agent's present picture of host and guests"""
        return RawJson(
            results.TuneStatus.model_validate(self._agent().status(), strict=False).model_dump_json().encode()
        )

    async def tune_explain(self, params: results.ExplainParams, _call: Call) -> RawJson:
        """The agent's decisions about one guest, each with its reasons and what came of it"""
        self._manager.guests.known(params.name)
        found = self._agent().explain(params.name, params.limit)
        return RawJson(results.Explained.model_validate(found, strict=False).model_dump_json().encode())

    # ---- the daemon ---------------------------------------------------------------------------------------------

    async def daemon_status(self, _params: NoParams, _call: Call) -> results.DaemonStatus:
        """How kvmd is: guests, networks, faults in the files, drift"""
        services = self._manager.services
        await self._manager.guests.refresh()
        plan = await self._manager.plan()
        supervisors = self._listed()
        troubled = {problem.subject for problem in plan.problems}
        return results.DaemonStatus(
            version=__version__,
            pid=os.getpid(),
            since=self._started_at,
            supervisor="systemd" if services.units else "direct",
            guests_total=len(supervisors),
            guests_running=sum(supervisor.state in ALIVE for supervisor in supervisors),
            faults=_faults(services.loaded.faults),
            networks=tuple(
                results.NetworkShape(
                    name=name,
                    mode=network.network.mode,
                    bridge=network.network.bridge,
                    state="degraded" if f"network {name}" in troubled else "up",
                )
                for name, network in services.loaded.desired.networks.items()
            ),
            drift=len(plan.actions),
            drifts=self._drifts(plan),
            tuning_mode=services.loaded.desired.host.tuning.mode,
        )

    def _drifts(self, plan: Plan) -> results.Drift:
        pending = {supervisor.name: self._manager.guests.pending(supervisor) for supervisor in self._listed()}
        return results.Drift(
            running=_kind_of_drift([f"{name}: {', '.join(keys)}" for name, keys in sorted(pending.items()) if keys]),
            host=_kind_of_drift([a.line() for a in plan.actions if not isinstance(a, RestartGuest)]),
            yielded=_kind_of_drift([knob.line() for knob in plan.yielded]),
        )

    async def daemon_version(self, _params: NoParams, _call: Call) -> results.DaemonVersion:
        """The version of this daemon"""
        return results.DaemonVersion(version=__version__)

    async def daemon_ping(self, _params: NoParams, _call: Call) -> results.Pong:
        """The time, to show that it answers"""
        return results.Pong(time=self._manager.services.now())


def _kind_of_drift(lines: Sequence[str]) -> results.DriftKind:
    return results.DriftKind(count=len(lines), first=tuple(lines[:FIRST_LINES]))


def _difference(found: Difference) -> results.DifferenceShape:
    return results.DifferenceShape(kind=found.kind.value, line=found.line, why=found.why)


def _action(action: AnyAction) -> results.ActionShape:
    return results.ActionShape(
        kind=_kind(action),
        line=action.line(),
        why=action.why,
        disruption=action.disruption.value,
        when=when(action.disruption).value,
    )


def _outcome(outcome: Outcome) -> results.OutcomeShape:
    return results.OutcomeShape(**_action(outcome.action).model_dump(), error=outcome.error)


def _kind(action: AnyAction) -> str:
    """ "start-guest" of StartGuest."""
    return _WORD.sub("-", type(action).__name__).lower()


def _problems(problems: Iterable[Problem]) -> tuple[results.ProblemShape, ...]:
    return tuple(
        results.ProblemShape(
            subject=p.subject, message=p.message, hint=p.hint, guests=tuple(sorted(p.guests)), needs=p.needs
        )
        for p in problems
    )


def _yielded(yielded: Iterable[Yielded]) -> tuple[results.YieldedShape, ...]:
    return tuple(results.YieldedShape(path=k.path, ours=k.ours, theirs=k.theirs, why=k.why) for k in yielded)


def _faults(faults: Iterable[Fault]) -> tuple[results.FaultShape, ...]:
    return tuple(results.FaultShape(**asdict(fault)) for fault in faults)


def _applied(report: Report) -> results.Applied:
    return results.Applied(
        outcomes=tuple(_outcome(outcome) for outcome in report.outcomes),
        skipped=tuple(_action(action) for action in report.skipped),
        problems=_problems(report.plan.problems),
        yielded=_yielded(report.plan.yielded),
        faults=_faults(report.loaded.faults),
    )


def _threads(guest: GuestSeats) -> tuple[results.ThreadShape, ...]:
    return tuple(results.ThreadShape(name=name, cpus=cpus) for name, cpus in guest.threads)


def _admissions(found: Iterable[Account]) -> tuple[results.AdmissionShape, ...]:
    return tuple(
        results.AdmissionShape(
            guest=one.guest,
            rule=one.rule,
            own_bytes=one.own_bytes,
            others_bytes=one.others_bytes,
            others=one.others,
            limit_bytes=one.limit_bytes,
            remaining_bytes=one.remaining_bytes,
            terms=one.terms,
            note=one.note,
            admitted=not one.refused,
            line=one.line(),
        )
        for one in found
    )


def _plain(value: Any) -> Any:
    """JSON for what json does not know: sets become lists, mappings plain."""
    if isinstance(value, frozenset):
        return sorted(value)
    if hasattr(value, "items"):
        return dict(value.items())
    return str(value)
