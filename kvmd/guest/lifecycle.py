"""The life of one guest as a pure function: step(life, event) -> (life, effects).

The supervisor feeds it what it learns (from clients, QMP, the process) and carries out what it returns; nothing here
waits, reads a clock or touches a process, so each race of the two is a unit test. An event that makes no sense in a
state changes nothing: SHUTDOWN may come twice, RESET during a start, DISCONNECT after SHUTDOWN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, assert_never


class State(StrEnum):
    """What clients see."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    UNREACHABLE = "unreachable"
    FAILED = "failed"


ALIVE = frozenset({State.STARTING, State.RUNNING, State.PAUSED, State.STOPPING, State.UNREACHABLE})


class Cause(StrEnum):
    """Why a QEMU ended: the answers to "why did it die?"."""

    GUEST_POWEROFF = "guest-poweroff"
    GUEST_PANIC = "guest-panic"
    ADMIN_STOP = "admin-stop"
    ADMIN_KILL = "admin-kill"
    QEMU_CRASH = "qemu-crash"
    OUT_OF_MEMORY = "out-of-memory"
    START_FAILED = "start-failed"
    HOST_SHUTDOWN = "host-shutdown"
    VANISHED = "vanished"  # ended while kvmd was away, and left no word


@dataclass(frozen=True, slots=True)
class Policy:
    """The guest's `on.*` answers."""

    crash: Literal["restart", "stay_off"] = "restart"
    panic: Literal["restart", "stay_off", "pause"] = "restart"
    poweroff: Literal["restart", "stay_off"] = "stay_off"


@dataclass(frozen=True, slots=True)
class Life:
    """Where a guest is. `cause` is set from the moment the end is known until QEMU has gone."""

    state: State = State.STOPPED
    reason: str = ""
    cause: Cause | None = None


# Events: what the supervisor learnt.
@dataclass(frozen=True, slots=True)
class StartAsked:
    actor: str


@dataclass(frozen=True, slots=True)
class Started:
    """QEMU is verified, pinned and continued."""


@dataclass(frozen=True, slots=True)
class StartFailed:
    message: str


@dataclass(frozen=True, slots=True)
class Adopted:
    """A QEMU found alive after kvmd's own restart; `status` is QMP's RunState, None if it does not answer."""

    status: str | None


@dataclass(frozen=True, slots=True)
class StopAsked:
    actor: str
    told: bool = False  # whoever asks has pressed the guest's power button already
    host_goes_down: bool = False


@dataclass(frozen=True, slots=True)
class StopGaveUp:
    """The guest did not obey within the time; it goes on running."""

    waited_s: float


@dataclass(frozen=True, slots=True)
class KillAsked:
    actor: str


@dataclass(frozen=True, slots=True)
class ShutDown:
    """QMP SHUTDOWN; `reason` is QEMU's ShutdownCause ("guest-shutdown", "host-qmp-quit", "host-signal", …)."""

    reason: str


@dataclass(frozen=True, slots=True)
class Panicked:
    """QMP GUEST_PANICKED."""


@dataclass(frozen=True, slots=True)
class Paused:
    why: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """QMP RESUME."""


@dataclass(frozen=True, slots=True)
class MonitorLost:
    """QMP disconnected or a command timed out while the process lives."""


@dataclass(frozen=True, slots=True)
class MonitorBack:
    status: str


@dataclass(frozen=True, slots=True)
class Exited:
    """The process is gone; `status` as of waitpid (negative: signal), None when it was not our child.

    `out_of_memory`: the kernel has been killing for lack of memory.
    """

    status: int | None
    last_words: str = ""
    out_of_memory: bool = False


Event = (
    StartAsked
    | Started
    | StartFailed
    | Adopted
    | StopAsked
    | StopGaveUp
    | KillAsked
    | ShutDown
    | Panicked
    | Paused
    | Resumed
    | MonitorLost
    | MonitorBack
    | Exited
)


# Effects: what the supervisor shall do, in order.
class Effect(StrEnum):
    """One thing to do."""

    LAUNCH = "launch"
    POWERDOWN = "powerdown"
    QUIT = "quit"
    KILL = "kill"
    RECONNECT = "reconnect"
    RELEASE = "release"  # everything the run held; record the end
    RESTART = "restart"  # within the restart budget
    WANT_STOPPED = "want-stopped"  # the guest itself decided to be off


Step = tuple[Life, tuple[Effect, ...]]
_SIGKILL = -9

# QMP RunState -> what it means for a QEMU that was already up (qapi/run-state.json)
_RUN_STATES = {
    "running": State.RUNNING,
    "paused": State.PAUSED,
    "suspended": State.PAUSED,
    "io-error": State.PAUSED,
    "prelaunch": State.STARTING,
}


def step(life: Life, event: Event, policy: Policy) -> Step:
    """The next life and what to do now. Pure and total: every event is accepted in every state."""
    match event:
        case StartAsked():
            return _start_asked(life)
        case Started():
            return (Life(State.RUNNING), ()) if life.state is State.STARTING else (life, ())
        case StartFailed(message):
            if life.state is not State.STARTING:
                return life, ()
            return Life(State.FAILED, message, Cause.START_FAILED), (Effect.KILL, Effect.RELEASE)
        case Adopted(status):
            return _seen(Life(State.UNREACHABLE, "monitor silent"), status, policy)
        case StopAsked(actor, told, host_goes_down):
            return _stop_asked(life, actor, told=told, host_goes_down=host_goes_down)
        case StopGaveUp(waited_s):
            if life.state is not State.STOPPING or life.cause is not Cause.ADMIN_STOP:
                return life, ()
            return Life(State.RUNNING, f"did not power off within {waited_s:g} s"), ()
        case KillAsked(actor):
            if life.state not in ALIVE:
                return life, ()
            return Life(State.STOPPING, f"killed by {actor}", Cause.ADMIN_KILL), (Effect.KILL,)
        case ShutDown(reason):
            return _shut_down(life, reason)
        case Panicked():
            return _panicked(life, policy)
        case Paused(why):
            return (Life(State.PAUSED, why), ()) if life.state is State.RUNNING else (life, ())
        case Resumed():
            return (Life(State.RUNNING), ()) if life.state is State.PAUSED else (life, ())
        case MonitorLost():
            if life.state in (State.RUNNING, State.PAUSED):
                return Life(State.UNREACHABLE, "monitor silent"), (Effect.RECONNECT,)
            return life, ()
        case MonitorBack(status):
            return _seen(life, status, policy) if life.state is State.UNREACHABLE else (life, ())
        case Exited():
            return _exited(life, event, policy)
        case _:
            assert_never(event)


def _start_asked(life: Life) -> Step:
    if life.state in ALIVE:
        return life, ()
    return Life(State.STARTING), (Effect.LAUNCH,)


def _stop_asked(life: Life, actor: str, *, told: bool, host_goes_down: bool) -> Step:
    stopping = Life(State.STOPPING, f"stop asked by {actor}", Cause.ADMIN_STOP)
    if host_goes_down:
        stopping = Life(State.STOPPING, "the host goes down", Cause.HOST_SHUTDOWN)
    match life.state:
        case State.RUNNING | State.PAUSED | State.UNREACHABLE if told:
            return stopping, ()
        case State.RUNNING | State.PAUSED:
            return stopping, (Effect.POWERDOWN,)
        case State.STARTING:
            return stopping, (Effect.KILL,)
        case State.FAILED:
            return Life(State.STOPPED, life.reason), ()
        case _:
            return life, ()


def _shut_down(life: Life, reason: str) -> Step:
    """QEMU runs with shutdown=pause: it waits, with its reason, until we say quit."""
    if life.state not in ALIVE or life.state is State.STARTING:
        return life, ()
    if life.cause in (Cause.ADMIN_STOP, Cause.ADMIN_KILL):
        return life, (Effect.QUIT,) if life.cause is Cause.ADMIN_STOP else ()
    if life.state is State.STOPPING:
        return life, ()
    if reason == "guest-shutdown":
        cause, words = Cause.GUEST_POWEROFF, "the guest powered itself off"
    elif reason == "guest-panic":
        cause, words = Cause.GUEST_PANIC, "the guest's kernel panicked"
    elif reason == "host-signal":
        cause, words = Cause.HOST_SHUTDOWN, "QEMU was told to end by a signal"
    else:
        cause, words = Cause.ADMIN_STOP, f"QEMU was told to quit ({reason})"
    return Life(State.STOPPING, words, cause), (Effect.QUIT,)


def _panicked(life: Life, policy: Policy) -> Step:
    if life.state not in (State.RUNNING, State.PAUSED, State.UNREACHABLE):
        return life, ()
    if policy.panic == "pause":
        return Life(State.PAUSED, "the guest's kernel panicked"), ()
    return Life(State.STOPPING, "the guest's kernel panicked", Cause.GUEST_PANIC), (Effect.QUIT,)


def _seen(life: Life, status: str | None, policy: Policy) -> Step:
    """What a RunState means for a guest we had lost sight of."""
    if status is None:
        return life, (Effect.RECONNECT,)
    if status == "shutdown":
        return _shut_down(replace(life, state=State.RUNNING), "guest-shutdown")
    if status == "guest-panicked":
        return _panicked(replace(life, state=State.RUNNING), policy)
    state = _RUN_STATES.get(status, State.PAUSED)
    return Life(state, "" if state is State.RUNNING else f"QEMU says {status}"), ()


def _exited(life: Life, event: Exited, policy: Policy) -> Step:
    status, last_words = event.status, event.last_words
    if life.state not in ALIVE:
        return life, ()
    if life.state is State.STARTING:
        words = last_words or f"QEMU ended with status {status}"
        return Life(State.FAILED, words, Cause.START_FAILED), (Effect.RELEASE,)
    match life.cause:
        case Cause.ADMIN_STOP | Cause.ADMIN_KILL | Cause.HOST_SHUTDOWN:
            return replace(life, state=State.STOPPED), (Effect.RELEASE,)
        case Cause.GUEST_POWEROFF:
            after: tuple[Effect, ...] = (Effect.RESTART,) if policy.poweroff == "restart" else (Effect.WANT_STOPPED,)
            return replace(life, state=State.STOPPED), (Effect.RELEASE, *after)
        case Cause.GUEST_PANIC:
            after = (Effect.RESTART,) if policy.panic == "restart" else ()
            return replace(life, state=State.FAILED), (Effect.RELEASE, *after)
        case _:
            words, cause = _death(status, last_words), Cause.QEMU_CRASH
            if event.out_of_memory and status in (None, _SIGKILL):
                words = "no memory was left on the host, or within limits.memory_max"
                cause = Cause.OUT_OF_MEMORY
            after = (Effect.RESTART,) if policy.crash == "restart" else ()
            return Life(State.FAILED, words, cause), (Effect.RELEASE, *after)


def _death(status: int | None, last_words: str) -> str:
    if status is None:
        how = "QEMU ended unexpectedly"
    elif status == -31:  # SIGSYS: the seccomp sandbox
        how = "QEMU broke its seccomp sandbox (SIGSYS)"
    elif status < 0:
        how = f"QEMU was killed by signal {-status}"
    else:
        how = f"QEMU ended with status {status}"
    return f"{how}: {last_words}" if last_words else how
