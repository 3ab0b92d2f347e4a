"""The one way in: load the files, observe the world, plan, apply. RPC, boot, cron and signals all come here.

`reconcile` and `apply` differ only in the disruption they allow; `plan` is the same path without the last step.
Passes are serialised. The guests themselves are the roster's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvmd.actions import (
    AnyAction,
    DetachUplink,
    Disruption,
    EnableGuest,
    Outcome,
    PinGuest,
    RemoveBridge,
    ReplaceRuleset,
    RestartGuest,
    SetHugepages,
    SetLink,
    StartGuest,
    StopGuest,
    WriteDropIn,
    WriteKernelArgs,
)
from kvmd.config.desired import Loaded
from kvmd.effects import nextboot, nft
from kvmd.effects.apply import HostApplier
from kvmd.effects.observe import HostObserver
from kvmd.effects.records import EffectKind, uplink_key
from kvmd.effects.uplink import boot_s
from kvmd.errors import Conflict, HostFailed, KvmdError, PartlyFailed, Refused
from kvmd.facts import BootLine, Facts
from kvmd.guest.passthrough import Passthrough
from kvmd.guest.roster import Roster
from kvmd.plan import kernelargs, ports
from kvmd.plan.admission import Account
from kvmd.plan.dnsmasq import Lease
from kvmd.plan.entry import Entry, growth
from kvmd.plan.host import Plan, plan, plan_pools
from kvmd.plan.kernelargs import KernelArguments
from kvmd.plan.nfttable import PORTS, difference
from kvmd.plan.reboot import Difference, after_reboot
from kvmd.plan.release import plan_release, refusal
from kvmd.plan.yielding import Yielded

_log = logging.getLogger(__name__)
RELEASED_META = "released_in_boot"


@dataclass(frozen=True, slots=True)
class Report:
    """What one pass did and left."""

    outcomes: tuple[Outcome, ...]
    skipped: tuple[AnyAction, ...]
    plan: Plan
    loaded: Loaded


class Manager:
    """The passes that bring desired state and facts together."""

    def __init__(self, guests: Roster, observer: HostObserver, applier: HostApplier) -> None:
        self.guests = guests
        self.services = guests.services
        self._observer = observer
        self._applier = applier
        self.trials = applier.trials
        self._pass = asyncio.Lock()
        self._providing = asyncio.Lock()
        self.services.provide = self._provide_pages
        self.services.fence = self._fence
        self.services.devices = Passthrough(guests, observer, applier)
        self.prepared: Callable[[], None] = lambda: None  # a pass has prepared the host and goes on to start guests

    # ---- observe, plan, apply -----------------------------------------------------------------------------------

    async def observe(self) -> Facts:
        """One picture of host and guests."""
        services = self.services
        boot_id = services.tree.boot_id()
        journal = services.store.journalled(boot_id)
        async with self._applier.knobs:
            facts = await self._observer.observe(services.loaded.desired, journal)
            tuned = services.store.tuned(boot_id)
        self.guests.topology = facts.cpus
        guests = self.guests.all_running()
        return replace(
            facts,
            guests=guests,
            lives=self.guests.lives(),
            foreign_qemu_bytes=services.tree.foreign_qemu(frozenset(guest.process.pid for guest in guests)),
            units=services.units.observe() if services.units else None,
            usage=services.usage(),
            journal=journal,
            tuned=tuned,
        )

    async def plan(self, *, prune: bool = False, retake: bool = False) -> Plan:
        """What a pass would do now; with `retake` what a person's `apply` would."""
        return self._plan(await self.observe(), prune=prune, retake=retake)

    async def look(self) -> tuple[Facts, Plan]:
        """The host, and what a pass would do to it now."""
        facts = await self.observe()
        return facts, self._plan(facts, prune=False, retake=False)

    async def admissions(self, names: Sequence[str]) -> tuple[Account, ...]:
        """The sum for each of these guests, were they started one after the other now. NotFound, ConfigInvalid."""
        desired, facts = self.services.loaded.desired, await self.observe()
        for name in names:
            self.services.declared(name)
        actions, _ = plan_pools(desired, facts, self._original_pools(facts.boot_id))
        entry = Entry(desired, facts, growing_bytes=growth(actions))
        return tuple(entry.account(name) for name in names)

    def _plan(self, facts: Facts, *, prune: bool, retake: bool) -> Plan:
        return plan(
            self.services.loaded.desired,
            facts,
            macs=self.services.macs(),
            originals=self._original_pools(facts.boot_id),
            uuids=self.services.uuids(),
            prune=prune,
            retake=retake,
        )

    async def after_reboot(self) -> tuple[Difference, ...]:
        """What a reboot of the host would change."""
        services = self.services
        boot = nextboot.observe(services.tree)
        facts = await self.observe()
        return after_reboot(services.loaded.desired, facts, boot, macs=services.macs(), uuids=services.uuids())

    def _original_pools(self, boot_id: str) -> dict[tuple[int, int], int]:
        """Pages of (node, page size) before kvmd first changed them in this boot."""
        pools = (entry for entry in self.services.store.journalled(boot_id) if entry.kind == EffectKind.HUGEPAGES)
        return {_pool_key(entry.subject): int(entry.original) for entry in pools}

    async def _fence(self) -> None:
        """The rules of the guests' ports, as the files want them now: before a port that has some is opened."""
        desired = self.services.loaded.desired
        text = ports.port_rules(desired.networks, desired.guests, self.services.macs(), self.services.uuids())
        change = difference(text, await nft.observe(PORTS))
        if change is not None:
            action = ReplaceRuleset(text=text, change=change, table=PORTS, why="a guarded guest starts")
            await self._applier.apply(action)
            _log.info("%s  (%s)", action.line(), action.why)

    async def apply(self, allow: frozenset[Disruption], actor: str, *, prune: bool = False) -> Report:
        """Load, plan and do what `allow` permits, tuning knobs of others included. A failed action stops no other."""
        if self.services.store.meta(RELEASED_META):
            self.services.store.set_meta(RELEASED_META, "")
        self.trials.forgive()
        return await self._pass_once(allow, actor, prune=prune, retake=True)

    async def _pass_once(
        self, allow: frozenset[Disruption], actor: str, *, prune: bool = False, retake: bool = False
    ) -> Report:
        async with self._pass:
            await self.guests.refresh()
            facts = await self.observe()
            planned = self._plan(facts, prune=prune, retake=retake)
            self._tell_yielded(planned.yielded, facts)
            now, skipped = planned.split(allow)
            self._refuse_mass_stop(now)
            outcomes = await self._carry_out(now, actor)
            if any(isinstance(action, StartGuest | RestartGuest) for action in now):
                outcomes += await self._make_room(actor)
        return Report(tuple(outcomes), skipped, planned, self.services.loaded)

    async def reconcile(self, actor: str) -> Report:
        """What cron, the timer and boot do: nothing that disturbs anyone, unless kvmd.toml allows it.

        A host that was released stays so until someone applies, or until the next boot.
        """
        if self.is_released:
            return Report((), (), Plan(), self.services.loaded)
        allow = frozenset(Disruption(word) for word in self.services.loaded.desired.daemon.apply.allow)
        return await self._pass_once(allow, actor)

    def _tell_yielded(self, yielded: tuple[Yielded, ...], facts: Facts) -> None:
        """Once for each tuning knob that somebody else changed; what they put back is told anew the next time."""
        store, last = self.services.store, {knob.path: knob for knob in facts.tuned}
        for knob in facts.tuned:
            if knob.theirs is not None and facts.knobs.get(knob.path) == knob.ours:
                store.set_tuned(replace(knob, theirs=None), facts.boot_id)
        for left in yielded:
            if left.told:
                continue
            _log.warning("%s; it is left to them until `kvmd-cli apply` or another value in the file", left.line())
            data = {"path": left.path, "ours": left.ours, "theirs": left.theirs, "why": left.why}
            self.services.publish("knob.yielded", None, None, data)
            store.set_tuned(replace(last[left.path], theirs=left.theirs), facts.boot_id)

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
        after = [action for action in actions if isinstance(action, RestartGuest | RemoveBridge)]
        for action in actions:
            if not isinstance(action, StartGuest | RestartGuest | RemoveBridge):
                outcomes.append(await self._do(action, actor))
        if any(isinstance(action, WriteDropIn) for action in actions):
            await self._reload_units()
        self.prepared()
        for action in after:
            outcomes.append(await self._do(action, actor))
        return outcomes + await self._start_all(starts, actor)

    async def _make_room(self, actor: str) -> list[Outcome]:
        """Pins of guests that were there before: those that came may have taken CPUs for themselves alone."""
        pins = [action for action in (await self.plan()).actions if isinstance(action, PinGuest)]
        return [await self._do(action, actor) for action in pins]

    async def _provide_pages(self) -> str | None:
        """Grow automatic pools to what the files need, for a start that finds too few pages; why that failed, if so.

        Part of a start, which may itself be part of a pass: it waits for no pass, and only adds.
        """
        async with self._providing:
            tree, desired = self.services.tree, self.services.loaded.desired
            facts = Facts(
                boot_id=tree.boot_id(),
                memory=tree.observe_memory(),
                hugepages=tree.observe_hugepages(),
                guests=self.guests.footing(),
            )
            actions, _ = plan_pools(desired, facts, self._original_pools(facts.boot_id))
            growing = (a for a in actions if isinstance(a, SetHugepages) and a.new > a.old)
            outcomes = [await self._do(action, "kvmd") for action in growing]
        return next((outcome.error for outcome in outcomes if outcome.error), None)

    async def _start_all(self, starts: list[StartGuest], actor: str) -> list[Outcome]:
        """A few at a time, each after those its `start.after` names."""
        wish = self.services.loaded.desired.daemon.guests.start_concurrency
        # Half of a start is waiting (its interpreter, the disk, QEMU itself): one for each CPU would leave CPUs idle.
        auto = min(16, max(4, 2 * len(self.guests.topology.cpus)))
        limit = asyncio.Semaphore(wish if isinstance(wish, int) else auto)
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

    async def _do(self, action: AnyAction, actor: str, *, undo: bool = False) -> Outcome:
        """One action, its log line and its event."""
        try:
            match action:
                case StartGuest():
                    await self.guests.supervisor(action.guest).start(actor)
                case StopGuest():
                    await self.guests.stop(action.guest, actor)
                case RestartGuest():
                    await self.guests.stop(action.guest, actor)
                    await self.guests.start(action.guest, actor)
                case PinGuest():
                    self.guests.pin(action)
                case SetLink():
                    await self.guests.supervisor(action.guest).set_link(action.nic, up=action.up)
                case WriteDropIn() | EnableGuest():
                    self._tell_systemd(action)
                case _:
                    await (self._applier.undoing() if undo else self._applier).apply(action)
        except KvmdError as error:
            _log.error("%s failed: %s", action.line(), error)
            self.services.publish("action.failed", None, actor, {"line": action.line(), "error": error.message})
            return Outcome(action, error.message)
        guest = getattr(action, "guest", None)
        _log.info("%s  (%s)", action.line(), action.why, extra={"KVMD_GUEST": guest} if guest else None)
        self.services.publish("action.done", None, actor, {"line": action.line(), "why": action.why})
        return Outcome(action)

    @property
    def is_released(self) -> bool:
        """Whether the host was given back in this boot: until someone applies, kvmd changes nothing by itself."""
        return self.services.store.meta(RELEASED_META) == self.services.tree.boot_id()

    async def release(self, actor: str, *, partial: bool = False) -> tuple[list[str], list[str]]:
        """Put the host back as it was before kvmd. Returns what was restored and what was kept, and why.

        Conflict when running guests need some of it, naming who needs what; with `partial` that stays. One that was
        interrupted is finished by the next.
        """
        restored, kept = [], []
        async with self._pass:
            facts = await self.observe()
            if settling := sorted(life.name for life in facts.lives if life.settling):
                raise Conflict(f"starting or stopping: {', '.join(settling)}", hint="wait for it, then release")
            entries = [(e.kind, e.subject, e.original, e.new) for e in facts.journal]
            undos = plan_release(entries, facts)
            if not partial and (needs := refusal(undos)):
                raise Conflict(needs, hint="kvmd-cli stop them, or release --partial: what nobody needs")
            self.services.store.set_meta(RELEASED_META, facts.boot_id)
            for undo in undos:
                if undo.needed_by:
                    kept.append(f"{undo.subject}: {', '.join(undo.needed_by)} needs it")
                    continue
                if undo.kept:
                    kept.append(undo.kept)
                if undo.action:
                    outcome = await self._do(undo.action, actor, undo=True)
                    if outcome.error:
                        raise PartlyFailed(f"{undo.action.line()}: {outcome.error}", failed=[undo.key])
                    restored.append(undo.action.line())
                self.services.store.forget(undo.key)
        return restored, kept

    # ---- the kernel's command line ------------------------------------------------------------------------------

    async def kernel_args(self) -> tuple[KernelArguments, BootLine]:
        """What the kernel was given and what it should be given."""
        facts = await self.observe()
        return kernelargs.kernel_arguments(self.services.loaded.desired, facts), facts.boot

    async def write_kernel_args(self, actor: str, *, remove: bool = False) -> WriteKernelArgs | None:
        """Write the boot loader's drop-in, or take it away; None when it is so. Refused, NotSupported, HostFailed."""
        async with self._pass:
            found, line = await self.kernel_args()
            action = kernelargs.asked_for(
                found, line, self.services.loaded.desired.host, f"{actor} asked for it", remove=remove
            )
            outcome = await self._do(action, actor) if action else None
            if outcome and outcome.error:
                raise HostFailed(outcome.error)
            return action

    # ---- networks -------------------------------------------------------------------------------------------------

    def leases(self, network: str) -> tuple[Lease, ...]:
        """What a network's DHCP server has given out. HostFailed."""
        return self._observer.dnsmasqs.leases(network)

    def confirm_uplink(self, network: str, actor: str) -> bool:
        """All is well with the NIC in this network's bridge: it stays. False if it was kept before. Refused."""
        trial = next((one for one in self.trials.all() if one.network == network), None)
        if trial is None or trial.state == "undone" or (trial.state == "trial" and trial.deadline_s <= boot_s()):
            raise Refused(f"network {network} has no uplink on trial", hint="kvmd-cli apply puts it in, on trial")
        if trial.state == "kept":
            return False
        self.trials.settle(trial, keep=True)
        data = {"network": network, "interface": trial.interface}
        self.services.publish("network.uplink_kept", None, actor, data)
        return True

    async def undo_uplinks(self) -> None:
        """Take out again every NIC whose trial has ended without a word."""
        async with self._pass:
            for trial in self.trials.pending():
                if trial.deadline_s > boot_s():
                    continue
                journal = self.services.store.journalled(trial.boot_id)
                was_up = any(entry.key == uplink_key(trial.interface) and entry.original == "up" for entry in journal)
                why = f"nobody confirmed the uplink of network {trial.network} in time"
                detach = DetachUplink(bridge=trial.bridge, interface=trial.interface, was_up=was_up, why=why)
                if (await self._do(detach, "kvmd")).error is None:
                    self.trials.settle(trial, keep=False)
                    data = {"network": trial.network, "interface": trial.interface}
                    self.services.publish("network.uplink_undone", None, "kvmd", data)

    def _tell_systemd(self, action: WriteDropIn | EnableGuest) -> None:
        units = self.services.units
        if units is None:
            return
        if isinstance(action, WriteDropIn):
            units.write_drop_in(action.guest, action.text)
        else:
            units.enable(action.guest, on=action.on)


def _pool_key(subject: str) -> tuple[int, int]:
    node, page_bytes = subject.split(":")
    return int(node), int(page_bytes)
