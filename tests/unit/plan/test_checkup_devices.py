"""Doctor's checks of modules, the IOMMU and devices for guests, each broken on a directory that looks like a host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from kvmd.config.desired import Desired, Loaded
from kvmd.config.guest import Guest
from kvmd.config.host import Host
from kvmd.facts import Facts, Iommu, Module, PciDevice
from kvmd.plan import checks_devices
from kvmd.plan.hostreport import HostReport, Status
from tests.rig.doctorhost import DoctorHost, doctor_host, expect

ON = Iommu(9, "intel")
GPU = PciDevice("0000:3b:00.0", 0x030000, "nouveau", group=14)


@pytest.fixture
def box() -> Iterator[DoctorHost]:
    with doctor_host() as found:
        yield found


def report(*devices: PciDevice, iommu: Iommu = ON, state: Any = "loaded", allow: str = GPU.address) -> HostReport:
    guest = Guest.model_validate(
        {"machine": {"default_nic": False}, "memory": {"size": "1GiB"}, "hostdev": {"gpu": {"pci": GPU.address}}}
    )
    host = Host.model_validate({"passthrough": {"allow": [allow]}})
    facts = Facts(
        kernel="6.1.0",
        pci=devices,
        iommu=iommu,
        modules={"vfio_pci": Module("vfio_pci", state)},
        nodes=frozenset({"/dev/vfio/vfio"}),
    )
    return HostReport(loaded=Loaded(Desired(host=host, guests={"web": guest})), facts=facts)


def test_all_is_well() -> None:
    for check in (checks_devices.modules, checks_devices.iommu, checks_devices.passthrough):
        assert [found.status for found in check(report(GPU))] == [Status.OK]


def test_no_iommu_names_the_guests_and_the_switch() -> None:
    (found,) = checks_devices.iommu(report(GPU, iommu=Iommu(0, "intel")))
    assert (found.status, found.message) == (Status.FAIL, "no IOMMU is on; needed by web")
    assert "intel_iommu=on" in (found.fix or "")


def test_a_device_that_cannot_be_had_is_told_as_the_start_would() -> None:
    (found,) = checks_devices.passthrough(report(GPU, allow="0000:00:00.0"))
    assert found.status is Status.FAIL
    assert "is not in passthrough.allow" in found.message
    assert found.fix


def test_a_module_that_this_kernel_has_not() -> None:
    (found,) = checks_devices.modules(report(GPU, state="absent"))
    assert (found.status, "no module of this name" in found.message) == (Status.FAIL, True)
    world = report(GPU, state="loaded")
    (found,) = checks_devices.modules(replace(world, facts=replace(world.facts, nodes=frozenset())))
    assert "there is no /dev/vfio/vfio" in found.message
    (found,) = checks_devices.modules(report(GPU, state="available"))
    assert "kvmd has yet to load" in found.message


def test_nothing_is_wanted(box: DoctorHost) -> None:
    for name in ("modules", "iommu", "passthrough"):
        expect(box, name, "skip")


def test_a_module_of_a_kernel_that_was_replaced(box: DoctorHost) -> None:
    box.config("host.toml", '[modules]\nload = ["vhost_vsock"]\n')
    expect(box, "modules", "fail", "there is no /dev/vhost-vsock", fix="reboot")


def test_a_guest_with_a_device_on_a_host_without_iommu(box: DoctorHost) -> None:
    box.write("/proc/cpuinfo", "vendor_id\t: AuthenticAMD\n")
    box.guest("gamer", '[memory]\nsize = "1GiB"\n[hostdev.gpu]\npci = "0000:3b:00.0"\n')
    expect(box, "iommu", "fail", "needed by gamer", fix="AMD-Vi")
    expect(
        box, "passthrough", "fail", "guest gamer: hostdev.gpu: this host has no PCI function 0000:3b:00.0", fix="lspci"
    )
