"""What shall be done: a closed union of frozen actions, each of which says why and whom it disturbs.

Made by `plan`, carried out by `effects.apply` (host actions) and the guest supervisors (guest actions).
Every action is idempotent: carrying it out twice is the same as once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from kvmd.facts import VlanRange
from kvmd.units import Rate, Size


class Disruption(StrEnum):
    """Whom an action disturbs. `reconcile` does NONE and what kvmd.toml's `apply.allow` adds."""

    NONE = "none"
    GUEST = "guest"
    NETWORK = "network"
    HOST = "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """Common part: `why` is a full clause ("ksm.mode is off"), shown in parentheses behind the change."""

    why: str
    disruption: Disruption = Disruption.NONE

    def line(self) -> str:
        """One plan line without the reason: "~ /sys/kernel/mm/ksm/run: 1 -> 0"."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteKnob(Action):
    """Write one sysfs or procfs file. A requirement is re-asserted; a tuning knob yields to other writers."""

    path: str
    old: str
    new: str
    requirement: bool = True

    def line(self) -> str:
        return f"~ {self.path}: {self.old} -> {self.new}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetHugepages(Action):
    """Set a node's pool of one page size; verified by reading back, rolled back when the kernel gives fewer."""

    node: int
    page_bytes: int
    old: int
    new: int
    compact: bool = True  # memory may be compacted once when the first write falls short

    def line(self) -> str:
        return f"~ hugepages {Size(self.page_bytes)} node {self.node}: {self.old} -> {self.new} pages"


@dataclass(frozen=True, slots=True, kw_only=True)
class MountHugetlbfs(Action):
    """Mount a private hugetlbfs there (the directory is made if missing); one of ours goes first, files stay open."""

    path: str
    page_bytes: int
    limit_bytes: int
    change: str = "mount"
    kind: str = "directory"  # what is there: MemoryPath.kind

    def line(self) -> str:
        what = f"hugetlbfs {self.path}: {Size(self.page_bytes)} pages, at most {Size(self.limit_bytes)}"
        return f"+ {what}" if self.change == "mount" else f"~ {what} ({self.change})"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmountHugetlbfs(Action):
    """Unmount a hugetlbfs of ours; files that are open there stay with who has them."""

    path: str
    remove: bool = False  # the directory too: kvmd made it

    def line(self) -> str:
        return f"- hugetlbfs {self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsureSwapFile(Action):
    """Make the file (no holes, mode 0600, kvmd's label in its signature) where it is missing, and swap to it."""

    path: str
    size_bytes: int

    def line(self) -> str:
        return f"+ swap file {self.path}: {Size(self.size_bytes)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveSwapFile(Action):
    """Bring back what our file holds, stop swapping to it and remove it."""

    path: str

    def line(self) -> str:
        return f"- swap file {self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsureZram(Action):
    """Add a zram device of that size and swap to it before all else."""

    size_bytes: int
    number: int | None = None  # of a device of ours that is set up and not in use; None: a new one

    def line(self) -> str:
        return f"+ swap zram: {Size(self.size_bytes)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveZram(Action):
    """Bring back what our zram device holds, stop swapping to it and remove it."""

    number: int

    def line(self) -> str:
        return f"- swap zram{self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteKernelArgs(Action):
    """Make the boot loader's drop-in say exactly this (empty: none). The kernel sees it after a reboot."""

    path: str
    old: str
    new: str
    words: str  # what it gives the kernel, for people

    def line(self) -> str:
        if not self.new:
            return f"- {self.path}"
        return f"{'~' if self.old else '+'} {self.path}: {self.words}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsureBridge(Action):
    """Make or correct one bridge of ours: up, with exactly these addresses."""

    network: str
    bridge: str
    mtu: int = 1500
    stp: bool = False
    vlan_filtering: bool = False
    host: bool = True  # whether the host itself is a party on it; else it has no IPv6 there either
    addresses: tuple[str, ...] = ()
    change: str = "create"  # what differs, for people

    def line(self) -> str:
        if self.change == "create":
            return f"+ bridge {self.bridge}" + (f" {' '.join(self.addresses)}" if self.addresses else "")
        return f"~ bridge {self.bridge}: {self.change}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetPortVlans(Action):
    """Give a port of a filtering bridge exactly these VLANs."""

    port: str
    bridge: str
    vlans: tuple[VlanRange, ...]
    old: tuple[VlanRange, ...] = ()

    def line(self) -> str:
        return f"~ port {self.port} of {self.bridge}: VLANs {vlans_text(self.old)} -> {vlans_text(self.vlans)}"


def vlans_text(vlans: tuple[VlanRange, ...]) -> str:
    """ "10 untagged", "1 untagged, 20, 30-39", "none"."""
    parts = []
    for each in vlans:
        span = str(each.first) if each.first == each.last else f"{each.first}-{each.last}"
        notes = " untagged" if each.pvid and each.untagged else " pvid" * each.pvid + " egress untagged" * each.untagged
        parts.append(span + notes)
    return ", ".join(parts) or "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachUplink(Action):
    """Make a NIC without a host address a port of a bridge of ours, up.

    With `rollback_s` it is on trial: taken out again unless somebody confirms it within that time.
    """

    network: str
    bridge: str
    interface: str
    was_up: bool = False
    rollback_s: float = 0.0

    def line(self) -> str:
        trial = f", taken out again in {self.rollback_s:g} s unless confirmed" if self.rollback_s else ""
        return f"+ uplink {self.interface} into {self.bridge}{trial}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DetachUplink(Action):
    """Take a NIC that kvmd attached out of the bridge; down again if it was."""

    bridge: str
    interface: str
    was_up: bool = False

    def line(self) -> str:
        return f"- uplink {self.interface} out of {self.bridge}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveBridge(Action):
    """Remove a bridge that carries our alias and no port."""

    bridge: str

    def line(self) -> str:
        return f"- bridge {self.bridge}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceRuleset(Action):
    """Replace one whole nft table of ours in one transaction; an empty text removes it."""

    text: str
    change: str
    table: str = "inet kvmd"

    def line(self) -> str:
        sign = "-" if not self.text else "+" if self.change == "create" else "~"
        return f"{sign} nft table {self.table}" + ("" if self.change in ("create", "remove") else f": {self.change}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapePort(Action):
    """Limit what a TAP of ours lets through to its guest; a rate of None takes the limit away."""

    guest: str
    nic: str
    tap: str
    rate: Rate | None
    old: str = "none"

    def line(self) -> str:
        return f"~ guest {self.guest}: nic.{self.nic}.rate_in {self.old} -> {self.rate or 'none'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartDnsmasq(Action):
    """Start (or restart with another configuration) the DHCP/DNS server of one network."""

    network: str
    config: str
    change: str = "start"

    def line(self) -> str:
        return f"{'+' if self.change == 'start' else '~'} dnsmasq for network {self.network}" + (
            "" if self.change == "start" else f": {self.change}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StopDnsmasq(Action):
    """Stop a network's DHCP/DNS server that we started."""

    network: str

    def line(self) -> str:
        return f"- dnsmasq for network {self.network}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadModule(Action):
    """Have modprobe load one kernel module and what it needs."""

    name: str

    def line(self) -> str:
        return f"+ module {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadModule(Action):
    """Remove a module that kvmd loaded and nobody uses."""

    name: str

    def line(self) -> str:
        return f"- module {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetVfs(Action):
    """Give a PCI device this many virtual functions; from one number to another the kernel wants 0 between."""

    device: str  # "0000:3b:00.0"
    pool: str  # as the file names it
    old: int
    new: int
    autoprobe: bool = False  # whether the host's drivers take the new ones

    def line(self) -> str:
        return f"~ {self.pool}: {self.old} -> {self.new} virtual functions"


@dataclass(frozen=True, slots=True)
class VfPort:
    """What the physical function does with one virtual function's frames (rtnetlink, IFLA_VFINFO_LIST)."""

    link: str  # interface of the physical function
    index: int
    mac: str
    vlan: int = 0  # 0: none
    spoofchk: bool | None = True  # frames with another source address are dropped; None: the driver cannot say


@dataclass(frozen=True, slots=True, kw_only=True)
class BindDevice(Action):
    """Take a PCI function from its driver for one guest: vfio-pci drives it, the guest's uid owns its group."""

    device: str
    guest: str
    key: str  # "hostdev.gpu", "nic.fast"
    group: int
    uid: int
    driver: str | None = None  # as it was seen
    port: VfPort | None = None  # of a virtual function that is a NIC

    def line(self) -> str:
        return f"~ pci {self.device}: {self.driver or 'no driver'} -> vfio-pci for guest {self.guest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseDevice(Action):
    """Give a PCI function back to the driver it was taken from."""

    device: str
    guest: str

    def line(self) -> str:
        return f"~ pci {self.device}: back from guest {self.guest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartGuest(Action):
    """Bring a guest to `running`."""

    guest: str

    def line(self) -> str:
        return f"+ guest {self.guest}: start"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopGuest(Action):
    """Ask a guest to power off."""

    guest: str

    def line(self) -> str:
        return f"- guest {self.guest}: stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class PinGuest(Action):
    """Put each vCPU thread, and all other threads, on the CPUs the placement gives."""

    guest: str
    vcpus: tuple[str, ...]  # CPU list per vCPU
    emulator: str  # CPU list for every other thread
    old: tuple[str, ...] = ()  # of the vCPUs
    strays: tuple[str, ...] = ()  # other threads that may run elsewhere: "vhost-4711 on 0-7"

    def line(self) -> str:
        if self.old != self.vcpus:
            return f"~ guest {self.guest}: vCPUs on {' '.join(self.old) or 'any'} -> {' '.join(self.vcpus)}"
        shown = ", ".join(self.strays[:3]) + (f" and {len(self.strays) - 3} more" if len(self.strays) > 3 else "")
        return f"~ guest {self.guest}: {shown} -> {self.emulator}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetLink(Action):
    """Plug the cable of a running guest's card in, or pull it."""

    guest: str
    nic: str
    up: bool

    def line(self) -> str:
        change = "pulled -> plugged in" if self.up else "plugged in -> pulled"
        return f"~ guest {self.guest}: nic.{self.nic}.link {change}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartGuest(Action):
    """The running guest differs from its file in something only a new QEMU can have."""

    guest: str
    change: str

    def line(self) -> str:
        return f"~ guest {self.guest}: restart for {self.change}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteDropIn(Action):
    """Make a guest's systemd drop-in say exactly this; an empty text removes it."""

    guest: str
    text: str

    def line(self) -> str:
        return f"{'~' if self.text else '-'} guest {self.guest}: drop-in of its unit"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnableGuest(Action):
    """Make or remove the link by which systemd starts a guest at boot."""

    guest: str
    on: bool

    def line(self) -> str:
        return f"{'+' if self.on else '-'} guest {self.guest}: start with the host"


SwapAction = EnsureSwapFile | RemoveSwapFile | EnsureZram | RemoveZram
MemoryAction = WriteKnob | SetHugepages | MountHugetlbfs | UnmountHugetlbfs | SwapAction
LinkAction = EnsureBridge | SetPortVlans | ShapePort | AttachUplink | DetachUplink | RemoveBridge
NetworkAction = LinkAction | ReplaceRuleset | StartDnsmasq | StopDnsmasq
DeviceAction = LoadModule | UnloadModule | SetVfs | BindDevice | ReleaseDevice
HostAction = MemoryAction | NetworkAction | DeviceAction | WriteKernelArgs
GuestAction = StartGuest | StopGuest | PinGuest | SetLink | RestartGuest | WriteDropIn | EnableGuest
AnyAction = HostAction | GuestAction


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one action; `error` is None when it was done and verified."""

    action: AnyAction
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Something asked for that cannot be had as asked, found while planning; no action can mend it.

    `guests` are those that must not be started because of it; empty: a warning about the host only.
    """

    subject: str  # "guest web", "network lan", "hugepages 2MiB node 0"
    message: str
    hint: str | None = None
    guests: frozenset[str] = frozenset()
    needs: Literal["reboot"] | None = None  # what would mend it: shown in the plan's group of that name
