"""Carries host actions out, one at a time: the original is in the journal before the effect, always.

Guest actions are the supervisors' business. Nothing here decides; an action that fails raises a KvmdError and the
caller goes on with the next one.
"""

from __future__ import annotations

import asyncio
from copy import copy
from functools import partial
from typing import assert_never

from kvmd.actions import (
    EnsureBridge,
    HostAction,
    LoadModule,
    RemoveBridge,
    ReplaceRuleset,
    SetHugepages,
    SetPortVlans,
    StartDnsmasq,
    StopDnsmasq,
    UnloadModule,
    WriteKnob,
)
from kvmd.effects import modules, nft, records
from kvmd.effects.dnsmasq import Dnsmasqs
from kvmd.effects.netlink import Netlink
from kvmd.effects.store import Store
from kvmd.effects.sysfs import HostTree
from kvmd.facts import TunedKnob

ABSENT = ""  # the original of something that was not there


class HostApplier:
    """The only writer of host state."""

    def __init__(self, tree: HostTree, netlink: Netlink, dnsmasqs: Dnsmasqs, store: Store) -> None:
        self._tree = tree
        self._netlink = netlink
        self._dnsmasqs = dnsmasqs
        self._store = store
        self._boot_id = tree.boot_id()
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
                self._journal(records.knob_key(action.path), action.old, action.new, action.why)
                async with self.knobs:
                    await asyncio.to_thread(self._tree.write_knob, action.path, action.new)
                    if not action.requirement:
                        self._store.set_tuned(TunedKnob(action.path, action.new, action.why), self._boot_id)
            case SetHugepages():
                key = records.hugepages_key(action.node, action.page_bytes)
                self._journal(key, str(action.old), str(action.new), action.why)
                resize = partial(self._tree.set_hugepages, compact=action.compact)
                await asyncio.to_thread(resize, action.node, action.page_bytes, action.new)
            case EnsureBridge():
                if action.change == "create":
                    self._journal(records.bridge_key(action.bridge), ABSENT, action.network, action.why)
                await self._netlink.ensure_bridge(action)
            case SetPortVlans():
                await self._netlink.set_port_vlans(action)
            case RemoveBridge():
                await self._netlink.remove_bridge(action)
                self._store.forget(records.bridge_key(action.bridge))
            case ReplaceRuleset():
                self._journal(records.ruleset_key(action.table), ABSENT, action.change, action.why)
                await nft.replace(action)
                if not action.text:
                    self._store.forget(records.ruleset_key(action.table))
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
            case _:
                assert_never(action)

    def _journal(self, key: str, original: str, new: str, why: str) -> None:
        if self._journalling:
            self._store.journal(key, original, new, self._boot_id, why)
