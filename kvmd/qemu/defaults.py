"""What a guest's file leaves open, decided: one place for argv, identity and `explain` to ask.

Pure functions of the file (and, where it matters, of the board). Nothing here knows an emulator or a host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kvmd.config import places
from kvmd.config.devices import Disk, Nic
from kvmd.config.guest import Cpu, Guest
from kvmd.errors import NotSupported, Refused

CacheMode = Literal["none", "writeback", "writethrough", "directsync", "unsafe"]

DEFAULT_NIC = "default"  # the NAME of the NIC a guest without any [nic.NAME] gets
_USER_NIC = Nic(type="user")

PCI_DISKS = frozenset({"virtio", "nvme"})  # interfaces whose drives are PCI devices themselves
# Slots of the root bus that the boards use themselves: host bridge; q35's LPC, SATA and SMBus; the PIIX3's functions.
BOARD_SLOTS: Mapping[str, frozenset[int]] = {"pc-q35": frozenset({0x00, 0x1F}), "pc-i440fx": frozenset({0x00, 0x01})}


@dataclass(frozen=True, slots=True)
class Topology:
    """All parts of -smp. QEMU's own derivation has changed between machine types, so none is left to it."""

    sockets: int
    dies: int
    cores: int
    threads: int

    @property
    def vcpus(self) -> int:
        """Their product."""
        return self.sockets * self.dies * self.cores * self.threads


def topology(name: str, cpu: Cpu) -> Topology:
    """The guest's CPU topology; one of `sockets` or `cores` takes what remains. Raises Refused with the arithmetic."""
    dies, threads = cpu.dies or 1, cpu.threads or 1
    sockets = cpu.sockets or (1 if cpu.cores is None else max(1, cpu.vcpus // (dies * threads * cpu.cores)))
    cores = cpu.cores or max(1, cpu.vcpus // (sockets * dies * threads))
    found = Topology(sockets, dies, cores, threads)
    if found.vcpus != cpu.vcpus:
        raise Refused(
            f"guest {name}: {sockets} sockets x {dies} dies x {cores} cores x {threads} threads = {found.vcpus}, "
            f"but cpu.vcpus = {cpu.vcpus}",
            hint="correct cpu.vcpus, or leave out cpu.cores",
        )
    return found


def family(machine: str) -> str:
    """ "pc-q35" of "pc-q35-7.2": what an alias and all its versions share."""
    return re.sub(r"-\d+(\.\d+)*$", "", machine)


def require_board(name: str, machine: str) -> str:
    """The family of a board kvmd knows the slots of. Raises NotSupported for any other."""
    found = family(machine)
    if found not in BOARD_SLOTS:
        raise NotSupported(
            f'guest {name}: machine.type = "{machine}": only q35 and pc boards can be built yet',
            hint='set machine.type = "q35"',
        )
    return found


def root_bus(machine: str) -> str:
    """The PCI bus devices sit on."""
    return "pcie.0" if family(machine) == "pc-q35" else "pci.0"


def nics(guest: Guest) -> Mapping[str, Nic]:
    """The guest's NICs by NAME; without any in the file one in user mode, as QEMU does, unless that is switched off."""
    if guest.nic or not guest.machine.default_nic:
        return guest.nic
    return {DEFAULT_NIC: _USER_NIC}


def nic_driver(model: str) -> str:
    """QEMU's device for `nic.NAME.model`."""
    return "virtio-net-pci" if model == "virtio" else model


def video_model(guest: Guest) -> str:
    """One of video.model's words."""
    return guest.video.model or ("std" if guest.display.type != "none" else "none")


def pci_devices(guest: Guest, machine: str) -> tuple[str, ...]:
    """Ids of the devices that take a PCI slot, in the order in which first slots are given out."""
    found = ["video"] if video_model(guest) not in ("none", "ramfb") else []
    found += [f"disk-{name}" for name, disk in guest.disk.items() if places.disk_bus(disk, machine) in PCI_DISKS]
    found += [f"nic-{name}" for name in nics(guest)]
    found += [f"hostdev-{name}" for name in guest.hostdev]
    found += ["balloon"] if guest.ballooned else []
    found += ["rng"] if guest.rng.source else []
    found += ["agent"] if guest.agent.enabled else []
    found += ["pvpanic"] if guest.pvpanic.enabled else []
    found += ["watchdog"] if guest.watchdog.model == "i6300esb" else []
    found += ["sound"] if guest.sound.model else []
    return (*found, *places.controllers(guest, machine))


def cache_mode(disk: Disk, *, direct_works: bool) -> CacheMode:
    """The cache mode: as the file says, else past the host's page cache wherever O_DIRECT works."""
    return disk.cache or ("none" if direct_works else "writeback")


def is_direct(cache: CacheMode) -> bool:
    """Whether this mode opens the image with O_DIRECT."""
    return cache in ("none", "directsync")


def aio_mode(disk: Disk, cache: CacheMode) -> str:
    """How QEMU does the I/O: Linux AIO only works with O_DIRECT, threads always."""
    return disk.aio or ("native" if is_direct(cache) else "threads")


def rtc_base(guest: Guest) -> str:
    """Where the guest's clock begins: UTC, but Windows keeps local time."""
    return guest.rtc.base or ("localtime" if guest.machine.os == "windows" else "utc")


def hyperv(guest: Guest) -> bool:
    """Whether the guest gets the hv-* features."""
    return guest.machine.os == "windows" if guest.hyperv.enabled is None else guest.hyperv.enabled
