"""PCI functions read, taken and given back on a bus that behaves as the kernel's, also when it refuses or goes away."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmd.actions import BindDevice, ReleaseDevice, SetVfs, VfPort
from kvmd.effects import pci, vfio
from kvmd.effects.hostdevices import HostDevices
from kvmd.effects.records import EffectKind, GuestRun
from kvmd.effects.store import Store
from kvmd.errors import Conflict, HostFailed, KvmdError, NotFound
from kvmd.facts import HostUse, Iommu, Link, PciDevice
from kvmd.plan.vfio import releases
from tests.rig.pcihost import BRIDGE, BUS, ETHERNET, ISA, NVME, VGA, KilledHere, PciHost

GPU, SOUND, CARD, DISK = "0000:3b:00.0", "0000:3b:00.1", "0000:af:00.0", "0000:00:1f.2"
BOOT = "boot-1"


@pytest.fixture
def host(tmp_path: Path) -> PciHost:
    """A graphics card of two functions in group 14, a network card with virtual functions, the host's disk."""
    host = PciHost(tmp_path / "host")
    host.add("0000:3a:00.0", BRIDGE, "pcieport", group=14)
    host.add(GPU, VGA, "nouveau", group=14)
    host.add(SOUND, 0x040300, "snd_hda_intel", group=14, node=-1)
    host.add(CARD, ETHERNET, "ice", group=20, total_vfs=8, link="ens1", node=1)
    host.add("0000:00:1f.0", ISA, None, group=3)
    host.add(DISK, 0x010601, "ahci", group=3, disk="sda")
    return host


class Wires:
    """Netlink for virtual functions: what each port is set to."""

    def __init__(self) -> None:
        self.ports = {i: VfPort("ens1", i, "00:00:00:00:00:00", 0, False) for i in range(8)}
        self.fails = False

    async def vf(self, link: str, index: int) -> VfPort | None:
        assert link == "ens1"
        return self.ports[index]

    async def set_vf(self, port: VfPort) -> None:
        if self.fails:
            raise HostFailed("cannot set virtual function: Operation not permitted")
        self.ports[port.index] = port


class Desk:
    """One state directory and the kvmds that come after each other."""

    def __init__(self, host: PciHost, state: Path) -> None:
        self.host = host
        self.wires = Wires()
        state.mkdir()
        self.store = Store(state)

    def devices(self) -> HostDevices:
        return HostDevices(self.host, self.wires, self.store, BOOT)  # type: ignore[arg-type]

    def run(self, name: str) -> None:
        """A guest has a run on record from now on."""
        self.store.begin_start(GuestRun(name=name, uuid=name, uid=64101, boot_id=BOOT, nonce="n", begun_at=1.0))

    def end(self, name: str) -> None:
        self.store.end_run(name, "", "", 2.0)

    def reservations(self) -> dict[str, str]:
        return {e.subject: e.new for e in self.store.journalled(BOOT) if e.kind == EffectKind.VFIO}

    def give_all_back(self) -> None:
        for action in releases(self.reservations(), lambda name: name in {run.name for run in self.store.runs()}):
            asyncio.run(self.devices().give_back(action))


@pytest.fixture
def desk(host: PciHost, tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(host, tmp_path / "state")
    yield desk
    desk.store.close()


def taking(address: str, group: int, *, guest: str = "web", port: VfPort | None = None, uid: int = 64101) -> BindDevice:
    return BindDevice(device=address, guest=guest, key="hostdev.x", group=group, uid=uid, port=port, why="it starts")


def driver(host: PciHost, address: str) -> str | None:
    return vfio.driver(host, address)


# ---- reading ----------------------------------------------------------------------------------------------------


def test_what_a_function_is(host: PciHost) -> None:
    found = {device.address: device for device in pci.observe(host)}
    assert found[GPU] == PciDevice(GPU, VGA, "nouveau", None, 14, 0)
    assert found[SOUND].node is None
    assert found[CARD] == PciDevice(CARD, ETHERNET, "ice", None, 20, 1, total_vfs=8, links=("ens1",))
    assert found[DISK].disks == ("sda",)
    assert found["0000:00:1f.0"].driver is None


def test_virtual_functions_know_their_card_and_number(host: PciHost) -> None:
    host.write(f"{BUS}/devices/{CARD}/sriov_numvfs", "3")
    found = [device for device in pci.observe(host) if device.parent]
    assert [(device.address, device.parent, device.index) for device in found] == [
        ("0000:af:02.0", CARD, 0),
        ("0000:af:02.1", CARD, 1),
        ("0000:af:02.2", CARD, 2),
    ]
    assert next(device for device in pci.observe(host) if device.address == CARD).vfs == 3


def test_what_of_the_host_hangs_on_a_disk_controller(host: PciHost) -> None:
    here = f"/sys/devices/pci{DISK[:7]}/{DISK}/block/sda"
    for number, name in enumerate(("sda1", "sda2", "sda3"), 1):
        host.add_block(name, f"{here}/{name}", number=f"8:{number}")
        host.put(f"{here}/{name}/partition", str(number))
    host.add_block("dm-0", "/sys/devices/virtual/block/dm-0", number="253:0", slaves=("sda2",))
    host.put("/sys/devices/virtual/block/dm-0/dm/name", "vg0-root")
    host.put(f"{here}/sda3/uevent", "DEVNAME=sda3\nPARTNAME=zfs-1a2b")
    host.put(
        "/proc/self/mountinfo",
        "22 1 253:0 / / rw - ext4 /dev/mapper/vg0-root rw\n23 22 8:1 / /boot rw - vfat /dev/sda1 rw",
    )
    host.put("/proc/swaps", "Filename Type Size Used Priority\n/dev/sda1 partition 1 0 -2\n/swapfile file 1 0 -3")
    (found,) = [device for device in pci.observe(host) if device.address == DISK]
    assert found.disks == ("sda",)
    assert set(found.uses) == {
        HostUse("vg0-root", "mounted at /"),
        HostUse("sda2", "part of vg0-root"),
        HostUse("sda1", "mounted at /boot"),
        HostUse("sda1", "used as swap"),
        HostUse("sda3", "part of a ZFS pool"),
    }


def test_a_namespace_that_several_nvme_controllers_share_is_on_each(host: PciHost) -> None:
    host.add("0000:01:00.0", NVME, "nvme", group=8)
    controller = "/sys/devices/pci0000:01/0000:01:00.0/nvme/nvme0"
    host.put(f"{controller}/dev", "240:0")
    subsystem = "/sys/devices/virtual/nvme-subsystem/nvme-subsys0"
    host.add_block("nvme0n1", f"{subsystem}/nvme0n1", number="259:0")
    host._link("/sys/class/nvme-subsystem/nvme-subsys0", subsystem)
    host._link(f"{subsystem}/nvme0", controller)
    host.put("/proc/self/mountinfo", "22 1 259:0 / / rw - ext4 /dev/root rw")
    (found,) = [device for device in pci.observe(host) if device.address == "0000:01:00.0"]
    assert (found.disks, found.uses) == (("nvme0n1",), (HostUse("nvme0n1", "mounted at /"),))


def test_what_of_the_host_hangs_on_a_network_card(host: PciHost) -> None:
    host.put(
        "/proc/net/route",
        "Iface Destination Gateway Flags RefCnt Use Metric Mask\nens1 00000000 0100A8C0 3 0 0 0 00000000",
    )
    host.put(f"/sys/devices/pci{CARD[:7]}/{CARD}/net/ens1/upper_br0/x", "")
    (found,) = [d for d in pci.observe(host, [Link("ens1", 2, addresses=("192.0.2.1/24",))]) if d.address == CARD]
    assert found.uses == (
        HostUse("ens1", "has 192.0.2.1/24"),
        HostUse("ens1", "carries the default route"),
        HostUse("ens1", "is below br0"),
    )


def test_iommu(host: PciHost) -> None:
    host.put("/proc/cpuinfo", "processor : 0\nvendor_id\t: GenuineIntel")
    host.put("/proc/cmdline", "root=/dev/sda1 quiet")
    assert pci.observe_iommu(host) == Iommu(3, "intel", asked=False)
    host.put("/proc/cmdline", "root=/dev/sda1 intel_iommu=on iommu=pt")
    assert pci.observe_iommu(host).asked


# ---- taking and giving back -----------------------------------------------------------------------------------------


def test_taken_for_a_guest_and_back_on_its_driver(desk: Desk) -> None:
    before = desk.host.picture()
    desk.run("web")
    for _ in range(2):  # idempotent
        asyncio.run(desk.devices().take(taking(GPU, 14)))
        asyncio.run(desk.devices().take(taking(SOUND, 14)))
    assert driver(desk.host, GPU) == driver(desk.host, SOUND) == "vfio-pci"
    assert desk.host.owner("/dev/vfio/14") == (64101, 0, 0o600)
    assert desk.reservations() == {GPU: "web", SOUND: "web"}
    desk.end("web")
    desk.give_all_back()
    assert desk.host.picture() == before
    assert desk.store.journalled(BOOT) == ()


def test_no_other_driver_can_take_it_in_between(desk: Desk) -> None:
    desk.run("web")
    asyncio.run(desk.devices().take(taking(GPU, 14)))
    assert desk.host.writes[:3] == [
        f"/devices/{GPU}/driver_override vfio-pci",
        f"/devices/{GPU}/driver/unbind {GPU}",
        f"/drivers_probe {GPU}",
    ]


def test_one_that_was_on_vfio_pci_before_kvmd_stays_there_and_its_node_goes_back(desk: Desk) -> None:
    desk.host.add("0000:5e:00.0", NVME, "vfio-pci", group=30, override="vfio-pci")
    before = desk.host.picture()
    desk.run("web")
    asyncio.run(desk.devices().take(taking("0000:5e:00.0", 30)))
    assert desk.host.owner("/dev/vfio/30") == (64101, 0, 0o600)
    desk.end("web")
    desk.give_all_back()
    assert desk.host.picture() == before


def test_a_virtual_function_gets_its_mac_and_vlan_and_loses_them_again(desk: Desk) -> None:
    desk.host.write(f"{BUS}/devices/{CARD}/sriov_numvfs", "4")
    desk.run("web")
    port = VfPort("ens1", 1, "52:54:00:00:00:07", 30)
    was = desk.wires.ports[1]
    asyncio.run(desk.devices().take(_vf(desk, port)))
    assert desk.wires.ports[1] == port
    desk.end("web")
    desk.give_all_back()
    assert desk.wires.ports[1] == was
    assert driver(desk.host, "0000:af:02.1") == "ice"


def _vf(desk: Desk, port: VfPort) -> BindDevice:
    (found,) = [device for device in pci.observe(desk.host) if device.address == "0000:af:02.1"]
    assert found.group is not None
    return taking(found.address, found.group, port=port)


def test_one_guest_at_a_time(desk: Desk) -> None:
    desk.run("web")
    asyncio.run(desk.devices().take(taking(GPU, 14)))
    desk.run("db")
    with pytest.raises(Conflict, match=f"{GPU} is given to guest web"):
        asyncio.run(desk.devices().take(taking(GPU, 14, guest="db", uid=64102)))
    with pytest.raises(Conflict):
        asyncio.run(desk.devices().give_back(ReleaseDevice(device=GPU, guest="web", why="")))
    assert desk.reservations() == {GPU: "web"}
    desk.end("web")  # its owner is gone: free
    asyncio.run(desk.devices().take(taking(GPU, 14, guest="db", uid=64102)))
    assert desk.reservations() == {GPU: "db"}
    assert desk.host.owner("/dev/vfio/14") == (64102, 0, 0o600)


@pytest.mark.parametrize("ending", ["driver_override", "unbind", "drivers_probe"])
@pytest.mark.parametrize("number", [errno.EBUSY, errno.EIO])
def test_a_bind_the_kernel_refuses_leaves_it_as_it_was(desk: Desk, ending: str, number: int) -> None:
    before = desk.host.picture()
    desk.run("web")
    desk.host.refuse[ending] = number
    with pytest.raises(HostFailed):
        asyncio.run(desk.devices().take(taking(GPU, 14)))
    assert desk.host.picture() == before
    desk.end("web")
    desk.give_all_back()
    assert (desk.host.picture(), desk.store.journalled(BOOT)) == (before, ())


def test_vfio_pci_that_does_not_want_it(desk: Desk) -> None:
    desk.host.path(f"{BUS}/drivers/vfio-pci").rmdir()
    with pytest.raises(HostFailed, match="the driver vfio-pci is not loaded") as caught:
        vfio.bind(desk.host, GPU)
    assert caught.value.hint == "modprobe vfio-pci"
    assert driver(desk.host, GPU) == "nouveau"


def test_a_driver_that_is_gone_is_said_and_tried_again(desk: Desk) -> None:
    desk.run("web")
    asyncio.run(desk.devices().take(taking(GPU, 14)))
    desk.end("web")
    shelf = desk.host.path(f"{BUS}/drivers/nouveau")
    shelf.rename(shelf.with_name("away"))
    with pytest.raises(HostFailed, match="was to be driven by nouveau, and nobody took it"):
        desk.give_all_back()
    assert desk.reservations() == {GPU: "web"}
    shelf.with_name("away").rename(shelf)
    desk.give_all_back()
    assert (driver(desk.host, GPU), desk.reservations()) == ("nouveau", {})


def test_a_device_that_vanished_is_given_back(desk: Desk) -> None:
    desk.run("web")
    asyncio.run(desk.devices().take(taking(GPU, 14)))
    desk.host.path(f"{BUS}/devices/{GPU}").unlink()
    desk.end("web")
    desk.give_all_back()
    assert desk.store.journalled(BOOT) == ()
    with pytest.raises(NotFound, match="no PCI function 0000:3b:00"):
        asyncio.run(desk.devices().take(taking(GPU, 14)))


def test_a_group_that_somebody_has_open_is_not_unbound(desk: Desk) -> None:
    """The kernel would wait for him: kvmd says who he is, and tries again."""
    desk.run("web")
    asyncio.run(desk.devices().take(taking(GPU, 14)))
    desk.end("web")
    desk.host.put("/proc/4242/comm", "qemu-system-x86")
    holder = desk.host.path("/proc/4242/fd/9")
    holder.parent.mkdir()
    holder.symlink_to("/dev/vfio/14")
    with pytest.raises(Conflict, match=r"/dev/vfio/14 is open in process 4242 \(qemu-system-x86\)"):
        desk.give_all_back()
    assert (driver(desk.host, GPU), desk.reservations()) == ("vfio-pci", {GPU: "web"})
    holder.unlink()
    desk.give_all_back()
    assert (driver(desk.host, GPU), desk.reservations()) == ("nouveau", {})


def test_a_disk_somebody_has_open_exclusively_is_not_taken(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZFS and programs show nowhere in /sys; an exclusive open shows them."""
    import os

    def busy(path: Path, flags: int, *_: int) -> int:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(os, "open", busy)
    with pytest.raises(Conflict, match=f"{DISK}: /dev/sda is in use"):
        vfio._refuse_used_disks(desk.host, DISK)


# ---- virtual functions ----------------------------------------------------------------------------------------------


def growing(old: int, new: int, *, autoprobe: bool = False) -> SetVfs:
    return SetVfs(device=CARD, pool="ens1", old=old, new=new, autoprobe=autoprobe, why="sriov.ens1.vfs")


def test_virtual_functions_by_way_of_0_and_without_a_driver(desk: Desk) -> None:
    before = desk.host.picture()
    asyncio.run(desk.devices().set_vfs(growing(0, 4)))
    asyncio.run(desk.devices().set_vfs(growing(4, 6)))
    found = [device for device in pci.observe(desk.host) if device.parent == CARD]
    assert [device.driver for device in found] == [None] * 6
    assert [write.partition("sriov_")[2] for write in desk.host.writes] == [
        "drivers_autoprobe 0",
        "numvfs 4",
        "numvfs 0",
        "drivers_autoprobe 0",
        "numvfs 6",
    ]
    (entry,) = desk.store.journalled(BOOT)
    assert (entry.key, entry.original, entry.new) == (f"sriov:{CARD}", "0,1", "6")
    asyncio.run(desk.devices().set_vfs(growing(6, 0, autoprobe=True)))
    assert (desk.host.picture(), desk.store.journalled(BOOT)) == (before, ())


def test_virtual_functions_in_use_are_not_taken_away(desk: Desk) -> None:
    asyncio.run(desk.devices().set_vfs(growing(0, 4)))
    desk.run("web")
    asyncio.run(desk.devices().take(_vf(desk, VfPort("ens1", 1, "52:54:00:00:00:07"))))
    with pytest.raises(Conflict, match=r"ens1: 0000:af:02\.1 are in use"):
        asyncio.run(desk.devices().set_vfs(growing(4, 6)))
    assert desk.host.read(f"{BUS}/devices/{CARD}/sriov_numvfs") == "4"


def test_more_virtual_functions_than_there_can_be(desk: Desk) -> None:
    with pytest.raises(HostFailed):
        asyncio.run(desk.devices().set_vfs(growing(0, 9)))


# ---- kill -9 at every step ------------------------------------------------------------------------------------------


def test_a_kvmd_killed_at_any_step_of_taking_is_mended_by_the_next(tmp_path: Path) -> None:
    steps = 0
    while True:
        host = _fresh(tmp_path / f"take-{steps}")
        desk = Desk(host, tmp_path / f"take-state-{steps}")
        before = host.picture()
        desk.run("web")
        host.die_after = steps
        killed = _interrupted(desk, [taking(GPU, 14), taking(SOUND, 14)])
        host.die_after = None
        desk.end("web")  # the next kvmd finds no process of this run
        desk.give_all_back()
        assert (host.picture(), desk.store.journalled(BOOT)) == (before, ()), f"killed after {steps} writes"
        desk.store.close()
        if not killed:
            break
        steps += 1
    assert steps == 7  # two functions of three writes each, and the owner of their group


def test_a_kvmd_killed_at_any_step_of_giving_back_is_mended_by_the_next(tmp_path: Path) -> None:
    steps = 0
    while True:
        host = _fresh(tmp_path / f"give-{steps}")
        desk = Desk(host, tmp_path / f"give-state-{steps}")
        before = host.picture()
        desk.run("web")
        for action in (taking(GPU, 14), taking(SOUND, 14)):
            asyncio.run(desk.devices().take(action))
        desk.end("web")
        host.writes.clear()
        host.die_after = steps
        killed = False
        try:
            desk.give_all_back()
        except KilledHere:
            killed = True
        host.die_after = None
        desk.give_all_back()
        assert (host.picture(), desk.store.journalled(BOOT)) == (before, ()), f"killed after {steps} writes"
        desk.store.close()
        if not killed:
            break
        steps += 1
    assert steps == 8  # override, unbind, probe, override again; twice


def _fresh(root: Path) -> PciHost:
    host = PciHost(root)
    host.add(GPU, VGA, "nouveau", group=14)
    host.add(SOUND, 0x040300, "snd_hda_intel", group=14, override="snd_hda_intel")
    return host


def _interrupted(desk: Desk, actions: list[BindDevice]) -> bool:
    try:
        for action in actions:
            asyncio.run(desk.devices().take(action))
    except KilledHere:
        return True
    except KvmdError as error:
        raise AssertionError(str(error)) from error
    return False
