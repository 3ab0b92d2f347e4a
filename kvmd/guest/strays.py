"""QEMUs of our guests that no record of this boot knows: born without kvmd, or when its database was lost.

What proves them ours is the UUID on their command line *and* the uid under which that guest was last started
(last-start.json, which only root can write). Looking only: nothing is changed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection
from pathlib import Path

from kvmd.effects.laststart import LastStart, load
from kvmd.effects.proc import QemuProcess
from kvmd.effects.records import GuestRun
from kvmd.guest.services import Services


def find(services: Services, known: Collection[str]) -> tuple[GuestRun, ...]:
    """Every such QEMU as a run to be recorded, except of the guests in `known`."""
    with contextlib.suppress(FileNotFoundError):
        names = sorted({entry.name for entry in (services.paths.state / "guests").iterdir()} - set(known))
        return find_of(services, names)
    return ()


def find_of(services: Services, names: Collection[str]) -> tuple[GuestRun, ...]:
    """The same for these guests. One walk through /proc, and none when none of them was ever started."""
    started = {last.uuid: last for name in names if (last := load(services.paths.guest_state(name)))}
    qemus = services.tree.qemus() if started else ()
    return tuple(
        _run(services, started[qemu.uuid], qemu)
        for qemu in qemus
        if qemu.uuid in started and _owner(qemu.process.pid) == started[qemu.uuid].uid
    )


def _run(services: Services, last: LastStart, qemu: QemuProcess) -> GuestRun:
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - qemu.process.start_time / os.sysconf("SC_CLK_TCK")
    return GuestRun(
        name=last.name,
        uuid=last.uuid,
        uid=last.uid,
        boot_id=services.tree.boot_id(),
        nonce="",
        begun_at=services.now() - age_s,
        process=qemu.process,
        running_at=services.now() - age_s,
        config_text=last.config,
        argv=qemu.argv,
    )


def _owner(pid: int) -> int | None:
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None
