"""What is: one frozen picture of the host and of the guests that run on it.

Made by `effects` (observe_*), read by `plan` and `tuning`. Data only: no reading, no judging. Every number's
unit is in its name; every path that could be absent is optional and None means "this kernel has none".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from kvmd.units import CpuSet

EMPTY: Mapping[Any, Any] = MappingProxyType({})
NO_CPUS = CpuSet()


@dataclass(frozen=True, slots=True)
class Cpu:
    """One logical CPU of the host (Documentation/admin-guide/cputopology.rst)."""

    id: int
    node: int = 0
    package: int = 0
    die: int = 0
    core: int = 0  # lowest CPU id among its SMT siblings: unique on the host, unlike core_id
    l3: int = 0  # lowest CPU id among those that share the last-level cache
    capacity: int = 1024  # cpu_capacity: 1024 is the fastest core of the host


@dataclass(frozen=True, slots=True)
class CpuTopology:
    """All online CPUs, and what the kernel command line took out of scheduling."""

    cpus: tuple[Cpu, ...] = ()
    isolated: CpuSet = NO_CPUS
    nohz_full: CpuSet = NO_CPUS
    allowed: CpuSet = NO_CPUS  # what this process may use (its cpuset)
    offline: CpuSet = NO_CPUS  # present and switched off
    nodes: tuple[int, ...] = ()  # every NUMA node, ascending, those without CPUs too
    distances: tuple[tuple[int, ...], ...] = ()  # distances[i][j] of nodes[i] and nodes[j]; () when not told

    @property
    def online(self) -> CpuSet:
        """Ids of all CPUs in `cpus`."""
        return CpuSet(cpu.id for cpu in self.cpus)


@dataclass(frozen=True, slots=True)
class Interrupt:
    """One interrupt line that some device uses (Documentation/core-api/irq/irq-affinity.rst)."""

    number: int
    device: str  # names of its handlers: "eth0-TxRx-3"
    affinity: CpuSet  # where it may arrive
    effective: CpuSet | None = None  # where it does; None: this kernel does not tell
    node: int | None = None  # of the device
    fixed: bool = False  # the kernel lets nobody change it

    @property
    def arrives(self) -> CpuSet:
        """CPUs it interrupts: where it does arrive, else where it may."""
        return self.affinity if self.effective is None else self.effective

    @property
    def is_guests(self) -> bool:
        """Of a device that was given to a guest."""
        return self.device.startswith("vfio")


@dataclass(frozen=True, slots=True)
class Irqbalance:
    """A running irqbalance and the CPUs it stays off; None: its own choice, the isolated and nohz_full ones."""

    pid: int
    banned: CpuSet | None


@dataclass(frozen=True, slots=True)
class BootLine:
    """What the boot loader gave the kernel, and the file by which kvmd adds to it."""

    cmdline: str = ""  # /proc/cmdline
    drop_in: str | None = None  # text of /etc/default/grub.d/50-kvmd.cfg; None: there is none
    loader: Literal["grub", "grubby", "kernel-install", ""] = ""  # grub: Debian's, which takes drop-ins; "": unknown

    def words(self) -> Mapping[str, str]:
        """Value by parameter, the last one where it is given twice."""
        return dict(word.split("=", 1) for word in self.cmdline.split() if "=" in word)

    def gib_pages(self) -> tuple[str | None, int]:
        """The words that ask for pages of 1 GiB at boot, and how many pages: hugepages= goes with the hugepagesz=
        before it, or with default_hugepagesz=."""
        size, found, count = self.words().get("default_hugepagesz", ""), None, 0
        for word in self.cmdline.split():
            key, _, value = word.partition("=")
            if key == "hugepagesz":
                size = value
            elif key == "hugepages" and size.upper() in ("1G", "1024M", "1GB"):
                pages = [part.rpartition(":")[2] for part in value.split(",")]
                found = f"hugepagesz={size} {word}"
                count = sum(int(each) for each in pages if each.isdigit())
        return found, count


@dataclass(frozen=True, slots=True)
class HugepagePool:
    """One node's pool of one page size (Documentation/admin-guide/mm/hugetlbpage.rst)."""

    node: int
    page_bytes: int
    total: int
    free: int
    surplus: int = 0  # beyond what was asked for: go as soon as they are freed; part of `total`
    reserved: int = 0  # promised to a mapping that has not touched them yet; part of `free`

    @property
    def used(self) -> int:
        """Pages some process holds."""
        return self.total - self.free


@dataclass(frozen=True, slots=True)
class FreeBlocks:
    """A node's free memory by the size of its pieces (/proc/buddyinfo), without the zone for old devices."""

    node: int
    page_bytes: int  # of an ordinary page
    counts: tuple[int, ...]  # counts[n]: free blocks of page_bytes << n

    @property
    def largest_bytes(self) -> int:
        """The kernel's largest block."""
        return self.page_bytes << max(0, len(self.counts) - 1)

    @property
    def free_bytes(self) -> int:
        """All of it."""
        return sum(size * count for size, count in self.by_size())

    def by_size(self) -> tuple[tuple[int, int], ...]:
        """(bytes of a block, how many), from small to large."""
        return tuple((self.page_bytes << order, count) for order, count in enumerate(self.counts))


@dataclass(frozen=True, slots=True)
class Memory:
    """/proc/meminfo and /proc/swaps, in bytes."""

    total_bytes: int = 0
    available_bytes: int = 0
    swap_total_bytes: int = 0
    swap_free_bytes: int = 0
    zram_bytes: int = 0  # part of the swap: compressed, in RAM
    hugetlb_bytes: int = 0  # all pools of all sizes
    node_total_bytes: Mapping[int, int] = field(default_factory=lambda: EMPTY)
    node_free_bytes: Mapping[int, int] = field(default_factory=lambda: EMPTY)


@dataclass(frozen=True, slots=True, order=True)
class VlanRange:
    """VLANs first to last of a bridge port, which are alike (linux/if_bridge.h, BRIDGE_VLAN_INFO_*)."""

    first: int
    last: int
    pvid: bool = False  # untagged frames that come in belong to it
    untagged: bool = False  # its frames go out without a tag


@dataclass(frozen=True, slots=True)
class MemoryPath:
    """What lies where a guest's memory.path wants a hugetlbfs, or where kvmd mounted one."""

    path: str
    kind: str = "absent"  # or "directory", "file"
    is_empty: bool = True  # a directory with nothing in it
    page_bytes: int | None = None  # of the hugetlbfs that is mounted there
    limit_bytes: int | None = None  # its size= option
    ours: bool = False  # kvmd mounted it


@dataclass(frozen=True, slots=True)
class SwapArea:
    """One line of /proc/swaps (proc(5))."""

    path: str
    size_bytes: int  # without the page of its signature
    used_bytes: int
    priority: int


@dataclass(frozen=True, slots=True)
class SwapFile:
    """What lies at a path that host.toml names for swap, or where kvmd made a swap file before."""

    path: str
    size_bytes: int | None = None  # None: nothing is there
    ours: bool = False  # its signature carries kvmd's label
    free_bytes: int | None = None  # of the file system it is or would be on; None: no such directory


@dataclass(frozen=True, slots=True)
class Zram:
    """One compressed block device in RAM (Documentation/admin-guide/blockdev/zram.rst)."""

    number: int
    size_bytes: int  # 0: not set up
    ours: bool = False  # its swap signature carries kvmd's label

    @property
    def path(self) -> str:
        """Its device node, as /proc/swaps has it."""
        return f"/dev/zram{self.number}"


@dataclass(frozen=True, slots=True)
class Tbf:
    """A token bucket queue at the root of a link (tc-tbf(8)), in bytes."""

    rate_bytes: int  # a second
    limit_bytes: int  # what may wait, the burst included
    burst_bytes: int = field(default=0, compare=False)  # the kernel gives it back as a time, rounded


@dataclass(frozen=True, slots=True)
class Link:
    """One network interface of the namespace kvmd runs in."""

    name: str
    index: int
    kind: str | None = None  # "bridge", "tun", "veth", None for a physical NIC
    mac: str = ""
    mtu: int = 1500
    up: bool = False
    master: str | None = None
    alias: str | None = None  # IFLA_IFALIAS; "kvmd:…" says it is ours
    addresses: tuple[str, ...] = ()  # "192.168.50.1/24"
    stp: bool | None = None  # bridges only
    vlan_filtering: bool | None = None  # bridges only
    port_isolated: bool | None = None  # bridge ports only
    default_pvid: int | None = None  # bridges only; 0: none; None: this kernel has no VLAN filtering
    vlans: tuple[VlanRange, ...] | None = None  # of a port, sorted and merged; None: not looked at
    parent: str | None = None  # the link below, of a VLAN or a macvtap
    tbf: Tbf | None = None  # None for any other queue


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket of the host that waits for packets: bound UDP, or listening TCP."""

    protocol: str  # "tcp" or "udp"
    address: str  # "0.0.0.0", "::", "203.0.113.7"
    port: int


@dataclass(frozen=True, slots=True)
class UplinkTrial:
    """What became of a network's NIC: on trial until a deadline, kept for good, or undone in this boot."""

    network: str
    interface: str
    bridge: str
    state: Literal["trial", "kept", "undone"]
    boot_id: str  # the boot a trial or an undoing counts in
    deadline_s: float = 0.0  # of a trial, on CLOCK_BOOTTIME


@dataclass(frozen=True, slots=True)
class Dnsmasq:
    """The DHCP/DNS server of one network, if it runs."""

    network: str
    pid: int
    start_time: int  # clock ticks since boot, /proc/PID/stat field 22
    config_sha256: str  # of the configuration it was started with


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One host effect of ours in boot `boot_id`: `original` was there before the first, `new` is the last wish."""

    key: str
    original: str
    new: str
    boot_id: str
    why: str

    @property
    def kind(self) -> str:
        """An EffectKind; a plain string, for a later kvmd may have written others."""
        return self.key.partition(":")[0]

    @property
    def subject(self) -> str:
        """What follows the kind: a path, "0:2097152", a bridge, a network."""
        return self.key.partition(":")[2]


@dataclass(frozen=True, slots=True)
class TunedKnob:
    """A tuning knob kvmd wrote in this boot: `ours` was read back then; `theirs` is what it gave way to, once told."""

    path: str
    ours: str
    why: str
    theirs: str | None = None


@dataclass(frozen=True, slots=True)
class Process:
    """Proof of identity of a process: a pid alone is never one."""

    pid: int
    start_time: int  # clock ticks since boot, /proc/PID/stat field 22


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread of a guest that is no vCPU: QEMU's own, or a kernel thread that works for it."""

    tid: int
    name: str  # "qemu-system-x86", "IO iothread0", "vhost-4711", "kvm-pit/4711"
    cpus: str  # CPU list it may run on now


@dataclass(frozen=True, slots=True)
class RunningGuest:
    """A QEMU that is provably ours."""

    name: str
    uuid: str
    process: Process
    memory_bytes: int
    page_bytes: int | None = None  # hugepage size of its memory, None if not hugepage backed
    vcpu_threads: tuple[int, ...] = ()  # host thread ids, in vCPU order
    affinity: tuple[str, ...] = ()  # CPU list each vCPU thread may run on now, in vCPU order
    others: tuple[Thread, ...] = ()  # every other thread, the main one first; () when not looked at
    nodes: CpuSet | None = None  # cpu.nodes as it was started

    @property
    def emulator(self) -> str:
        """CPU list of QEMU's main thread, "" when not looked at."""
        return self.others[0].cpus if self.others else ""

    nics: tuple[str, ...] = ()  # names of the cards it was started with
    unplugged: frozenset[str] = frozenset()  # of those, whose cable is pulled


@dataclass(frozen=True, slots=True)
class Usage:
    """What a guest was seen to need, from samples of its runs (history.samples)."""

    samples: int
    span_s: float  # from the oldest one to now
    demand_p95_bytes: int  # 95 % of the samples were at most that
    overhead_bytes: int | None = None  # most that its QEMU held beside the guest's memory; None: not measured


@dataclass(frozen=True, slots=True)
class GuestLife:
    """Where one guest is and where it was last asked to be."""

    name: str
    alive: bool
    wanted: bool  # running is what was last asked for, or what boot gives it
    held: str | None = None  # why kvmd keeps its hands off: a hold, a crash budget used up
    pending: tuple[str, ...] = ()  # changed keys that need a new QEMU
    settling: bool = False  # a start or stop is under way: nothing is planned for it now


@dataclass(frozen=True, slots=True)
class GuestUnit:
    """What systemd has of one guest beyond the template."""

    guest: str
    drop_in: str = ""  # text of 50-kvmd.conf, "" for none
    enabled: bool = False  # linked to kvmd-guests.target


@dataclass(frozen=True, slots=True)
class Module:
    """One kernel module, as /sys/module and /lib/modules/RELEASE tell it."""

    name: str  # the kernel's own, with "_": an alias is resolved
    state: Literal["loaded", "builtin", "available", "absent", "unknown"]  # unknown: no directory of modules at all
    users: int = 0  # refcnt of a loaded one


@dataclass(frozen=True, slots=True)
class HostUse:
    """What of the host's hangs on a PCI device and would go with it."""

    device: str  # "sda2", "enp3s0"
    what: str  # "mounted at /", "has 192.0.2.1/24", "carries the default route"


@dataclass(frozen=True, slots=True)
class PciDevice:
    """One PCI function (Documentation/ABI/testing/sysfs-bus-pci)."""

    address: str  # "0000:3b:00.1"
    class_code: int = 0  # base class, subclass, interface: 0x010802 is NVMe
    driver: str | None = None
    override: str | None = None  # driver_override: the only driver it may have
    group: int | None = None  # IOMMU group; None: no IOMMU stands before it
    node: int | None = None  # NUMA node; None: the firmware does not say
    parent: str | None = None  # of a virtual function: its physical one
    index: int | None = None  # of a virtual function: its number, from 0
    total_vfs: int = 0
    vfs: int = 0
    disks: tuple[str, ...] = ()  # "sda", "nvme0n1"
    links: tuple[str, ...] = ()  # network interfaces
    uses: tuple[HostUse, ...] = ()


@dataclass(frozen=True, slots=True)
class Iommu:
    """Why there are no IOMMU groups, if there are none."""

    groups: int = 0
    vendor: Literal["intel", "amd", ""] = ""  # of the processor
    asked: bool = False  # the kernel command line switches one on


@dataclass(frozen=True, slots=True)
class Facts:
    """The world, read once."""

    boot_id: str = ""
    cpus: CpuTopology = CpuTopology()
    memory: Memory = Memory()
    boot: BootLine = BootLine()
    interrupts: tuple[Interrupt, ...] = ()  # read when cpu.irq_affinity asks for them
    irqbalance: Irqbalance | None = None  # likewise
    hugepages: tuple[HugepagePool, ...] = ()
    free_blocks: tuple[FreeBlocks, ...] = ()
    knobs: Mapping[str, str] = field(default_factory=lambda: EMPTY)  # absolute path -> stripped content
    kernel: str = ""  # release of the running kernel
    modules: Mapping[str, Module] = field(default_factory=lambda: EMPTY)  # by the name that was asked for
    nodes: frozenset[str] = frozenset()  # device nodes that are there, of those some module makes
    memory_paths: tuple[MemoryPath, ...] = ()
    swaps: tuple[SwapArea, ...] | None = ()  # None: a kernel without swap
    swap_files: tuple[SwapFile, ...] = ()
    zrams: tuple[Zram, ...] | None = ()  # None: a kernel without zram, or its module is not loaded
    pci: tuple[PciDevice, ...] | None = None  # None: not looked at, for no file and no journal speaks of any
    iommu: Iommu = Iommu()
    reservations: Mapping[str, str] = field(default_factory=lambda: EMPTY)  # PCI function -> guest it was bound for
    vfs_before: Mapping[str, int] = field(default_factory=lambda: EMPTY)  # PCI function -> its VFs before kvmd
    links: tuple[Link, ...] = ()
    uplinks: tuple[UplinkTrial, ...] = ()  # of declared networks, what was decided in this boot or for good
    default_links: frozenset[str] = frozenset()  # links that a default route of the host goes through
    vlan_filtering: bool | None = None  # whether bridges can; None: not known before there is one
    ra_uplinks: tuple[str, ...] = ()  # links whose IPv6 default route ends when this host forwards IPv6
    nft: str | None = None  # fingerprint comment of our table of networks, None: there is none
    foreign_rules: str | None = None  # nft's JSON of other tables that see forwarded packets; None: not looked at
    nft_ports: str | None = None  # the same of our table of ports
    listeners: tuple[Listener, ...] = ()  # looked at only where a port is forwarded
    dnsmasq: tuple[Dnsmasq, ...] = ()
    guests: tuple[RunningGuest, ...] = ()
    lives: tuple[GuestLife, ...] = ()
    foreign_qemu_bytes: int = 0  # RSS of QEMU processes that are not ours
    usage: Mapping[str, Usage] = field(default_factory=lambda: EMPTY)  # by guest, of those with samples
    units: tuple[GuestUnit, ...] | None = None  # None: guests are no units of systemd
    journal: tuple[JournalEntry, ...] = ()  # what kvmd did to the host in this boot, in that order
    tuned: tuple[TunedKnob, ...] = ()  # by path
