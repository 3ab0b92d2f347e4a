"""Gathers the one frozen report that `doctor` judges: files below a root path, and a few questions to the live host.

Whatever cannot be read below a root path is a member of `Questions`, so that a test can answer for the host. Nothing
is changed; QEMUs that are asked run as a guest's uid where this is root.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvmd.config.desired import Desired, Loaded
from kvmd.effects import checkup_files, checkup_system, modules, nft, pci
from kvmd.effects.probe import kvm_usable, probe
from kvmd.effects.routes import ra_uplinks
from kvmd.effects.sysfs import KVM_MODULES, HostTree
from kvmd.errors import KvmdError
from kvmd.facts import Facts, RunningGuest
from kvmd.paths import Paths
from kvmd.plan import firewall, ksm, network, vfio
from kvmd.plan import modules as module_plan
from kvmd.plan.checks_machine import KVM_DEVICE, TUN_DEVICE, VHOST_DEVICE
from kvmd.plan.checks_memory import AIO_MAX
from kvmd.plan.hostreport import Emulator, FileStat, HostReport, Unseen
from kvmd.qemu.caps import Accel, Capabilities, Kvm

_KNOBS = (*ksm.KNOBS, *network.KNOBS, *firewall.BRIDGE_NF)
_PROGRAMS = ("nft", "dnsmasq")
_PROGRAM_DIRECTORIES = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")
_QEMU_GROUP = "kvmd-qemu"


class AskKvm(Protocol):
    """`effects.probe.kvm_usable`."""

    async def __call__(self, emulator: str, *, uid: int | None, gid: int | None, root: Path) -> Kvm: ...


class AskCapabilities(Protocol):
    """`effects.probe.probe`."""

    async def __call__(
        self, emulator: str, accel: Accel, cache_dir: Path | None, *, uid: int | None, gid: int | None
    ) -> Capabilities: ...


@dataclass(frozen=True, slots=True)
class Questions:
    """What only the live host can answer."""

    euid: int
    as_root: bool  # may look at everything, and start a QEMU as a guest's uid
    kvm: AskKvm = kvm_usable
    capabilities: AskCapabilities = probe
    ruleset: Callable[[], Awaitable[str]] = nft.list_ruleset
    is_synchronized: Callable[[], bool | Unseen] = checkup_system.is_synchronized
    answers: Callable[[Path], bool] = checkup_system.answers

    @classmethod
    def live(cls) -> Questions:
        """Asked of this host, as the user we are."""
        return cls(euid=os.geteuid(), as_root=os.geteuid() == 0)


async def gather(paths: Paths, loaded: Loaded, tree: HostTree, ask: Questions) -> HostReport:
    """The report. Takes as long as the slowest QEMU it asks, 0.5 s usually; raises nothing."""
    desired = loaded.desired
    accounts = checkup_files.accounts(tree)
    low, _ = desired.daemon.qemu.uid_range
    uid, gid = (low, accounts.groups.get(_QEMU_GROUP, low)) if ask.as_root else (None, None)
    kvm, emulators, ruleset, images = await asyncio.gather(
        _kvm(ask, desired, tree, uid, gid),
        _emulators(ask, desired, uid, gid),
        _ruleset(ask),
        asyncio.to_thread(checkup_files.images, tree, desired),
    )
    running = checkup_system.processes(tree)
    listening = await asyncio.to_thread(ask.answers, paths.api_socket)
    return HostReport(
        paths=paths,
        euid=ask.euid,
        loaded=loaded,
        facts=_facts(tree, desired),
        kernel=tree.kernel(),
        kvm=kvm,
        under_hypervisor=checkup_system.under_hypervisor(tree),
        nested=next((v for m in KVM_MODULES if (v := tree.read(f"/sys/module/{m}/parameters/nested"))), None),
        emulators=emulators,
        has_psi=tree.has_psi(),
        cgroup=checkup_system.cgroup(tree),
        memlock_bytes=checkup_system.memlock_bytes(tree, running),
        aio_max=tree.number(AIO_MAX),
        programs=frozenset(name for name in _PROGRAMS if _installed(tree, name)),
        ruleset=ruleset,
        legacy_tables=checkup_system.legacy_tables(tree),
        links=checkup_system.links(tree),
        listeners=checkup_system.listeners(tree, paths.run / "networks"),
        network_setup=checkup_system.network_setup(tree, running),
        uplink=checkup_system.uplink(tree),
        processes=running,
        images=images,
        places=checkup_files.places(tree, paths, desired),
        files=_files(tree, paths),
        config_files=checkup_files.config_files(paths.config),
        listening=listening,
        clock=checkup_system.clock(running, ask.is_synchronized()),
        accounts=accounts,
        unit=checkup_files.unit_state(tree),
        needrestart=checkup_files.needrestart(tree),
        network_manager=checkup_files.network_manager(tree, runs="NetworkManager" in running),
    )


def _facts(tree: HostTree, desired: Desired) -> Facts:
    """The host as the planners see it; guests that run are recognised by their name on QEMU's command line."""
    guests = [
        RunningGuest(
            name=found.name,
            uuid=found.uuid or "",
            process=found.process,
            memory_bytes=int(desired.guests[found.name].memory.size) if found.name in desired.guests else 0,
            page_bytes=desired.guests[found.name].memory.hugepage_size if found.name in desired.guests else None,
        )
        for found in tree.qemus()
        if found.name
    ]
    names = module_plan.wanted(desired)
    return Facts(
        boot_id=tree.boot_id(),
        cpus=tree.observe_cpus(),
        memory=tree.observe_memory(),
        hugepages=tree.observe_hugepages(),
        knobs=tree.observe_knobs(_KNOBS),
        kernel=tree.kernel(),
        modules=modules.observe(tree, names),
        nodes=modules.observe_nodes(tree, module_plan.NODES.values()),
        pci=pci.observe(tree) if vfio.is_concerned(desired, ()) else None,
        iommu=pci.observe_iommu(tree),
        ra_uplinks=ra_uplinks(tree),
        guests=tuple(guests),
    )


async def _kvm(ask: Questions, desired: Desired, tree: HostTree, uid: int | None, gid: int | None) -> Kvm | Unseen:
    if not ask.as_root and tree.kvm_module():
        return Unseen(f"only root can try KVM as a guest's uid; this is uid {ask.euid}")
    try:
        return await ask.kvm(desired.daemon.qemu.emulator, uid=uid, gid=gid, root=tree.root)
    except KvmdError as error:
        return Kvm(usable=False, reason=error.message, fix=error.hint)


async def _emulators(ask: Questions, desired: Desired, uid: int | None, gid: int | None) -> tuple[Emulator, ...]:
    """Every QEMU that is named, asked one after the other: each takes a core for half a second."""
    named = {desired.daemon.qemu.emulator, *(g.machine.emulator for g in desired.guests.values())}
    found = []
    for name in sorted(name for name in named if name):
        try:
            caps = await ask.capabilities(name, "tcg", None, uid=uid, gid=gid)
            found.append(Emulator(name, caps.version_text, can_sandbox=caps.can_sandbox))
        except KvmdError as error:
            found.append(Emulator(name, error=error.message, hint=error.hint))
    return tuple(found)


async def _ruleset(ask: Questions) -> str | Unseen:
    if not ask.as_root:
        return Unseen(f"only root may list them; this is uid {ask.euid}")
    try:
        return await ask.ruleset()
    except KvmdError as error:
        return Unseen(error.message)


def _installed(tree: HostTree, program: str) -> bool:
    return any(tree.exists(f"{directory}/{program}") for directory in _PROGRAM_DIRECTORIES)


def _files(tree: HostTree, paths: Paths) -> dict[str, FileStat | Unseen | None]:
    """Devices below the root, kvmd's own directories and sockets where they are."""
    devices = {name: checkup_files.file_stat(tree.path(name)) for name in (KVM_DEVICE, VHOST_DEVICE, TUN_DEVICE)}
    own = [path for path, _ in paths.directories] + [paths.api_socket, paths.launch_socket]
    return devices | {str(path): checkup_files.file_stat(path) for path in own}
