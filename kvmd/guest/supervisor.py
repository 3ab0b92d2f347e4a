"""One guest's supervisor: feeds lifecycle.step with what happens and carries out what it answers.

Events are handled synchronously, so no two ever interleave; whatever takes time (a birth, a QMP command, a
reconnection) runs as a task of its own and comes back as an event. A stuck QEMU therefore never delays a kill, nor
any other guest. Nothing raised here leaves: a birth that fails ends in FAILED with its reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvmd.config.guest import Guest
from kvmd.effects.handover import Asking
from kvmd.effects.laststart import LastStart
from kvmd.effects.process import Watched
from kvmd.effects.qmp import Monitor
from kvmd.effects.records import GuestRun, WantedState
from kvmd.errors import Conflict, HostFailed, KvmdError, QemuFailed, TimedOut, Unreachable
from kvmd.facts import Process
from kvmd.guest import lifecycle
from kvmd.guest.birth import Birth, Newborn
from kvmd.guest.lifecycle import ALIVE, Cause, Effect, Life, Policy, State
from kvmd.guest.services import Born, Services
from kvmd.guest.started import started_nics
from kvmd.qemu import events as qmp_events
from kvmd.qemu.fds import Launch

_log = logging.getLogger(__name__)

RECONNECT_FIRST_S = 0.5
RECONNECT_LONGEST_S = 30.0
QUIT_GRACE_S = 5.0
LAUNCHER_PATIENCE_S = 10.0  # a launcher waits for its hand-over longer than that
KILL_TIMEOUT_S = 30.0  # SIGKILL on a QEMU with much memory: the kernel frees it page by page
START_SETTLE_S = 600.0  # an upper bound only; the birth has its own deadlines


@dataclass(frozen=True, slots=True)
class Status:
    """What others may see of a guest without asking QEMU. Replaced, never changed."""

    life: Life = field(default_factory=Life)
    since: float = 0.0  # UNIX time of the last change of state
    process: Process | None = None
    balloon_bytes: int | None = None
    observed_at: float = 0.0  # UNIX time QEMU last confirmed this
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class _Run:
    """What a living QEMU has that a dead one has not."""

    process: Watched
    record: GuestRun
    monitor: Monitor
    launch: Launch | None = None  # None: begun by an earlier kvmd
    last_start: LastStart | None = None  # to be kept once the guest runs
    born: Born | None = None


@dataclass(eq=False)
class Supervisor:
    """Owner of one guest's QEMU."""

    name: str
    services: Services
    spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
    on_change: Callable[[str], None]
    status: Status = field(default_factory=Status)
    _run: _Run | None = None
    _birth: Birth | None = None
    _failure: KvmdError | None = None
    _waiters: set[asyncio.Future[None]] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    # ---- what clients ask -------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Where the guest is."""
        return self.status.life.state

    @property
    def vcpu_threads(self) -> tuple[int, ...]:
        """Host thread ids in vCPU order; empty until they are known."""
        return self._run.born.vcpu_threads if self._run and self._run.born else ()

    @property
    def record(self) -> GuestRun | None:
        """The durable record of the present run."""
        return self._run.record if self._run else None

    async def start(self, actor: str, *, wait: bool = True) -> bool:
        """Bring the guest to running; False if it was alive already. Raises what made the start fail."""
        if self.state in ALIVE:
            return False
        self._failure = None
        self._feed(lifecycle.StartAsked(actor))
        if not wait:
            return True
        await self._until(lambda: self.state is not State.STARTING, START_SETTLE_S, "start")
        if self._failure:
            raise self._failure
        return True

    async def stop(self, actor: str, timeout_s: float, *, force: bool = False) -> bool:
        """Ask the guest to power off and wait. TimedOut when it does not obey, unless `force` goes on to kill."""
        if self.state not in ALIVE:
            self._feed(lifecycle.StopAsked(actor))
            return False
        self._feed(lifecycle.StopAsked(actor))
        try:
            await self._until(lambda: self.state not in ALIVE, timeout_s, "stop")
        except TimedOut:
            if force:
                return await self.kill(actor)
            self._feed(lifecycle.StopGaveUp(timeout_s))
            raise TimedOut(
                f"guest {self.name} did not power off within {timeout_s:g} s; it goes on running",
                hint=f"kvmd-cli stop --force {self.name} pulls the plug after waiting; is ACPI handled in the guest?",
            ) from None
        return True

    async def kill(self, actor: str) -> bool:
        """End QEMU at once. Works on a stopped, hung or unreachable QEMU."""
        if self.state not in ALIVE:
            return False
        self._feed(lifecycle.KillAsked(actor))
        await self._until(lambda: self.state not in ALIVE, KILL_TIMEOUT_S, "kill")
        return True

    async def reach(self, reached: Callable[[State], bool], timeout_s: float, what: str) -> None:
        """Wait until the guest is in such a state. TimedOut."""
        try:
            await self._until(lambda: reached(self.state), timeout_s, what)
        except TimedOut:
            raise TimedOut(f"guest {self.name} is {self.state} and not {what} after {timeout_s:g} s") from None

    async def reset(self) -> None:
        """The reset button: the guest starts over in the same QEMU."""
        await self.qmp("system_reset")

    async def reboot(self) -> None:
        """Ask the guest to reboot itself, as Ctrl-Alt-Del at its keyboard does."""
        keys = [{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")]
        await self.qmp("send-key", keys=keys)

    async def qmp(self, command: str, **arguments: Any) -> Any:
        """Run one QMP command on the running guest. QemuFailed, TimedOut, Unreachable, Conflict."""
        try:
            return await self._monitor().execute(command, **arguments)
        except (TimedOut, Unreachable):
            self._feed(lifecycle.MonitorLost())
            raise

    async def asked(self, asking: Asking) -> None:
        """A launcher asks for its hand-over: it belongs to the birth under way, or systemd starts one."""
        if self.state is State.STOPPING:  # systemctl restart: systemd was faster than our pidfd
            with contextlib.suppress(TimedOut):
                await self._until(lambda: self.state not in ALIVE, LAUNCHER_PATIENCE_S, "stop")
        if self._birth is None and self.state not in ALIVE and self.services.is_unit_of(self.name, asking.pid):
            hold = self.services.hold(self.name)
            if hold:  # the host's boot and `systemctl start` look the same from here
                words = f"{hold.actor}{': ' if hold.reason else ''}{hold.reason}"
                asking.refuse(f"guest {self.name} is held by {words}; kvmd-cli start starts it all the same")
                return
            try:
                self._want_by_systemd("running", "its unit was started")
            except KvmdError as error:
                asking.refuse(str(error))
                return
            self._feed(lifecycle.StartAsked("systemd"))
        if self._birth is None or not self._birth.accept(asking):
            asking.refuse(f"kvmd expects no start of guest {self.name} by pid {asking.pid}")

    def unit_stops(self, asking: Asking) -> None:
        """systemd stops the guest's unit; its launcher tells us, then asks the guest. From here on it is no crash."""
        if self.services.is_unit_of(self.name, asking.pid) and self.state in ALIVE:
            if not asking.host_goes_down:
                self._stop_by_systemd()
            self._feed(lifecycle.StopAsked("systemd", told=True, host_goes_down=asking.host_goes_down))
        asking.note()

    def note_balloon(self, actual_bytes: int) -> None:
        """The guest's memory is seen to be this much."""
        if actual_bytes != self.status.balloon_bytes:
            self.status = replace(self.status, balloon_bytes=actual_bytes, observed_at=self.services.now())
            self.on_change(self.name)

    # ---- adoption ---------------------------------------------------------------------------------------------

    def expect(self, what: str) -> None:
        """Something else is about to start this guest: nobody starts it here until `adopt` or `end_expectation`."""
        self._set(Life(State.STARTING, what))

    def end_expectation(self) -> None:
        """It was not started after all."""
        self._set(Life(State.STOPPED))

    async def adopt(self, record: GuestRun, warnings: tuple[str, ...] = ()) -> None:
        """Take up a run that an earlier kvmd left: connect, finish, or record its end. Never starts a second QEMU."""
        process = record.process or self.services.find_qemu(record)
        watched = Watched.open(process) if process else None
        if watched is None:
            self._set(Life(State.STARTING if record.process is None else State.RUNNING))
            status = await self.services.unit_status(self.name, process.pid) if process else None
            if status == 0:  # a guest's own end waits for us in QEMU; this one was asked of its unit
                self._set(Life(State.STOPPING, "its unit was stopped while kvmd was away", Cause.ADMIN_STOP))
                self._want_by_systemd("stopped", "its unit was stopped while kvmd was away")
            self._feed(self._exited(status))
            return
        if record.process is None:
            record = self.services.store.record_process(self.name, watched.process.pid, watched.process.start_time)
        run = self._take(watched, record)
        self.status = replace(self.status, process=watched.process, warnings=warnings)
        self._set(Life(State.UNREACHABLE, "kvmd has just come back and asks its monitor"))
        run_state = await self._connect()
        if self._run is not run:
            return  # it ended meanwhile
        self._feed(lifecycle.Adopted(run_state))
        if self.state is State.STARTING:  # killed between -S and cont: finish what was begun
            self._spawn(self._finish_adopted(), "finish")
        elif self.services.settled.is_set():  # it answered only after all others were asked
            await self.learn()

    async def learn(self) -> None:
        """What an adopted QEMU consists of (threads, balloon). Not part of `adopt`: its state can be told before."""
        run = self._run
        if run is None or run.born or not run.monitor.connected or self.state is State.STARTING:
            return
        try:
            run.born = await self.services.inspect(run.monitor)
        except KvmdError as error:
            _log.warning("guest %s: %s", self.name, error, extra={"KVMD_GUEST": self.name})
            return
        self.status = replace(self.status, balloon_bytes=run.born.balloon_bytes)
        self.on_change(self.name)

    def let_go(self) -> None:
        """Stop supervising, for kvmd ends; QEMU goes on and is adopted by the next kvmd."""
        for task in self._tasks:
            task.cancel()
        if self._run:
            self._run.process.close()
            self._run.monitor.abandon()

    # ---- events -----------------------------------------------------------------------------------------------

    def _feed(self, event: lifecycle.Event) -> None:
        before = self.status.life
        life, effects = lifecycle.step(before, event, self._policy())
        if life != before:
            self._set(life)
            data = {"reason": life.reason, "cause": life.cause}
            self.services.publish(f"guest.{life.state}", self.name, None, data)
            words = f" ({life.reason})" if life.reason else ""
            _log.info("guest %s: %s%s", self.name, life.state, words, extra={"KVMD_GUEST": self.name})
        for effect in effects:
            self._carry_out(effect)
        if life != before:
            self._wake()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Effect.LAUNCH:
                self._birth = Birth(self.services, self.name)
                self._spawn(self._bear(self._birth), "birth")
            case Effect.POWERDOWN:
                self._spawn(self._powerdown(), "powerdown")
            case Effect.QUIT:
                self._spawn(self._quit(), "quit")
            case Effect.KILL:
                self._kill()
            case Effect.RECONNECT:
                self._spawn(self._reconnect(), "reconnect")
            case Effect.RELEASE:
                self._release()
            case Effect.RESTART:
                self._spawn(self._restart(), "restart")
            case Effect.WANT_STOPPED:
                self._want_stopped("guest", self.status.life.reason)

    def _on_qmp_event(self, message: Mapping[str, Any]) -> None:
        match qmp_events.translate(message):
            case qmp_events.Shutdown(reason=reason):
                if reason == "host-qmp-quit" and self.status.life.cause is None:
                    self._want_stopped("monitor", "QEMU was told to quit through its monitor")
                self._feed(lifecycle.ShutDown(reason))
            case qmp_events.Panicked(crash_loaded=False):
                self._feed(lifecycle.Panicked())
            case qmp_events.IoError(stopped=True) as error:
                cause = "no space left" if error.no_space else error.reason
                self._feed(lifecycle.Paused(f"disk {error.disk}: {error.operation} failed: {cause}"))
            case qmp_events.Paused():
                self._feed(lifecycle.Paused("paused through QEMU's monitor"))
            case qmp_events.Resumed():
                self._feed(lifecycle.Resumed())
            case qmp_events.Reset(by_guest=by_guest):
                self.services.publish("guest.reset", self.name, None, {"by_guest": by_guest})
            case qmp_events.BalloonMoved(actual_bytes=actual):
                self.note_balloon(actual)
            case _:
                pass

    def _on_exit(self, run: _Run, status: int | None) -> None:
        if run is not self._run:  # a QEMU that outlived its run must not end the next one
            return
        if status is None and self.services.units and self.status.life.cause is None:
            self._spawn(self._ask_status(run), "status")
        else:
            self._feed(self._exited(status))

    async def _ask_status(self, run: _Run) -> None:
        """An end nobody asked for, of a process that is systemd's child: systemd knows how."""
        status = await self.services.unit_status(self.name, run.process.process.pid)
        if run is self._run:
            self._feed(self._exited(status))

    def _exited(self, status: int | None) -> lifecycle.Exited:
        words = self.services.last_words(self.name)
        return lifecycle.Exited(status, words, out_of_memory=self.services.memory_ran_out())

    # ---- effects ----------------------------------------------------------------------------------------------

    async def _bear(self, birth: Birth) -> None:
        try:
            born = await birth.launch()
            self._birth = None
            run = self._take(born.process, born.record, born)
            if self.state is not State.STARTING:  # stopped or killed meanwhile
                run.process.kill()
            self.status = replace(self.status, process=run.process.process)
            await self._open_monitor(run, birth.greeting_timeout_s)
            birth.has_memory()
            await self._finish()
        except KvmdError as error:
            self._fail(error)
        except Exception:
            self._fail(HostFailed(f"guest {self.name}: the start failed inside kvmd", hint="see kvmd's journal"))
            raise
        finally:
            birth.close()
            self._birth = None

    async def _finish(self) -> None:
        """From a paused QEMU that answers to a running guest."""
        run = self._run
        if run is None:
            return
        born = await self.services.verify_and_place(self.name, run.record, run.monitor, run.launch)
        run.born = born
        await self._pull_cables(run)
        await run.monitor.execute("cont")
        run.record = self.services.store.record_running(self.name, self.services.now())
        self.status = replace(
            self.status, balloon_bytes=born.balloon_bytes, observed_at=self.services.now(), warnings=born.warnings
        )
        self._feed(lifecycle.Started())
        if run.last_start:
            await self.services.keep_last_start(run.last_start)

    async def _pull_cables(self, run: _Run) -> None:
        """Before the guest's first look: a card comes with its cable plugged in."""
        guest = self.services.guest(self.name)
        for nic in started_nics(run.record) if guest else ():
            wish = guest.nic.get(nic) if guest else None
            if wish is not None and not wish.link:
                await self.services.set_link(self.name, run.monitor, nic, up=False)

    async def set_link(self, nic: str, *, up: bool) -> None:
        """Plug a cable of the running guest in, or pull it. Conflict, QemuFailed, TimedOut, Unreachable."""
        await self.services.set_link(self.name, self._monitor(), nic, up=up)

    async def _finish_adopted(self) -> None:
        try:
            await self._finish()
        except KvmdError as error:
            self._fail(error)

    def _fail(self, error: KvmdError) -> None:
        words = self.services.last_words(self.name)
        gone = self._run is None or self._run.process.gone
        if isinstance(error, Unreachable | TimedOut) and words and gone:
            error = QemuFailed(f"guest {self.name}: QEMU did not start: {words}", hint=f"kvmd-cli argv {self.name}")
        elif isinstance(error, Unreachable | TimedOut) and self._run and gone:
            error = QemuFailed(
                f"guest {self.name}: QEMU ended without a word before it answered",
                hint="`journalctl -k` tells whether the kernel killed it, as it does over limits.memory_max",
            )
        self._failure = error
        self._feed(lifecycle.StartFailed(error.message))
        if self._run is None and self.state in ALIVE:  # stopped before there was a process
            self._feed(lifecycle.Exited(None))

    async def _open_monitor(self, run: _Run, timeout_s: float) -> None:
        """Connect as soon as QEMU answers; give up at once when it dies. Unreachable, TimedOut."""
        connecting = asyncio.create_task(run.monitor.connect(self.services.socket(self.name, "qmp"), timeout_s))
        either: set[asyncio.Future[Any]] = {connecting, run.process.exited}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not connecting.done():
            connecting.cancel()
            await asyncio.wait({connecting})
            raise Unreachable(f"guest {self.name}: QEMU ended before it answered")
        connecting.result()

    async def _powerdown(self) -> None:
        try:
            await self._monitor().execute("system_powerdown")
        except KvmdError as error:
            _log.warning("guest %s: cannot ask for a power-off: %s", self.name, error, extra={"KVMD_GUEST": self.name})

    async def _quit(self) -> None:
        run = self._run
        try:
            await self._monitor().execute("quit")
        except KvmdError:
            if run:  # whoever stops its unit may have been first with the quit
                await asyncio.wait({run.process.exited}, timeout=QUIT_GRACE_S)
            if run is self._run:
                self._kill()

    def _kill(self) -> None:
        if self._run:
            self._run.process.kill()
        elif self._birth:
            self._birth.abort()

    async def _reconnect(self) -> None:
        delay = RECONNECT_FIRST_S
        while self._run and self.state is State.UNREACHABLE:
            status = await self._connect()
            if status is not None:
                self._feed(lifecycle.MonitorBack(status))
                await self.learn()
                return
            await asyncio.sleep(delay)
            delay = min(delay * 2, RECONNECT_LONGEST_S)

    async def _connect(self) -> str | None:
        """QMP's RunState over a fresh session, None when the monitor is silent."""
        run = self._run
        if run is None:
            return None
        try:
            if not run.monitor.connected:
                await run.monitor.connect(self.services.socket(self.name, "qmp"))
            status = await run.monitor.execute("query-status")
        except KvmdError:
            await run.monitor.close()
            return None
        self.status = replace(self.status, observed_at=self.services.now())
        return str(status.get("status")) if isinstance(status, dict) else None

    def _release(self) -> None:
        run, self._run = self._run, None
        if run:
            self._spawn(run.monitor.close(), "close")
        self.services.clean_up(self.name)
        self._spawn(self.services.scripts.down(self.name), "downscripts")
        life = self.status.life
        self.services.store.end_run(self.name, str(life.cause or ""), life.reason, self.services.now())
        self._spawn(self.services.give_back_devices(self.name), "devices")
        self.status = replace(self.status, process=None, balloon_bytes=None, warnings=())

    def _want_stopped(self, actor: str, reason: str) -> None:
        try:
            self.services.want(self.name, "stopped", actor=actor, reason=reason)
        except KvmdError as error:  # a full disk: the guest is off all the same
            _log.error("guest %s: %s", self.name, error, extra={"KVMD_GUEST": self.name})

    def _want_by_systemd(self, state: WantedState, reason: str) -> None:
        wanted = self.services.store.wanted(self.name)
        if wanted is None or wanted.state != state:
            self.services.want(self.name, state, actor="systemd", reason=reason)

    def _stop_by_systemd(self) -> None:
        try:
            self._want_by_systemd("stopped", "its unit was stopped")
        except KvmdError as error:  # a full disk: it stops all the same
            _log.error("guest %s: %s", self.name, error, extra={"KVMD_GUEST": self.name})

    async def _restart(self) -> None:
        try:
            delay_s = self.services.restart_delay_s(self.name)
        except KvmdError as refusal:
            self._set(replace(self.status.life, reason=f"{self.status.life.reason}; {refusal.message}"))
            return
        await asyncio.sleep(delay_s)
        if self.state not in ALIVE:
            self._feed(lifecycle.StartAsked("kvmd"))

    # ---- small things -----------------------------------------------------------------------------------------

    def _take(self, process: Watched, record: GuestRun, born: Newborn | None = None) -> _Run:
        monitor = Monitor(self.name, self._on_qmp_event, lambda: self._feed(lifecycle.MonitorLost()))
        self._run = _Run(process, record, monitor)
        if born:
            self._run.launch, self._run.last_start = born.launch, born.last_start
        run = self._run
        process.exited.add_done_callback(lambda exited: self._on_exit(run, exited.result()))
        return run

    def _monitor(self) -> Monitor:
        if self._run is None or self.state not in ALIVE:
            raise Conflict(f"guest {self.name} is {self.state}", hint=f"kvmd-cli start {self.name}")
        return self._run.monitor

    def _policy(self) -> Policy:
        guest: Guest | None = self.services.guest(self.name)
        if guest is None:
            return Policy(crash="stay_off", panic="stay_off")
        return Policy(crash=guest.on.crash, panic=guest.on.panic, poweroff=guest.on.poweroff)

    def _set(self, life: Life) -> None:
        now = self.services.now()
        since = now if life.state is not self.status.life.state else self.status.since
        self.status = replace(self.status, life=life, since=since, observed_at=now)
        self.on_change(self.name)

    def _spawn(self, work: Coroutine[Any, Any, None], what: str) -> None:
        task = self.spawn(self._guard(work), f"{self.name}-{what}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        """A guest's task never raises out: what went wrong with one guest stays with it."""
        try:
            await work
        except Exception:
            _log.exception("guest %s: a task failed in kvmd itself", self.name, extra={"KVMD_GUEST": self.name})

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _until(self, reached: Callable[[], bool], timeout_s: float, what: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                while not reached():
                    waiter: asyncio.Future[None] = loop.create_future()
                    self._waiters.add(waiter)
                    try:
                        await waiter
                    finally:
                        self._waiters.discard(waiter)
        except TimeoutError:
            raise TimedOut(f"guest {self.name}: {what} did not end within {timeout_s:g} s") from None
