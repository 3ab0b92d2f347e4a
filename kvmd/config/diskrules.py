"""Rules of the disks of one guest: what a key means beside another, what an interface has, who sits where. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from kvmd.config import places
from kvmd.config.devices import Disk
from kvmd.config.faults import Complaint, twice
from kvmd.config.guest import Guest


def disk_rules(guest: Guest) -> Iterator[Complaint]:
    """All that is wrong with the disks of one guest's file."""
    for name, disk in guest.disk.items():
        yield from _disk(("disk", name), disk)
        yield from _drive(("disk", name), disk, guest)
    yield from _disks_together(guest)
    yield from _places(guest)


def _disk(path: tuple[str, ...], disk: Disk) -> Iterator[Complaint]:
    if disk.aio == "native" and disk.cache not in (None, "none", "directsync"):
        text = f'"native" needs direct I/O, but cache = "{disk.cache}"'
        yield Complaint((*path, "aio"), text, 'cache = "none" or "directsync", or aio = "threads"')
    if disk.media == "cdrom" and "readonly" in disk.model_fields_set and not disk.readonly:
        yield Complaint((*path, "readonly"), "a CD is always read-only", "leave the key out")
    if disk.detect_zeroes == "unmap" and disk.discard != "unmap":
        yield Complaint((*path, "detect_zeroes"), '"unmap" needs discard = "unmap"')


_PLACED = frozenset({"ide", "sata", "scsi", "floppy"})
_QUEUED = frozenset({"virtio"})
_THREADED = frozenset({"virtio", "scsi"})
_PLAIN_SECTORS = frozenset({"floppy", "sd"})
_CDS = frozenset({"virtio", "scsi", "ide", "sata"})


def _drive(path: tuple[str, ...], disk: Disk, guest: Guest) -> Iterator[Complaint]:
    """What of a disk only some interfaces have."""
    at, q35 = disk.interface, places.is_q35(guest.machine.type)
    if at == "ide" and q35:
        text = f'machine.type = "{guest.machine.type}" has no IDE'
        yield Complaint((*path, "interface"), text, 'interface = "sata", or machine.type = "pc"')
    if disk.media == "cdrom" and at not in _CDS:
        yield Complaint((*path, "interface"), f'there is no CD drive on "{at}"', '"scsi", or leave the key out')
    needs = (
        ("pci_address", disk.pci_address, at in ("virtio", "nvme") and disk.media == "disk", "virtio and nvme disks"),
        ("queues", disk.queues, at in _QUEUED and disk.media == "disk", "virtio disks"),
        ("iothread", disk.iothread, at in _THREADED and (at, disk.media) != ("virtio", "cdrom"), "virtio and scsi"),
        ("logical_block_size", disk.logical_block_size, at not in _PLAIN_SECTORS and disk.media == "disk", "disks"),
        ("serial", disk.serial, at not in _PLAIN_SECTORS, "drives other than floppy and sd"),
        ("on_error", "on_error" in disk.model_fields_set or None, at not in ("nvme", "floppy", "sd"), "other drives"),
    )
    for word, value, fits, whose in needs:
        if value is not None and not fits:
            kind = f'interface = "{at}"' + (", a CD drive" if disk.media == "cdrom" else "")
            yield Complaint((*path, word), f"only of {whose}; this is {kind}", "leave the key out")
    if disk.queues is not None and disk.queues > guest.cpu.vcpus:
        yield Complaint((*path, "queues"), f"{disk.queues} queues, but cpu.vcpus = {guest.cpu.vcpus}")
    if disk.shared and not disk.writable:
        yield Complaint((*path, "shared"), "only of a disk the guest writes to", "several may read one image anyway")
    if disk.shared and disk.format != "raw":
        yield Complaint((*path, "shared"), f"{disk.format} has metadata that only one may write", 'format = "raw"')
    bus = places.disk_bus(disk, guest.machine.type)
    given = next((word for word in ("index", "unit", "bus") if getattr(disk, word) is not None), None)
    if given and bus not in _PLACED:
        yield Complaint((*path, given), f'only on ide, sata, scsi and floppy; this is "{bus}"', "leave the key out")
    elif given:
        try:
            places.asked_place(disk, bus)
        except ValueError as error:
            yield Complaint((*path, given), str(error))


def _places(guest: Guest) -> Iterator[Complaint]:
    """No two drives in one place, and no more drives than a bus has places."""
    asked: list[tuple[str, tuple[places.Bus, places.Place]]] = []
    counts: dict[places.Bus, list[str]] = defaultdict(list)
    for name, disk in guest.disk.items():
        bus = places.disk_bus(disk, guest.machine.type)
        counts[bus].append(name)
        try:
            place = places.asked_place(disk, bus) if bus in _PLACED else None
        except ValueError:
            continue  # said already
        if place:
            asked.append((name, (bus, place)))
    for name, other, (bus, place) in twice(asked):
        text = f"{bus} bus {place.bus}, unit {place.unit} is the place of disk.{other} too"
        hint = "a classic -cdrom is the third IDE drive, as -hdc is" if (bus, place.number(bus)) == ("ide", 2) else None
        yield Complaint(("disk", name), text, hint)
    for bus, names in counts.items():
        most = places.BUSES[bus] * places.UNITS[bus] if bus in places.UNITS else len(names)
        if len(names) > most:
            text = f"{bus} has room for {most} drives, and this is number {most + 1}"
            yield Complaint(("disk", names[most], "interface"), text, 'interface = "virtio" or "scsi"', given=False)
    yield from _threads(guest)


def _threads(guest: Guest) -> Iterator[Complaint]:
    """A SCSI controller works in one thread, which all its disks share."""
    first: dict[int, tuple[str, str]] = {}
    for name, disk in guest.disk.items():
        if disk.interface != "scsi" or disk.iothread is None:
            continue
        try:
            place = places.asked_place(disk, "scsi")
        except ValueError:
            continue  # said already
        other, thread = first.setdefault(place.bus if place else 0, (name, disk.iothread))
        if thread != disk.iothread:
            text = f'"{disk.iothread}", but disk.{other} on the same SCSI controller has "{thread}"'
            yield Complaint(("disk", name, "iothread"), text, "the same for both, or another bus for one of them")


def _disks_together(guest: Guest) -> Iterator[Complaint]:
    disks = guest.disk.items()
    for name, other, file in twice((name, disk.file) for name, disk in disks):
        if guest.disk[name].writable or guest.disk[other].writable:
            yield Complaint(("disk", name, "file"), f'"{file}" is the file of disk.{other} too')
    for name, other, slot in twice((name, disk.pci_address) for name, disk in disks):
        yield Complaint(("disk", name, "pci_address"), f'"{slot}" is the slot of disk.{other} too')
