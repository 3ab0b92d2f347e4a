"""argv of disks and CDs: a chain of block nodes over an fdset, and the device on top.

QEMU never sees a path. The file node has `locking=off` because kvmd holds the OFD lock on the fd; a qcow2's backing
file is always given as none, so that no header can make QEMU open another file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    bus = defaults.disk_bus(disk, identity.machine)
    driver = "virtio-blk-pci" if bus == "virtio" else "ide-cd"
    device: dict[str, object] = {"driver": driver, "id": f"disk-{key}"}
    if bus == "virtio":
        device |= {"bus": defaults.root_bus(identity.machine), "addr": identity.slots[f"disk-{key}"]}
    else:
        device |= _port(name, key, bus, identity.units[f"{bus}-{key}"])
    device["drive"] = node_name(key)
    if disk.serial is not None:
        device["serial"] = disk.serial
    if bootindex is not None:
        device["bootindex"] = bootindex
    if bus == "virtio":
        werror, rerror = _ON_ERROR[disk.on_error]
        device |= {"write-cache": "off" if cache in _WRITE_THROUGH else "on", "werror": werror, "rerror": rerror}
    return device


def _port(name: str, key: str, bus: defaults.Bus, number: int) -> dict[str, object]:
    """A port of the board's own controller: AHCI has one unit a bus, IDE two."""
    if number >= defaults.PORTS[bus]:
        raise Refused(
            f"guest {name}: disk.{key} would be drive {number} of a board with {defaults.PORTS[bus]} {bus} ports",
            hint="take a CD drive out, or take stale entries out of the identity file's [unit]",
        )
    return {"bus": f"ide.{number}"} if bus == "sata" else {"bus": f"ide.{number // 2}", "unit": number % 2}
