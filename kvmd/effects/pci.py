"""PCI functions as /sys tells them, and what of the host's hangs on each. Reads below a root path; judges nothing.

Sources: Documentation/ABI/testing/sysfs-bus-pci, Documentation/PCI/pci-iov-howto.rst. A block device or interface
belongs to the last PCI function in its path under /sys/devices; one made of others (dm, md) to all of theirs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from kvmd.effects.tree import Tree
from kvmd.facts import HostUse, Iommu, Link, PciDevice

DEVICES = "/sys/bus/pci/devices"
_BLOCK, _NET = "/sys/class/block", "/sys/class/net"
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
_SUBSYSTEM = re.compile(r"/(nvme-subsys\d+)(?:/|$)")
_PARTS_DEEP = 8  # dm over md over dm; a circle cannot be built

_Uses = Mapping[str, tuple[HostUse, ...]]


def observe(tree: Tree, links: Iterable[Link] = ()) -> tuple[PciDevice, ...]:
    """All PCI functions in the order of their addresses. `links`: the interfaces with their addresses."""
    disks, disk_uses = _disks(tree)
    nets, net_uses = _nets(tree, {link.name: link for link in links})
    return tuple(
        _device(tree, address, disks.get(address, ()), nets.get(address, ()), (disk_uses, net_uses))
        for address in tree.names(DEVICES)
        if _ADDRESS.fullmatch(address)
    )


def observe_iommu(tree: Tree) -> Iommu:
    """Whether an IOMMU is at work, and what switches one on here."""
    vendor: Literal["intel", "amd", ""] = ""
    for line in (tree.read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("vendor_id"):
            vendor = "intel" if "Intel" in line else "amd" if "AMD" in line else ""
            break
    asked = {"intel_iommu=on", "amd_iommu=on", "iommu=pt"} & set((tree.read("/proc/cmdline") or "").split())
    return Iommu(len(tree.names("/sys/kernel/iommu_groups")), vendor, bool(asked))


def _device(
    tree: Tree, address: str, disks: tuple[str, ...], links: tuple[str, ...], uses: tuple[_Uses, _Uses]
) -> PciDevice:
    here = f"{DEVICES}/{address}"
    group, node, override = _tail(tree, f"{here}/iommu_group"), tree.number(f"{here}/numa_node"), None
    override = tree.read(f"{here}/driver_override")
    parent = _tail(tree, f"{here}/physfn")
    return PciDevice(
        address=address,
        class_code=int(tree.read(f"{here}/class") or "0", 16),
        driver=_tail(tree, f"{here}/driver"),
        override=None if override in (None, "", "(null)") else override,
        group=int(group) if group and group.isdigit() else None,
        node=node if node is not None and node >= 0 else None,
        parent=parent,
        index=_vf_index(tree, parent, address) if parent else None,
        total_vfs=tree.number(f"{here}/sriov_totalvfs") or 0,
        vfs=tree.number(f"{here}/sriov_numvfs") or 0,
        disks=disks,
        links=links,
        uses=(*uses[0].get(address, ()), *uses[1].get(address, ())),
    )


def _tail(tree: Tree, path: str) -> str | None:
    """The last part of where a link points: a driver's name, a group's number, another function's address."""
    target = tree.link(path)
    return target.rpartition("/")[2] if target else None


def _vf_index(tree: Tree, parent: str, address: str) -> int | None:
    numbers = tree.numbered(f"{DEVICES}/{parent}", "virtfn")
    return next((n for n in numbers if _tail(tree, f"{DEVICES}/{parent}/virtfn{n}") == address), None)


# ---- what hangs on them ---------------------------------------------------------------------------------------------


def _disks(tree: Tree) -> tuple[Mapping[str, tuple[str, ...]], _Uses]:
    """Block devices by function, and how the host uses them."""
    names = tree.names(_BLOCK)
    owners = {name: _block_owners(tree, name) for name in names}
    disks: defaultdict[str, list[str]] = defaultdict(list)
    uses: defaultdict[str, list[HostUse]] = defaultdict(list)
    used = dict(_block_uses(tree, names))
    for name in names:
        made_of_others = bool(tree.names(f"{_BLOCK}/{name}/slaves"))
        whole = not tree.exists(f"{_BLOCK}/{name}/partition")
        for address in owners[name]:
            if whole and not made_of_others:
                disks[address].append(name)
            uses[address] += [HostUse(_shown(tree, name), what) for what in used.get(name, ())]
    return {address: tuple(found) for address, found in disks.items()}, _frozen(uses)


def block_devices(tree: Tree, address: str) -> tuple[str, ...]:
    """Disks and partitions that stand on a function themselves (not what is made of them)."""
    return tuple(
        name
        for name in tree.names(_BLOCK)
        if not tree.names(f"{_BLOCK}/{name}/slaves") and address in _block_owners(tree, name)
    )


def _block_owners(tree: Tree, name: str, depth: int = 0) -> frozenset[str]:
    """Functions a block device stands on."""
    parts = tree.names(f"{_BLOCK}/{name}/slaves")
    if parts and depth < _PARTS_DEEP:
        return frozenset().union(*(_block_owners(tree, part, depth + 1) for part in parts))
    target = tree.link(f"{_BLOCK}/{name}") or ""
    subsystem = _SUBSYSTEM.search(target)
    if subsystem:  # a namespace that several NVMe controllers share (drivers/nvme/host/multipath.c)
        here = f"/sys/class/nvme-subsystem/{subsystem[1]}"
        paths = [tree.link(f"{here}/{entry}") or "" for entry in tree.names(here)]
        return frozenset(address for path in paths if (address := _last_address(path)))
    address = _last_address(target)
    return frozenset({address} if address else ())


def _last_address(path: str) -> str | None:
    return next((part for part in reversed(path.split("/")) if _ADDRESS.fullmatch(part)), None)


def _block_uses(tree: Tree, names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """(block device, how it is used): mounts, swap, what is built on it."""
    numbers = {tree.read(f"{_BLOCK}/{name}/dev"): name for name in names}
    found: defaultdict[str, list[str]] = defaultdict(list)
    for line in (tree.read("/proc/self/mountinfo") or "").splitlines():
        fields, _, rest = line.partition(" - ")
        words, source = fields.split(), rest.split()[1:2]
        if len(words) < 5:
            continue
        # btrfs and others have a device number of their own; their source is the device's path
        name = numbers.get(words[2]) or _by_path(tree, source[0] if source else "")
        if name and (use := f"mounted at {words[4]}") not in found[name]:
            found[name].append(use)
    for line in (tree.read("/proc/swaps") or "").splitlines()[1:]:
        name = _by_path(tree, line.split()[0])
        if name:
            found[name].append("used as swap")
    for name in names:
        found[name] += [f"part of {_shown(tree, holder)}" for holder in tree.names(f"{_BLOCK}/{name}/holders")]
        if "PARTNAME=zfs-" in (tree.read(f"{_BLOCK}/{name}/uevent") or ""):  # ZFS shows no holder
            found[name].append("part of a ZFS pool")
    yield from ((name, uses) for name, uses in found.items() if uses)


def _by_path(tree: Tree, path: str) -> str | None:
    """The block device of /dev/NAME, or of /dev/mapper/NAME."""
    if not path.startswith("/dev/"):
        return None
    name = path.removeprefix("/dev/")
    if name.startswith("mapper/"):
        target = tree.link(path)
        name = target.rpartition("/")[2] if target else name
    return name if tree.exists(f"{_BLOCK}/{name}") else None


def _shown(tree: Tree, name: str) -> str:
    """A device mapper's device by the name people gave it."""
    return tree.read(f"{_BLOCK}/{name}/dm/name") or name


def _nets(tree: Tree, links: Mapping[str, Link]) -> tuple[Mapping[str, tuple[str, ...]], _Uses]:
    """Interfaces by function, and how the host uses them."""
    default = {
        row[0]
        for row in map(str.split, (tree.read("/proc/net/route") or "").splitlines()[1:])
        if len(row) > 7 and row[1] == row[7] == "00000000"
    }
    found: defaultdict[str, list[str]] = defaultdict(list)
    uses: defaultdict[str, list[HostUse]] = defaultdict(list)
    for name in tree.names(_NET):
        address = _last_address(tree.link(f"{_NET}/{name}") or "")
        if address is None:
            continue
        found[address].append(name)
        link, here = links.get(name), tree.names(f"{_NET}/{name}")
        uses[address] += [HostUse(name, f"has {text}") for text in (link.addresses if link else ())]
        uses[address] += [HostUse(name, "carries the default route")] * (name in default)
        uses[address] += [HostUse(name, f"is below {e[6:]}") for e in here if e.startswith("upper_")]
    return {address: tuple(names) for address, names in found.items()}, _frozen(uses)


def _frozen(uses: Mapping[str, list[HostUse]]) -> _Uses:
    return {address: tuple(found) for address, found in uses.items()}
