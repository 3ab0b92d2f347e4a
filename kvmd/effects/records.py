"""The rows of kvmd's databases as the rest of kvmd sees them: frozen, typed, without SQL.

Times are UNIX seconds; boot ids are /proc/sys/kernel/random/boot_id.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from kvmd.facts import Process

WantedState = Literal["running", "stopped"]


class EffectKind(StrEnum):
    """What of the host kvmd changes and can undo; the part of a journal key before the first colon."""

    KNOB = "knob"
    HUGEPAGES = "hugepages"
    BRIDGE = "bridge"
    UPLINK = "uplink"
    RULESET = "ruleset"
    TAP_SCRIPT = "tap_script"
    DNSMASQ = "dnsmasq"
    KERNEL_ARGS = "kernel-args"
    FIXED_IRQ = "fixed-irq"
    MODULE = "module"
    HUGETLBFS = "hugetlbfs"
    SWAP_FILE = "swapfile"
    ZRAM = "zram"
    SRIOV = "sriov"
    VFIO = "vfio"
    VFIO_GROUP = "vfio_group"


OUTLIVE_BOOT = (EffectKind.SWAP_FILE,)  # what a reboot does not undo


def knob_key(path: str) -> str:
    """Journal key of one sysfs or procfs file."""
    return f"{EffectKind.KNOB}:{path}"


def kernel_args_key(path: str) -> str:
    """Journal key of the boot loader's drop-in."""
    return f"{EffectKind.KERNEL_ARGS}:{path}"


def fixed_irq_key(path: str) -> str:
    """Journal key of an interrupt's file in which the kernel refused a change: nothing to undo, and not tried again."""
    return f"{EffectKind.FIXED_IRQ}:{path}"


def hugepages_key(node: int, page_bytes: int) -> str:
    """Journal key of one node's pool of one page size."""
    return f"{EffectKind.HUGEPAGES}:{node}:{page_bytes}"


def bridge_key(bridge: str) -> str:
    """Journal key of a bridge kvmd made."""
    return f"{EffectKind.BRIDGE}:{bridge}"


def uplink_key(interface: str) -> str:
    """Journal key of a NIC kvmd made a bridge's port; its original is "up" or "down", its new value the bridge."""
    return f"{EffectKind.UPLINK}:{interface}"


def ruleset_key(table: str) -> str:
    """Journal key of an nft table of kvmd's ("inet kvmd")."""
    return f"{EffectKind.RULESET}:{table}"


def tap_script_key(guest: str, nic: str) -> str:
    """Journal key of the scripts of a guest's TAP: `original` is the downscript, `new` the TAP."""
    return f"{EffectKind.TAP_SCRIPT}:{guest}:{nic}"


def dnsmasq_key(network: str) -> str:
    """Journal key of a network's DHCP and DNS server."""
    return f"{EffectKind.DNSMASQ}:{network}"


def module_key(name: str) -> str:
    """Journal key of a kernel module kvmd loaded."""
    return f"{EffectKind.MODULE}:{name}"


def hugetlbfs_key(path: str) -> str:
    """Journal key of a hugetlbfs kvmd mounted; its original is what was at the path."""
    return f"{EffectKind.HUGETLBFS}:{path}"


def swap_file_key(path: str) -> str:
    """Journal key of a swap file kvmd made."""
    return f"{EffectKind.SWAP_FILE}:{path}"


def zram_key() -> str:
    """Journal key of kvmd's zram device. Its number is the entry's `new` as soon as there is one."""
    return f"{EffectKind.ZRAM}:swap"


def sriov_key(device: str) -> str:
    """Journal key of a device's number of virtual functions; the original is "NUMBER,AUTOPROBE"."""
    return f"{EffectKind.SRIOV}:{device}"


def vfio_key(device: str) -> str:
    """Journal key of a PCI function bound for a guest, whose name is `new`: while it is there it is reserved."""
    return f"{EffectKind.VFIO}:{device}"


def vfio_group_key(group: int) -> str:
    """Journal key of the node of an IOMMU group; the original is "UID:GID:MODE"."""
    return f"{EffectKind.VFIO_GROUP}:{group}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was last asked of a guest, by whom and why."""

    guest: str
    state: WantedState
    actor: str
    reason: str
    time: float


@dataclass(frozen=True, slots=True)
class Hold:
    """Hands off this guest: no autostart, restart or reconcile touches it."""

    guest: str
    actor: str
    reason: str
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRun:
    """One QEMU of a guest, from the intent to start it on. `process` and `running_at` are None until known."""

    name: str
    uuid: str
    uid: int
    boot_id: str
    nonce: str  # in QEMU's argv: proves a process to be this very run
    begun_at: float
    process: Process | None = None
    running_at: float | None = None
    config_text: str = ""  # the TOML it was started with, byte for byte
    argv: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GuestEnd:
    """How the last run of a guest ended; `begun_at` and `process` are None when no run was on record."""

    guest: str
    reason: str
    detail: str
    time: float
    begun_at: float | None = None
    process: Process | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for subscribers and `kvmd-cli events`. `data` is the text of a JSON object."""

    cursor: int
    time: float
    type: str
    guest: str | None
    actor: str | None
    data: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What one guest needed at that time: of memory, and its QEMU beside it (None: not measured)."""

    time: float
    guest: str
    demand_bytes: int
    overhead_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What the tuning agent decided about a guest (None: about the host). `data` is the text of a JSON object."""

    time: float
    guest: str | None
    data: str
