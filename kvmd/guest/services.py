"""What the supervisors of all guests share: directories, state, capabilities, identities, descriptors.

One object, made by the manager; its `loaded` is replaced when the files are read again. It answers questions about a
guest by name and holds no guest: names are looked up each time, so a file that changed is never half used.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import grp
import logging
import os
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from kvmd.config.desired import Desired, Loaded
from kvmd.config.devices import Nic
from kvmd.config.guest import Guest, Limits
from kvmd.config.network import bridge_name
from kvmd.effects import birthmark, files, logs, proc, process, threads
from kvmd.effects.descriptors import Descriptors, Opener, TapPlan
from kvmd.effects.handover import runs_as_unit
from kvmd.effects.laststart import LastStart
from kvmd.effects.netlink import Netlink
from kvmd.effects.oom import OomWatch
from kvmd.effects.qmp import Monitor
from kvmd.effects.records import GuestRun, Hold, WantedState
from kvmd.effects.store import Store
from kvmd.effects.sysfs import HostTree
from kvmd.effects.systemd import Units, guest_unit
from kvmd.effects.tapscripts import TapScripts
from kvmd.effects.tree import Tree
from kvmd.errors import ConfigInvalid, KvmdError, NotFound, QemuFailed, Refused
from kvmd.facts import EMPTY, Process, Usage
from kvmd.guest.emulators import Emulators, resolve
from kvmd.guest.identities import Identities
from kvmd.guest.pages import PageBook
from kvmd.paths import Paths
from kvmd.plan.cpus import Placement
from kvmd.plan.links import tap_alias, tap_name
from kvmd.plan.ports import has_fence, tbf_of
from kvmd.plan.units import drop_in
from kvmd.plan.vfio import Grant
from kvmd.plan.vlans import VlanWish
from kvmd.qemu import argv, explain, verify
from kvmd.qemu.caps import Accel, Capabilities
from kvmd.qemu.fds import Launch
from kvmd.qemu.identity import Identity
from kvmd.units import Size

_log = logging.getLogger(__name__)


async def _nothing_provided() -> str | None:
    return None


Publish = Callable[[str, str | None, str | None, Mapping[str, Any]], None]  # type, guest, actor, data


class Devices(Protocol):
    """Devices of the host for guests (`kvmd.guest.passthrough`)."""

    async def settle(self, name: str, macs: Mapping[str, str]) -> tuple[Grant, ...]: ...

    async def take(self, name: str, uid: int, grants: tuple[Grant, ...]) -> None: ...

    async def give_back(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Decided:
    """What is settled about a start before anything of the host is touched."""

    guest: Guest
    run: GuestRun
    identity: Identity
    accel: Accel
    warning: str | None  # about the accelerator
    caps: Capabilities
    emulator: str  # absolute path
    placement: Placement | None
    grants: tuple[Grant, ...] = ()  # devices of the host


@dataclass(frozen=True, slots=True)
class Born:
    """What verification learnt about a QEMU that is ready to run."""

    vcpu_threads: tuple[int, ...]
    balloon_bytes: int | None
    warnings: tuple[str, ...]


async def _no_fence() -> None:
    """Without a manager there is nobody who could make rules."""


@dataclass(eq=False)
class Services:
    """Shared by all supervisors."""

    paths: Paths
    store: Store
    tree: HostTree
    netlink: Netlink
    units: Units | None  # None: kvmd spawns launchers itself
    publish: Publish
    admit: Callable[[str], None] = lambda _name: None  # the manager's: raises Refused
    place: Callable[[str], Placement | None] = lambda _name: None  # the manager's: raises Refused
    make_room: Callable[[str], None] = lambda _name: None  # the roster's: others leave the CPUs of a guest to come
    provide: Callable[[], Awaitable[str | None]] = _nothing_provided  # the manager's: grows automatic pools
    pages: PageBook = field(default_factory=PageBook)
    usage: Callable[[], Mapping[str, Usage]] = lambda: EMPTY  # what guests were seen to need; the history's
    fence: Callable[[], Awaitable[None]] = field(default=_no_fence)  # the manager's: HostFailed
    devices: Devices | None = None  # the manager's
    settled: asyncio.Event = field(
        default_factory=asyncio.Event
    )  # all adopted guests' CPUs are known: starts may place
    loaded: Loaded = field(default_factory=lambda: Loaded(desired=Desired()))
    _oom: OomWatch = field(default_factory=lambda: OomWatch(Tree()))
    _identities: Identities = field(init=False)
    _emulators: Emulators = field(init=False)

    def __post_init__(self) -> None:
        self._identities = Identities(self.paths)
        self._emulators = Emulators(self.paths.state / "cache")

    # ---- the guest as its file has it ---------------------------------------------------------------------------

    def guest(self, name: str) -> Guest | None:
        """The declared guest, from its last good version when its file has faults."""
        return self.loaded.desired.guests.get(name)

    def declared(self, name: str) -> Guest:
        """The declared guest. NotFound; ConfigInvalid when its file has never been without fault."""
        guest = self.guest(name)
        if guest is not None:
            return guest
        faults = [fault for fault in self.loaded.errors if fault.file == f"guests.d/{name}.toml"]
        if faults:
            raise ConfigInvalid(
                f"guest {name} has never had a file without fault: {faults[0]}",
                hint="kvmd-cli check",
                faults=[str(fault) for fault in faults],
            )
        raise NotFound(f"no guest is called {name}", hint="kvmd-cli list")

    def identity(self, name: str) -> Identity | None:
        """The guest's identity as it was last written; None before its first start."""
        return self._identities.get(name)

    def macs(self) -> Mapping[tuple[str, str], str]:
        """MACs of all declared guests by (guest, nic); a guest that was never started has none yet."""
        return self._identities.macs(self.loaded.desired.guests)

    def uuids(self) -> Mapping[str, str]:
        """UUIDs of all declared guests that have an identity."""
        return self._identities.uuids(self.loaded.desired.guests)

    # ---- before a birth -----------------------------------------------------------------------------------------

    async def decide(self, name: str) -> Decided:
        """Check and settle everything. Refused, ConfigInvalid, NotSupported…; nothing of the host is touched."""
        await self.settled.wait()
        guest = self.declared(name)
        self.admit(name)
        placement = self.place(name)
        emulator = self._emulator(guest)
        accel, warning = await self._accel(guest, emulator)
        caps = await self._emulators.capabilities(emulator, accel)
        ident = self._allot_identity(name, guest, caps)
        grants = await self.devices.settle(name, ident.macs) if self.devices else ()
        low, high = self.loaded.desired.daemon.qemu.uid_range
        run = GuestRun(
            name=name,
            uuid=ident.uuid,
            uid=self.store.allot_uid(name, low, high, lambda uid: bool(process.pids_of_uid(uid))),
            boot_id=self.tree.boot_id(),
            nonce=secrets.token_hex(8),
            begun_at=self.now(),
            config_text=guest.model_dump_json(by_alias=True),
        )
        return Decided(guest, run, ident, accel, warning, caps, emulator, placement, grants)

    async def explain(self, name: str) -> tuple[explain.Line, ...]:
        """Every value of the guest that its file does not say, with the reason. As `decide`, without touching state."""
        guest = self.declared(name)
        emulator = self._emulator(guest)
        accel, _ = await self._accel(guest, emulator)
        caps = await self._emulators.capabilities(emulator, accel)
        return explain.explain(name, guest, caps, self._allot_identity(name, guest, caps), accel=accel)

    async def identify(self, name: str) -> None:
        """Give a guest its identity before its first start. QemuFailed, NotSupported, Refused."""
        guest, known = self.declared(name), self.identity(name)
        if self.units:
            files.ensure_dir(self.paths.guest_log(name), 0o750)  # systemd may be the first to start it
        if known is None or guest.nic.keys() - known.macs.keys():
            self._allot_identity(name, guest, await self._emulators.capabilities(self._emulator(guest), "tcg"))

    def _emulator(self, guest: Guest) -> str:
        return resolve(guest.machine.emulator or self.loaded.desired.daemon.qemu.emulator)

    async def _accel(self, guest: Guest, emulator: str) -> tuple[Accel, str | None]:
        low, _ = self.loaded.desired.daemon.qemu.uid_range
        return await self._emulators.accel(emulator, guest.machine.accel, uid=low, gid=self.qemu_gid or low)

    def _allot_identity(self, name: str, guest: Guest, caps: Capabilities) -> Identity:
        return self._identities.allot(name, guest, caps, self.loaded.desired.guests)

    async def open(self, name: str, decided: Decided) -> tuple[Launch, Descriptors]:
        """The argv, and everything it names open. Closes all and raises on the first failure."""
        guest, run = decided.guest, decided.run
        daemon = self.loaded.desired.daemon
        opener = Opener(
            guest=name,
            run_dir=self.paths.guest_run(name),
            log_dir=self.paths.guest_log(name),
            roots=[Path(root) for root in (*daemon.storage.roots, daemon.storage.images)],
            netlink=self.netlink,
            scripts=self.scripts,
            uid=run.uid,
            gid=self.qemu_gid or run.uid,
        )
        try:
            beside = self._nodes_beside(decided)
            backing = await self.pages.back(name, guest, beside, self.tree.observe_hugepages, self.provide)
            launch = argv.build(
                name,
                guest,
                decided.identity,
                decided.caps,
                accel=decided.accel,
                run_dir=str(self.paths.guest_run(name)),
                images=opener.open_images(guest),
                mtus={nic: tap.mtu for nic, tap in self._taps(name, decided).items() if tap.mtu},
                hugepages=backing.hugepages,
                memory_nodes=backing.nodes,
                vhost=os.access("/dev/vhost-net", os.R_OK | os.W_OK),
                sandbox=daemon.qemu.sandbox,
                functions={grant.id: grant.device.address for grant in decided.grants},
            )
            files.ensure_dir(opener.log_dir, 0o750)
            files.ensure_dir(opener.run_dir, 0o711)
            files.ensure_dir(self.paths.guest_display(name), 0o700, run.uid, self.qemu_gid or run.uid)
            warnings = (decided.warning, *backing.warnings, *launch.warnings)
            launch = replace(launch, warnings=tuple(warning for warning in warnings if warning))
            if any(has_fence(nic) for nic in guest.nic.values()):
                await self.fence()
            await self.scripts.down(name)  # of a run that kvmd did not see end
            return launch, await opener.open_all(launch.opens, self._taps(name, decided))
        except BaseException:
            opener.close()
            await self.scripts.down(name)
            raise

    def _taps(self, name: str, decided: Decided) -> Mapping[str, TapPlan]:
        """The TAP of each NIC that has one."""
        taps = {}
        for nic, wish in decided.guest.nic.items():
            if wish.network is None:
                if wish.has_tap:
                    taps[nic] = _own_tap(name, nic, wish, decided.identity.uuid)
                continue
            network = self.loaded.desired.networks[wish.network]
            taps[nic] = TapPlan(
                name=tap_name(decided.identity.uuid, nic),
                bridge=bridge_name(wish.network, network),
                mtu=network.network.mtu,
                alias=tap_alias(wish.network, name, nic),
                port_isolated=network.network.guests_isolated,
                vlans=VlanWish.of(wish) if network.network.vlan_filtering else None,
                tbf=tbf_of(wish.rate_in),
                fenced=has_fence(wish),
            )
        return taps

    def _nodes_beside(self, decided: Decided) -> tuple[int, ...]:
        """Nodes with memory beside the guest's vCPUs; () on a host with one node, or where its file names others."""
        has = {node for node, total in self.tree.observe_memory().node_total_bytes.items() if total}
        if decided.placement is None or decided.guest.memory.nodes or len(has) < 2:
            return ()
        return tuple(node for node in decided.placement.nodes if node in has)

    def open_qemu_log(self, name: str) -> int:
        """The file that takes QEMU's stdout and stderr."""
        directory = self.paths.guest_log(name)
        files.ensure_dir(directory, 0o750)
        return files.append_log_fd(directory / "qemu.log")

    def rotate_logs(self, name: str) -> None:
        """Keep the guest's logs within `log.serial` and `log.qemu`."""
        wish = self.loaded.desired.daemon.log
        for path in self.paths.guest_log(name).glob("*.log"):
            limit = wish.qemu if path.name == "qemu.log" else wish.serial
            logs.rotate(path, max_bytes=int(limit.size), keep=limit.files)

    # ---- after a birth ------------------------------------------------------------------------------------------

    async def verify_and_place(self, name: str, run: GuestRun, monitor: Monitor, launch: Launch | None) -> Born:
        """Compare what runs with what was asked, pin every thread.

        `launch` is None for a run of an earlier kvmd, of which only the record is left. Raises QemuFailed when
        identity, disks or confinement are not what was asked; the rest becomes warnings.
        """
        warnings: tuple[str, ...] = launch.warnings if launch else ()
        if launch:
            asks = verify.queries(launch)
            replies = dict(zip([ask.label for ask in asks], await _ask_all(monitor, asks), strict=True))
            vcpus = vcpu_threads(replies["query-cpus-fast"])
            found = verify.check_running(launch, replies)
            grave = [mismatch for mismatch in found if mismatch.severity == "refuse"]
            if grave:
                raise QemuFailed(f"guest {name}: QEMU is not what was asked for: {grave[0]}")
            warnings += tuple(str(mismatch) for mismatch in found)
            for command in launch.commands:
                await monitor.execute(command.name, **command.arguments)
        else:
            vcpus = vcpu_threads(await monitor.execute("query-cpus-fast"))
        pid = run.process.pid if run.process else 0
        process.limit_core(pid)
        placement = self.place(name)
        guest = self.guest(name)
        if guest and guest.memory.lock and not guest.memory.hugepage_size:
            locked = proc.locked_bytes(self.tree, pid)
            if locked < guest.memory.size:
                warnings += (f"memory.lock: only {Size(locked).human()} of {guest.memory.size} are locked (VmLck)",)
        if self.units is None and guest and guest.limits != Limits():
            warnings += ("limits.* are kept by systemd; this kvmd runs without it and keeps none",)
        if placement:
            threads.pin(name, pid, vcpus, placement.vcpus, placement.emulator)
            if placement.is_exclusive:
                self.make_room(name)
        return Born(vcpus, await self._balloon(monitor), warnings)

    async def inspect(self, monitor: Monitor) -> Born:
        """What has to be known of a guest that runs already. QemuFailed, TimedOut, Unreachable."""
        cpus, balloon_bytes = await asyncio.gather(monitor.execute("query-cpus-fast"), self._balloon(monitor))
        return Born(vcpu_threads(cpus), balloon_bytes, ())

    @staticmethod
    async def _balloon(monitor: Monitor) -> int | None:
        """The guest's present size in bytes, None without a balloon device."""
        with contextlib.suppress(QemuFailed, KeyError, TypeError, ValueError):
            return int((await monitor.execute("query-balloon"))["actual"])
        return None

    async def take_devices(self, name: str, decided: Decided) -> None:
        """Take the guest's devices of the host; its run is on record. KvmdError."""
        if self.devices and decided.grants:
            await self.devices.take(name, decided.run.uid, decided.grants)

    async def give_back_devices(self, name: str) -> None:
        """After the end of a guest's run: its devices go back to their drivers."""
        if self.devices:
            await self.devices.give_back(name)

    def find_qemu(self, run: GuestRun) -> Process | None:
        """The QEMU of a run whose process was never recorded: by its UUID, and only under the uid it was given."""
        return next(
            (q.process for q in self.tree.qemus() if q.uuid == run.uuid and _uid(q.process.pid) == run.uid), None
        )

    # ---- while it runs and after --------------------------------------------------------------------------------

    def socket(self, name: str, purpose: str) -> Path:
        """A socket of the guest: "qmp", "rescue", "serial-NAME"."""
        return self.paths.guest_run(name) / f"{purpose}.sock"

    def unplugged(self, name: str) -> frozenset[str]:
        """Cards of the present run whose cable kvmd has pulled. QEMU itself cannot be asked."""
        try:
            return frozenset(self._links_file(name).read_text().split())
        except OSError:
            return frozenset()

    async def set_link(self, name: str, monitor: Monitor, nic: str, *, up: bool) -> None:
        """Plug a cable in or pull it; noted afterwards, so that what was not noted is done again. QemuFailed..."""
        await monitor.execute("set_link", name=f"nic-{nic}", up=up)
        pulled = self.unplugged(name) - {nic} if up else self.unplugged(name) | {nic}
        files.write_atomic(self._links_file(name), " ".join(sorted(pulled)).encode())

    def _links_file(self, name: str) -> Path:
        return self.paths.guest_run(name) / "unplugged"

    def last_words(self, name: str) -> str:
        """The last line QEMU or its launcher wrote."""
        return process.last_words(self.paths.guest_log(name) / "qemu.log")

    def clean_up(self, name: str) -> None:
        """Remove the sockets of a guest that has ended; its logs and identity stay."""
        if name not in birthmark.all_held(self.paths.birth_marks):  # else they are those of its next QEMU
            shutil.rmtree(self.paths.guest_run(name), ignore_errors=True)

    def want(self, name: str, state: WantedState, *, actor: str, reason: str) -> None:
        """Record where the guest shall be from now on. HostFailed when the state cannot be written."""
        self.store.set_wanted(name, state, actor, reason, self.now())

    def restart_delay_s(self, name: str) -> float:
        """How long a guest that crashed waits before its next start; the crash is counted. Refused when it stays off.

        `restart.backoff` doubles with each crash within `restart.within`.
        """
        guest = self.guest(name)
        if guest is None:
            raise Refused("its file is gone")
        now, restart = self.now(), guest.restart
        self.store.record_crash(name, now)
        hold = self.hold(name)
        if hold:
            raise Refused(f"not restarted: held by {hold.actor}")
        count = self.store.crashes_since(name, now - restart.within)
        if count > restart.limit:
            raise Refused(f"not restarted: {count} ends within {restart.within} (restart.limit = {restart.limit})")
        return float(restart.backoff) * float(2 ** min(count - 1, 10))

    def hold(self, name: str) -> Hold | None:
        """Who keeps automatic hands off the guest, and why."""
        return next((hold for hold in self.store.holds() if hold.guest == name), None)

    def memory_ran_out(self) -> bool:
        """Whether the kernel has just been killing for lack of memory. Asked often, it can tell which end was that."""
        return self._oom.look(time.monotonic())

    async def start_unit(self, name: str, guest: Guest) -> None:
        """Start the guest's unit, told first what this guest needs beyond the template. HostFailed, TimedOut."""
        assert self.units is not None
        files.ensure_dir(self.paths.guest_log(name), 0o750)  # where the unit appends QEMU's words
        if self.units.write_drop_in(name, drop_in(name, guest)):
            await self.units.reload()
        await self.units.start(name)

    async def check_unit(self, name: str) -> None:
        """For a start that waits for its launcher: see that the unit is on its way. HostFailed when it failed."""
        if self.units is not None:
            await self.units.check_start(name)

    async def unit_status(self, name: str, pid: int) -> int | None:
        """How a QEMU that was not our child ended, as of waitpid; None when there is no unit or systemd forgot."""
        if self.units is None:
            return None
        try:
            return await self.units.exit_status(name, pid)
        except KvmdError as error:
            _log.warning("guest %s: %s", name, error, extra={"KVMD_GUEST": name})
            return None

    def is_unit_of(self, name: str, pid: int) -> bool:
        """Whether systemd runs this pid as the guest's unit."""
        return self.units is not None and runs_as_unit(pid, guest_unit(name))

    async def keep_last_start(self, last: LastStart) -> None:
        """Leave what a start without kvmd needs. A guest that runs is not troubled by a disk that is full."""
        try:
            await asyncio.to_thread(last.save, self.paths.guest_state(last.name))
        except KvmdError as error:
            _log.warning("guest %s: %s", last.name, error, extra={"KVMD_GUEST": last.name})

    def watch_pid(self, pid: int) -> process.Watched | None:
        """Watch a process by its pid, which was proved otherwise to be ours."""
        found = self.tree.process(pid)
        return process.Watched.open(found) if found else None

    def record_process(self, run: GuestRun, watched: process.Watched) -> GuestRun:
        """The run has a process from now on."""
        return self.store.record_process(run.name, watched.process.pid, watched.process.start_time)

    @functools.cached_property
    def scripts(self) -> TapScripts:
        """The scripts of guests' TAPs, and which are due."""
        return TapScripts(self.store, self.tree.boot_id)

    @functools.cached_property
    def qemu_gid(self) -> int | None:
        """Group kvmd-qemu where it was made by the installation; else each guest's gid is its uid."""
        return _group("kvmd-qemu")

    @property
    def qemu_groups(self) -> tuple[int, ...]:
        """Supplementary groups: kvm, for /dev/kvm."""
        kvm = _group("kvm")
        return () if kvm is None else (kvm,)

    @staticmethod
    def now() -> float:
        """UNIX time."""
        return time.time()


def vcpu_threads(reply: Any) -> tuple[int, ...]:
    """Host thread ids in vCPU order from query-cpus-fast. QemuFailed when the reply is not one."""
    try:
        return tuple(int(cpu["thread-id"]) for cpu in sorted(reply, key=lambda cpu: int(cpu["cpu-index"])))
    except (TypeError, KeyError, ValueError):
        raise QemuFailed("query-cpus-fast answered something else than CPUs") from None


def _own_tap(guest: str, nic: str, wish: Nic, uuid: str) -> TapPlan:
    """The TAP of a NIC that is on no network of kvmd's."""
    bridge = (wish.br or "br0") if wish.type == "bridge" or wish.helper else None
    return TapPlan(
        name=wish.ifname or tap_name(uuid, nic),
        bridge=bridge,
        mtu=wish.mtu,
        alias=tap_alias("", guest, nic),
        fenced=bridge is None or wish.helper is not None or wish.mtu is None,  # nothing standby.py could do
        plain=not wish.vnet_hdr,
        script=wish.script,
        downscript=wish.downscript,
        helper=wish.helper,
    )


async def _ask_all(monitor: Monitor, queries: Iterable[verify.Query]) -> list[Any]:
    """All replies in order. The queries go out together: QEMU answers one while we read another."""
    return await asyncio.gather(*(_ask(monitor, query) for query in queries))


async def _ask(monitor: Monitor, query: verify.Query) -> Any:
    """A reply, None where QEMU has none: a wrong verifier must not stop a host."""
    try:
        return await monitor.execute(query.command, **query.arguments)
    except QemuFailed:
        return None


def _uid(pid: int) -> int | None:
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None


def _group(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None
