"""Who has which PCI function: reserved in the journal before it is taken, given back when its guest is off.

A reservation names a guest; it stands as long as that guest has a run on record (pid, start time and boot id are the
run's). So what a kvmd that was killed half-way left is found by the next one: either the guest lives and keeps its
devices, or each step that was done is undone from what the journal says was there before.
"""

from __future__ import annotations

import asyncio
import contextlib

from kvmd.actions import BindDevice, ReleaseDevice, SetVfs, VfPort
from kvmd.effects import pci, records, vfio
from kvmd.effects.netlink import Netlink
from kvmd.effects.records import EffectKind
from kvmd.effects.store import Store
from kvmd.effects.tree import Tree
from kvmd.errors import Conflict, HostFailed
from kvmd.facts import JournalEntry

_PRIVATE = 0o600


class HostDevices:
    """The only one that takes PCI functions and gives them back; one at a time."""

    def __init__(self, tree: Tree, netlink: Netlink, store: Store, boot_id: str) -> None:
        self._tree = tree
        self._netlink = netlink
        self._store = store
        self._boot_id = boot_id
        self._lock = asyncio.Lock()

    async def take(self, action: BindDevice) -> None:
        """Bind it for a guest that has a run on record. Conflict when another guest has it; HostFailed, NotFound."""
        async with self._lock:
            entry = self._entry(records.vfio_key(action.device))
            if entry is not None and entry.new != action.guest:
                await self._undo(entry)  # refuses when that guest lives
                entry = None
            if entry is None:
                port = await self._port(action.port) if action.port else None
                was = await asyncio.to_thread(vfio.before, self._tree, action.device, port)
                self._journal(records.vfio_key(action.device), was.encode(), action.guest, action.why)
            await asyncio.to_thread(vfio.bind, self._tree, action.device)
            await self._own_group(action)
            if action.port:
                await self._netlink.set_vf(action.port)

    async def give_back(self, action: ReleaseDevice) -> None:
        """To the driver it had. What is nobody's any more is given back. Conflict while its guest lives."""
        async with self._lock:
            entry = self._entry(records.vfio_key(action.device))
            if entry is not None and entry.new == action.guest:
                await self._undo(entry)

    async def set_vfs(self, action: SetVfs) -> None:
        """Change the number of virtual functions. Conflict while one is in use; HostFailed."""
        async with self._lock:
            taken = [e.subject for e in self._entries(EffectKind.VFIO) if self._parent(e.subject) == action.device]
            if taken:
                raise Conflict(f"{action.pool}: {', '.join(taken)} are in use", hint="stop their guests first")
            here = f"{pci.DEVICES}/{action.device}"
            autoprobe = self._tree.read(f"{here}/sriov_drivers_autoprobe") or "1"
            original = f"{self._tree.number(f'{here}/sriov_numvfs') or 0},{autoprobe}"
            self._journal(records.sriov_key(action.device), original, str(action.new), action.why)
            await asyncio.to_thread(vfio.set_vfs, self._tree, action)
            entry = self._entry(records.sriov_key(action.device))
            if entry and entry.original == f"{action.new},{int(action.autoprobe)}":
                self._store.forget(entry.key)

    # ---- one step each ------------------------------------------------------------------------------------------

    async def _undo(self, entry: JournalEntry) -> None:
        """Give one function back and forget it; the group's node with the last of its functions."""
        if any(run.name == entry.new and run.boot_id == self._boot_id for run in self._store.runs()):
            raise Conflict(f"{entry.subject} is given to guest {entry.new}", hint=f"kvmd-cli stop {entry.new}")
        was = vfio.Before.decode(entry.original)
        if was.port:
            with contextlib.suppress(HostFailed):  # the card itself may be gone
                await self._netlink.set_vf(was.port)
        await asyncio.to_thread(vfio.restore, self._tree, entry.subject, was)
        mates = [e for e in self._entries(EffectKind.VFIO) if vfio.Before.decode(e.original).group == was.group]
        if was.group is not None and len(mates) == 1:
            self._disown_group(was.group)
        self._store.forget(entry.key)

    async def _own_group(self, action: BindDevice) -> None:
        """The guest's uid opens its group, and nobody else does."""
        path = vfio.node(action.group)
        was = self._tree.owner(path)
        if was is None:
            raise HostFailed(f"{action.device} is bound to {vfio.VFIO}, but there is no {path}", hint="ls -l /dev/vfio")
        if was == (action.uid, was[1], _PRIVATE):
            return
        original = f"{was[0]}:{was[1]}:{was[2]:o}"
        self._journal(records.vfio_group_key(action.group), original, str(action.uid), action.why)
        self._tree.give(path, action.uid, was[1], _PRIVATE)

    def _disown_group(self, group: int) -> None:
        entry = self._entry(records.vfio_group_key(group))
        if entry is None:
            return
        uid, gid, mode = entry.original.split(":")
        if self._tree.owner(vfio.node(group)) is not None:  # else the node went with the last function of vfio-pci's
            self._tree.give(vfio.node(group), int(uid), int(gid), int(mode, 8))
        self._store.forget(entry.key)

    async def _port(self, wanted: VfPort) -> VfPort | None:
        """How the physical function treats this one now: what is put back later."""
        return await self._netlink.vf(wanted.link, wanted.index)

    # ---- small things -------------------------------------------------------------------------------------------

    def _journal(self, key: str, original: str, new: str, why: str) -> None:
        self._store.journal(key, original, new, self._boot_id, why)

    def _entries(self, kind: EffectKind) -> list[JournalEntry]:
        return [entry for entry in self._store.journalled(self._boot_id) if entry.kind == kind]

    def _entry(self, key: str) -> JournalEntry | None:
        return next((entry for entry in self._store.journalled(self._boot_id) if entry.key == key), None)

    def _parent(self, address: str) -> str | None:
        target = self._tree.link(f"{pci.DEVICES}/{address}/physfn")
        return target.rpartition("/")[2] if target else None
