"""PCI functions taken from their driver and given back, virtual functions made, through sysfs. Reads back what it did.

Sources: Documentation/ABI/testing/sysfs-bus-pci (driver_override, bind, unbind, drivers_probe, sriov_numvfs),
Documentation/driver-api/vfio.rst. driver_override names the one driver a function may have, so at no moment can
another driver of the host take it. All calls block; an unbind waits for the driver.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from kvmd.actions import SetVfs, VfPort
from kvmd.effects import pci
from kvmd.effects.pci import DEVICES
from kvmd.effects.tree import Tree
from kvmd.errors import Conflict, HostFailed, NotFound

VFIO = "vfio-pci"
_DRIVERS = "/sys/bus/pci/drivers"
_PROBE = "/sys/bus/pci/drivers_probe"
_NO_OVERRIDE = "\n"  # an empty line takes it back (drivers/base/driver.c, driver_set_override)


@dataclass(frozen=True, slots=True)
class Before:
    """What a function was before kvmd took it: the original in the journal."""

    driver: str | None = None
    override: str | None = None
    group: int | None = None  # IOMMU group, to be known when the function is gone
    port: VfPort | None = None

    def encode(self) -> str:
        """As text for the journal."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> Before:
        """From the journal; HostFailed when an entry is not one of ours."""
        try:
            data: dict[str, Any] = json.loads(text)
            port = VfPort(**data["port"]) if data.get("port") else None
            return cls(data["driver"], data["override"], data["group"], port)
        except (ValueError, KeyError, TypeError) as error:
            raise HostFailed(f"the journal's entry of a PCI device cannot be read: {error}") from None


def before(tree: Tree, address: str, port: VfPort | None = None) -> Before:
    """What it is now. NotFound when it is not there."""
    here = f"{DEVICES}/{address}"
    if not tree.exists(here):
        raise NotFound(f"there is no PCI function {address} any more", hint="lspci -D")
    override = tree.read(f"{here}/driver_override")
    none = override in (None, "", "(null)")
    return Before(driver(tree, address), None if none else override, group(tree, address), port)


def driver(tree: Tree, address: str) -> str | None:
    """The driver that has it."""
    target = tree.link(f"{DEVICES}/{address}/driver")
    return target.rpartition("/")[2] if target else None


def group(tree: Tree, address: str) -> int | None:
    """Its IOMMU group."""
    target = tree.link(f"{DEVICES}/{address}/iommu_group")
    return int(target.rpartition("/")[2]) if target else None


def bind(tree: Tree, address: str) -> None:
    """Give it to vfio-pci; done already is done. HostFailed and as it was before, NotFound, Conflict when in use."""
    was = before(tree, address)
    if was.driver == VFIO:
        return
    if not tree.exists(f"{_DRIVERS}/{VFIO}"):
        raise HostFailed(f"{address}: the driver {VFIO} is not loaded", hint="modprobe vfio-pci")
    _refuse_used_disks(tree, address)
    try:
        _rebind(tree, address, VFIO)
    except HostFailed:
        restore(tree, address, was)
        raise


def restore(tree: Tree, address: str, was: Before) -> None:
    """Give it back to the driver it had. A function that is gone is given back. HostFailed, Conflict when in use."""
    if not tree.exists(f"{DEVICES}/{address}"):
        return
    if driver(tree, address) == VFIO != was.driver:
        _refuse_open_group(tree, address)
    if driver(tree, address) != was.driver:
        _rebind(tree, address, was.driver)
    _write_gone_ok(tree, address, f"{DEVICES}/{address}/driver_override", (was.override or "") + "\n")


def _rebind(tree: Tree, address: str, wanted: str | None) -> None:
    """From whatever driver it has to `wanted` (None: to none)."""
    here = f"{DEVICES}/{address}"
    _write_gone_ok(tree, address, f"{here}/driver_override", f"{wanted}\n" if wanted else _NO_OVERRIDE)
    if driver(tree, address) is not None:
        _write_gone_ok(tree, address, f"{here}/driver/unbind", address)
    if wanted is None:
        return
    if tree.exists(here):
        tree.write(_PROBE, address)
    found = driver(tree, address)
    if found != wanted and tree.exists(here):
        raise HostFailed(
            f"{address} was to be driven by {wanted}, and {'nobody took it' if found is None else f'{found} has it'}",
            hint=f"journalctl -k -g {address}",
            device=address,
        )


def _write_gone_ok(tree: Tree, address: str, path: str, value: str) -> None:
    """A device may vanish between two writes (hot-unplug, sriov_numvfs): then there is nothing left to do."""
    try:
        tree.write(path, value)
    except HostFailed as error:
        if error.details.get("errno") not in (errno.ENODEV, errno.ENOENT) or _still_there(tree, address, path):
            raise


def _still_there(tree: Tree, address: str, path: str) -> bool:
    """Whether the device is there, and the driver to unbind it from."""
    if path.endswith("/unbind"):
        return driver(tree, address) is not None
    return tree.exists(f"{DEVICES}/{address}")


def _refuse_used_disks(tree: Tree, address: str) -> None:
    """The kernel would take a disk away from whoever uses it: ask for it exclusively first, which shows any user."""
    for name in pci.block_devices(tree, address):
        try:
            os.close(os.open(tree.path(f"/dev/{name}"), os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            if error.errno == errno.EBUSY:
                hint = f"lsblk /dev/{name}; `fuser -v /dev/{name}` and `zpool status` know more"
                raise Conflict(f"{address}: /dev/{name} is in use", hint=hint) from None


# ---- the group's node -----------------------------------------------------------------------------------------------


def node(number: int) -> str:
    """What opens an IOMMU group."""
    return f"/dev/vfio/{number}"


def _refuse_open_group(tree: Tree, address: str) -> None:
    """An unbind of what somebody has open waits for him, for ever (drivers/vfio): so look who has, first.

    Not by opening it: kvmd.service may open no VFIO device.
    """
    number = group(tree, address)
    path = None if number is None else node(number)
    if path is None or not tree.exists(path):
        return
    for pid in tree.numbered("/proc", ""):
        if any(tree.link(f"/proc/{pid}/fd/{fd}") == path for fd in tree.names(f"/proc/{pid}/fd")):
            name = tree.read(f"/proc/{pid}/comm")
            raise Conflict(f"{address}: {path} is open in process {pid} ({name})", hint=f"end it first: ps -fp {pid}")


# ---- virtual functions ----------------------------------------------------------------------------------------------


def set_vfs(tree: Tree, action: SetVfs) -> None:
    """Make so many virtual functions, by way of 0, and read back. HostFailed."""
    here = f"{DEVICES}/{action.device}"
    now = tree.number(f"{here}/sriov_numvfs")
    if now is None:
        raise NotFound(f"{action.device} is not there, or has no virtual functions", hint="lspci -D")
    if now != action.new and now:
        tree.write(f"{here}/sriov_numvfs", "0")
    if tree.exists(f"{here}/sriov_drivers_autoprobe"):
        tree.write(f"{here}/sriov_drivers_autoprobe", "1" if action.autoprobe else "0")
    if now != action.new and action.new:
        tree.write(f"{here}/sriov_numvfs", str(action.new))
    found = tree.number(f"{here}/sriov_numvfs")
    if found != action.new:
        raise HostFailed(
            f"{action.device}: {action.new} virtual functions were asked for, there are {found}",
            hint=f"journalctl -k -g {action.device}; its bus may be too small (pci=realloc, pci=assign-busses)",
        )
