"""Run in the lab: takes a PCI function for a guest, or gives it back, and dies before the Nth change as kill -9 would.

    python -m tests.rig.labkill take|give STATE ADDRESS GROUP N

Exits 9 when it died, 0 when there were fewer changes. `give` is what the next kvmd does: the guest's run has ended.
What is still journalled is printed. The kernel is the real one.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from kvmd.actions import BindDevice
from kvmd.effects.hostdevices import HostDevices
from kvmd.effects.netlink import Netlink
from kvmd.effects.records import EffectKind, GuestRun
from kvmd.effects.store import Store
from kvmd.effects.sysfs import HostTree
from kvmd.plan.vfio import releases

DIED = 9
GUEST, UID = "victim", 64999


class MortalTree(HostTree):
    """This host; the process ends without a word before change number `left`."""

    left = 0

    def write(self, path: str, value: str) -> None:
        self._count()
        super().write(path, value)

    def give(self, path: str, uid: int, gid: int, mode: int) -> None:
        self._count()
        super().give(path, uid, gid, mode)

    def _count(self) -> None:
        if self.left == 0:
            os._exit(DIED)
        self.left -= 1


async def run(verb: str, state: Path, address: str, group: int, changes: int) -> None:
    """One kvmd's part of it."""
    tree = MortalTree()
    tree.left = changes
    boot_id = tree.boot_id()
    store = Store(state)
    devices = HostDevices(tree, Netlink(), store, boot_id)
    if verb == "take":
        store.begin_start(GuestRun(name=GUEST, uuid=GUEST, uid=UID, boot_id=boot_id, nonce="n", begun_at=1.0))
        why = "a start that is interrupted"
        await devices.take(BindDevice(device=address, guest=GUEST, key="hostdev.x", group=group, uid=UID, why=why))
    else:
        store.end_run(GUEST, "", "", 2.0)
        entries = [entry for entry in store.journalled(boot_id) if entry.kind == EffectKind.VFIO]
        for action in releases({entry.subject: entry.new for entry in entries}, lambda _: False):
            await devices.give_back(action)
    for entry in store.journalled(boot_id):
        sys.stdout.write(f"{entry.key} {entry.new}\n")


if __name__ == "__main__":
    what, where, function, number, most = sys.argv[1:]
    Path(where).mkdir(exist_ok=True)
    asyncio.run(run(what, Path(where), function, int(number), int(most)))
