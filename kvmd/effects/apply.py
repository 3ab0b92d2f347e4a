"""Carries host actions out, one at a time: the original is in the journal before the effect, always.

Guest actions are the supervisors' business. Nothing here decides; an action that fails raises a KvmdError and the
caller goes on with the next one.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from copy import copy
from functools import partial
from typing import assert_never

from kvmd.actions import (
    AttachUplink,
    BindDevice,
    DetachUplink,
    EnsureBridge,
    EnsureSwapFile,
    EnsureZram,
    HostAction,
    LoadModule,
    MountHugetlbfs,
    ReleaseDevice,
    RemoveBridge,
    RemoveSwapFile,
    RemoveZram,
    ReplaceRuleset,
    SetHugepages,
    SetPortVlans,
    SetVfs,
    ShapePort,
    StartDnsmasq,
    StopDnsmasq,
    UnloadModule,
    UnmountHugetlbfs,
    WriteKernelArgs,
    WriteKnob,
)
from kvmd.effects import hugetlbfs, kernelargs, modules, nft, records, swap, uplink
from kvmd.effects.dnsmasq import Dnsmasqs
from kvmd.effects.hostdevices import HostDevices
from kvmd.effects.interrupts import IRQ
from kvmd.effects.netlink import Netlink
from kvmd.effects.store import Store
from kvmd.effects.sysfs import HostTree
from kvmd.errors import HostFailed
from kvmd.facts import TunedKnob
from kvmd.plan.ports import tbf_of

_log = logging.getLogger(__name__)
ABSENT = ""  # the original of something that was not there


class HostApplier:
    """The only writer of host state."""

    def __init__(self, tree: HostTree, netlink: Netlink, dnsmasqs: Dnsmasqs, store: Store) -> None:
        self._tree = tree
        self._netlink = netlink
        self._dnsmasqs = dnsmasqs
        self._store = store
        self._boot_id = tree.boot_id()
        self._devices = HostDevices(tree, netlink, store, self._boot_id)  # journals for itself
        self.trials = uplink.Trials(store, self._boot_id)
        self._journalling = True
        self.knobs = asyncio.Lock()  # held where a knob and its record are written, or read together

    def undoing(self) -> HostApplier:
        """The same, writing no journal: what is being undone stays on record as it was done until it is forgotten.

        Else a kvmd killed in between would find its own value under a record of the original: somebody else's.
        """
        other = copy(self)
        other._journalling = False
        return other

    async def apply(self, action: HostAction) -> None:
        """Do one action and verify it. KvmdError says what the kernel or tool refused."""
        match action:
            case WriteKnob():
                await self._write_knob(action)
            case WriteKernelArgs():
                self._journal(records.kernel_args_key(action.path), action.old, action.new, action.why)
                await asyncio.to_thread(kernelargs.write, self._tree, action)
            case SetHugepages():
                key = records.hugepages_key(action.node, action.page_bytes)
                self._journal(key, str(action.old), str(action.new), action.why)
                resize = partial(self._tree.set_hugepages, compact=action.compact)
                await asyncio.to_thread(resize, action.node, action.page_bytes, action.new)
            case MountHugetlbfs():
                self._journal(records.hugetlbfs_key(action.path), action.kind, str(action.page_bytes), action.why)
                await asyncio.to_thread(hugetlbfs.mount, action.path, action.page_bytes, action.limit_bytes)
            case UnmountHugetlbfs():
                await asyncio.to_thread(hugetlbfs.unmount, action.path, remove=action.remove)
                self._store.forget(records.hugetlbfs_key(action.path))
            case EnsureSwapFile():
                self._journal(records.swap_file_key(action.path), ABSENT, str(action.size_bytes), action.why)
                await asyncio.to_thread(swap.ensure_file, self._tree, action.path, action.size_bytes)
            case RemoveSwapFile():
                await asyncio.to_thread(swap.remove_file, self._tree, action.path)
                self._store.forget(records.swap_file_key(action.path))
            case EnsureZram():
                await self._start_zram(action)
            case RemoveZram():
                await asyncio.to_thread(swap.remove_zram, self._tree, action.number)
                self._store.forget(records.zram_key())
            case EnsureBridge():
                if action.change == "create":
                    self._journal(records.bridge_key(action.bridge), ABSENT, action.network, action.why)
                await self._netlink.ensure_bridge(action)
            case SetPortVlans():
                await self._netlink.set_port_vlans(action)
            case AttachUplink():
                self._journal(
                    records.uplink_key(action.interface), "up" if action.was_up else "down", action.bridge, action.why
                )
                self.trials.begin(action)
                await uplink.attach(self._netlink, action)
            case DetachUplink():
                await uplink.detach(self._netlink, action)
                self._store.forget(records.uplink_key(action.interface))
            case RemoveBridge():
                await self._netlink.remove_bridge(action)
                self._store.forget(records.bridge_key(action.bridge))
            case ReplaceRuleset():
                self._journal(records.ruleset_key(action.table), ABSENT, action.change, action.why)
                await nft.replace(action)
                if not action.text:
                    self._store.forget(records.ruleset_key(action.table))
            case ShapePort():  # of a TAP of ours, and gone with it: nothing to put back
                await self._netlink.shape(action.tap, tbf_of(action.rate))
            case StartDnsmasq():
                self._journal(records.dnsmasq_key(action.network), ABSENT, action.network, action.why)
                await self._dnsmasqs.start(action)
            case StopDnsmasq():
                await self._dnsmasqs.stop(action)
                self._store.forget(records.dnsmasq_key(action.network))
            case LoadModule():
                self._journal(records.module_key(action.name), ABSENT, action.name, action.why)
                await modules.load(self._tree, action.name)
            case UnloadModule():
                await modules.unload(self._tree, action.name)
                self._store.forget(records.module_key(action.name))
            case SetVfs():
                await self._devices.set_vfs(action)
            case BindDevice():
                await self._devices.take(action)
            case ReleaseDevice():
                await self._devices.give_back(action)
            case _:
                assert_never(action)

    async def _write_knob(self, action: WriteKnob) -> None:
        self._journal(records.knob_key(action.path), action.old, action.new, action.why)
        try:
            async with self.knobs:
                await asyncio.to_thread(self._tree.write_knob, action.path, action.new)
                if not action.requirement:
                    self._store.set_tuned(TunedKnob(action.path, action.new, action.why), self._boot_id)
        except HostFailed as error:
            # the kernel manages this interrupt's affinity itself and says so only now (kernel/irq/proc.c)
            if not action.path.startswith(IRQ) or error.details.get("errno") not in (errno.EIO, errno.EPERM):
                raise
            self._store.forget(records.knob_key(action.path))
            self._journal(records.fixed_irq_key(action.path), action.old, action.old, "the kernel manages it")
            _log.info("%s stays at %s: the kernel manages this interrupt itself", action.path, action.old)

    async def _start_zram(self, action: EnsureZram) -> None:
        """The journal has which devices there were before, then the number of ours: a kvmd killed between the two
        takes up a device that was added since and that nobody has set up."""
        key = records.zram_key()
        number = action.number if action.number is not None else self._added_zram()
        if number is None:
            there = ",".join(str(zram.number) for zram in swap.observe_zrams(self._tree) or ())
            self._journal(key, there, "", action.why)
            number = swap.add_zram()
        self._journal(key, "", str(number), action.why)
        try:
            await asyncio.to_thread(swap.start_zram, self._tree, number, action.size_bytes)
        except HostFailed:
            await asyncio.to_thread(swap.discard_zram, self._tree, number)
            self._store.forget(key)
            raise

    def _added_zram(self) -> int | None:
        """A device that an earlier kvmd added and did not come to use."""
        entry = next((e for e in self._store.journalled(self._boot_id) if e.key == records.zram_key()), None)
        if entry is None:
            return None
        before = {int(number) for number in entry.original.split(",") if number}
        zrams = swap.observe_zrams(self._tree) or ()
        areas = {area.path for area in swap.observe_swaps(self._tree, [zram.path for zram in zrams]) or ()}
        unused = [zram for zram in zrams if zram.path not in areas]
        mine = (z.number for z in unused if str(z.number) == entry.new or not (z.size_bytes or z.number in before))
        return next(mine, None)

    def _journal(self, key: str, original: str, new: str, why: str) -> None:
        if self._journalling:
            self._store.journal(key, original, new, self._boot_id, why)
