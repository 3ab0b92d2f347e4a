"""Where a drive sits: its bus, and the number of its place there, as the file says or as QEMU's classic rules count.

One number stands for a place: on ide `bus * 2 + unit`, on scsi `bus * 256 + target`, elsewhere the port or unit. The
classic `index` counts with QEMU's own units per bus (-drive if=…,index=), two on ide and seven on scsi. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kvmd.config.devices import Disk
from kvmd.config.guest import Guest

Bus = Literal["virtio", "scsi", "ide", "sata", "nvme", "usb", "floppy", "sd"]

# Places of one bus with numbered ones: the PIIX3's two channels of two; the AHCI's ports; targets of virtio-scsi
# (VIRTIO_SCSI_MAX_TARGET) on up to four controllers; ports of our xhci; the floppy controller's drives.
UNITS: Mapping[Bus, int] = {"ide": 2, "sata": 1, "scsi": 256, "usb": 1, "floppy": 2, "sd": 1}
BUSES: Mapping[Bus, int] = {"ide": 2, "sata": 6, "scsi": 4, "usb": 8, "floppy": 1, "sd": 1}
# What `index` is divided by (if_max_devs in QEMU's blockdev.c; a bus of its own for each sata drive, as on q35).
INDEX_UNITS: Mapping[Bus, int] = {"ide": 2, "sata": 1, "scsi": 7, "floppy": 2}


@dataclass(frozen=True, slots=True)
class Place:
    """A place on a bus."""

    bus: int
    unit: int

    def number(self, kind: Bus) -> int:
        """What the identity remembers."""
        return self.bus * UNITS[kind] + self.unit

    @classmethod
    def of(cls, kind: Bus, number: int) -> Place:
        """The other way round."""
        return cls(*divmod(number, UNITS[kind]))


def is_q35(machine: str) -> bool:
    """Whether a machine type, alias or version, is the q35 board; it has AHCI where the pc board has IDE."""
    return machine.startswith(("q35", "pc-q35"))


def disk_bus(disk: Disk, machine: str) -> Bus:
    """Where a drive sits. virtio has no CD drive, so a CD without another interface is on the board's controller."""
    if disk.interface != "virtio" or disk.media == "disk":
        return disk.interface
    return "sata" if is_q35(machine) else "ide"


def asked_place(disk: Disk, kind: Bus) -> Place | None:
    """The place the file asks for by bus, unit or index; None when it leaves that open.

    ValueError with the arithmetic when the three contradict each other, or when there is no such place.
    """
    if disk.bus is None and disk.unit is None and disk.index is None:
        return None
    if kind not in INDEX_UNITS:
        raise ValueError(f"{kind} has no places to choose from")
    place = Place(disk.bus or 0, disk.unit or 0)
    if disk.index is not None:
        units = INDEX_UNITS[kind]
        by_index = Place(*divmod(disk.index, units))
        if disk.bus not in (None, by_index.bus) or disk.unit not in (None, by_index.unit):
            raise ValueError(
                f"index {disk.index} is bus {by_index.bus}, unit {by_index.unit} "
                f"({by_index.bus} x {units} + {by_index.unit} on {kind}), not bus {place.bus}, unit {place.unit}"
            )
        place = by_index
    if place.bus >= BUSES[kind] or place.unit >= UNITS[kind]:
        raise ValueError(
            f"bus {place.bus}, unit {place.unit} is beyond what {kind} has: "
            f"buses 0 to {BUSES[kind] - 1}, units 0 to {UNITS[kind] - 1}"
        )
    return place


def scsi_buses(guest: Guest, machine: str) -> tuple[int, ...]:
    """Numbers of the SCSI controllers the guest has: those its file names, and 0 for disks that name none."""
    found = set()
    for disk in guest.disk.values():
        if disk_bus(disk, machine) == "scsi":
            place = asked_place(disk, "scsi")
            found.add(place.bus if place else 0)
    return tuple(sorted(found))


def controllers(guest: Guest, machine: str) -> tuple[str, ...]:
    """Ids of the PCI controllers a guest's drives and USB devices need beyond the board's own."""
    buses = {disk_bus(disk, machine) for disk in guest.disk.values()}
    found = [f"scsi{bus}" for bus in scsi_buses(guest, machine)]
    found += ["sata"] if "sata" in buses and not is_q35(machine) else []
    found += ["usb"] if "usb" in buses or guest.usb.tablet or guest.usb.controller == "xhci" else []
    found += ["sdhci"] if "sd" in buses else []
    return tuple(found)
