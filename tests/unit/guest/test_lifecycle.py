"""Every race of a guest's life, as data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.guest import lifecycle as lc
from kvmd.guest.lifecycle import ALIVE, Cause, Effect, Life, Policy, State, step

DEFAULT = Policy()
RUNNING = Life(State.RUNNING)


def walk(life: Life, *events: lc.Event, policy: Policy = DEFAULT) -> tuple[Life, list[Effect]]:
    done: list[Effect] = []
    for event in events:
        life, effects = step(life, event, policy)
        done.extend(effects)
    return life, done


def test_start_then_polite_stop() -> None:
    life, done = walk(Life(), lc.StartAsked("root"), lc.Started())
    assert (life.state, done) == (State.RUNNING, [Effect.LAUNCH])
    life, done = walk(life, lc.StopAsked("root"), lc.ShutDown("guest-shutdown"), lc.Exited(0))
    assert life.state is State.STOPPED
    assert life.cause is Cause.ADMIN_STOP
    assert done == [Effect.POWERDOWN, Effect.QUIT, Effect.RELEASE]


def test_second_start_is_nothing() -> None:
    for state in ALIVE:
        life = Life(state)
        assert step(life, lc.StartAsked("root"), DEFAULT) == (life, ())


def test_guest_powers_itself_off_and_stays_off() -> None:
    life, done = walk(RUNNING, lc.ShutDown("guest-shutdown"), lc.Paused("STOP"), lc.Exited(0))
    assert (life.state, life.cause) == (State.STOPPED, Cause.GUEST_POWEROFF)
    assert done == [Effect.QUIT, Effect.RELEASE, Effect.WANT_STOPPED]


def test_guest_powers_itself_off_and_is_wanted_back() -> None:
    _, done = walk(RUNNING, lc.ShutDown("guest-shutdown"), lc.Exited(0), policy=Policy(poweroff="restart"))
    assert done == [Effect.QUIT, Effect.RELEASE, Effect.RESTART]


def test_shutdown_twice_quits_once() -> None:
    _, done = walk(RUNNING, lc.ShutDown("guest-shutdown"), lc.ShutDown("host-qmp-quit"))
    assert done == [Effect.QUIT]


@pytest.mark.parametrize(
    ("panic", "state", "effects"),
    [
        ("restart", State.FAILED, [Effect.QUIT, Effect.RELEASE, Effect.RESTART]),
        ("stay_off", State.FAILED, [Effect.QUIT, Effect.RELEASE]),
    ],
)
def test_panic(panic: str, state: State, effects: list[Effect]) -> None:
    life, done = walk(RUNNING, lc.Panicked(), lc.Exited(0), policy=Policy(panic=panic))  # type: ignore[arg-type]
    assert (life.state, life.cause, done) == (state, Cause.GUEST_PANIC, effects)


def test_panic_paused_stays_paused() -> None:
    life, done = walk(RUNNING, lc.Panicked(), policy=Policy(panic="pause"))
    assert (life.state, done) == (State.PAUSED, [])


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-9, "QEMU was killed by signal 9"),
        (-31, "QEMU broke its seccomp sandbox (SIGSYS)"),
        (1, "QEMU ended with status 1"),
        (None, "QEMU ended unexpectedly"),
    ],
)
def test_crash_says_how(status: int | None, words: str) -> None:
    life, done = walk(RUNNING, lc.Exited(status, "boom"))
    assert (life.state, life.cause) == (State.FAILED, Cause.QEMU_CRASH)
    assert life.reason == f"{words}: boom"
    assert done == [Effect.RELEASE, Effect.RESTART]


def test_start_fails_and_the_late_exit_changes_nothing() -> None:
    life, done = walk(Life(State.STARTING), lc.StartFailed("no image"), lc.Exited(1))
    assert (life.state, life.reason) == (State.FAILED, "no image")
    assert done == [Effect.KILL, Effect.RELEASE]


def test_qemu_dies_during_its_birth() -> None:
    life, done = walk(Life(State.STARTING), lc.Exited(1, "cannot map"), lc.StartFailed("no greeting"))
    assert (life.state, life.reason, done) == (State.FAILED, "cannot map", [Effect.RELEASE])


def test_stop_during_birth_kills_and_started_comes_too_late() -> None:
    life, done = walk(Life(State.STARTING), lc.StopAsked("root"), lc.Started(), lc.Exited(-9))
    assert (life.state, life.cause) == (State.STOPPED, Cause.ADMIN_STOP)
    assert done == [Effect.KILL, Effect.RELEASE]


def test_a_guest_that_does_not_obey_goes_on_running() -> None:
    life, _ = walk(RUNNING, lc.StopAsked("root"), lc.StopGaveUp(5))
    assert (life.state, life.cause) == (State.RUNNING, None)


def test_kill_wins_over_stop() -> None:
    life, done = walk(RUNNING, lc.StopAsked("a"), lc.KillAsked("b"), lc.StopGaveUp(5), lc.Exited(-9))
    assert (life.state, life.cause) == (State.STOPPED, Cause.ADMIN_KILL)
    assert done == [Effect.POWERDOWN, Effect.KILL, Effect.RELEASE]


def test_lost_monitor_is_not_death() -> None:
    life, done = walk(RUNNING, lc.MonitorLost(), lc.MonitorLost(), lc.MonitorBack("running"))
    assert (life.state, done) == (State.RUNNING, [Effect.RECONNECT])


@pytest.mark.parametrize(
    ("status", "state", "effects"),
    [
        ("running", State.RUNNING, []),
        ("paused", State.PAUSED, []),
        ("io-error", State.PAUSED, []),
        ("prelaunch", State.STARTING, []),
        ("shutdown", State.STOPPING, [Effect.QUIT]),
        ("guest-panicked", State.STOPPING, [Effect.QUIT]),
        (None, State.UNREACHABLE, [Effect.RECONNECT]),
        ("never-heard-of", State.PAUSED, []),
    ],
)
def test_adoption(status: str | None, state: State, effects: list[Effect]) -> None:
    life, done = walk(Life(), lc.Adopted(status))
    assert (life.state, done) == (state, effects)


EVENTS = st.one_of(
    st.just(lc.StartAsked("a")),
    st.just(lc.Started()),
    st.just(lc.StartFailed("x")),
    st.sampled_from([None, "running", "shutdown", "prelaunch", "guest-panicked"]).map(lc.Adopted),
    st.just(lc.StopAsked("a")),
    st.just(lc.StopGaveUp(1)),
    st.just(lc.KillAsked("a")),
    st.sampled_from(["guest-shutdown", "host-signal", "host-qmp-quit", "guest-panic"]).map(lc.ShutDown),
    st.just(lc.Panicked()),
    st.just(lc.Paused("x")),
    st.just(lc.Resumed()),
    st.just(lc.MonitorLost()),
    st.sampled_from(["running", "shutdown", "paused"]).map(lc.MonitorBack),
    st.sampled_from([None, 0, 1, -9]).map(lc.Exited),
)


@given(st.lists(EVENTS, max_size=40))
def test_any_order_of_events_ends_in_one_state_and_never_launches_twice(events: list[lc.Event]) -> None:
    life, alive_qemu = Life(), False
    for event in events:
        if isinstance(event, lc.Adopted) and alive_qemu:
            continue  # adoption happens once, at kvmd's start
        life, effects = step(life, event, DEFAULT)
        for effect in effects:
            if effect is Effect.LAUNCH:
                assert not alive_qemu, "two QEMUs of one guest"
                alive_qemu = True
            if effect is Effect.RELEASE:
                alive_qemu = False
        if isinstance(event, lc.Adopted):
            alive_qemu = life.state in ALIVE
        assert alive_qemu == (life.state in ALIVE)


def test_an_end_by_the_kernel_for_lack_of_memory_is_told_from_a_crash() -> None:
    running = Life(State.RUNNING)
    for status, cause in ((-9, Cause.OUT_OF_MEMORY), (None, Cause.OUT_OF_MEMORY), (-11, Cause.QEMU_CRASH)):
        life, effects = lc.step(running, lc.Exited(status, out_of_memory=True), Policy())
        assert (life.state, life.cause) == (State.FAILED, cause)
        assert Effect.RESTART in effects
    assert lc.step(running, lc.Exited(-9), Policy())[0].cause is Cause.QEMU_CRASH
    killed, _ = lc.step(running, lc.KillAsked("alice"), Policy())
    assert lc.step(killed, lc.Exited(-9, out_of_memory=True), Policy())[0].cause is Cause.ADMIN_KILL


def test_a_guest_that_goes_with_the_host_was_not_stopped_by_anyone() -> None:
    life, effects = lc.step(Life(State.RUNNING), lc.StopAsked("systemd", told=True, host_goes_down=True), Policy())
    assert (life.state, life.cause, effects) == (State.STOPPING, Cause.HOST_SHUTDOWN, ())
    life, _ = lc.step(life, lc.ShutDown("guest-shutdown"), Policy())
    life, effects = lc.step(life, lc.Exited(0), Policy())
    assert (life.state, life.cause, effects) == (State.STOPPED, Cause.HOST_SHUTDOWN, (Effect.RELEASE,))
