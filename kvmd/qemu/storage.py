"""argv of disks and CDs: a chain of block nodes over an fdset, and the device on top.

QEMU never sees a path. The file node has `locking=off` because kvmd holds the OFD lock on the fd; a qcow2's backing
file is always given as none, so that no header can make QEMU open another file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmd.config import places
from kvmd.config.devices import Disk
from kvmd.config.guest import Guest
from kvmd.errors import NotSupported, Refused
from kvmd.qemu import defaults
from kvmd.qemu.caps import Capabilities
from kvmd.qemu.defaults import CacheMode
from kvmd.qemu.fds import FdTable, OpenImage
from kvmd.qemu.identity import Identity
from kvmd.qemu.text import device_args, to_json


@dataclass(frozen=True, slots=True)
class ImageFact:
    """What was seen of an image before the start. `direct`: O_DIRECT works on its file system."""

    block: bool = False
    direct: bool = True


@dataclass(slots=True)
class Drives:
    """What `drives` found out besides the arguments. `shown`: device id -> node; `warnings` are for people."""

    args: list[str] = field(default_factory=list)
    shown: dict[str, str | None] = field(default_factory=dict)
    readonly: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)


# QEMU's own table of cache modes (qemu(1), "-drive cache="): cache.no-flush and write-cache; O_DIRECT is is_direct().
_NO_FLUSH = frozenset({"unsafe"})
_WRITE_THROUGH = frozenset({"writethrough", "directsync"})

# on_error -> what a failed write and a failed read do (BlockdevOnError; a read is never out of space)
_ON_ERROR = {
    "report": ("report", "report"),
    "ignore": ("ignore", "ignore"),
    "stop": ("stop", "stop"),
    "stop_enospc": ("enospc", "report"),
}


_DRIVERS: Mapping[places.Bus, str] = {
    "virtio": "virtio-blk-pci",
    "scsi": "scsi-hd",
    "ide": "ide-hd",
    "sata": "ide-hd",
    "nvme": "nvme",
    "usb": "usb-storage",
    "floppy": "floppy",
    "sd": "sd-card",
}
_CONTROLLERS = {"scsi": "virtio-scsi-pci", "sata": "ich9-ahci", "usb": "qemu-xhci", "sdhci": "sdhci-pci"}
_WITH_ERRORS = frozenset({"virtio", "scsi", "ide", "sata", "usb"})  # devices that take werror and rerror


def node_name(disk: str) -> str:
    """The block node of [disk.NAME]: its NAME, or with a prefix where QEMU would not take it (a leading digit)."""
    return disk if disk[0].isalpha() else f"disk.{disk}"


def drives(
    name: str,
    guest: Guest,
    identity: Identity,
    caps: Capabilities,
    fds: FdTable,
    images: Mapping[str, ImageFact],
    boot: Mapping[str, int],
) -> Drives:
    """Arguments of all disks and CDs of a guest, in the order of the file. Raises Refused and NotSupported."""
    found = Drives()
    found.args += _threads(name, guest, caps)
    found.args += _controllers(name, guest, identity, caps)
    found.args += _floppy_boot(guest, identity, boot)
    for key, disk in guest.disk.items():
        fact = images.get(key, ImageFact())
        device = f"disk-{key}"
        cache = _checked_cache(name, key, disk, fact, found.warnings)
        found.args += _nodes(name, key, disk, fact, cache, caps, fds)
        found.args += device_args(
            caps, f"guest {name}: disk.{key}", _device(name, key, disk, cache, identity, boot.get(device))
        )
        found.shown[device] = node_name(key)
        if not disk.writable:
            found.readonly.add(device)
    return found


def _checked_cache(name: str, key: str, disk: Disk, fact: ImageFact, warnings: list[str]) -> CacheMode:
    cache = defaults.cache_mode(disk, direct_works=fact.direct)
    if defaults.is_direct(cache) and not fact.direct:
        raise Refused(
            f'guest {name}: disk.{key}.cache = "{cache}": the file system of {disk.file} has no direct I/O',
            hint="leave the key out, or move the image",
        )
    if disk.aio == "native" and not defaults.is_direct(cache):
        raise Refused(
            f'guest {name}: disk.{key}.aio = "native" needs direct I/O, and the cache mode is {cache}',
            hint='set cache = "none", or aio = "threads"',
        )
    if cache == "unsafe":
        warnings.append(f"disk.{key} ignores flushes (cache = unsafe): a host crash destroys it")
    if disk.format == "qcow2" and cache in _WRITE_THROUGH:
        warnings.append(f"disk.{key}: qcow2 with {cache} is slow, each write waits for its metadata")
    return cache


def _nodes(
    name: str, key: str, disk: Disk, fact: ImageFact, cache: CacheMode, caps: Capabilities, fds: FdTable
) -> list[str]:
    """The format node over its file node."""
    driver = "host_device" if fact.block else "file"
    for need in (driver, disk.format):
        if need not in caps.block_drivers:
            raise NotSupported(f"guest {name}: disk.{key}: this QEMU {caps.version_text} has no block driver {need}")
    aio = defaults.aio_mode(disk, cache)
    if aio not in caps.aio:
        raise NotSupported(
            f"guest {name}: disk.{key}.aio = {aio}: this QEMU {caps.version_text} has {', '.join(sorted(caps.aio))}"
        )
    direct = defaults.is_direct(cache)
    fd = fds.add(OpenImage(fds.next_fd, key, disk.file, disk.writable, disk.format, direct))
    caching = {"direct": direct, "no-flush": cache in _NO_FLUSH}
    node = node_name(key)
    file: dict[str, object] = {
        "driver": driver,
        "node-name": f"{node}.file",
        "filename": fds.fdset(fd, f"disk-{key}"),
        "read-only": not disk.writable,
        "locking": "off",
        "aio": aio,
        "cache": caching,
        "discard": disk.discard,
    }
    top: dict[str, object] = {
        "driver": disk.format,
        "node-name": node,
        "read-only": not disk.writable,
        "cache": caching,
        "discard": disk.discard,
        "detect-zeroes": disk.detect_zeroes,
        "file": f"{node}.file",
    }
    if disk.format == "qcow2":
        top["backing"] = None
    return ["-blockdev", to_json(file), "-blockdev", to_json(top)]


def _device(
    name: str,
    key: str,
    disk: Disk,
    cache: CacheMode,
    identity: Identity,
    bootindex: int | None,
) -> dict[str, object]:
    bus = places.disk_bus(disk, identity.machine)
    device: dict[str, object] = {"driver": _driver(disk, bus), "id": f"disk-{key}"}
    if bus in defaults.PCI_DISKS:
        device |= {"bus": defaults.root_bus(identity.machine), "addr": identity.slots[f"disk-{key}"]}
    else:
        device |= _port(name, key, bus, identity)
    device["drive"] = node_name(key)
    if disk.serial is not None:
        device["serial"] = disk.serial
    elif bus == "nvme":
        device["serial"] = _nvme_serial(identity, key)
    if bootindex is not None and bus != "floppy":
        device["bootindex"] = bootindex
    if disk.media == "disk" and bus in _WITH_ERRORS:
        werror, rerror = _ON_ERROR[disk.on_error]
        device |= {"write-cache": "off" if cache in _WRITE_THROUGH else "on", "werror": werror, "rerror": rerror}
    elif bus == "nvme":
        device["write-cache"] = "off" if cache in _WRITE_THROUGH else "on"
    for word, value in (
        ("share-rw", disk.shared or None),
        ("logical_block_size", disk.logical_block_size),
        ("physical_block_size", disk.logical_block_size),
        ("num-queues", disk.queues),
        ("iothread", thread_id(disk.iothread) if disk.iothread and bus == "virtio" else None),
    ):
        if value is not None:
            device[word] = value
    return device


def _driver(disk: Disk, bus: places.Bus) -> str:
    if disk.media == "cdrom":
        return "scsi-cd" if bus == "scsi" else "ide-cd"
    return _DRIVERS[bus]


def thread_id(thread: str) -> str:
    """The object id of a named I/O thread."""
    return f"iothread-{thread}"


def _nvme_serial(identity: Identity, key: str) -> str:
    """An NVMe drive must have one: made from who the guest is, the same at each start, 20 bytes as the standard has."""
    return hashlib.sha256(f"{identity.uuid}/{key}".encode()).hexdigest()[:20]


def _port(name: str, key: str, bus: places.Bus, identity: Identity) -> dict[str, object]:
    """The place on a controller. A port too far is refused: the identity file keeps places of drives that are gone."""
    place = places.Place.of(bus, identity.units[f"{bus}-{key}"])
    if place.bus >= places.BUSES[bus]:
        most = places.BUSES[bus] * places.UNITS[bus]
        raise Refused(
            f"guest {name}: disk.{key} would be drive {place.number(bus)} of {most} on {bus}",
            hint="take a drive out, or take stale entries out of the identity file's [unit]",
        )
    match bus:
        case "ide":
            return {"bus": f"ide.{place.bus}", "unit": place.unit}
        case "sata":
            return {"bus": f"{'ide' if places.is_q35(identity.machine) else 'sata'}.{place.bus}"}
        case "scsi":
            return {"bus": f"scsi{place.bus}.0", "scsi-id": place.unit, "lun": 0}
        case "usb":
            return {"bus": "usb.0", "port": str(place.bus + 1)}
        case "floppy":
            return {"unit": place.unit}
        case _:
            return {}


def _controllers(name: str, guest: Guest, identity: Identity, caps: Capabilities) -> list[str]:
    """What drives hang on beyond the board's own controllers."""
    found: list[str] = []
    for device in places.controllers(guest, identity.machine):
        kind, key = device.rstrip("0123456789"), f"guest {name}: the {device} controller of its disks"
        properties: dict[str, object] = {"bus": defaults.root_bus(identity.machine), "addr": identity.slots[device]}
        if kind == "usb":
            properties |= {"p2": places.BUSES["usb"], "p3": places.BUSES["usb"]}
        thread = _scsi_thread(guest, identity, int(device[4:])) if kind == "scsi" else None
        if thread:
            properties["iothread"] = thread_id(thread)
        found += device_args(caps, key, {"driver": _CONTROLLERS[kind], "id": device, **properties})
    has_floppy = any(disk.interface == "floppy" for disk in guest.disk.values())
    if has_floppy and places.is_q35(identity.machine):  # the pc board has one of its own
        found += device_args(caps, f"guest {name}: floppy drives", {"driver": "isa-fdc", "id": "fdc"})
    return found


def _scsi_thread(guest: Guest, identity: Identity, bus: int) -> str | None:
    """The I/O thread of a SCSI controller: that of its disks, which name one and the same (config/rules.py)."""
    for key, disk in guest.disk.items():
        number = identity.units.get(f"scsi-{key}")
        if disk.interface == "scsi" and disk.iothread and number is not None and number // 256 == bus:
            return disk.iothread
    return None


def _threads(name: str, guest: Guest, caps: Capabilities) -> list[str]:
    threads = sorted({disk.iothread for disk in guest.disk.values() if disk.iothread})
    if threads and "iothread" not in caps.object_types:
        raise NotSupported(f"guest {name}: disk.iothread: this QEMU {caps.version_text} has no I/O threads")
    return [
        word for thread in threads for word in ("-object", to_json({"qom-type": "iothread", "id": thread_id(thread)}))
    ]


def _floppy_boot(guest: Guest, identity: Identity, boot: Mapping[str, int]) -> list[str]:
    """Floppy drives have no boot index of their own: their controller has one for each."""
    found: list[str] = []
    for key, disk in guest.disk.items():
        index = boot.get(f"disk-{key}")
        if disk.interface == "floppy" and index is not None:
            found += ["-global", f"isa-fdc.bootindex{'AB'[identity.units[f'floppy-{key}']]}={index}"]
    return found
