"""Devices of the host for guests: which, whether they can be had, and what else would go with them. Pure.

An IOMMU isolates groups, not devices: all of a group goes to one guest (Documentation/driver-api/vfio.rst). What is
left in a group must be a PCI bridge, or have no driver of the host's, else the host loses it: that is told by name,
with the disk or the address that hangs on it, before anything is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from kvmd.actions import Problem, ReleaseDevice, VfPort
from kvmd.config.desired import Desired
from kvmd.config.guest import Guest
from kvmd.config.host import Host
from kvmd.facts import EMPTY, Facts, Iommu, PciDevice
from kvmd.plan.guests import start_order
from kvmd.plan.sriov import VFIO, find_pool, virtual_functions

MODULE = "vfio_pci"
GIB = 1 << 30
# Beside the guest's memory QEMU maps, and so locks, that of its own devices (video, ROMs); libvirt allows as much.
MEMLOCK_MARGIN = GIB
_PCI_BRIDGE = 0x0604
# Drivers that do no DMA of their own (driver_managed_dma): the kernel gives a group away with them in it.
_HARMLESS = frozenset({VFIO, "pci-stub", "pcieport"})
_CLASSES: Mapping[int, str] = {
    0x01: "storage controller",
    0x02: "network card",
    0x03: "graphics card",
    0x04: "sound device",
    0x06: "bridge",
    0x0C: "controller of a serial bus",
}


@dataclass(frozen=True, slots=True)
class Grant:
    """One device for one guest."""

    key: str  # "hostdev.gpu", "nic.fast"
    device: PciDevice
    group: int
    port: VfPort | None = None

    @property
    def id(self) -> str:
        """QEMU's id of it."""
        return self.key.replace(".", "-", 1)


@dataclass(frozen=True, slots=True)
class Settled:
    """What a guest gets, or why it does not."""

    grants: tuple[Grant, ...] = ()
    problems: tuple[Problem, ...] = ()


@dataclass(slots=True)
class _Case:
    """One guest's devices while they are chosen."""

    name: str
    guest: Guest
    host: Host
    facts: Facts
    taken: Mapping[str, str]  # PCI function -> the other guest that has it
    coming: frozenset[str]  # pools whose virtual functions this pass makes
    chosen: dict[str, PciDevice] = field(default_factory=dict)  # by key
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, key: str, message: str, hint: str | None = None) -> None:
        self.problems.append(Problem(f"guest {self.name}", f"{key}: {message}", hint, frozenset({self.name})))


def memlock_bytes(guest: Guest) -> int | None:
    """RLIMIT_MEMLOCK its QEMU needs: all memory is pinned, for a device may write to any; None without a device."""
    return int(guest.memory.size) + MEMLOCK_MARGIN if guest.passthrough else None


def is_concerned(desired: Desired, kinds: Iterable[str]) -> bool:
    """Whether the files, or what kvmd did in this boot, speak of PCI devices at all."""
    host = desired.host
    declared = bool(host.sriov) or any(guest.passthrough for guest in desired.guests.values())
    return declared or bool({"vfio", "sriov"} & set(kinds))


def plan_passthrough(
    desired: Desired, facts: Facts, coming: frozenset[str]
) -> tuple[tuple[ReleaseDevice, ...], tuple[Problem, ...]]:
    """What guests that are off still hold is given back; why guests cannot have what their files name.

    `coming`: pools that have as many virtual functions as wanted only after this pass.
    """
    alive = {life.name for life in facts.lives if life.alive}
    wanted = {life.name for life in facts.lives if life.wanted and not life.held}
    taken = {address: owner for address, owner in facts.reservations.items() if owner in alive}
    problems: list[Problem] = []
    for name in start_order(desired.guests):
        guest = desired.guests[name]
        if name in alive or not guest.passthrough:
            continue
        found = settle(name, guest, desired.host, facts, taken=taken, coming=coming)
        problems += found.problems
        if name in wanted:
            taken |= {grant.device.address: name for grant in found.grants}
    return releases(facts.reservations, alive.__contains__), tuple(problems)


def releases(reservations: Mapping[str, str], alive: Callable[[str], bool]) -> tuple[ReleaseDevice, ...]:
    """Functions that were bound for guests which are off."""
    return tuple(
        ReleaseDevice(device=address, guest=owner, why=f"guest {owner}, which had it, is off")
        for address, owner in sorted(reservations.items())
        if not alive(owner)
    )


def settle(
    name: str,
    guest: Guest,
    host: Host,
    facts: Facts,
    *,
    macs: Mapping[tuple[str, str], str] = EMPTY,
    taken: Mapping[str, str] = EMPTY,
    coming: frozenset[str] = frozenset(),
) -> Settled:
    """The devices of one guest that is off. `taken` by PCI function: guests that have or will have it."""
    others = {address: owner for address, owner in taken.items() if owner != name}
    case = _Case(name, guest, host, facts, others, coming)
    for key, hostdev in guest.hostdev.items():
        if hostdev.pci:
            _choose(case, f"hostdev.{key}", hostdev.pci)
    for key, nic in guest.nic.items():
        if nic.type == "vf" and nic.pci:
            _choose(case, f"nic.{key}", nic.pci)
    for key, nic in guest.nic.items():
        if nic.type == "vf" and nic.pool:
            _pick(case, f"nic.{key}", nic.pool)
    for key, device in case.chosen.items():
        _preflight(case, key, device)
    if case.problems:
        return Settled(problems=tuple(case.problems))
    return Settled(tuple(_grant(case, key, macs) for key in guest.passthrough if key in case.chosen))


def _grant(case: _Case, key: str, macs: Mapping[tuple[str, str], str]) -> Grant:
    device = case.chosen[key]
    kind, _, nic = key.partition(".")
    if kind != "nic":
        return Grant(key, device, device.group or 0)
    link = _parent(device, case.facts).links[0]
    mac, vlan = macs.get((case.name, nic), ""), case.guest.nic[nic].vlan or 0
    return Grant(key, device, device.group or 0, VfPort(link, device.index or 0, mac, vlan))


def _choose(case: _Case, key: str, address: str) -> None:
    """A device by its address."""
    device = next((each for each in case.facts.pci or () if each.address == address), None)
    allowed = any(address in span for span in case.host.passthrough.allow)
    if device is None:
        case.refuse(key, f"this host has no PCI function {address}", "lspci -D lists them")
    elif not allowed:
        hint = f'allow = ["{address}"] under [passthrough] in host.toml, if the host can do without it'
        case.refuse(key, f"{address}, {_described(device)}, is not in passthrough.allow", hint)
    elif key.startswith("nic.") and device.parent is None:
        case.refuse(key, f"{address} is no virtual function", f'give the whole card: [hostdev.NAME], pci = "{address}"')
    else:
        case.chosen[key] = device


def _pick(case: _Case, key: str, pool: str) -> None:
    """A free virtual function: the one it had if kvmd was interrupted, else the lowest number.

    All of a pool are on their card's NUMA node, so there is nothing to choose between nodes.
    """
    card = find_pool(pool, case.facts)
    if card is None or pool not in case.host.sriov:
        hint = f"[sriov.{pool}] with vfs = NUMBER in host.toml" if card else "ip link, or lspci -D, shows what there is"
        case.refuse(key, f'no pool of virtual functions is called "{pool}"', hint)
        return
    if pool in case.coming:
        return  # made in this pass, before any guest starts
    theirs = virtual_functions(card, case.facts)
    mine = {device.address for device in case.chosen.values()}
    free = [each for each in theirs if each.address not in case.taken.keys() | mine and not each.uses]
    if not free:
        holders = [f"{each.address} has {case.taken.get(each.address) or 'the host'}" for each in theirs]
        shown = f" ({', '.join(holders)})" if holders else ""
        declared = case.host.sriov[pool].vfs
        hint = f"raise sriov.{pool}.vfs in host.toml, or stop one of these guests"
        if len(theirs) < declared:
            hint = f"kvmd-cli apply makes the {declared} that sriov.{pool}.vfs asks for"
        case.refuse(key, f"no virtual function of {pool} is free: there are {len(theirs)}{shown}", hint)
        return
    reserved = case.facts.reservations
    case.chosen[key] = min(free, key=lambda each: (reserved.get(each.address) != case.name, each.driver == VFIO))


def _preflight(case: _Case, key: str, device: PciDevice) -> None:
    address = device.address
    if address in case.taken:
        case.refuse(key, f"{address} is given to guest {case.taken[address]}", f"kvmd-cli stop {case.taken[address]}")
    elif device.class_code >> 8 == _PCI_BRIDGE:
        case.refuse(key, f"{address} is a PCI bridge", "give what is behind it: lspci -t")
    elif device.vfs:
        hint = 'give one of these (type = "vf"), or declare vfs = 0'
        case.refuse(key, f"{address} has {device.vfs} virtual functions", hint)
    elif device.uses:
        uses = ", ".join(f"{use.device} {use.what}" for use in device.uses)
        case.refuse(
            key, f"{address} is {_described(device)}: {uses}", "the host would lose it; take it out of use first"
        )
    elif device.group is None:
        case.refuse(
            key,
            f"no IOMMU stands before {address}: it could write to all of the host's memory",
            iommu_hint(case.facts.iommu),
        )
    elif key.startswith("nic.") and not _parent(device, case.facts).links:
        card = device.parent
        case.refuse(
            key, f"{card} has no interface, through which {address} would get its MAC address", "load its driver"
        )
    else:
        _preflight_group(case, key, device)


def _preflight_group(case: _Case, key: str, device: PciDevice) -> None:
    """The blast radius: what else is in its IOMMU group."""
    mine = {each.address for each in case.chosen.values()}
    lost = []
    for mate in case.facts.pci or ():
        if mate.group != device.group or mate.address in mine or mate.class_code >> 8 == _PCI_BRIDGE:
            continue
        if mate.address in case.taken:
            lost.append(f"{mate.address}, which guest {case.taken[mate.address]} has")
        elif mate.driver is not None and mate.driver not in _HARMLESS:
            uses = "".join(f", {use.device} {use.what}" for use in mate.uses)
            lost.append(f"{mate.address}, {_described(mate)}{uses}")
    if lost:
        case.refuse(
            key,
            f"IOMMU group {device.group} of {device.address} also holds {'; '.join(lost)}: "
            "a group goes to one guest as a whole",
            "give the guest these as well, or put the device into another slot (groups are the board's)",
        )


def iommu_hint(iommu: Iommu) -> str:
    """What switches an IOMMU on."""
    if iommu.groups:
        return "this device is outside of every IOMMU group; another slot may be inside"
    if iommu.vendor == "amd":
        return "switch the IOMMU (AMD-Vi) on in the firmware; the kernel uses it without being asked"
    if iommu.vendor == "intel" and not iommu.asked:
        return "add intel_iommu=on to the kernel command line and reboot; VT-d must be on in the firmware too"
    return "switch VT-d (the IOMMU) on in the firmware" if iommu.vendor else "this machine shows no IOMMU to the kernel"


def _parent(device: PciDevice, facts: Facts) -> PciDevice:
    return next((each for each in facts.pci or () if each.address == device.parent), PciDevice(device.parent or ""))


def _described(device: PciDevice) -> str:
    """ "the storage controller of sda", "the network card enp3s0", "a graphics card (nouveau)"."""
    word = _CLASSES.get(device.class_code >> 16, f"device of class {device.class_code >> 8:04x}")
    if device.disks:
        return f"the {word} of {', '.join(device.disks)}"
    if device.links:
        return f"the {word} {', '.join(device.links)}"
    return f"a {word}" + (f" ({device.driver})" if device.driver else "")
