"""Where each value comes from that the file does not give: for `kvmd-cli explain NAME`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from kvmd.config import places
from kvmd.config.guest import Guest
from kvmd.facts import EMPTY
from kvmd.qemu import defaults
from kvmd.qemu.boot import boot_order
from kvmd.qemu.caps import Accel, Capabilities
from kvmd.qemu.identity import Identity
from kvmd.qemu.storage import ImageFact


class Line(NamedTuple):
    """One derived value: the key that would set it, what it is, and why."""

    key: str
    value: str
    reason: str


def explain(
    name: str,
    guest: Guest,
    caps: Capabilities,
    identity: Identity,
    *,
    accel: Accel,
    images: Mapping[str, ImageFact] = EMPTY,
) -> tuple[Line, ...]:
    """Every default decided for this guest, in the order of the file's tables. Raises Refused as build does."""
    return (
        *_board(guest, caps, identity, accel),
        *_cpu(name, guest, accel),
        *_memory(guest),
        *_boot(name, guest),
        *_disks(guest, identity, images),
        *_nics(guest, identity),
        *_places(guest, identity),
    )


def _board(guest: Guest, caps: Capabilities, identity: Identity, accel: Accel) -> Iterator[Line]:
    if guest.guest.uuid is None:
        yield Line("guest.uuid", identity.uuid, "made at the first start, kept in the identity file")
    if identity.machine != guest.machine.type:
        newest = caps.aliases.get(guest.machine.type)
        newer = f"; new guests get {newest}" if newest and newest != identity.machine else ""
        yield Line("machine.type", identity.machine, f'"{guest.machine.type}", pinned at the first start{newer}')
    if guest.machine.accel != accel:
        yield Line("machine.accel", accel, '"auto", and this host has no usable KVM' if accel == "tcg" else '"auto"')


def _cpu(name: str, guest: Guest, accel: Accel) -> Iterator[Line]:
    cpu, found = guest.cpu, defaults.topology(name, guest.cpu)
    if "vcpus" not in cpu.model_fields_set:
        yield Line("cpu.vcpus", str(cpu.vcpus), "the default")
    reasons = {
        "sockets": "one, unless more are asked for",
        "dies": "one in each socket",
        "threads": "one for each core",
    }
    for part in ("sockets", "dies", "cores", "threads"):
        if getattr(cpu, part) is None:
            yield Line(f"cpu.{part}", str(getattr(found, part)), reasons.get(part, "what remains of cpu.vcpus"))
    if cpu.model is None:
        reason = "the host's own, under KVM" if accel == "kvm" else "all that can be emulated, without KVM"
        yield Line("cpu.model", "host" if accel == "kvm" else "max", reason)


def _memory(guest: Guest) -> Iterator[Line]:
    memory, page = guest.memory, guest.memory.hugepage_size
    if page and memory.page_size is None:
        yield Line("memory.page_size", str(page), "the default of hugepages")
    if memory.prealloc is None:
        reason = (
            "pages are taken at the start, so that they cannot be missing later" if page else "not with this backing"
        )
        yield Line("memory.prealloc", str(memory.preallocated).lower(), reason)
    if memory.balloon.enabled is None:
        reason = "hugepages taken from a guest would give the host nothing" if page else "without it no memory can move"
        if memory.lock and not page:
            reason = "locked memory is never given back"
        if guest.passthrough:
            reason = f"{guest.passthrough[0]} may write to any of its memory at any time"
        yield Line("memory.balloon.enabled", str(guest.ballooned).lower(), reason)
    if memory.nodes and memory.policy is None:
        yield Line("memory.policy", "bind", "memory.nodes are the only ones it comes from")
    if memory.ksm_group is None:
        yield Line("memory.ksm_group", "none", "pages are never merged with another guest's unless a group is named")


def _boot(name: str, guest: Guest) -> Iterator[Line]:
    if guest.boot.order is None and guest.boot.kernel is None:
        order = ", ".join(device.replace("-", ".", 1) for device in boot_order(name, guest, None))
        yield Line("boot.order", order or "none", "disks, CDs, NICs, each in the order of the file")


def _disks(guest: Guest, identity: Identity, images: Mapping[str, ImageFact]) -> Iterator[Line]:
    for key, disk in guest.disk.items():
        fact = images.get(key, ImageFact())
        cache = defaults.cache_mode(disk, direct_works=fact.direct)
        if disk.cache is None:
            yield Line(
                f"disk.{key}.cache", cache, "direct I/O works" if fact.direct else "the file system has no direct I/O"
            )
        if disk.aio is None:
            reason = "with direct I/O" if defaults.is_direct(cache) else "native needs direct I/O"
            yield Line(f"disk.{key}.aio", defaults.aio_mode(disk, cache), reason)
        if "on_error" not in disk.model_fields_set and disk.media == "disk":
            yield Line(f"disk.{key}.on_error", disk.on_error, "a full file system pauses the guest, nothing is lost")
        if disk.media == "cdrom" and disk.interface == "virtio":
            bus = places.disk_bus(disk, identity.machine)
            reason = f"a CD drive sits on the board's own controller ({identity.machine})"
            yield Line(f"disk.{key}.interface", bus, reason)


def _nics(guest: Guest, identity: Identity) -> Iterator[Line]:
    for key, nic in defaults.nics(guest).items():
        if key not in guest.nic:
            yield Line(f"nic.{key}.type", "user", "no [nic.NAME] in the file; machine.default_nic = false for none")
        if "model" not in nic.model_fields_set:
            yield Line(f"nic.{key}.model", nic.model, "the default")
        if nic.mac is None and key in identity.macs:
            yield Line(f"nic.{key}.mac", identity.macs[key], "made from the uuid and the NIC's name, kept for life")


def _places(guest: Guest, identity: Identity) -> Iterator[Line]:
    explicit = {f"disk-{key}" for key, disk in guest.disk.items() if disk.pci_address}
    for device in defaults.pci_devices(guest, identity.machine):
        if device not in explicit:
            key = f"{device.replace('-', '.', 1)}.pci_address"
            yield Line(key, identity.slots[device], "given out once, kept in the identity file")
