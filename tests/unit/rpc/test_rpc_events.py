"""kvmd/rpc/events.py: order, no gaps, replay, filters, and what becomes of a slow subscriber."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.errors import Conflict, HostFailed
from kvmd.rpc import events
from kvmd.rpc.events import PAGE_EVENTS, QUEUE_EVENTS, EventHub, Subscription
from kvmd.rpc.registry import Follower


@dataclass(frozen=True, slots=True)
class Happening:
    """An event as a store would keep it."""

    cursor: int
    type: str = "guest.started"
    time: float = 1.5
    guest: str | None = "web"
    actor: str | None = "root"
    data: str = "{}"


class Listener:
    """A client's connection: what it was sent, and whether it takes more."""

    def __init__(self) -> None:
        self.ready = True
        self.lines: list[bytes] = []
        self.last: bytes | None = None
        self.followers: list[Follower] = []
        self.due: deque[Callable[[], None]] = deque()

    def send(self, line: bytes) -> None:
        self.lines.append(line)

    def hang_up(self, last_line: bytes) -> None:
        assert self.last is None
        self.last = last_line
        self.ready = False

    def later(self, callback: Callable[[], None]) -> None:
        self.due.append(callback)

    def attach(self, follower: Follower) -> None:
        self.followers.append(follower)

    def turn(self) -> None:
        """Run what was put off, and what that puts off."""
        while self.due:
            self.due.popleft()()

    def take(self) -> None:
        """The client reads on."""
        self.ready = True
        for follower in self.followers:
            follower.resume()
        self.turn()

    @property
    def cursors(self) -> list[int]:
        return [json.loads(line)["params"]["cursor"] for line in self.lines]


class Stored:
    """A history that lives in a list."""

    def __init__(self, happened: Sequence[Happening] = ()) -> None:
        self.all = list(happened)
        self.reads = 0

    def __call__(self, since: int, limit: int) -> list[Happening]:
        self.reads += 1
        return [event for event in self.all if event.cursor > since][:limit]

    def publish(self, hub: EventHub, event: Happening) -> None:
        self.all.append(event)
        hub.publish(event)


def hub_of(stored: Stored) -> EventHub:
    return EventHub(stored, cursor=stored.all[-1].cursor if stored.all else 0)


def listen(
    hub: EventHub, since: int | None = None, types: Sequence[str] | None = None
) -> tuple[Listener, Subscription]:
    listener = Listener()
    subscription = hub.subscribe(listener, since, types)
    subscription.start()
    return listener, subscription


def numbered(*cursors: int) -> list[Happening]:
    return [Happening(cursor) for cursor in cursors]


def test_an_event_as_the_client_sees_it() -> None:
    hub = EventHub()
    listener, subscription = listen(hub)
    hub.publish(Happening(7, data='{"why":\n"x"}'))
    (line,) = listener.lines
    assert b"\n" not in line
    assert json.loads(line) == {
        "jsonrpc": "2.0",
        "method": "event",
        "params": {
            "subscription": subscription.name,
            "cursor": 7,
            "time": 1.5,
            "type": "guest.started",
            "guest": "web",
            "actor": "root",
            "data": {"why": "x"},
        },
    }


def test_without_since_only_what_comes() -> None:
    stored = Stored(numbered(1, 2, 3))
    hub = hub_of(stored)
    listener, _ = listen(hub)
    stored.publish(hub, Happening(4))
    assert listener.cursors == [4]
    assert stored.reads == 0


def test_nothing_before_the_start_and_nothing_lost_until_then() -> None:
    hub = EventHub()
    listener = Listener()
    subscription = hub.subscribe(listener, None, None)
    hub.publish(Happening(1))
    subscription.resume()
    assert listener.lines == []
    subscription.start()
    assert listener.cursors == [1]


def test_replay_then_live_without_a_gap_or_a_double() -> None:
    stored = Stored(numbered(1, 2, 5))
    hub = hub_of(stored)
    listener = Listener()
    subscription = hub.subscribe(listener, 1, None)
    stored.publish(hub, Happening(6))  # is in the history by the time that is read
    subscription.start()
    listener.turn()
    stored.publish(hub, Happening(9))
    assert listener.cursors == [2, 5, 6, 9]


def test_a_long_replay_takes_turns() -> None:
    stored = Stored(numbered(*range(1, 3 * PAGE_EVENTS + 11)))
    hub = hub_of(stored)
    listener, _ = listen(hub, since=0)
    assert len(listener.lines) == PAGE_EVENTS
    stored.publish(hub, Happening(9999))
    listener.turn()
    assert listener.cursors == [*range(1, 3 * PAGE_EVENTS + 11), 9999]


def test_a_client_that_does_not_read_pauses_its_replay() -> None:
    stored = Stored(numbered(*range(1, 2 * PAGE_EVENTS)))
    hub = hub_of(stored)
    listener = Listener()
    listener.ready = False
    hub.subscribe(listener, 0, None).start()
    listener.turn()
    assert stored.reads == 0
    listener.take()
    assert len(listener.lines) == 2 * PAGE_EVENTS - 1


def test_a_history_that_ends_early_is_no_endless_replay() -> None:
    hub = EventHub(Stored(), cursor=50)
    listener, _ = listen(hub, since=10)
    listener.turn()
    hub.publish(Happening(51))
    assert listener.cursors == [51]


@pytest.mark.parametrize(
    ("types", "passed"),
    [
        (None, [1, 2, 3, 4]),
        (["guest.started"], [1]),
        (["guest.*"], [1, 2]),
        (["guest.stopped", "tune.*"], [2, 3]),
        (["guest", "*", "guest.start"], []),
    ],
)
def test_filters_hold_live_and_replayed(types: list[str] | None, passed: list[int]) -> None:
    happened = [Happening(1), Happening(2, "guest.stopped"), Happening(3, "tune.decided"), Happening(4, "host.applied")]
    live = EventHub()
    listener, _ = listen(live, types=types)
    for event in happened:
        live.publish(event)
    assert listener.cursors == passed
    listener, _ = listen(hub_of(Stored(happened)), since=0, types=types)
    listener.turn()
    assert listener.cursors == passed


def test_an_event_becomes_json_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = EventHub()
    listeners = [listen(hub)[0] for _ in range(20)]
    calls: list[Any] = []
    encode = events._encode
    monkeypatch.setattr(events, "_encode", lambda event: calls.append(event) or encode(event))
    hub.publish(Happening(1))
    hub.publish(Happening(2))
    assert len(calls) == 2
    assert all(listener.cursors == [1, 2] for listener in listeners)
    assert len({listener.lines[0] for listener in listeners}) == 20  # each under its own name


def test_a_full_queue_ends_the_subscription_with_the_place_to_go_on_from() -> None:
    stored = Stored()
    hub = hub_of(stored)
    listener, subscription = listen(hub)
    quick, _ = listen(hub)
    stored.publish(hub, Happening(1))
    listener.ready = False
    for cursor in range(2, QUEUE_EVENTS + 2):
        stored.publish(hub, Happening(cursor))
    assert listener.last is None
    stored.publish(hub, Happening(5000))
    assert listener.last is not None
    assert json.loads(listener.last) == {
        "jsonrpc": "2.0",
        "method": "events.end",
        "params": {
            "subscription": subscription.name,
            "cursor": 1,
            "code": "lagged",
            "hint": "subscribe again with since = 1",
        },
    }
    assert not hub.has(subscription)
    hub.publish(Happening(5001))
    listener.take()
    assert listener.cursors == [1]
    assert quick.cursors == [*range(1, QUEUE_EVENTS + 2), 5000, 5001]
    again, _ = listen(hub, since=1)
    again.turn()
    assert again.cursors == [*range(2, QUEUE_EVENTS + 2), 5000]


def test_reading_again_in_time_loses_nothing() -> None:
    hub = EventHub()
    listener, _ = listen(hub)
    listener.ready = False
    for cursor in range(1, QUEUE_EVENTS + 1):
        hub.publish(Happening(cursor))
    listener.take()
    hub.publish(Happening(QUEUE_EVENTS + 1))
    assert listener.cursors == list(range(1, QUEUE_EVENTS + 2))


def test_a_client_that_left_gets_nothing_more() -> None:
    stored = Stored(numbered(*range(1, PAGE_EVENTS + 20)))
    hub = hub_of(stored)
    listener, subscription = listen(hub, since=0)
    subscription.close()
    subscription.close()
    listener.turn()
    hub.publish(Happening(9999))
    assert len(listener.lines) == PAGE_EVENTS
    assert not hub.has(subscription)


def test_a_history_that_cannot_be_read_ends_the_subscription() -> None:
    def broken(_since: int, _limit: int) -> Sequence[Happening]:
        raise HostFailed("history.db: I/O error")

    listener, _ = listen(EventHub(broken, cursor=5), since=1)
    assert listener.last is not None
    assert json.loads(listener.last)["params"]["code"] == "host-failed"
    assert json.loads(listener.last)["params"]["cursor"] == 1


def test_a_cursor_from_the_future_is_refused() -> None:
    with pytest.raises(Conflict, match="ahead of the last event, 5"):
        EventHub(cursor=5).subscribe(Listener(), 6, None)


def test_a_cursor_too_old_is_refused_and_the_oldest_kept_is_not() -> None:
    stored = Stored(numbered(10, 11, 12))
    hub = EventHub(stored, cursor=12, oldest=lambda: 10)
    with pytest.raises(Conflict, match="no longer kept") as caught:
        hub.subscribe(Listener(), 8, None)
    assert caught.value.details == {"cursor": 12, "oldest": 10}
    listener, _ = listen(hub, since=9)
    listener.turn()
    assert listener.cursors == [10, 11, 12]


def test_up_to_date_is_never_too_old() -> None:
    """With an empty history the oldest kept is the next one."""
    hub = EventHub(cursor=12, oldest=lambda: 13)
    listener, _ = listen(hub, since=12)
    hub.publish(Happening(13))
    assert listener.cursors == [13]


_steps = st.lists(st.sampled_from(["publish", "burst", "pause", "take", "turn", "subscribe"]), max_size=40)


@given(_steps, st.integers(0, 30))
def test_every_subscriber_sees_every_event_once_and_in_order(steps: list[str], since: int) -> None:
    stored = Stored(numbered(*range(1, 31)))
    hub = hub_of(stored)
    listeners: list[tuple[Listener, int]] = [(listen(hub, since)[0], since)]
    for step in steps:
        match step:
            case "publish":
                stored.publish(hub, Happening(hub.cursor + 1))
            case "burst":
                for _ in range(60):
                    stored.publish(hub, Happening(hub.cursor + 3))
            case "pause":
                listeners[-1][0].ready = False
            case "take":
                listeners[0][0].take()
            case "turn":
                listeners[-1][0].turn()
            case "subscribe" if len(listeners) < 4:
                listeners.append((listen(hub, hub.cursor // 2)[0], hub.cursor // 2))
    for listener, start in listeners:
        listener.take()
        expected = [event.cursor for event in stored.all if event.cursor > start]
        if listener.last is None:
            assert listener.cursors == expected
        else:  # it lagged: a beginning without gaps, and the right place to go on from
            assert listener.cursors == expected[: len(listener.lines)]
            assert json.loads(listener.last)["params"]["cursor"] == (listener.cursors or [start])[-1]
