"""How a QEMU comes to be: intent, descriptors, launcher, hand-over. Ends with a process that is on record.

Order matters, since kvmd may be killed between any two steps: the intent is on disk before the first effect; the
process is on record before it can become QEMU; what is opened here lives in descriptors only, so a kvmd that dies
leaves nothing behind. The launcher starts first and the descriptors are opened while its interpreter loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass

from kvmd.config.guest import Guest
from kvmd.effects import birthmark
from kvmd.effects.handover import Asking, Spec
from kvmd.effects.laststart import LastStart
from kvmd.effects.process import Watched, allow_locking, spawn_launcher
from kvmd.effects.records import GuestRun
from kvmd.errors import Conflict, HostFailed, TimedOut
from kvmd.guest.services import Decided, Services
from kvmd.plan.vfio import memlock_bytes
from kvmd.qemu.fds import Launch

LAUNCHER_TIMEOUT_S = 30.0  # a loaded machine boots twenty guests; systemd itself may be busy
UNIT_CHECK_S = 2.0
GREETING_BASE_S = 10.0
FUNCTION_S = 10.0  # for each device of the host: its reset, and its ROM read
PREALLOC_S_PER_GIB = 4.0  # touching pages on a slow node, with compaction


@dataclass(frozen=True, slots=True)
class Newborn:
    """A QEMU that was exec'ed and has yet to answer."""

    process: Watched
    record: GuestRun
    launch: Launch
    last_start: LastStart  # to be kept once the start turns out well


@dataclass(eq=False)
class Birth:
    """One attempt to start one guest."""

    services: Services
    name: str
    _asking: asyncio.Future[Asking] | None = None
    _spawned: Watched | None = None
    _aborted: bool = False
    greeting_timeout_s: float = GREETING_BASE_S

    def __post_init__(self) -> None:
        # A launcher that systemd started is there before launch() runs.
        self._asking = asyncio.get_running_loop().create_future()

    def accept(self, asking: Asking) -> bool:
        """Take a launcher that is provably this birth's; False leaves it to be refused."""
        if self._asking is None or self._asking.done():
            return False
        if self._spawned:
            ours = asking.pid == self._spawned.process.pid
        else:
            ours = self.services.is_unit_of(self.name, asking.pid)
        if ours:
            self._asking.set_result(asking)
        return ours

    def abort(self) -> None:
        """Someone killed the guest before it was one."""
        self._aborted = True
        if self._spawned:
            self._spawned.kill()
        if self._asking and not self._asking.done():
            self._asking.cancel()

    async def launch(self) -> Newborn:
        """From the file to a QEMU that was exec'ed. Raises whatever made that impossible; nothing is left then."""
        decided = await self.services.decide(self.name)
        self.greeting_timeout_s = _greeting_timeout_s(decided.guest)
        with birthmark.held(self.services.paths.birth_marks, self.name):
            return await self._launch(decided)

    async def _launch(self, decided: Decided) -> Newborn:
        self.services.store.begin_start(decided.run)
        await self.services.take_devices(self.name, decided)
        if self.services.units is None:
            self._spawned = self._spawn()
            self.services.record_process(decided.run, self._spawned)
        elif self._asking and not self._asking.done():
            await self.services.start_unit(self.name, decided.guest)
        launch, descriptors = await self.services.open(self.name, decided)
        with contextlib.closing(descriptors):
            argv = launch.argv(decided.emulator)
            record = self.services.store.record_launch(self.name, decided.run.config_text, argv)
            asking = await self._await_launcher()
            process = self._spawned or self._watch(asking)
            if not self._spawned:
                record = self.services.record_process(decided.run, process)
            if decided.guest.memory.lock or decided.guest.passthrough:
                limit = None if decided.guest.memory.lock else memlock_bytes(decided.guest)
                allow_locking(self.name, process.process.pid, limit)
            spec = Spec(decided.run.uid, self.services.qemu_gid or decided.run.uid, self.services.qemu_groups, argv)
            asking.hand_over(spec, descriptors.pairs)
        self._spawned = None
        last = LastStart(
            name=self.name,
            uuid=record.uuid,
            uid=spec.uid,
            gid=spec.gid,
            groups=spec.groups,
            argv=argv,
            # a device of the host is bound by kvmd alone: standby.py knows no such kind, and says so
            open=(
                *descriptors.described,
                *({"fd": 0, "kind": f"{grant.key} (a device of the host)"} for grant in decided.grants),
            ),
            config=record.config_text,
        )
        return Newborn(process, record, launch, last)

    def has_memory(self) -> None:
        """QEMU answers, so it has all its pages: what is free now is free."""
        self.services.pages.settle(self.name)

    def _spawn(self) -> Watched:
        output = self.services.open_qemu_log(self.name)
        try:
            process = spawn_launcher(self.services.paths.run, self.name, output)
        finally:
            os.close(output)
        watched = Watched.open(process)
        if watched is None:
            raise HostFailed(f"guest {self.name}: the launcher ended at once")
        return watched

    async def _await_launcher(self) -> Asking:
        """The launcher's question; at once if it dies before it asks."""
        asking = self._asking
        if asking is None or self._aborted:
            raise Conflict(f"guest {self.name}: the start was cancelled")
        waits: set[asyncio.Future[Asking] | asyncio.Future[int | None]] = {asking}
        if self._spawned:
            waits.add(self._spawned.exited)
        for _ in range(round(LAUNCHER_TIMEOUT_S / UNIT_CHECK_S)):
            await asyncio.wait(waits, timeout=UNIT_CHECK_S, return_when=asyncio.FIRST_COMPLETED)
            if self._aborted or any(wait.done() for wait in waits):
                break
            await self.services.check_unit(self.name)
        if self._aborted or asking.cancelled():
            raise Conflict(f"guest {self.name}: the start was cancelled")
        if asking.done():
            return asking.result()
        if self._spawned and self._spawned.exited.done():
            words = self.services.last_words(self.name)
            raise HostFailed(f"guest {self.name}: the launcher ended before it asked for the guest: {words}")
        raise TimedOut(
            f"guest {self.name}: no launcher asked for it within {LAUNCHER_TIMEOUT_S:g} s",
            hint=f"journalctl -u kvmd-guest@{self.name}",
        )

    def _watch(self, asking: Asking) -> Watched:
        watched = self.services.watch_pid(asking.pid)
        if watched is None:
            raise HostFailed(f"guest {self.name}: its launcher (pid {asking.pid}) ended before the hand-over")
        return watched

    def close(self) -> None:
        """End the attempt: a launcher that came too late is refused, one that waits for us is killed."""
        if self._spawned:
            self._spawned.kill()
        self.services.pages.settle(self.name)
        asking, self._asking = self._asking, None
        if asking and asking.done() and not asking.cancelled():
            asking.result().refuse("the start failed")
        elif asking and not asking.done():
            asking.cancel()


def _greeting_timeout_s(guest: Guest) -> float:
    """How long QEMU may take to answer: it touches all preallocated memory before it does."""
    if isinstance(guest.start.timeout, float):
        return guest.start.timeout
    touched = guest.memory.preallocated or guest.memory.lock or bool(guest.passthrough)  # VFIO pins all of it
    gib = guest.memory.size / (1 << 30) if touched else 0.0
    return GREETING_BASE_S + FUNCTION_S * len(guest.passthrough) + PREALLOC_S_PER_GIB * gib
