"""Where drives sit: the classic arithmetic of bus, unit and index, and what a file may not ask for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.config import places
from kvmd.config.devices import Disk
from kvmd.config.guest import Guest
from kvmd.config.places import Place, asked_place
from kvmd.config.rules import guest_rules


def disk(**keys: Any) -> Disk:
    return Disk.model_validate({"file": "/srv/vm/a", "format": "raw", **keys})


def said(disks: dict[str, dict[str, Any]], *, machine: str = "q35", **tables: Any) -> list[str]:
    """What the rules say of a guest with these disks: "path: message (hint)"."""
    data = {name: {"file": f"/srv/vm/{name}", "format": "raw", **keys} for name, keys in disks.items()}
    text = {"memory": {"size": "64MiB"}, "machine": {"type": machine, "default_nic": False}, "disk": data, **tables}
    found = guest_rules(Guest.model_validate(text))
    return [".".join(one.path) + f": {one.message} ({one.hint})" for one in found if one.severity == "error"]


@pytest.mark.parametrize(
    ("keys", "kind", "place"),
    [
        ({}, "ide", None),
        ({"index": 0}, "ide", Place(0, 0)),
        ({"index": 2}, "ide", Place(1, 0)),  # -hdc, and -cdrom
        ({"index": 3}, "ide", Place(1, 1)),
        ({"bus": 1}, "ide", Place(1, 0)),
        ({"unit": 1}, "ide", Place(0, 1)),
        ({"index": 9}, "scsi", Place(1, 2)),
        ({"bus": 1, "unit": 200}, "scsi", Place(1, 200)),
        ({"index": 9, "bus": 1, "unit": 2}, "scsi", Place(1, 2)),
        ({"index": 4}, "sata", Place(4, 0)),
        ({"unit": 1}, "floppy", Place(0, 1)),
    ],
)
def test_place_asked_for(keys: dict[str, int], kind: places.Bus, place: Place | None) -> None:
    assert asked_place(disk(interface=kind, **keys), kind) == place


@pytest.mark.parametrize(
    ("keys", "kind", "words"),
    [
        ({"index": 2, "bus": 0}, "ide", r"index 2 is bus 1, unit 0 \(1 x 2 \+ 0 on ide\), not bus 0, unit 0"),
        ({"index": 9, "unit": 1}, "scsi", r"index 9 is bus 1, unit 2 \(1 x 7 \+ 2 on scsi\), not bus 0, unit 1"),
        ({"index": 4}, "ide", "bus 2, unit 0 is beyond what ide has: buses 0 to 1, units 0 to 1"),
        ({"unit": 2}, "floppy", "units 0 to 1"),
        ({"bus": 6}, "sata", "buses 0 to 5"),
        ({"bus": 4}, "scsi", "buses 0 to 3"),
        ({"index": 1}, "nvme", "nvme has no places to choose from"),
    ],
)
def test_a_contradiction_or_no_such_place_is_told_with_the_sum(
    keys: dict[str, int], kind: places.Bus, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        asked_place(disk(interface=kind, **keys), kind)


@given(st.sampled_from(sorted(places.UNITS)), st.data())
def test_a_number_is_a_place_and_back(kind: places.Bus, data: st.DataObject) -> None:
    number = data.draw(st.integers(0, places.BUSES[kind] * places.UNITS[kind] - 1))
    assert Place.of(kind, number).number(kind) == number


@given(st.sampled_from(sorted(places.INDEX_UNITS)), st.integers(0, 255))
def test_an_index_is_one_place_or_refused(kind: places.Bus, index: int) -> None:
    try:
        place = asked_place(disk(interface=kind, index=index), kind)
    except ValueError:
        assert index >= min(places.BUSES[kind] * places.INDEX_UNITS[kind], 2 * places.UNITS[kind])
    else:
        assert place is not None and place.bus * places.INDEX_UNITS[kind] + place.unit == index


IDE = {"interface": "ide"}


@pytest.mark.parametrize(
    ("disks", "machine", "expected"),
    [
        ({"a": IDE}, "q35", ['disk.a.interface: machine.type = "q35" has no IDE']),
        ({"a": IDE}, "pc-q35-7.2", ["has no IDE"]),
        ({"a": IDE}, "pc", []),
        ({"a": {**IDE, "index": 2}, "cd": {"media": "cdrom", "index": 2}}, "pc", ["a classic -cdrom is the third IDE"]),
        (
            {"a": {**IDE, "index": 1}, "b": {**IDE, "unit": 1}},
            "pc",
            ["disk.b: ide bus 0, unit 1 is the place of disk.a"],
        ),
        (dict.fromkeys("abcde", IDE), "pc", ["disk.e.interface: ide has room for 4 drives, and this is number 5"]),
        ({name: {"interface": "floppy"} for name in "abc"}, "q35", ["floppy has room for 2"]),
        ({"a": {"interface": "usb", "media": "cdrom"}}, "q35", ['there is no CD drive on "usb"']),
        (
            {"a": {"interface": "scsi", "pci_address": "05"}},
            "q35",
            ["disk.a.pci_address: only of virtio and nvme disks"],
        ),
        ({"a": {"interface": "nvme", "pci_address": "05"}}, "q35", []),
        ({"a": {"interface": "nvme", "on_error": "stop"}}, "q35", ["disk.a.on_error: only of other drives"]),
        ({"a": {"interface": "ide", "queues": 1}}, "pc", ["disk.a.queues: only of virtio disks"]),
        ({"a": {"queues": 2}}, "q35", ["disk.a.queues: 2 queues, but cpu.vcpus = 1"]),
        ({"a": {"interface": "usb", "iothread": "x"}}, "q35", ["disk.a.iothread: only of virtio and scsi"]),
        ({"a": {"interface": "floppy", "logical_block_size": 4096}}, "q35", ["logical_block_size: only of disks"]),
        ({"a": {"interface": "sd", "serial": "x"}}, "q35", ["serial: only of drives other than floppy and sd"]),
        ({"a": {"index": 1}}, "q35", ['disk.a.index: only on ide, sata, scsi and floppy; this is "virtio"']),
        ({"a": {"interface": "scsi", "index": 3, "bus": 1}}, "q35", ["disk.a.index: index 3 is bus 0, unit 3"]),
        ({"a": {"shared": True, "readonly": True}}, "q35", ["disk.a.shared: only of a disk the guest writes to"]),
        ({"a": {"shared": True, "format": "qcow2"}}, "q35", ["disk.a.shared: qcow2 has metadata"]),
        (
            {"a": {"interface": "scsi", "iothread": "x"}, "b": {"interface": "scsi", "iothread": "y"}},
            "q35",
            ['disk.b.iothread: "y", but disk.a on the same SCSI controller has "x"'],
        ),
        (
            {"a": {"interface": "scsi", "iothread": "x"}, "b": {"interface": "scsi", "iothread": "y", "bus": 1}},
            "q35",
            [],
        ),
    ],
)
def test_rules_of_drives(disks: dict[str, dict[str, Any]], machine: str, expected: list[str]) -> None:
    found = said(disks, machine=machine)
    assert len(found) == len(expected), found
    for words in expected:
        assert any(words in line for line in found), found
