"""A host in memory: facts, a journal, and one function for each action of kvmd. Printed as text, compared as text.

What `effects` do to a kernel these functions do to a value, the journal first, so that planners, undo and drift are
tried on thousands of worlds in seconds. A new action joins with one function and a line in EFFECTS;
tests/unit/rig/test_fakeworld.py fails for one that has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvmd.actions import (
    Action,
    AnyAction,
    AttachUplink,
    BindDevice,
    DetachUplink,
    Disruption,
    EnableGuest,
    EnsureBridge,
    EnsureSwapFile,
    EnsureZram,
    LoadModule,
    MountHugetlbfs,
    PinGuest,
    ReleaseDevice,
    RemoveBridge,
    RemoveSwapFile,
    RemoveZram,
    ReplaceRuleset,
    RestartGuest,
    SetHugepages,
    SetLink,
    SetPortVlans,
    SetVfs,
    ShapePort,
    StartDnsmasq,
    StartGuest,
    StopDnsmasq,
    StopGuest,
    UnloadModule,
    UnmountHugetlbfs,
    WriteDropIn,
    WriteKernelArgs,
    WriteKnob,
)
from kvmd.config.desired import Desired
from kvmd.config.network import bridge_name
from kvmd.effects import records
from kvmd.facts import (
    BootLine,
    Dnsmasq,
    Facts,
    GuestLife,
    GuestUnit,
    HugepagePool,
    Interrupt,
    JournalEntry,
    Link,
    Memory,
    MemoryPath,
    Module,
    PciDevice,
    Process,
    RunningGuest,
    SwapArea,
    SwapFile,
    Thread,
    TunedKnob,
    UplinkTrial,
    Zram,
)
from kvmd.plan import cpus
from kvmd.plan.dnsmasq import bridge_of, config_sha256
from kvmd.plan.host import Plan, plan
from kvmd.plan.interrupts import DEFAULT as DEFAULT_IRQ
from kvmd.plan.ksm import KSM, SWAPPINESS, THP
from kvmd.plan.links import bridge_alias, bridge_mac, tap_alias, tap_name
from kvmd.plan.network import FORWARDING, FORWARDING6
from kvmd.plan.nfttable import NETWORKS, PORTS, fingerprint
from kvmd.plan.ports import tbf_of
from kvmd.plan.release import plan_release
from kvmd.plan.vlans import wanted_vlans
from kvmd.units import CpuSet
from tests.rig.hosts import GIB, MIB, topology

BOOT = "boot-1"
NIC = PciDevice("0000:3b:00.0", 0x020000, driver="ixgbe", group=1, node=0, total_vfs=8, links=("eno2",))
GPU = PciDevice("0000:41:00.0", 0x030000, driver="nouveau", group=2, node=1)
SWAP_FILE = "/var/lib/kvmd/swap"  # the default of swap.file.path
ALL = frozenset(Disruption)
KERNEL_RATE = "100"  # pages_to_scan after the kernel's advisor was left
KNOBS: Mapping[str, str] = {
    f"{KSM}/run": "0",
    f"{KSM}/pages_to_scan": KERNEL_RATE,
    f"{KSM}/sleep_millisecs": "50",
    f"{KSM}/merge_across_nodes": "1",
    f"{KSM}/pages_shared": "0",
    f"{KSM}/advisor_mode": "none",
    f"{KSM}/advisor_max_cpu": "70",
    f"{KSM}/advisor_target_scan_time": "300",
    f"{KSM}/advisor_min_pages_to_scan": "500",
    f"{KSM}/advisor_max_pages_to_scan": "30000",
    f"{KSM}/smart_scan": "0",
    f"{KSM}/use_zero_pages": "0",
    f"{KSM}/max_page_sharing": "256",
    f"{THP}/enabled": "always",
    f"{THP}/defrag": "madvise",
    f"{THP}/shmem_enabled": "never",
    f"{THP}/khugepaged/defrag": "1",
    SWAPPINESS: "60",
    FORWARDING: "0",
    FORWARDING6: "0",
    DEFAULT_IRQ: "ff",
    "/proc/irq/24/smp_affinity_list": "0-7",
}
INTERRUPTS = (
    Interrupt(24, "eno1-rx", CpuSet(range(8))),
    Interrupt(31, "nvme0q4", CpuSet([3]), fixed=True),
)
MODULES = {name: Module(name, "available") for name in ("vfio_pci", "vhost_net", "zram")}
LINKS = (
    Link("lo", 1, mac="00:00:00:00:00:00", mtu=65536, up=True, addresses=("127.0.0.1/8",)),
    Link("eno1", 2, mac="fc:00:00:00:00:01", up=True, addresses=("192.0.2.7/24",)),
    Link("br0", 3, kind="bridge", mac="fc:00:00:00:00:02", up=True, stp=False),
    Link("virbr0", 4, kind="bridge", mac="52:54:00:00:00:09", up=True, stp=True, addresses=("192.168.122.1/24",)),
)


def fresh(*, total: int = 64 * GIB, units: bool = True) -> Facts:
    """A machine as it comes up: two nodes of four cores, pools of two sizes, foreign links, nothing of kvmd's."""
    return Facts(
        boot_id=BOOT,
        cpus=topology(nodes=2, cores=4),
        memory=Memory(
            total_bytes=total,
            available_bytes=total - 2 * GIB,
            swap_total_bytes=total,
            swap_free_bytes=total,
            node_total_bytes={0: total // 2, 1: total // 2},
            node_free_bytes={0: total // 2 - GIB, 1: total // 2 - GIB},
        ),
        hugepages=tuple(HugepagePool(node, size, 0, 0) for node in (0, 1) for size in (2 * MIB, GIB)),
        knobs=dict(KNOBS),
        interrupts=INTERRUPTS,
        modules=dict(MODULES),
        nodes=frozenset({"/dev/vfio/vfio", "/dev/vhost-net"}),
        boot=BootLine(cmdline="BOOT_IMAGE=/vmlinuz quiet", loader="grub"),
        pci=(NIC, GPU),
        memory_paths=(MemoryPath("/mnt/pages", "directory"),),
        swaps=(SwapArea("/dev/sda2", 4 * GIB, 0, -2),),
        swap_files=(SwapFile(SWAP_FILE, free_bytes=100 * GIB),),
        links=LINKS,
        units=() if units else None,
    )


class Died(Exception):
    """kvmd was killed here."""


@dataclass
class FakeWorld:
    """`facts` is the world; everything kvmd does to it goes through `apply`."""

    facts: Facts = field(default_factory=fresh)
    desired: Desired = field(default_factory=Desired)
    dies_after: int | None = None  # steps (a record written, an effect done) until kvmd is killed
    wanted: dict[str, bool] = field(default_factory=dict)  # what people asked of guests; else start.auto
    _pids: int = 1000
    _journalling: bool = True

    # ---- kvmd's passes

    def plan(self, *, retake: bool = False, prune: bool = False) -> Plan:
        """What a pass would do."""
        pools = [entry for entry in self.facts.journal if entry.kind == records.EffectKind.HUGEPAGES]
        originals = {_pool_key(entry.subject): int(entry.original) for entry in pools}
        facts = replace(self.facts, lives=self._lives())
        uuids = {name: name for name in self.desired.guests}
        macs = self.macs()
        return plan(self.desired, facts, macs=macs, uuids=uuids, originals=originals, prune=prune, retake=retake)

    def reconcile(
        self, desired: Desired | None = None, *, retake: bool = False, prune: bool = False
    ) -> tuple[AnyAction, ...]:
        """One pass with everything allowed; guests start last, as in the manager. What was done."""
        self.desired = desired or self.desired
        planned = self.plan(retake=retake, prune=prune)
        done = list(planned.actions)
        for action in planned.actions:
            self.apply(action)
        if any(isinstance(action, StartGuest | RestartGuest) for action in done):
            pins = [action for action in self.plan().actions if isinstance(action, PinGuest)]
            done += pins
            for action in pins:
                self.apply(action)
        for knob in planned.yielded:
            tuned = (replace(one, theirs=knob.theirs) if one.path == knob.path else one for one in self.facts.tuned)
            self.change(tuned=tuple(tuned))
        return tuple(done)

    def settle(self, desired: Desired | None = None, passes: int = 3) -> None:
        """Passes until there is nothing to do. A guest that stops frees what only the next pass can take back."""
        for _ in range(passes):
            if not self.reconcile(desired, prune=True):
                return
        left = [action.line() for action in self.plan(prune=True).actions]
        assert not left, f"still to do after {passes} passes: {left}"

    def release(self) -> None:
        """Put everything back, in the order plan_release gives."""
        entries = [(e.kind, e.subject, e.original, e.new) for e in self.facts.journal]
        self._journalling = False
        try:
            for undo in plan_release(entries, self.facts):
                if undo.action:
                    self.apply(undo.action)
                self.forget(undo.key)
        finally:
            self._journalling = True

    def apply(self, action: Action) -> None:
        """One action; KeyError when it has no function here."""
        EFFECTS[type(action)](self, action)

    # ---- the journal, as effects.store keeps it

    def journal(self, key: str, original: str, new: str, why: str) -> None:
        """Before the effect; not while it is undone, as effects.apply does."""
        if not self._journalling:
            return
        mine = next((entry for entry in self.facts.journal if entry.key == key), None)
        entry = JournalEntry(key, mine.original if mine else original, new, BOOT, why)
        if mine:
            self.change(journal=tuple(entry if one is mine else one for one in self.facts.journal))
        else:
            self.change(journal=(*self.facts.journal, entry))

    def forget(self, key: str) -> None:
        """The effect is undone."""
        self.change(
            journal=tuple(entry for entry in self.facts.journal if entry.key != key),
            tuned=tuple(knob for knob in self.facts.tuned if f"knob:{knob.path}" != key),
        )

    def change(self, **fields: Any) -> None:
        """One step: these facts, unless kvmd is killed before it."""
        if self.dies_after is not None:
            if self.dies_after == 0:
                raise Died
            self.dies_after -= 1
        self.facts = _with_interrupts(replace(self.facts, **fields))

    # ---- what others do

    def drift(self, **fields: Any) -> None:
        """Somebody, or the kernel, changes the world behind kvmd's back."""
        self.facts = _with_interrupts(replace(self.facts, **fields))

    def drift_knob(self, path: str, value: str) -> None:
        """`echo value > path`."""
        self.drift(knobs={**self.facts.knobs, path: value})

    def drift_link(self, name: str, **fields: Any) -> None:
        """`ip link set name ...`"""
        self.drift(links=tuple(replace(one, **fields) if one.name == name else one for one in self.facts.links))

    def drift_pool(self, node: int, page_bytes: int, total: int) -> None:
        """`echo total > nr_hugepages` of a pool nobody uses."""
        self._resize(node, page_bytes, total)

    def end_guest(self, name: str) -> None:
        """Its QEMU is gone, with its TAPs, pages and memory."""
        guest = next(one for one in self.facts.guests if one.name == name)
        if guest.page_bytes:
            pages = -(-guest.memory_bytes // guest.page_bytes)
            self._use_pages(guest.page_bytes, -pages)
        else:
            self._take_memory(-guest.memory_bytes)
        self.drift(
            guests=tuple(one for one in self.facts.guests if one is not guest),
            links=tuple(link for link in self.facts.links if not (link.alias or "").count(f":{name}:")),
        )

    # ---- guests

    def macs(self) -> Mapping[tuple[str, str], str]:
        """An address for each NIC, always the same."""
        return {
            (name, nic): "02:" + ":".join(f"{byte:02x}" for byte in f"{name}{nic}xxxxx".encode()[:5])
            for name, guest in self.desired.guests.items()
            for nic in guest.nic
        }

    def _lives(self) -> tuple[GuestLife, ...]:
        alive = {guest.name: guest for guest in self.facts.guests}
        return tuple(
            GuestLife(name, alive=name in alive, wanted=self._wanted(name), pending=self._pending(name))
            for name in sorted(alive.keys() | self.desired.guests.keys())
        )

    def _wanted(self, name: str) -> bool:
        guest = self.desired.guests.get(name)
        return self.wanted.get(name, bool(guest and guest.start.auto))

    def _pending(self, name: str) -> tuple[str, ...]:
        running = next((guest for guest in self.facts.guests if guest.name == name), None)
        guest = self.desired.guests.get(name)
        if running is None or guest is None:
            return ()
        changed = (int(guest.memory.size), guest.memory.hugepage_size) != (running.memory_bytes, running.page_bytes)
        changed |= len(running.vcpu_threads) != guest.cpu.vcpus or _nics(self.desired, name) != _taps(self.facts, name)
        return ("memory.size",) if changed else ()

    def _start(self, name: str) -> None:
        self.change()  # a QEMU is there with all it has, or not at all
        guest = self.desired.guests[name]
        placement = cpus.place_guest(
            name,
            self.desired,
            self.facts.cpus,
            {other.name for other in self.facts.guests},
            taken=cpus.taken_by(self.facts),
        )
        assert placement is not None
        self._pids += 10
        page = guest.memory.hugepage_size
        running = RunningGuest(
            name=name,
            uuid=name,
            process=Process(self._pids, self._pids),
            memory_bytes=int(guest.memory.size),
            page_bytes=page,
            vcpu_threads=tuple(range(self._pids + 1, self._pids + 1 + guest.cpu.vcpus)),
            affinity=tuple(str(each) for each in placement.vcpus),
            others=(Thread(self._pids, "qemu-system-x86", str(placement.emulator)),),
            nodes=guest.cpu.nodes,
            nics=tuple(guest.nic),
            unplugged=frozenset(nic for nic, table in guest.nic.items() if not table.link),
        )
        if page:
            self._use_pages(page, -(-int(guest.memory.size) // page))
        else:
            self._take_memory(int(guest.memory.size))
        taps = [_tap(self.facts, self.desired, name, nic, number) for number, nic in enumerate(sorted(guest.nic))]
        self.drift(guests=(*self.facts.guests, running), links=(*self.facts.links, *taps))

    # ---- memory

    def _resize(self, node: int, page_bytes: int, total: int) -> None:
        pool = next(one for one in self.facts.hugepages if (one.node, one.page_bytes) == (node, page_bytes))
        grown = replace(pool, total=total, free=pool.free + total - pool.total)
        assert grown.free >= 0, f"{page_bytes} node {node}: {total} pages are fewer than are in use"
        self._take_memory((total - pool.total) * page_bytes)
        self.facts = replace(self.facts, hugepages=tuple(grown if one is pool else one for one in self.facts.hugepages))

    def _use_pages(self, page_bytes: int, pages: int) -> None:
        pools = list(self.facts.hugepages)
        for at, pool in enumerate(pools):
            if pool.page_bytes == page_bytes:
                part = min(pages, pool.free) if pages > 0 else max(pages, pool.free - pool.total)
                pools[at] = replace(pool, free=pool.free - part)
                pages -= part
        assert pages == 0, f"{pages} pages of {page_bytes} are missing"
        self.facts = replace(self.facts, hugepages=tuple(pools))

    def _take_memory(self, amount: int) -> None:
        memory = self.facts.memory
        self.facts = replace(self.facts, memory=replace(memory, available_bytes=memory.available_bytes - amount))

    # ---- as text

    def text(self) -> str:
        """The world, a thing a line; without what a restart of guests may change (pids, CPUs)."""
        pools = (f"pool {p.page_bytes >> 20}MiB node {p.node}: {p.total}, {p.free} free" for p in self.facts.hugepages)
        knobs = (f"{path} = {value}" for path, value in sorted(self.facts.knobs.items()))
        return "\n".join((*knobs, *pools, self.lasting()))

    def lasting(self) -> str:
        """What a desired state decides alone, whatever was before: no knob that is not mentioned, no node."""
        facts = self.facts
        sizes = sorted({pool.page_bytes for pool in facts.hugepages})
        totals = ((size, sum(pool.total for pool in facts.hugepages if pool.page_bytes == size)) for size in sizes)
        lines = [f"pools of {size >> 20}MiB: {total}" for size, total in totals]
        lines += sorted(f"link {replace(link, index=0)}" for link in facts.links)
        lines += [f"nft {facts.nft}, {facts.nft_ports}"]
        lines += sorted(f"module {name} {found.state}" for name, found in facts.modules.items())
        lines += sorted(f"{device}" for device in facts.pci or ())
        lines.append(f"kernel arguments {facts.boot.drop_in}")
        lines += sorted(f"swap to {area}" for area in facts.swaps or ())
        lines += sorted(f"memory path {path}" for path in facts.memory_paths)
        lines += sorted(f"dnsmasq {server.network} {server.config_sha256}" for server in facts.dnsmasq)
        lines += sorted(f"guest {g.name} {g.memory_bytes} {g.page_bytes} x{len(g.vcpu_threads)}" for g in facts.guests)
        lines += sorted(f"unit {unit}" for unit in facts.units or () if unit.drop_in or unit.enabled)
        return "\n".join(lines)


def _pool_key(subject: str) -> tuple[int, int]:
    node, page_bytes = subject.split(":")
    return int(node), int(page_bytes)


def _nics(desired: Desired, name: str) -> set[str]:
    return {f"{table.network}:{name}:{nic}" for nic, table in desired.guests[name].nic.items()}


def _taps(facts: Facts, name: str) -> set[str]:
    return {link.alias.removeprefix("kvmd:") for link in facts.links if link.alias and f":{name}:" in link.alias}


def _tap(facts: Facts, desired: Desired, guest: str, nic: str, number: int) -> Link:
    network = desired.guests[guest].nic[nic].network
    assert network is not None
    bridge = bridge_name(network, desired.networks[network])
    assert any(link.name == bridge for link in facts.links), f"{guest} is plugged into {bridge}, which is not there"
    index = max(link.index for link in facts.links) + 1 + number
    alias = tap_alias(network, guest, nic)
    filtering = desired.networks[network].network.vlan_filtering
    vlans = wanted_vlans(desired.guests[guest].nic[nic], 1) if filtering else None
    tbf = tbf_of(desired.guests[guest].nic[nic].rate_in)
    return Link(tap_name(guest, nic), index, kind="tun", up=True, master=bridge, alias=alias, vlans=vlans, tbf=tbf)


def _with_interrupts(facts: Facts) -> Facts:
    """Where interrupts go is what their files say."""
    files = {each.number: facts.knobs.get(f"/proc/irq/{each.number}/smp_affinity_list") for each in facts.interrupts}
    found = (
        replace(each, affinity=CpuSet.parse(text)) if (text := files[each.number]) else each
        for each in facts.interrupts
    )
    return replace(facts, interrupts=tuple(found))


# ---- one function for each action ---------------------------------------------------------------------------------


def _write_knob(world: FakeWorld, action: WriteKnob) -> None:
    assert action.path in world.facts.knobs, f"this kernel has no {action.path}"
    world.journal(records.knob_key(action.path), action.old, action.new, action.why)
    knobs = {**world.facts.knobs, action.path: action.new}
    if action.path == f"{KSM}/advisor_mode" and action.new == "none":
        knobs[f"{KSM}/pages_to_scan"] = KERNEL_RATE
    world.change(knobs=knobs)
    if not action.requirement:
        rest = tuple(knob for knob in world.facts.tuned if knob.path != action.path)
        tuned = (*rest, TunedKnob(action.path, action.new, action.why))
        world.change(tuned=tuple(sorted(tuned, key=lambda knob: knob.path)))


def _write_kernel_args(world: FakeWorld, action: WriteKernelArgs) -> None:
    world.journal(records.kernel_args_key(action.path), action.old, action.new, action.why)
    world.change(boot=replace(world.facts.boot, drop_in=action.new or None))


def _set_hugepages(world: FakeWorld, action: SetHugepages) -> None:
    key = records.hugepages_key(action.node, action.page_bytes)
    world.journal(key, str(action.old), str(action.new), action.why)
    world.change()
    world._resize(action.node, action.page_bytes, action.new)


def _mount_hugetlbfs(world: FakeWorld, action: MountHugetlbfs) -> None:
    world.journal(records.hugetlbfs_key(action.path), action.kind, str(action.page_bytes), action.why)
    made = MemoryPath(action.path, "directory", True, action.page_bytes, action.limit_bytes, ours=True)
    world.change(memory_paths=(*(one for one in world.facts.memory_paths if one.path != action.path), made))


def _unmount_hugetlbfs(world: FakeWorld, action: UnmountHugetlbfs) -> None:
    left = MemoryPath(action.path, "absent" if action.remove else "directory")
    world.change(memory_paths=(*(one for one in world.facts.memory_paths if one.path != action.path), left))
    world.forget(records.hugetlbfs_key(action.path))


def _ensure_swap_file(world: FakeWorld, action: EnsureSwapFile) -> None:
    world.journal(records.swap_file_key(action.path), "", str(action.size_bytes), action.why)
    there = next(one for one in world.facts.swap_files if one.path == action.path)
    assert there.size_bytes is None or there.ours, "it is somebody else's"
    made = replace(there, size_bytes=action.size_bytes, ours=True)
    world.change(
        swap_files=tuple(made if one is there else one for one in world.facts.swap_files),
        swaps=_swaps(world, action.path, SwapArea(action.path, action.size_bytes, 0, -3)),
    )


def _remove_swap_file(world: FakeWorld, action: RemoveSwapFile) -> None:
    files = (SwapFile(one.path, free_bytes=one.free_bytes) if one.path == action.path else one
             for one in world.facts.swap_files)  # fmt: skip
    world.change(swap_files=tuple(files), swaps=_swaps(world, action.path, None))
    world.forget(records.swap_file_key(action.path))


def _ensure_zram(world: FakeWorld, action: EnsureZram) -> None:
    there = world.facts.zrams or ()
    number = action.number if action.number is not None else max((one.number for one in there), default=-1) + 1
    world.journal(records.zram_key(), "", str(number), action.why)
    made = Zram(number, action.size_bytes, ours=True)
    world.change(
        zrams=(*(one for one in there if one.number != number), made),
        swaps=_swaps(world, made.path, SwapArea(made.path, action.size_bytes, 0, 100)),
    )


def _remove_zram(world: FakeWorld, action: RemoveZram) -> None:
    there = world.facts.zrams or ()
    path = f"/dev/zram{action.number}"
    world.change(zrams=tuple(one for one in there if one.number != action.number), swaps=_swaps(world, path, None))
    world.forget(records.zram_key())


def _swaps(world: FakeWorld, path: str, area: SwapArea | None) -> tuple[SwapArea, ...]:
    rest = tuple(one for one in world.facts.swaps or () if one.path != path)
    return (*rest, area) if area else rest


def _set_vfs(world: FakeWorld, action: SetVfs) -> None:
    key = records.sriov_key(action.device)
    world.journal(key, f"{action.old},1", str(action.new), action.why)
    devices = [one for one in world.facts.pci or () if one.parent != action.device]
    devices = [replace(one, vfs=action.new) if one.address == action.device else one for one in devices]
    devices += [PciDevice(f"0000:3b:10.{n}", 0x020000, parent=action.device, index=n) for n in range(action.new)]
    before = {e.subject: int(e.original.split(",")[0]) for e in world.facts.journal if e.kind == "sriov"}
    world.change(pci=tuple(devices), vfs_before=before)


def _bind_device(world: FakeWorld, action: BindDevice) -> None:
    world.journal(records.vfio_key(action.device), action.driver or "", action.guest, action.why)
    devices = (
        replace(one, driver="vfio-pci", override="vfio-pci") if one.address == action.device else one
        for one in world.facts.pci or ()
    )
    taken = {**world.facts.reservations, action.device: action.guest}
    world.change(pci=tuple(devices), reservations=taken)


def _release_device(world: FakeWorld, action: ReleaseDevice) -> None:
    was = {entry.subject: entry.original for entry in world.facts.journal if entry.kind == "vfio"}
    devices = (
        replace(one, driver=was.get(action.device) or None, override=None) if one.address == action.device else one
        for one in world.facts.pci or ()
    )
    left = {device: guest for device, guest in world.facts.reservations.items() if device != action.device}
    world.change(pci=tuple(devices), reservations=left)
    world.forget(records.vfio_key(action.device))


def _ensure_bridge(world: FakeWorld, action: EnsureBridge) -> None:
    old = next((link for link in world.facts.links if link.name == action.bridge), None)
    if action.change == "create":
        world.journal(records.bridge_key(action.bridge), "", action.network, action.why)
    made = Link(
        action.bridge,
        old.index if old else max(link.index for link in world.facts.links) + 1,
        kind="bridge",
        mac=bridge_mac(action.bridge),
        mtu=action.mtu,
        up=True,
        alias=bridge_alias(action.network),
        addresses=action.addresses,
        stp=action.stp,
        vlan_filtering=action.vlan_filtering,
        default_pvid=1,
    )
    world.change(links=(*(link for link in world.facts.links if link is not old), made))


def _attach_uplink(world: FakeWorld, action: AttachUplink) -> None:
    key = records.uplink_key(action.interface)
    world.journal(key, "up" if action.was_up else "down", action.bridge, action.why)
    rest = tuple(one for one in world.facts.uplinks if one.network != action.network)
    state: Literal["trial", "kept"] = "trial" if action.rollback_s else "kept"
    world.change(uplinks=(*rest, UplinkTrial(action.network, action.interface, action.bridge, state, BOOT)))
    world.change(links=_with(world.facts.links, action.interface, master=action.bridge, up=True))


def _detach_uplink(world: FakeWorld, action: DetachUplink) -> None:
    world.change(links=_with(world.facts.links, action.interface, master=None, up=action.was_up))
    world.forget(records.uplink_key(action.interface))


def _with(links: tuple[Link, ...], name: str, **fields: Any) -> tuple[Link, ...]:
    return tuple(replace(one, **fields) if one.name == name else one for one in links)


def _set_port_vlans(world: FakeWorld, action: SetPortVlans) -> None:
    links = world.facts.links
    assert any(link.name == action.port and link.master == action.bridge for link in links), f"no port {action.port}"
    world.change(links=_with(links, action.port, vlans=action.vlans))


def _remove_bridge(world: FakeWorld, action: RemoveBridge) -> None:
    assert not any(link.master == action.bridge for link in world.facts.links), f"{action.bridge} has ports"
    world.change(links=tuple(link for link in world.facts.links if link.name != action.bridge))
    world.forget(records.bridge_key(action.bridge))


def _replace_ruleset(world: FakeWorld, action: ReplaceRuleset) -> None:
    world.journal(records.ruleset_key(action.table), "", action.change, action.why)
    table = {NETWORKS: "nft", PORTS: "nft_ports"}[action.table]
    world.change(**{table: fingerprint(action.text) if action.text else None})
    if not action.text:
        world.forget(records.ruleset_key(action.table))


def _shape_port(world: FakeWorld, action: ShapePort) -> None:
    links = (replace(x, tbf=tbf_of(action.rate)) if x.name == action.tap else x for x in world.facts.links)
    world.change(links=tuple(links))


def _start_dnsmasq(world: FakeWorld, action: StartDnsmasq) -> None:
    bridge = bridge_of(action.config)
    assert any(link.name == bridge for link in world.facts.links), f"no bridge {bridge} to serve on"
    world.journal(records.dnsmasq_key(action.network), "", action.network, action.why)
    rest = tuple(server for server in world.facts.dnsmasq if server.network != action.network)
    world.change(dnsmasq=(*rest, Dnsmasq(action.network, 7, 7, config_sha256(action.config))))


def _stop_dnsmasq(world: FakeWorld, action: StopDnsmasq) -> None:
    world.change(dnsmasq=tuple(server for server in world.facts.dnsmasq if server.network != action.network))
    world.forget(records.dnsmasq_key(action.network))


def _load_module(world: FakeWorld, action: LoadModule) -> None:
    assert world.facts.modules[action.name].state in ("available", "loaded")
    world.journal(records.module_key(action.name), "", action.name, action.why)
    world.change(modules={**world.facts.modules, action.name: Module(action.name, "loaded")})


def _unload_module(world: FakeWorld, action: UnloadModule) -> None:
    world.change(modules={**world.facts.modules, action.name: Module(action.name, "available")})
    world.forget(records.module_key(action.name))


def _start_guest(world: FakeWorld, action: StartGuest) -> None:
    if all(guest.name != action.guest for guest in world.facts.guests):
        world._start(action.guest)


def _stop_guest(world: FakeWorld, action: StopGuest) -> None:
    world.end_guest(action.guest)


def _restart_guest(world: FakeWorld, action: RestartGuest) -> None:
    world.end_guest(action.guest)
    world._start(action.guest)


def _pin_guest(world: FakeWorld, action: PinGuest) -> None:
    world.change(
        guests=tuple(
            replace(
                guest,
                affinity=action.vcpus,
                others=tuple(replace(thread, cpus=action.emulator) for thread in guest.others),
            )
            if guest.name == action.guest
            else guest
            for guest in world.facts.guests
        )
    )


def _set_link(world: FakeWorld, action: SetLink) -> None:
    def changed(guest: RunningGuest) -> RunningGuest:
        pulled = guest.unplugged - {action.nic} if action.up else guest.unplugged | {action.nic}
        return replace(guest, unplugged=pulled)

    world.change(guests=tuple(changed(one) if one.name == action.guest else one for one in world.facts.guests))


def _unit(world: FakeWorld, name: str) -> GuestUnit:
    return next((unit for unit in world.facts.units or () if unit.guest == name), GuestUnit(name))


def _set_unit(world: FakeWorld, unit: GuestUnit) -> None:
    rest = tuple(one for one in world.facts.units or () if one.guest != unit.guest)
    world.change(units=(*rest, unit) if unit.drop_in or unit.enabled else rest)


def _write_drop_in(world: FakeWorld, action: WriteDropIn) -> None:
    _set_unit(world, replace(_unit(world, action.guest), drop_in=action.text))


def _enable_guest(world: FakeWorld, action: EnableGuest) -> None:
    _set_unit(world, replace(_unit(world, action.guest), enabled=action.on))


EFFECTS: Mapping[type[Action], Callable[[FakeWorld, Any], None]] = {
    WriteKnob: _write_knob,
    WriteKernelArgs: _write_kernel_args,
    SetVfs: _set_vfs,
    BindDevice: _bind_device,
    ReleaseDevice: _release_device,
    SetHugepages: _set_hugepages,
    MountHugetlbfs: _mount_hugetlbfs,
    UnmountHugetlbfs: _unmount_hugetlbfs,
    EnsureSwapFile: _ensure_swap_file,
    RemoveSwapFile: _remove_swap_file,
    EnsureZram: _ensure_zram,
    RemoveZram: _remove_zram,
    AttachUplink: _attach_uplink,
    DetachUplink: _detach_uplink,
    EnsureBridge: _ensure_bridge,
    SetPortVlans: _set_port_vlans,
    RemoveBridge: _remove_bridge,
    ReplaceRuleset: _replace_ruleset,
    ShapePort: _shape_port,
    StartDnsmasq: _start_dnsmasq,
    StopDnsmasq: _stop_dnsmasq,
    LoadModule: _load_module,
    UnloadModule: _unload_module,
    StartGuest: _start_guest,
    StopGuest: _stop_guest,
    RestartGuest: _restart_guest,
    PinGuest: _pin_guest,
    SetLink: _set_link,
    WriteDropIn: _write_drop_in,
    EnableGuest: _enable_guest,
}
