"""The tuning agent's shell: looks, turns the pure engine, carries out or only advises, and keeps the record.

All judgement is in the engine; here are clocks, deadlines, the budget of monitor calls and what happens when something
does not answer. One guest that hangs delays no other. Nothing is undone when the daemon ends: guests keep what they
have, and the next kvmd begins from the sizes it finds. `restore` gives everything back and is called on release.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvmd.errors import KvmdError
from kvmd.tuning import constants as c
from kvmd.tuning.decision import Decision, Kind, mib
from kvmd.tuning.engine import EngineState, Tick, applied, tick
from kvmd.tuning.ksm import KsmLimits, KsmSample, KsmState, decide_ksm, ksm_applied
from kvmd.tuning.logbook import Entry, Logbook, Recorder
from kvmd.tuning.snapshot import (
    BalloonReading,
    GuestFacts,
    GuestSample,
    HostSample,
    Limits,
    Mode,
    Snapshot,
    spare_bytes,
    stats_seen_at,
    usable_bytes,
)
from kvmd.tuning.view import GuestView

_log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 1.5  # of one balloon call; a guest that needs longer is asked again later
RETRY_AFTER_FAILURE_S = 10.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the files say, for one tick."""

    limits: Limits
    ksm: KsmLimits = field(default_factory=KsmLimits)


class Sensors(Protocol):
    """What the agent looks at. The synchronous ones are cheap and never raise."""

    def host(self) -> HostSample | None: ...

    def ksm(self) -> KsmSample | None: ...

    def guests(self) -> Sequence[GuestFacts]:
        """All guests with a QEMU."""
        ...

    def rss_bytes(self, pid: int) -> int | None: ...

    async def balloon(self, name: str) -> BalloonReading:
        """guest-stats first, then query-balloon. Raises KvmdError."""
        ...


class Actuators(Protocol):
    """What the agent can do. All raise KvmdError."""

    async def set_balloon(self, name: str, target_bytes: int) -> None: ...

    async def set_stats_interval(self, name: str, interval_s: int) -> None: ...

    async def write_ksm_pages(self, pages_to_scan: int) -> None:
        """Journalled, as every write to the host."""
        ...


class Clock(Protocol):
    """Time as an argument: `monotonic` for judging, `wall` (UNIX seconds) for records."""

    def monotonic(self) -> float: ...

    def wall(self) -> float: ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


@dataclass(slots=True)
class _Watched:
    """What the agent keeps of one guest between ticks."""

    reading: BalloonReading | None = None
    read_at_s: float | None = None
    stats_at_s: float | None = None
    interval_s: int | None = None  # of the driver's reports, as last set
    next_s: float = 0.0
    failed: bool = False
    booted_s: float = 0.0


class Agent:
    """One per daemon; `run` is its task."""

    def __init__(
        self,
        sensors: Sensors,
        actuators: Actuators,
        recorder: Recorder,
        config: Callable[[], Settings],
        clock: Clock | None = None,
    ) -> None:
        self._sensors = sensors
        self._actuators = actuators
        self._config = config
        self._clock = clock or SystemClock()
        self._logbook = Logbook(recorder)
        self._engine = EngineState()
        self._ksm = KsmState()
        self._watched: dict[str, _Watched] = {}
        self._shrunk: set[str] = set()  # guests whose balloon this agent has inflated, and not given all back
        self._last: Tick | None = None
        self._last_host: HostSample | None = None
        self._busy: frozenset[str] = frozenset()
        self._ksm_next_s = 0.0
        self._ok = True
        self._released = False
        self._woken = asyncio.Event()

    async def run(self) -> None:
        """Tick until cancelled. A tick that fails is told once when it begins and once when it is over."""
        try:
            while True:
                try:
                    await self.tick_once()
                except Exception as error:
                    if self._ok:
                        _log.exception("the tuning agent's tick failed: %s", error)
                    self._ok = False
                else:
                    if not self._ok:
                        _log.info("the tuning agent works again")
                    self._ok = True
                await self._pause(c.TICK_S if self._busy else c.QUIET_TICK_S)
        finally:
            self._logbook.close()

    def wake(self) -> None:
        """Look at once: a guest started, the configuration changed."""
        self._woken.set()

    def resume(self) -> None:
        """Steps are carried out again after a `restore`: the host was asked for once more."""
        self._released = False

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            pass
        self._woken.clear()

    async def tick_once(self) -> None:
        """Look, decide, act, record: once."""
        settings = self._config()
        limits, now = settings.limits, self._clock.monotonic()
        facts = {fact.name: fact for fact in self._sensors.guests()}
        self._forget_gone(facts)
        await self._read_due(facts, limits, now)
        self._last_host = self._sensors.host()
        snapshot = self._snapshot(facts, now)
        outcome = tick(self._engine, snapshot, limits)
        self._engine, self._last = outcome.state, outcome
        self._busy = outcome.busy & self._tuned(limits)
        for seen in outcome.seen:
            self._logbook.seen(seen)
        await self._carry_out(outcome.decisions, limits, snapshot)
        await self._give_up(facts, limits)
        await self._tick_ksm(settings.ksm, now)
        self._logbook.close_old(self._clock.wall())

    # ---- looking

    def _tuned(self, limits: Limits) -> frozenset[str]:
        return frozenset(name for name, guest in limits.guests.items() if guest.mode is not Mode.OFF)

    def _forget_gone(self, facts: dict[str, GuestFacts]) -> None:
        """Guests that ended, and those that came back as another QEMU between two ticks."""
        for name, watched in list(self._watched.items()):
            fact = facts.get(name)
            if fact is None or fact.booted_s < watched.booted_s - 1:
                del self._watched[name]
                self._shrunk.discard(name)
                self._logbook.forget(name)
            else:
                watched.booted_s = fact.booted_s

    async def _read_due(self, facts: dict[str, GuestFacts], limits: Limits, now: float) -> None:
        """Poll whom it is time to poll: busy guests first, then who waited longest, within the budget of calls."""
        tuned = self._tuned(limits)
        able = [name for name, fact in sorted(facts.items()) if name in tuned and fact.balloon]
        for name in able:
            self._watched.setdefault(name, _Watched(booted_s=facts[name].booted_s))
        due = [name for name in able if facts[name].state == "running" and self._is_due(name, now)]
        due.sort(key=lambda name: (name not in self._busy, self._watched[name].read_at_s or 0.0, name))
        tick_s = c.TICK_S if self._busy else c.QUIET_TICK_S
        most = max(1, int(c.QMP_CALLS_PER_S * tick_s / c.CALLS_PER_SAMPLE))
        quiet_s = min(c.QUIET_POLL_MAX_S, max(c.QUIET_TICK_S, len(able) * c.CALLS_PER_SAMPLE / c.QUIET_CALLS_PER_S))
        async with asyncio.TaskGroup() as group:
            for name in due[:most]:
                group.create_task(self._read(name, c.TICK_S if name in self._busy else quiet_s))

    def _is_due(self, name: str, now: float) -> bool:
        watched = self._watched[name]
        return now >= watched.next_s or (name in self._busy and not watched.failed)

    async def _read(self, name: str, poll_s: float) -> None:
        """One guest's balloon, and the pace of its reports. A failure is told when it begins and when it is over."""
        watched = self._watched[name]
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                interval_s = max(1, int(poll_s))
                if watched.interval_s != interval_s:
                    await self._actuators.set_stats_interval(name, interval_s)
                    watched.interval_s = interval_s
                reading = await self._sensors.balloon(name)
        except (KvmdError, TimeoutError) as error:
            watched.next_s = self._clock.monotonic() + max(poll_s, RETRY_AFTER_FAILURE_S)
            if not watched.failed:
                _log.warning(
                    "balloon of %s does not answer: %s", name, str(error) or "timed out", extra={"GUEST": name}
                )
            watched.failed = True
            return
        if watched.failed:
            _log.info("balloon of %s answers again", name, extra={"GUEST": name})
        now, wall = self._clock.monotonic(), self._clock.wall()
        watched.stats_at_s = stats_seen_at(watched.reading, watched.stats_at_s, reading, now_s=now, wall_s=wall)
        watched.reading, watched.read_at_s, watched.failed = reading, now, False
        watched.next_s = now + poll_s

    def _snapshot(self, facts: dict[str, GuestFacts], now: float) -> Snapshot:
        """Everything known. Its time is that of the tick's end, so that no figure is from the future."""
        samples = []
        for name, fact in sorted(facts.items()):
            watched = self._watched.get(name, _Watched())
            samples.append(
                GuestSample(
                    facts=fact,
                    reading=watched.reading,
                    read_at_s=watched.read_at_s,
                    stats_at_s=watched.stats_at_s,
                    poll_s=float(watched.interval_s or c.TICK_S),
                    rss_bytes=self._sensors.rss_bytes(fact.pid) if fact.pid is not None else None,
                )
            )
        time_s = max(now, self._clock.monotonic())
        return Snapshot(time_s, self._clock.wall(), self._last_host, tuple(samples))

    # ---- acting

    async def _carry_out(self, decisions: Iterable[Decision], limits: Limits, snapshot: Snapshot) -> None:
        """Takes before gives; each is applied, or only noted where the mode is advise."""
        fingerprint = ""
        for decision in sorted(decisions, key=lambda decision: (decision.kind is not Kind.TAKE, decision.guest)):
            guest = limits.guests.get(decision.guest)
            if guest is None:
                continue
            done = False
            if decision.kind is not Kind.NONE:
                fingerprint = fingerprint or hashlib.sha256(repr(snapshot).encode()).hexdigest()[:16]
                done = guest.mode is Mode.APPLY and not self._released and await self._apply(decision)
            entry = Entry.of(decision, time=self._clock.wall(), applied=done, snapshot=fingerprint)
            if self._logbook.note(entry) and decision.kind is not Kind.NONE:
                self._tell(decision, done=done)

    async def _apply(self, decision: Decision) -> bool:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await self._actuators.set_balloon(decision.guest, decision.to_bytes)
        except (KvmdError, TimeoutError) as error:
            _log.error(
                "balloon of %s could not be set to %s: %s",
                decision.guest,
                mib(decision.to_bytes),
                str(error) or "timed out",
                extra={"GUEST": decision.guest},
            )
            return False
        self._engine = applied(self._engine, decision, self._clock.monotonic())
        if decision.kind is Kind.TAKE:
            self._shrunk.add(decision.guest)
        return True

    def _tell(self, decision: Decision, *, done: bool) -> None:
        _log.info(
            "%s %s %s: %s -> %s (%s)",
            "memory:" if done else "advice:",
            decision.kind.value,
            decision.guest,
            mib(decision.from_bytes),
            mib(decision.to_bytes),
            decision.why,
            extra={"GUEST": decision.guest},
        )

    async def _give_up(self, facts: dict[str, GuestFacts], limits: Limits) -> None:
        """Guests that are no longer tuned get back what was taken from them."""
        for name in sorted(self._shrunk & facts.keys()):
            guest = limits.guests.get(name)
            if guest is None or guest.mode is not Mode.APPLY:
                await self._restore(facts[name], "tuning is no longer applied to it")

    async def restore(self) -> tuple[str, ...]:
        """Give every guest its full memory back, for the release of the host. Names of those that were asked to.

        From then on the agent only advises, until `resume`.
        """
        self._released = True
        restored = []
        for fact in sorted(self._sensors.guests(), key=lambda fact: fact.name):
            watched = self._watched.get(fact.name)
            full = watched and watched.reading and watched.reading.actual_bytes >= fact.memory_bytes
            wanted = fact.name in self._shrunk or not full
            if fact.balloon and fact.state == "running" and wanted and await self._restore(fact, "kvmd lets it go"):
                restored.append(fact.name)
        return tuple(restored)

    async def _restore(self, fact: GuestFacts, why: str) -> bool:
        watched = self._watched.get(fact.name)
        size = watched.reading.actual_bytes if watched and watched.reading else fact.memory_bytes
        decision = Decision(
            guest=fact.name,
            kind=Kind.GIVE,
            from_bytes=size,
            to_bytes=fact.memory_bytes,
            rule="restore",
            why=why,
            urgent=True,
        )
        if not await self._apply(decision):
            return False
        self._shrunk.discard(fact.name)
        self._logbook.note(Entry.of(decision, time=self._clock.wall(), applied=True, snapshot=""))
        self._tell(decision, done=True)
        return True

    async def _tick_ksm(self, limits: KsmLimits, now: float) -> None:
        """Page merging, every KSM_TICK_S, where kvmd drives it."""
        if not limits.owned or limits.mode is Mode.OFF or now < self._ksm_next_s:
            return
        self._ksm_next_s = now + c.KSM_TICK_S
        sample = self._sensors.ksm()
        if sample is None:
            return
        host = self._engine.policy.host
        tight = host is not None and host.state > 0
        self._ksm, decision = decide_ksm(self._ksm, sample, limits, host_is_tight=tight, now_s=now)
        done = False
        if decision.pages_to_scan is not None and limits.mode is Mode.APPLY and not self._released:
            try:
                await self._actuators.write_ksm_pages(decision.pages_to_scan)
            except KvmdError as error:
                _log.error("page merging's rate could not be set: %s", error)
            else:
                self._ksm, done = ksm_applied(self._ksm, decision.pages_to_scan), True
        why = f"page merging {decision.gear.value}: {decision.why}"
        if decision.pages_to_scan is not None:
            why += f"; pages_to_scan {sample.pages_to_scan} -> {decision.pages_to_scan}"
        entry = Entry(self._clock.wall(), f"ksm-{decision.gear}", None, None, None, why, decision.rule, applied=done)
        if self._logbook.note(entry):
            _log.info("%s", why)

    def demands(self) -> dict[str, int]:
        """Demand in bytes of every guest whose balloon told its figures lately."""
        views = self._last.views if self._last else ()
        return {view.name: int(view.demand_bytes) for view in views if view.used_bytes is not None}

    # ---- telling

    def status(self) -> dict[str, Any]:
        """The shape of `tune.status`: the last tick's picture, without looking again."""
        limits = self._config().limits
        host, judged = self._last_host, self._engine.policy.host
        reasons = {decision.guest: decision.why for decision in self._last.decisions} if self._last else {}
        views = self._last.views if self._last else ()
        return {
            "mode": limits.mode.value,
            "host_state": judged.state.name if judged and host else "unknown",
            "host": {
                "available_bytes": spare_bytes(host, limits.reserve_bytes) if host else 0,
                "usable_bytes": usable_bytes(host, limits.reserve_bytes) if host else 0,
                "total_bytes": host.total_bytes if host else 0,
                "reserve_bytes": limits.reserve_bytes,
                "hugetlb_bytes": host.hugetlb_bytes if host else 0,
                "why": judged.why if judged else "not looked at yet",
            },
            "guests": [_guest_status(view, reasons.get(view.name)) for view in views],
            "last": self._logbook.recent(),
        }

    def explain(self, name: str, limit: int = 20) -> dict[str, Any]:
        """The shape of `tune.explain`: the guest's decisions, the newest last."""
        return {"decisions": self._logbook.explain(name, limit)}


def _guest_status(view: GuestView, reason: str | None) -> dict[str, Any]:
    return {
        "name": view.name,
        "eligible": view.bar is None,
        "reason": view.bar.why if view.bar is not None else reason,
        "actual_bytes": view.actual_bytes if view.is_read else None,
        "used_bytes": view.used_bytes,
        "available_bytes": view.available_bytes,
        "target_bytes": view.target_bytes if view.is_read else None,
        "floor_bytes": view.floor_bytes if view.is_read else None,
        "pressed": view.pressed is not None,
    }
