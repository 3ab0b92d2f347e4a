"""A guest's identity: what it must keep for life, whatever is added to or taken out of its file.

UUID, versioned board, MAC of each NIC, PCI slot of each device, port of each drive, number of each serial port. A guest
that found its NIC elsewhere after an update would rename its interface; one that met another board would ask for its
licence again. Allotting is pure and remembers: what was removed keeps its place, in case it comes back.
The text form is the truth, kept as /var/lib/kvmd/guests/NAME/identity.toml and copied along with a guest.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
import uuid as uuids
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from kvmd.config import places
from kvmd.config.devices import Disk
from kvmd.config.guest import Guest
from kvmd.errors import ConfigInvalid, NotSupported, Refused
from kvmd.qemu import defaults
from kvmd.qemu.caps import Capabilities

V = TypeVar("V")

SCHEMA = 1
MOST_UNITS = max(places.BUSES[bus] * places.UNITS[bus] for bus in places.UNITS)
MOST_SERIALS = 256
OUI = "52:54:00"  # QEMU's customary prefix; its second bit marks it as locally administered

_KEY = re.compile(r"[a-z0-9]([a-z0-9_-]{0,40}[a-z0-9])?")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_SLOT = re.compile(r"[01][0-9a-f]\.[0-7]")
_MACHINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


@dataclass(frozen=True, slots=True)
class Identity:
    """What a guest keeps. Mappings hold removed devices too."""

    uuid: str
    machine: str  # versioned: "pc-q35-7.2"
    macs: Mapping[str, str]  # [nic.NAME] -> "52:54:00:…"
    slots: Mapping[str, str]  # device id -> "SLOT.FUNCTION" on the root bus, in hex
    units: Mapping[str, int]  # "sata-NAME", "ide-NAME", "scsi-NAME"... -> place on the bus (config/places.py)
    serials: Mapping[str, int]  # [serial.NAME] -> number of the ISA port, 0 is ttyS0


def allot(
    name: str,
    guest: Guest,
    previous: Identity | None,
    caps: Capabilities,
    uuid_seed: str,
    *,
    taken_macs: frozenset[str] = frozenset(),
) -> Identity:
    """The identity `guest` starts with: everything `previous` had, and places for what is new.

    `uuid_seed` is a random UUID made by the caller, used when neither the file nor `previous` has one. `taken_macs`
    are those of other guests: a new NIC never gets one of them. Explicit `pci_address` and `mac` win over what was
    allotted; raises Refused when two devices would share a slot or a MAC, or when there are no slots left.
    """
    uuid = guest.guest.uuid or (previous.uuid if previous else uuid_seed)
    machine = _machine(guest, previous, caps)
    # A copied identity file with another UUID is another guest: it must not answer to the original's addresses.
    old_macs = previous.macs if previous and previous.uuid == uuid else {}
    return Identity(
        uuid=uuid,
        machine=machine,
        macs=_frozen(_macs(name, guest, uuid, old_macs, taken_macs)),
        slots=_frozen(_slots(name, guest, machine, previous.slots if previous else {})),
        units=_frozen(_units(name, guest, machine, previous.units if previous else {})),
        serials=_frozen(_numbers(guest.serial, previous.serials if previous else {}, "")),
    )


def _frozen(values: dict[str, V]) -> Mapping[str, V]:
    return MappingProxyType(values)


def derive_mac(uuid: str, nic: str, attempt: int = 0) -> str:
    """The MAC of a guest's NIC: QEMU's prefix and 24 bits of a hash of UUID and NIC name."""
    text = f"{uuid}/{nic}" + (f"/{attempt}" if attempt else "")
    digest = hashlib.sha256(text.encode()).digest()
    return ":".join((OUI, *(f"{byte:02x}" for byte in digest[:3])))


def _machine(guest: Guest, previous: Identity | None, caps: Capabilities) -> str:
    """The pinned board, as long as the file still asks for a board of its family."""
    wanted = guest.machine.type
    if (
        previous
        and wanted in caps.aliases
        and defaults.family(previous.machine) == defaults.family(caps.aliases[wanted])
    ):
        return previous.machine
    return caps.machine(wanted).name


def _macs(name: str, guest: Guest, uuid: str, old: Mapping[str, str], taken: frozenset[str]) -> dict[str, str]:
    nics = defaults.nics(guest)
    explicit = {nic: table.mac for nic, table in nics.items() if table.mac}
    for nic, mac in explicit.items():
        twin = next((other for other, theirs in explicit.items() if theirs == mac and other != nic), None)
        if twin:
            raise Refused(f"guest {name}: nic.{nic} and nic.{twin} have one MAC address, {mac}")
    macs = {nic: mac for nic, mac in old.items() if mac not in explicit.values()} | explicit
    for nic in nics:
        if nic in macs:
            continue
        others = taken | set(macs.values())
        macs[nic] = next(mac for attempt in range(1 << 16) if (mac := derive_mac(uuid, nic, attempt)) not in others)
    return macs


def _slots(name: str, guest: Guest, machine: str, old: Mapping[str, str]) -> dict[str, str]:
    """A slot of the root bus for each PCI device of the guest. First the places that are fixed, then the new ones."""
    fixed = defaults.BOARD_SLOTS[defaults.require_board(name, machine)]
    explicit = _explicit_slots(guest)
    now = defaults.pci_devices(guest, machine)
    slots = {key: slot for key, slot in old.items() if _number(slot) not in fixed}
    for key, slot in explicit.items():
        if not slot.endswith(".0"):
            raise NotSupported(f"guest {name}: {_key_of(key)}.pci_address = {slot}: only function 0 can be used yet")
        if _number(slot) in fixed:
            raise Refused(
                f"guest {name}: {_key_of(key)}.pci_address = {slot}: that slot belongs to the board ({machine})",
                hint=f"free are {_free_text(slots, fixed)}",
            )
        holders = [other for other, held in slots.items() if other != key and _number(held) == _number(slot)]
        for holder in holders:
            if holder in now:
                raise Refused(
                    f"guest {name}: {_key_of(key)}.pci_address = {slot}: {_key_of(holder)} is there",
                    hint=f"free are {_free_text(slots, fixed)}",
                )
            del slots[holder]
        slots[key] = slot
    for key in now:
        if key not in slots:
            slots[key] = _free_slot(name, key, slots, now, fixed)
    return slots


def _free_slot(name: str, key: str, slots: dict[str, str], now: Iterable[str], fixed: frozenset[int]) -> str:
    """The lowest slot nobody has or had; when there is none, that of a device that is no longer in the file."""
    used = {_number(slot) for slot in slots.values()} | fixed
    first = 0x01 if key == "video" else 0x02  # a display at 01.0 or 02.0 is where firmware and people look for it
    for number in range(first, 0x20):
        if number not in used:
            return f"{number:02x}.0"
    for holder in [holder for holder in slots if holder not in set(now)]:
        slot = slots.pop(holder)
        return f"{_number(slot):02x}.0"
    raise Refused(
        f"guest {name}: no PCI slot is left for {_key_of(key)}: the root bus has 32, and all are taken",
        hint="spread the disks over several guests, or take devices out",
    )


def _explicit_slots(guest: Guest) -> dict[str, str]:
    found: dict[str, str] = {}
    wishes = [(f"disk-{key}", disk.pci_address) for key, disk in guest.disk.items()]
    wishes += [(f"nic-{key}", nic.pci_address) for key, nic in guest.nic.items()]
    for device, wish in wishes:
        if wish:
            slot, _, function = wish.partition(".")
            found[device] = f"{int(slot, 16):02x}.{function or '0'}"
    return found


def _units(name: str, guest: Guest, machine: str, old: Mapping[str, int]) -> dict[str, int]:
    """A place for each drive that sits on a bus with numbered ones; what the file asks for wins over what was kept."""
    units = dict(old)
    for bus in places.UNITS:
        mine = {key: number for key, number in units.items() if key.startswith(f"{bus}-")}
        disks = {key: disk for key, disk in guest.disk.items() if places.disk_bus(disk, machine) == bus}
        for key, place in _asked_places(name, disks, bus).items():
            holder = next((other for other, number in mine.items() if number == place and other != key), None)
            if holder:
                del mine[holder]
            mine[key] = place
        kept = {key: number for key, number in units.items() if not key.startswith(f"{bus}-")}
        units = kept | _numbers(disks, mine, f"{bus}-")
    return units


def _asked_places(name: str, disks: Mapping[str, Disk], bus: places.Bus) -> dict[str, int]:
    found: dict[str, int] = {}
    for disk, table in disks.items():
        try:
            place = places.asked_place(table, bus)
        except ValueError as error:
            raise Refused(f"guest {name}: disk.{disk}: {error}") from None
        if place is not None:
            number = place.number(bus)
            twin = next((other for other, taken in found.items() if taken == number), None)
            if twin:
                where = f"{bus} bus {place.bus}, unit {place.unit}"
                raise Refused(f"guest {name}: disk.{disk} and {twin.replace(f'{bus}-', 'disk.', 1)} are both {where}")
            found[f"{bus}-{disk}"] = number
    return found


def _numbers(names: Iterable[str], old: Mapping[str, int], prefix: str) -> dict[str, int]:
    """The lowest number nobody has or had, for each name."""
    numbers = dict(old)
    for name in names:
        if prefix + name not in numbers:
            used = set(numbers.values())
            numbers[prefix + name] = next(number for number in range(len(used) + 1) if number not in used)
    return numbers


def _number(slot: str) -> int:
    return int(slot.partition(".")[0], 16)


def _free_text(slots: Mapping[str, str], fixed: frozenset[int]) -> str:
    used = {_number(slot) for slot in slots.values()} | fixed
    free = [f"{number:02x}.0" for number in range(0x20) if number not in used]
    return ", ".join(free[:6]) + (f" and {len(free) - 6} more" if len(free) > 6 else "")


def _key_of(device: str) -> str:
    """ "disk.root" of "disk-root": as the file writes it."""
    return device.replace("-", ".", 1) if device.startswith(("disk-", "nic-", "hostdev-")) else device


_HEADER = """\
# Identity of guest {name}: made by kvmd once, kept for its life. Copy this file along with the guest.
# Places of devices that were removed stay listed, so that they find them again when they come back.
"""


def to_toml(name: str, identity: Identity) -> str:
    """The file's text; `from_toml` takes it back."""
    lines = [
        _HEADER.format(name=name),
        f"schema = {SCHEMA}",
        f'uuid = "{identity.uuid}"',
        f'machine = "{identity.machine}"',
    ]
    sections: tuple[tuple[str, str, Mapping[str, str | int]], ...] = (
        ("mac", "[nic.NAME] -> MAC address", identity.macs),
        ("pci", "device -> slot.function on the root bus, in hex", identity.slots),
        (
            "unit",
            "drive -> place: port or unit; ide bus * 2 + unit, scsi bus * 256 + target",
            identity.units,
        ),
        ("serial", "[serial.NAME] -> number of the port: 0 is ttyS0", identity.serials),
    )
    for section, comment, values in sections:
        lines += ["", f"[{section}]  # {comment}"]
        lines += [
            f"{key} = {value}" if isinstance(value, int) else f'{key} = "{value}"' for key, value in values.items()
        ]
    return "\n".join(lines) + "\n"


def from_toml(name: str, text: str) -> Identity:
    """The identity in the text. Raises ConfigInvalid, naming the guest and the entry, on anything odd."""
    try:
        data = tomllib.loads(text)
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema is {data.get('schema')!r}, this kvmd reads {SCHEMA}")
        return Identity(
            uuid=str(uuids.UUID(_matched("uuid", data.get("uuid"), re.compile(r"[0-9a-f-]{36}")))),
            machine=_matched("machine", data.get("machine"), _MACHINE),
            macs=_section(data, "mac", _MAC),
            slots=_section(data, "pci", _SLOT),
            units=_counted(data, "unit", MOST_UNITS),
            serials=_counted(data, "serial", MOST_SERIALS),
        )
    except (ValueError, RecursionError) as error:
        raise ConfigInvalid(
            f"the identity file of guest {name} cannot be used: {error}",
            hint="restore it from a backup; without it the guest gets new MAC addresses and PCI slots",
        ) from error


def _matched(what: str, value: object, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{what}: {value!r} is not of the form {pattern.pattern}")
    return value


def _entries(data: Mapping[str, Any], section: str) -> dict[str, Any]:
    found = data.get(section, {})
    if not isinstance(found, dict):
        raise ValueError(f"{section} is not a table")
    for key in found:
        _matched(section, key, _KEY)
    return found


def _section(data: Mapping[str, Any], section: str, pattern: re.Pattern[str]) -> Mapping[str, str]:
    found = {key: _matched(f"{section}.{key}", value, pattern) for key, value in _entries(data, section).items()}
    if len(set(found.values())) != len(found):
        raise ValueError(f"{section}: two entries have the same value")
    return _frozen(found)


def _counted(data: Mapping[str, Any], section: str, most: int) -> Mapping[str, int]:
    found = _entries(data, section)
    for key, value in found.items():
        if type(value) is not int or not 0 <= value < most:
            raise ValueError(f"{section}.{key}: {value!r} is not a number below {most}")
    return _frozen(found)
