"""Every default that was decided is told, with its reason; what the file says is not repeated."""

from __future__ import annotations

import pytest

from kvmd.qemu import identity
from kvmd.qemu.explain import explain
from kvmd.qemu.storage import ImageFact
from tests.rig import golden_argv

CAPS = golden_argv.recorded()


def told(name: str, **host: object) -> dict[str, tuple[str, str]]:
    guest = golden_argv.guest(name)
    allotted = identity.allot(name, guest, None, CAPS, golden_argv.UUID)
    lines = explain(name, guest, CAPS, allotted, **({"accel": "tcg"} | host))  # type: ignore[arg-type]
    assert len({line.key for line in lines}) == len(lines)
    assert all(line.reason for line in lines)
    return {line.key: (line.value, line.reason) for line in lines}


@pytest.mark.parametrize("name", golden_argv.names())
def test_every_golden_can_be_explained(name: str) -> None:
    assert told(name)


def test_a_minimal_guest() -> None:
    lines = told("minimal")
    assert lines["machine.type"][0] == "pc-q35-7.2"
    assert lines["cpu.vcpus"] == ("1", "the default")
    assert lines["cpu.model"][0] == "max"
    assert lines["nic.default.type"][0] == "user"
    assert lines["memory.balloon.enabled"][0] == "true"
    assert lines["guest.uuid"][0] == golden_argv.UUID
    assert told("minimal", accel="kvm")["cpu.model"][0] == "host"


def test_hugepages_have_no_balloon_and_say_why() -> None:
    lines = told("hugepages")
    assert lines["memory.balloon.enabled"][0] == "false"
    assert "hugepages" in lines["memory.balloon.enabled"][1]
    assert lines["memory.prealloc"][0] == "true"
    assert "memory.page_size" not in lines


def test_disks_depend_on_what_the_file_system_can() -> None:
    assert told("kvm")["disk.root.cache"] == ("none", "direct I/O works")
    assert told("kvm")["disk.root.aio"][0] == "native"
    without = told("kvm", images={"root": ImageFact(direct=False)})
    assert without["disk.root.cache"] == ("writeback", "the file system has no direct I/O")
    assert without["disk.root.aio"][0] == "threads"
    assert told("pc")["disk.cd1.interface"][0] == "ide"


def test_what_the_file_says_is_not_repeated() -> None:
    lines = told("server")
    assert not {"cpu.cores", "cpu.threads", "boot.order", "disk.data.cache", "disk.data.on_error"} & set(lines)
    assert "nic.lan.mac" in lines
    assert "nic.lan.mac" not in told("kvm")
    assert "disk-hda.pci_address" not in told("pc")
    assert "disk.hda.pci_address" not in told("pc")
