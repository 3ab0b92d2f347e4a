"""NICs made ports of a bridge and taken out again by rtnetlink, and what is remembered of each: trial, kept, undone."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, replace
from typing import Any

from kvmd.actions import AttachUplink, DetachUplink
from kvmd.effects.netlink import Netlink
from kvmd.effects.store import Store
from kvmd.errors import Conflict, HostFailed, Refused
from kvmd.facts import UplinkTrial
from kvmd.plan.links import is_our_bridge

_META = "uplink:"


def boot_s() -> float:
    """CLOCK_BOOTTIME: it goes on while the host sleeps, and no one sets it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Trials:
    """What is on record of networks' uplinks, in state.db."""

    def __init__(self, store: Store, boot_id: str) -> None:
        self._store = store
        self._boot_id = boot_id
        self.changed = asyncio.Event()  # a trial began or ended

    def all(self) -> tuple[UplinkTrial, ...]:
        """What counts now, by network: what was kept, and the trials and undoings of this boot."""
        found = (_parsed(text) for _, text in sorted(self._store.metas(_META).items()))
        return tuple(one for one in found if one and (one.state == "kept" or one.boot_id == self._boot_id))

    def pending(self) -> tuple[UplinkTrial, ...]:
        """Trials that nobody has confirmed, the first to end first."""
        return tuple(sorted((one for one in self.all() if one.state == "trial"), key=lambda one: one.deadline_s))

    def begin(self, action: AttachUplink) -> None:
        """Recorded before the NIC is touched: a kvmd killed after it finds the deadline."""
        made = UplinkTrial(action.network, action.interface, action.bridge, "kept", self._boot_id)
        if action.rollback_s:
            made = replace(made, state="trial", deadline_s=boot_s() + action.rollback_s)
        self._write(made)

    def settle(self, trial: UplinkTrial, *, keep: bool) -> None:
        """The trial is over."""
        self._write(replace(trial, state="kept" if keep else "undone"))

    def forgive(self) -> None:
        """A person applies: what was undone may be tried again."""
        for trial in self.all():
            if trial.state == "undone":
                self._store.set_meta(_META + trial.network, "")

    def _write(self, trial: UplinkTrial) -> None:
        self._store.set_meta(_META + trial.network, json.dumps(asdict(trial)))
        self.changed.set()


def _parsed(text: str) -> UplinkTrial | None:
    """None for a record that is empty or damaged."""
    try:
        raw: Any = json.loads(text or "null")
        return UplinkTrial(**raw) if isinstance(raw, dict) else None
    except (ValueError, TypeError, RecursionError):
        return None


async def attach(netlink: Netlink, action: AttachUplink) -> None:
    """The NIC is up and a port of the bridge. Refused if it carries something after all, HostFailed."""
    nic, bridge = await netlink.find(action.interface), await netlink.find(action.bridge)
    if bridge is None or not is_our_bridge(bridge):
        raise Conflict(f'"{action.bridge}" is not a bridge that kvmd made', hint="kvmd-cli plan says what it is")
    if nic is None:
        raise HostFailed(f'uplink "{action.interface}" does not exist', hint="did somebody take the card out?")
    if nic.addresses:  # it came since the plan was made
        raise Refused(f"uplink {nic.name} carries the host's address {nic.addresses[0]}", hint="take another NIC")
    what = f"put {nic.name} into {bridge.name}"
    await netlink.change(what, "set", index=nic.index, master=bridge.index)
    await netlink.change(f"set {nic.name} up", "set", index=nic.index, state="up")


async def detach(netlink: Netlink, action: DetachUplink) -> None:
    """The NIC is no port of that bridge any more; one that is gone or elsewhere is left as it is. HostFailed."""
    nic, bridge = await netlink.find(action.interface), await netlink.find(action.bridge)
    if nic is None or bridge is None or nic.master != str(bridge.index):
        return
    what = f"take {nic.name} out of {bridge.name}"
    await netlink.change(what, "set", index=nic.index, master=0, gone_ok=True)
    if not action.was_up:
        await netlink.change(f"set {nic.name} down", "set", index=nic.index, state="down", gone_ok=True)
