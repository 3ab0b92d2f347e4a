"""Pools of virtual functions: as many as host.toml says, changed only while none is in use. Pure.

The kernel refuses a new number while there is another (drivers/pci/iov.c, sriov_numvfs_store): it goes to 0 first,
and that takes every virtual function from whoever has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kvmd.actions import Problem, SetVfs
from kvmd.config.host import Sriov
from kvmd.facts import Facts, PciDevice

VFIO = "vfio-pci"


def plan_sriov(pools: Mapping[str, Sriov], facts: Facts) -> tuple[tuple[SetVfs, ...], tuple[Problem, ...]]:
    """Numbers to set, and what cannot be had. A pool that is declared no more gets the number it had before kvmd."""
    actions: list[SetVfs] = []
    problems: list[Problem] = []
    declared = set()
    for name, pool in sorted(pools.items()):
        device = find_pool(name, facts)
        if device is None:
            problems.append(_no_device(name, facts))
            continue
        declared.add(device.address)
        fault = _fault(name, pool.vfs, device, facts)
        if fault:
            problems.append(fault)
        elif device.vfs != pool.vfs:
            why = f"sriov.{name}.vfs = {pool.vfs}"
            actions.append(SetVfs(device=device.address, pool=name, old=device.vfs, new=pool.vfs, why=why))
    actions += _undeclared(declared, facts)
    # shrink before grow
    return tuple(sorted(actions, key=lambda action: (action.new > action.old, action.pool))), tuple(problems)


def find_pool(name: str, facts: Facts) -> PciDevice | None:
    """The physical function a pool's name stands for: its address or its interface's name."""
    for device in facts.pci or ():
        if device.parent is None and (device.address == name or name in device.links):
            return device
    return None


def virtual_functions(device: PciDevice, facts: Facts) -> tuple[PciDevice, ...]:
    """Those of a physical function, by number."""
    found = (each for each in facts.pci or () if each.parent == device.address)
    return tuple(sorted(found, key=lambda each: (each.index is None, each.index or 0, each.address)))


def in_use(device: PciDevice, facts: Facts) -> tuple[str, ...]:
    """Who uses the virtual functions of a physical one: "0000:3b:02.0 by guest web"."""
    return tuple(
        f"{each.address} by {user}" for each in virtual_functions(device, facts) if (user := _user(each, facts))
    )


def _user(device: PciDevice, facts: Facts) -> str | None:
    owner = facts.reservations.get(device.address)
    if owner is not None:  # of a guest that is off it is given back in this pass
        return f"guest {owner}" if any(life.name == owner and life.alive for life in facts.lives) else None
    if device.driver == VFIO:
        return f"{VFIO}, which kvmd did not bind"
    return f"the host ({device.uses[0].device} {device.uses[0].what})" if device.uses else None


def _fault(name: str, wanted: int, device: PciDevice, facts: Facts) -> Problem | None:
    subject = f"sriov {name}"
    if device.vfs == wanted:
        return None
    if not device.total_vfs:
        hint = "is SR-IOV switched on in the firmware, and does its driver offer it (sriov_totalvfs)?"
        return Problem(subject, f"{device.address} has no virtual functions", hint)
    if wanted > device.total_vfs:
        message = f"{wanted} virtual functions are wanted, {device.address} has at most {device.total_vfs}"
        return Problem(subject, message, f"lower sriov.{name}.vfs in host.toml, or its maximum is set in the firmware")
    if device.driver is None:
        return Problem(subject, f"{device.address} has no driver, which would make them", "load its driver first")
    users = in_use(device, facts)
    if device.vfs and users:
        message = (
            f"{wanted} virtual functions are wanted, {device.vfs} are there and {len(users)} of them in use "
            f"({', '.join(users)}); the kernel goes from {device.vfs} to {wanted} only by way of 0"
        )
        return Problem(subject, message, "stop these guests, then kvmd-cli apply")
    return None


def _undeclared(declared: Iterable[str], facts: Facts) -> Iterator[SetVfs]:
    devices = {device.address: device for device in facts.pci or ()}
    for address, before in sorted(facts.vfs_before.items()):
        device = devices.get(address)
        if device is None or address in declared or device.vfs == before or in_use(device, facts):
            continue
        name = device.links[0] if device.links else address
        why = f"no file declares sriov.{name} any more"
        yield SetVfs(device=address, pool=name, old=device.vfs, new=before, autoprobe=True, why=why)


def _no_device(name: str, facts: Facts) -> Problem:
    able = [device.links[0] if device.links else device.address for device in facts.pci or () if device.total_vfs]
    hint = f"with virtual functions there is: {', '.join(able)}" if able else "no device here has virtual functions"
    return Problem(f"sriov {name}", "this host has no such device", hint)
