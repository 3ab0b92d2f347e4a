"""Devices of the host for guests: who gets which, and why not, with what the host would lose said by name."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import ReleaseDevice, VfPort
from kvmd.config.desired import Desired
from kvmd.config.guest import Guest
from kvmd.config.host import Host
from kvmd.facts import Facts, GuestLife, HostUse, Iommu, PciDevice
from kvmd.plan.entry import candidate
from kvmd.plan.modules import wanted
from kvmd.plan.vfio import GIB, memlock_bytes, plan_passthrough, settle
from kvmd.qemu import defaults

GPU, SOUND, CARD, DISK, PORT = "0000:3b:00.0", "0000:3b:00.1", "0000:af:00.0", "0000:00:1f.2", "0000:3a:00.0"
VGA, AUDIO, ETHERNET, SATA, BRIDGE = 0x030000, 0x040300, 0x020000, 0x010601, 0x060400

WORLD = (
    PciDevice(PORT, BRIDGE, "pcieport", group=14),
    PciDevice(GPU, VGA, "nouveau", group=14),
    PciDevice(SOUND, AUDIO, None, group=14),
    PciDevice(CARD, ETHERNET, "ice", group=20, total_vfs=8, vfs=3, links=("ens1",)),
    *(PciDevice(f"0000:af:02.{n}", ETHERNET, None, group=30 + n, parent=CARD, index=n) for n in range(3)),
    PciDevice(DISK, SATA, "ahci", group=3, disks=("sda",), uses=(HostUse("sda2", "mounted at /"),)),
    PciDevice("0000:00:1f.3", 0x0C0500, "i801_smbus", group=3),
)
MACS = {("web", "fast"): "52:54:00:00:00:07"}


def guest(**tables: Any) -> Guest:
    return Guest.model_validate({"machine": {"default_nic": False}, "memory": {"size": "1GiB"}} | tables)


def host(*allow: str, vfs: int = 3) -> Host:
    return Host.model_validate({"passthrough": {"allow": list(allow)}, "sriov": {"ens1": {"vfs": vfs}}})


def facts(*devices: PciDevice, **words: Any) -> Facts:
    return Facts(pci=devices or WORLD, iommu=Iommu(groups=9, vendor="intel"), **words)


WITH_GPU = guest(hostdev={"gpu": {"pci": GPU}})
WITH_VF = guest(nic={"fast": {"type": "vf", "pool": "ens1", "vlan": 30}})


def refusal(wish: Guest, allowed: Host, world: Facts, **words: Any) -> str:
    found = settle("web", wish, allowed, world, **words)
    assert found.grants == ()
    (problem,) = found.problems
    assert problem.guests == {"web"}
    assert problem.subject == "guest web"
    assert problem.hint, "each refusal says what to do"
    return f"{problem.message} | {problem.hint}"


# ---- what is given ----------------------------------------------------------------------------------------------


def test_a_card_with_what_is_harmless_in_its_group() -> None:
    """A bridge is the way to the card, and the sound device has no driver: the kernel gives the group away."""
    found = settle("web", WITH_GPU, host(GPU), facts())
    assert [(grant.key, grant.id, grant.device.address, grant.group) for grant in found.grants] == [
        ("hostdev.gpu", "hostdev-gpu", GPU, 14)
    ]
    assert found.problems == ()


def test_a_virtual_function_is_the_lowest_free_one_with_mac_and_vlan() -> None:
    found = settle("web", WITH_VF, host(), facts(), macs=MACS, taken={"0000:af:02.0": "db"})
    (grant,) = found.grants
    assert (grant.device.address, grant.id) == ("0000:af:02.1", "nic-fast")
    assert grant.port == VfPort("ens1", 1, "52:54:00:00:00:07", 30)


def test_a_virtual_function_of_an_interrupted_start_is_taken_again() -> None:
    world = facts(reservations={"0000:af:02.2": "web"})
    (grant,) = settle("web", WITH_VF, host(), world, macs=MACS).grants
    assert grant.device.address == "0000:af:02.2"


def test_one_the_host_uses_is_not_free() -> None:
    used = tuple(
        replace(device, uses=(HostUse("ens1v0", "is below br0"),)) if device.index == 0 else device for device in WORLD
    )
    (grant,) = settle("web", WITH_VF, host(), facts(*used), macs=MACS).grants
    assert grant.device.address == "0000:af:02.1"


def test_an_explicit_function_and_one_of_the_pool_are_two() -> None:
    two = guest(nic={"a": {"type": "vf", "pool": "ens1"}, "b": {"type": "vf", "pci": "0000:af:02.0"}})
    grants = settle("web", two, host("0000:af:02.0"), facts()).grants
    assert {grant.key: grant.device.address for grant in grants} == {"nic.a": "0000:af:02.1", "nic.b": "0000:af:02.0"}


# ---- what is refused --------------------------------------------------------------------------------------------


def test_the_blast_radius() -> None:
    smbus = guest(hostdev={"bus": {"pci": "0000:00:1f.3"}})
    said = refusal(smbus, host("0000:00:1f.3"), facts())
    assert said == (
        "hostdev.bus: IOMMU group 3 of 0000:00:1f.3 also holds 0000:00:1f.2, the storage controller of sda, "
        "sda2 mounted at /: a group goes to one guest as a whole | "
        "give the guest these as well, or put the device into another slot (groups are the board's)"
    )


def test_the_hosts_own_disk_is_not_given_even_when_it_is_allowed() -> None:
    said = refusal(guest(hostdev={"disk": {"pci": DISK}}), host(DISK), facts(WORLD[-2]))
    assert said.startswith("hostdev.disk: 0000:00:1f.2 is the storage controller of sda: sda2 mounted at / | ")


def test_only_what_is_allowed() -> None:
    said = refusal(WITH_GPU, host("0000:3b:00.1"), facts())
    assert said == (
        "hostdev.gpu: 0000:3b:00.0, a graphics card (nouveau), is not in passthrough.allow | "
        'allow = ["0000:3b:00.0"] under [passthrough] in host.toml, if the host can do without it'
    )


@pytest.mark.parametrize(
    ("iommu", "hint"),
    [
        (Iommu(0, "intel"), "add intel_iommu=on to the kernel command line"),
        (Iommu(0, "intel", asked=True), "switch VT-d (the IOMMU) on in the firmware"),
        (Iommu(0, "amd"), "switch the IOMMU (AMD-Vi) on in the firmware"),
        (Iommu(0), "this machine shows no IOMMU to the kernel"),
        (Iommu(5, "amd"), "outside of every IOMMU group"),
    ],
)
def test_without_an_iommu(iommu: Iommu, hint: str) -> None:
    world = replace(facts(PciDevice(GPU, VGA, "nouveau")), iommu=iommu)
    said = refusal(WITH_GPU, host(GPU), world)
    assert "no IOMMU stands before 0000:3b:00.0: it could write to all of the host's memory" in said
    assert hint in said


@pytest.mark.parametrize(
    ("wish", "world", "said"),
    [
        (WITH_GPU, facts(PciDevice(CARD)), "hostdev.gpu: this host has no PCI function 0000:3b:00.0 | lspci -D"),
        (
            guest(hostdev={"x": {"pci": CARD}}),
            facts(),
            'hostdev.x: 0000:af:00.0 has 3 virtual functions | give one of these (type = "vf"), or declare vfs = 0',
        ),
        (
            guest(nic={"x": {"type": "vf", "pci": CARD}}),
            facts(),
            "nic.x: 0000:af:00.0 is no virtual function | give the whole card",
        ),
        (
            guest(hostdev={"x": {"pci": PORT}}),
            facts(),
            "hostdev.x: 0000:3a:00.0 is a PCI bridge | give what is behind it",
        ),
        (
            guest(nic={"x": {"type": "vf", "pool": "ens1"}}),
            facts(*(replace(device, links=()) for device in WORLD)),
            'nic.x: no pool of virtual functions is called "ens1" | ip link',
        ),
        (
            guest(nic={"x": {"type": "vf", "pci": "0000:af:02.0"}}),
            facts(*(replace(device, links=()) for device in WORLD)),
            "nic.x: 0000:af:00.0 has no interface, through which 0000:af:02.0 would get its MAC address",
        ),
        (
            guest(nic={"x": {"type": "vf", "pool": "ens9"}}),
            facts(),
            'nic.x: no pool of virtual functions is called "ens9" | ip link',
        ),
    ],
)
def test_other_refusals(wish: Guest, world: Facts, said: str) -> None:
    assert refusal(wish, host("0000:00:00.0/20", "0000:a0:00.0/20", "0000:30:00.0/20"), world).startswith(said)


def test_a_pool_that_is_used_up_says_by_whom() -> None:
    taken = {"0000:af:02.0": "db", "0000:af:02.1": "mail"}
    used = tuple(
        replace(device, uses=(HostUse("v2", "has 10.0.0.1/8"),)) if device.index == 2 else device for device in WORLD
    )
    said = refusal(WITH_VF, host(), facts(*used), taken=taken)
    assert said == (
        "nic.fast: no virtual function of ens1 is free: there are 3 (0000:af:02.0 has db, 0000:af:02.1 has mail, "
        "0000:af:02.2 has the host) | raise sriov.ens1.vfs in host.toml, or stop one of these guests"
    )


def test_a_pool_that_no_pass_has_made_yet() -> None:
    bare = tuple(replace(device, vfs=0) for device in WORLD if device.parent is None)
    assert refusal(WITH_VF, host(), facts(*bare)) == (
        "nic.fast: no virtual function of ens1 is free: there are 0 | "
        "kvmd-cli apply makes the 3 that sriov.ens1.vfs asks for"
    )


def test_another_guest_in_the_group() -> None:
    said = refusal(WITH_GPU, host(GPU), facts(), taken={SOUND: "db"})
    assert "IOMMU group 14 of 0000:3b:00.0 also holds 0000:3b:00.1, which guest db has" in said


# ---- the plan ---------------------------------------------------------------------------------------------------


def life(name: str, *, alive: bool = False, wanted: bool = True) -> GuestLife:
    return GuestLife(name, alive=alive, wanted=wanted)


def test_of_two_that_want_one_device_the_first_gets_it() -> None:
    desired = Desired(host=host(GPU), guests={"a": WITH_GPU, "b": WITH_GPU})
    _, problems = plan_passthrough(desired, facts(lives=(life("a"), life("b"))), frozenset())
    assert [problem.guests for problem in problems] == [{"b"}]
    assert "is given to guest a" in problems[0].message
    # one that runs comes before one that wants to
    _, problems = plan_passthrough(
        desired, facts(lives=(life("a"), life("b", alive=True)), reservations={GPU: "b"}), frozenset()
    )
    assert [problem.guests for problem in problems] == [{"a"}]


def test_one_that_is_off_and_not_wanted_takes_nothing() -> None:
    desired = Desired(host=host(GPU), guests={"a": WITH_GPU, "b": WITH_GPU})
    assert plan_passthrough(desired, facts(lives=(life("a", wanted=False), life("b"))), frozenset()) == ((), ())


def test_what_a_guest_that_is_off_holds_comes_back_and_what_a_living_one_has_stays() -> None:
    world = facts(lives=(life("web", alive=True), life("db")), reservations={GPU: "web", CARD: "db", DISK: "gone"})
    releases, _ = plan_passthrough(Desired(), world, frozenset())
    assert releases == (
        ReleaseDevice(device=DISK, guest="gone", why="guest gone, which had it, is off"),
        ReleaseDevice(device=CARD, guest="db", why="guest db, which had it, is off"),
    )


def test_functions_that_this_pass_makes_are_no_problem() -> None:
    bare = tuple(replace(device, vfs=0) for device in WORLD if device.parent is None)
    desired = Desired(host=host(), guests={"web": WITH_VF})
    assert plan_passthrough(desired, facts(*bare, lives=(life("web"),)), frozenset({"ens1"}))[1] == ()
    assert plan_passthrough(desired, facts(*bare, lives=(life("web"),)), frozenset())[1] != ()


ADDRESSES = [device.address for device in WORLD if device.parent is None]


@given(
    st.dictionaries(
        st.sampled_from("abcdef"), st.lists(st.sampled_from(ADDRESSES), min_size=1, max_size=3, unique=True)
    ),
    st.sets(st.sampled_from("abcdef")),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_no_device_and_no_group_goes_to_two(
    wishes: dict[str, list[str]], with_vf: set[str], size: int, dice: Random
) -> None:
    guests = {
        name: guest(
            hostdev={f"d{n}": {"pci": address} for n, address in enumerate(addresses)},
            nic={"fast": {"type": "vf", "pool": "ens1"}} if name in with_vf else {},
        )
        for name, addresses in wishes.items()
    }
    devices = [device for device in WORLD if device.index is None or device.index < size]
    allowed = host("0000:00:00.0/20", "0000:a0:00.0/20", "0000:30:00.0/20")
    world = facts(*devices, lives=tuple(life(name) for name in guests))
    desired = Desired(host=allowed, guests=guests)
    found = plan_passthrough(desired, world, frozenset())

    dice.shuffle(devices)
    turned = Desired(host=allowed, guests=dict(reversed(guests.items())))
    assert (
        plan_passthrough(turned, replace(world, pci=tuple(sorted(devices, key=lambda d: d.address))), frozenset())
        == found
    )

    blocked = {name for problem in found[1] for name in problem.guests}
    groups: dict[int, str] = {}
    taken: dict[str, str] = {}
    for name in sorted(guests.keys() - blocked):
        for grant in settle(name, guests[name], allowed, world, taken=taken).grants:
            assert taken.setdefault(grant.device.address, name) == name
            assert groups.setdefault(grant.group, name) == name
            assert not grant.device.uses
            assert grant.device.class_code >> 8 != 0x0604


# ---- what follows for the guest ---------------------------------------------------------------------------------


def test_all_of_its_memory_is_locked_and_none_of_it_moves() -> None:
    assert memlock_bytes(WITH_GPU) == 2 * GIB
    assert memlock_bytes(guest()) is None
    assert candidate("web", WITH_VF).locked
    assert not candidate("web", guest()).locked
    assert "balloon" in defaults.pci_devices(guest(), "pc-q35-7.2")
    assert "balloon" not in defaults.pci_devices(WITH_VF, "pc-q35-7.2")


def test_vfio_pci_is_loaded_for_it() -> None:
    assert wanted(Desired(guests={"web": WITH_GPU, "db": guest()})) == {"vfio_pci": "guest web is given hostdev.gpu"}
    assert wanted(Desired(guests={"db": guest()})) == {}
