"""What the firmware boots from, and what it shows meanwhile; direct boot of a Linux kernel. Pure.

Every bootable device has an index; QEMU writes the list for the firmware at each reset. So an order for the first boot
only (`boot.once`) is what the devices are made with, and the order for all later ones is set before the guest's first
instruction: it is read at the next reset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvmd.config.guest import Guest
from kvmd.config.scalars import BootOrder
from kvmd.errors import Refused
from kvmd.qemu import defaults
from kvmd.qemu.fds import Command, FdTable, Memfd
from kvmd.qemu.text import double


def boot_order(name: str, guest: Guest, order: BootOrder | None) -> tuple[str, ...]:
    """Ids of the devices the firmware tries, first to last. Raises Refused on a device the guest does not have.

    None: disks, CDs, floppies, NICs, each in the order of the file. Letters are QEMU's classic ones: a and b floppies,
    c disks, d CDs, n NICs. An SD card is nothing a firmware boots by name.
    """
    named = {f"disk-{key}": disk for key, disk in guest.disk.items() if disk.interface != "sd"}
    floppies = tuple(key for key, disk in named.items() if disk.interface == "floppy")
    cds = tuple(key for key, disk in named.items() if disk.media == "cdrom")
    disks = tuple(key for key in named if key not in floppies + cds)
    cards = tuple(f"nic-{key}" for key in defaults.nics(guest))
    others = tuple(f"hostdev-{key}" for key in guest.hostdev)
    if order is None:
        return disks + cds + floppies + cards
    if isinstance(order, str):
        drives = {number if (unit := named[key].unit) is None else unit: key for number, key in enumerate(floppies)}
        a, b = ((drives[unit],) if unit in drives else () for unit in (0, 1))
        letters: Mapping[str, tuple[str, ...]] = {"a": a, "b": b, "c": disks, "d": cds, "n": cards}
        return tuple(device for letter in order for device in letters.get(letter, ()))
    wanted = tuple(device.replace(".", "-", 1) for device in order)
    for key, device in zip(order, wanted, strict=True):
        if device not in disks + cds + floppies + cards + others:
            raise Refused(f"guest {name}: boot.order names {key}, which this guest cannot boot from")
    return wanted


def first_indices(name: str, guest: Guest) -> Mapping[str, int]:
    """Boot index of each device as it is made: the order of the first boot."""
    order = guest.boot.order if guest.boot.once is None else guest.boot.once
    return {device: index for index, device in enumerate(boot_order(name, guest, order), 1)}


def later_indices(name: str, guest: Guest) -> tuple[Command, ...]:
    """What sets the order of all later boots, where the first one has its own. No two may have an index at any time."""
    if guest.boot.once is None:
        return ()
    now, later = boot_order(name, guest, guest.boot.once), boot_order(name, guest, guest.boot.order)
    floppies = {f"disk-{key}" for key, disk in guest.disk.items() if disk.interface == "floppy"}
    if floppies & {*now, *later}:
        raise Refused(
            f"guest {name}: boot.once with a floppy drive in the order: its place cannot change while QEMU runs",
            hint="leave floppies out of boot.order and boot.once",
        )
    return (*(_index(device, -1) for device in now), *(_index(device, at) for at, device in enumerate(later, 1)))


def _index(device: str, index: int) -> Command:
    path = f"/machine/peripheral/{device}"
    return Command("qom-set", {"path": path, "property": "bootindex", "value": index})


def options(guest: Guest, fds: FdTable) -> list[str]:
    """-boot. The picture comes as a copy in memory: the guest's uid need not reach the file."""
    words = ["strict=on", f"menu={'on' if guest.boot.menu else 'off'}"]
    if guest.boot.splash is not None:
        fd = fds.add(Memfd(fds.next_fd, guest.boot.splash, "splash"))
        words.append(f"splash=/proc/self/fd/{fd}")
    if guest.boot.splash_time is not None:
        words.append(f"splash-time={round(guest.boot.splash_time * 1000)}")
    return ["-boot", ",".join(words)]


def kernel(guest: Guest, fds: FdTable) -> list[str]:
    """Direct boot of a Linux kernel from copies in memory: the guest's uid need not reach the files."""
    found: list[str] = []
    for option, purpose, path in (("-kernel", "kernel", guest.boot.kernel), ("-initrd", "initrd", guest.boot.initrd)):
        if path is not None:
            fd = fds.add(Memfd(fds.next_fd, path, purpose))
            found += [option, f"/proc/self/fd/{fd}"]
    if guest.boot.kernel is not None and guest.boot.cmdline:
        # A leading space is nothing to Linux, and no argument of a file's begins with a dash.
        found += ["-append", " " * guest.boot.cmdline.startswith("-") + guest.boot.cmdline]
    return found


def clock(guest: Guest) -> list[str]:
    """-rtc."""
    return ["-rtc", f"base={defaults.rtc_base(guest)},clock={guest.rtc.clock}"]


def smbios(guest: Guest) -> list[str]:
    """-smbios of type 1 (DSP0134, "System Information")."""
    table = guest.machine.smbios
    given = {key: value for key, value in table if value is not None} if table else {}
    return ["-smbios", ",".join(("type=1", *_pairs(given)))] if given else []


def _pairs(values: Mapping[str, str]) -> Iterator[str]:
    for key, value in values.items():
        yield f"{key}={double(value)}"
