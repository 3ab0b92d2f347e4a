"""Identity: what is given out stays, whatever comes and goes; text there and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.config.guest import Guest
from kvmd.errors import ConfigInvalid, NotSupported, Refused
from kvmd.qemu import defaults
from kvmd.qemu.identity import Identity, allot, derive_mac, from_toml, to_toml
from kvmd.units import Size
from tests.rig import golden_argv

CAPS = golden_argv.recorded()
SEED = golden_argv.UUID
INTERFACES = {"b": "scsi", "c": "sata", "d": "nvme", "e": "usb", "f": "floppy", "g": "sd", "h": "scsi"}
OTHER = "00000000-0000-4000-8000-000000000001"


def guest_of(disks: list[str] | None = None, nics: list[str] | None = None, **tables: Any) -> Guest:
    return Guest.model_validate(
        {
            "memory": {"size": Size(64 << 20)},
            "disk": {
                name: {"file": f"/{name}", "format": "raw", "interface": INTERFACES.get(name, "virtio")}
                for name in disks or []
            },
            "nic": {name: {"network": "lan"} for name in nics or []},
        }
        | tables
    )


def first(guest: Guest) -> Identity:
    return allot("web", guest, None, CAPS, SEED)


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from("abcdefgh"), unique=True),
            st.lists(st.sampled_from("uvwxyz"), unique=True),
            st.booleans(),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_nothing_ever_moves(edits: list[tuple[list[str], list[str], bool, bool]]) -> None:
    """Through any sequence of edits: all that was given out before is the same, and no two share a place."""
    identity: Identity | None = None
    for disks, nics, rng, vnc in edits:
        guest = guest_of(
            disks, nics, rng={"source": "builtin"} if rng else {}, display={"type": "vnc" if vnc else "none"}
        )
        after = allot("web", guest, identity, CAPS, SEED)
        if identity:
            for old, new in ((identity.slots, after.slots), (identity.macs, after.macs), (identity.units, after.units)):
                assert dict(new) | dict(old) == dict(new)
        assert set(defaults.pci_devices(guest, after.machine)) <= set(after.slots)
        assert len(set(after.slots.values())) == len(after.slots)
        assert len(set(after.macs.values())) == len(after.macs)
        assert allot("web", guest, after, CAPS, OTHER) == after
        assert from_toml("web", to_toml("web", after)) == after
        identity = after


@given(st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_the_file_decides_the_first_time_only(order: list[str]) -> None:
    before = first(guest_of(["a", "b", "c", "d"]))
    assert allot("web", guest_of(order), before, CAPS, SEED) == before
    own = [f"disk-{name}" for name in order if INTERFACES.get(name) in (None, "nvme")]
    assert [key for key in first(guest_of(order)).slots if key.startswith("disk-")] == own


def test_a_removed_device_finds_its_place_again() -> None:
    both = first(guest_of(["a", "i"], ["lan"]))
    without = allot("web", guest_of(["i"], ["lan"]), both, CAPS, SEED)
    with_another = allot("web", guest_of(["i", "k"], ["lan"]), without, CAPS, SEED)
    assert with_another.slots["disk-k"] not in both.slots.values()
    again = allot("web", guest_of(["a", "i", "k"], ["lan"]), with_another, CAPS, SEED)
    assert again.slots["disk-a"] == both.slots["disk-a"]


def test_places_of_the_gone_are_taken_when_there_are_no_others() -> None:
    identity: Identity | None = None
    for number in range(60):
        identity = allot("web", guest_of([f"d{number}"], ["lan"]), identity, CAPS, SEED)
    assert identity is not None
    assert identity.slots["nic-lan"] == "03.0"
    assert len(set(identity.slots.values())) == len(identity.slots)
    with pytest.raises(Refused, match="no PCI slot is left"):
        first(guest_of([f"d{number}" for number in range(30)]))


def test_an_explicit_slot_wins_and_is_never_shared() -> None:
    disks = {"a": {"file": "/a", "format": "raw"}, "b": {"file": "/b", "format": "raw", "pci_address": "2"}}
    identity = first(guest_of(disk=disks))
    assert identity.slots["disk-b"] == "02.0"
    assert identity.slots["disk-a"] != "02.0"
    plain = {name: {"file": f"/{name}", "format": "raw"} for name in "ab"}
    before = first(guest_of(disk=plain))
    with pytest.raises(Refused, match=r"disk\.a is there"):
        allot("web", guest_of(disk=disks), before, CAPS, SEED)
    gone = allot("web", guest_of(disk={"b": plain["b"]}), before, CAPS, SEED)
    alone = allot("web", guest_of(disk={"b": disks["b"]}), gone, CAPS, SEED)
    assert alone.slots["disk-b"] == "02.0"
    assert "disk-a" not in alone.slots
    for taken in ("00.0", "1f.0"):
        with pytest.raises(Refused, match="belongs to the board"):
            first(guest_of(disk={"a": disks["a"] | {"pci_address": taken}}))
    with pytest.raises(NotSupported, match="function 0"):
        first(guest_of(disk={"a": disks["a"] | {"pci_address": "05.1"}}))
    with pytest.raises(Refused, match="is there"):
        first(guest_of(disk=dict.fromkeys("ab", disks["b"])))


def test_the_board_is_pinned_and_follows_its_family_only() -> None:
    old = replace(first(guest_of()), machine="pc-q35-5.2")
    assert allot("web", guest_of(), old, CAPS, SEED).machine == "pc-q35-5.2"
    assert allot("web", guest_of(machine={"type": "pc-q35-6.0"}), old, CAPS, SEED).machine == "pc-q35-6.0"
    assert allot("web", guest_of(machine={"type": "pc"}), old, CAPS, SEED).machine == "pc-i440fx-7.2"
    with pytest.raises(Refused, match="has no such machine"):
        first(guest_of(machine={"type": "q53"}))


def test_slots_that_another_board_uses_itself_are_given_up() -> None:
    q35 = first(guest_of(["a"], display={"type": "vnc"}))
    assert q35.slots["video"] == "01.0"
    pc = allot("web", guest_of(["a"], display={"type": "vnc"}, machine={"type": "pc"}), q35, CAPS, SEED)
    assert pc.slots["disk-a"] == q35.slots["disk-a"]
    assert pc.slots["video"] not in ("01.0", q35.slots["disk-a"])


def test_macs_come_from_uuid_and_name() -> None:
    identity = first(guest_of(nics=["lan", "dmz"]))
    assert identity.macs == {"lan": derive_mac(SEED, "lan"), "dmz": derive_mac(SEED, "dmz")}
    assert all(int(mac[:2], 16) & 3 == 2 for mac in identity.macs.values())  # local, unicast
    busy = frozenset({derive_mac(SEED, "lan")})
    assert allot("web", guest_of(nics=["lan"]), None, CAPS, SEED, taken_macs=busy).macs["lan"] not in busy
    assert allot("web", guest_of(nics=["lan"]), identity, CAPS, SEED, taken_macs=busy).macs["lan"] in busy


def test_an_explicit_mac_wins_and_is_never_shared() -> None:
    mac = "52:54:00:00:00:07"
    identity = first(guest_of(nic={"lan": {"network": "lan", "mac": mac}, "dmz": {"network": "lan"}}))
    assert identity.macs["lan"] == mac
    renamed = allot("web", guest_of(nic={"wan": {"network": "lan", "mac": mac}}), identity, CAPS, SEED)
    assert renamed.macs["wan"] == mac
    assert "lan" not in renamed.macs
    with pytest.raises(Refused, match=r"nic\.a and nic\.b have one MAC"):
        first(guest_of(nic={name: {"network": "lan", "mac": mac} for name in "ab"}))


def test_a_copy_under_another_uuid_has_other_macs_and_the_same_places() -> None:
    original = first(guest_of(["a"], ["lan"]))
    copy = allot("web", guest_of(["a"], ["lan"], guest={"uuid": OTHER}), original, CAPS, SEED)
    assert copy.uuid == OTHER
    assert copy.macs["lan"] != original.macs["lan"]
    assert copy.slots == original.slots


def test_the_file_reads_well() -> None:
    text = to_toml("web", first(guest_of(["root"], ["lan"], serial={"console": {}})))
    assert text.startswith("# Identity of guest web")
    assert 'disk-root = "02.0"' in text
    assert "console = 0" in text


@pytest.mark.parametrize(
    ("find", "put", "words"),
    [
        ("schema = 1", "schema = 2", "schema is 2"),
        ("pc-q35-7.2", "q35,accel=kvm", "machine"),
        (SEED, "web", "uuid"),
        ('"02.0"', '"02.0,x=y"', "pci.disk-root"),
        ('"02.0"', '"03.0"', "same value"),
        ("52:54:00", "52-54-00", "mac.lan"),
        ("disk-root =", "'a,b' =", "pci"),
        ("console = 0", "console = true", "serial.console"),
        ("console = 0", "console = 999", "serial.console"),
        ("[mac]", "mac = 1\n[other]", "mac is not a table"),
        ("[mac]", "[mac", "cannot be used"),
        ("[mac]", "x = " + "[" * 3000, "cannot be used"),
    ],
)
def test_a_damaged_file_is_said_and_never_used(find: str, put: str, words: str) -> None:
    text = to_toml("web", first(guest_of(["root"], ["lan"], serial={"console": {}})))
    assert find in text
    with pytest.raises(ConfigInvalid) as caught:
        from_toml("web", text.replace(find, put, 1))
    assert words in caught.value.message
    assert "guest web" in caught.value.message


@given(st.text(max_size=300))
def test_any_text_is_an_identity_or_a_clear_error(text: str) -> None:
    with pytest.raises(ConfigInvalid):
        from_toml("web", text)
