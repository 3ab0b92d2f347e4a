"""Events to those who subscribed: filtered, in order, without gaps, and never at the cost of anyone else.

The hub is plain data and callbacks: publishing never waits. Each event becomes JSON once however many listen. A
subscriber that does not keep up has a bounded queue; when it is full the subscriber is told `lagged` with the last
cursor it was sent, and is disconnected: it comes back with `since` and misses nothing.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from kvmd.errors import Conflict, KvmdError
from kvmd.rpc.protocol import encode_notification
from kvmd.rpc.registry import Outlet

QUEUE_EVENTS = 1024  # waiting for one subscriber
PAGE_EVENTS = 256  # read from history, or written, before others get a turn


class Event(Protocol):
    """Something that happened, as the store keeps it (effects.records.Event is one).

    `cursor` grows by at least one with each event; `time` is in seconds since the epoch; `type` is "guest.started";
    `actor` is who asked for it, None when nobody did; `data` is the text of a JSON object.
    """

    @property
    def cursor(self) -> int: ...
    @property
    def time(self) -> float: ...
    @property
    def type(self) -> str: ...
    @property
    def guest(self) -> str | None: ...
    @property
    def actor(self) -> str | None: ...
    @property
    def data(self) -> str: ...


# Up to `limit` events with a cursor above the given one, ascending. Must include every event published before the call.
History = Callable[[int, int], Sequence[Event]]


def _encode(event: Event) -> bytes:
    """The members of a notification's params that all subscribers share, without the braces."""
    members = {
        "cursor": event.cursor,
        "time": event.time,
        "type": event.type,
        "guest": event.guest,
        "actor": event.actor,
    }
    data = event.data.replace("\n", " ")  # in JSON only ever between tokens; here it would end the line
    return f'{json.dumps(members, separators=(",", ":"))[1:-1]},"data":{data}'.encode()


class Subscription:
    """One client's view of the stream. It begins held: `start` lets go once the client knows its name."""

    __slots__ = ("_cursor", "_hub", "_outlet", "_queue", "_replay_to", "_scheduled", "_started", "_types", "name")

    def __init__(self, hub: EventHub, outlet: Outlet, name: str, cursor: int, types: Sequence[str] | None) -> None:
        self.name = name
        self._hub = hub
        self._outlet = outlet
        self._cursor = cursor  # the last one this client has dealt with
        self._replay_to = hub.cursor  # up to here from history, from here on live
        self._types = types
        self._queue: deque[tuple[int, bytes]] = deque()
        self._started = False
        self._scheduled = False

    def wants(self, kind: str) -> bool:
        """Whether an event of this type passes the filter: named itself, or its noun by "guest.*"."""
        types = self._types
        return types is None or kind in types or f"{kind.partition('.')[0]}.*" in types

    def start(self) -> None:
        """Begin sending."""
        self._started = True
        self._flow()

    def resume(self) -> None:
        """The client has taken what was waiting for it."""
        if self._started:
            self._flow()

    def close(self) -> None:
        """The client is gone."""
        self._hub.drop(self)

    def offer(self, cursor: int, body: bytes) -> None:
        """A live event, in order behind all that came before."""
        if self._started and not self._queue and self._cursor >= self._replay_to and self._outlet.ready:
            self._emit(cursor, body)
        elif len(self._queue) < QUEUE_EVENTS:
            self._queue.append((cursor, body))
        else:
            self._part("lagged")

    def _flow(self) -> None:
        """Send a page of what is due, first from history, then from the queue; come back for more."""
        self._scheduled = False
        if not self._hub.has(self):
            return
        for _ in range(PAGE_EVENTS):
            if not self._outlet.ready:
                return  # resume() will be called
            if self._cursor < self._replay_to:
                self._replay()
                break
            if self._queue:
                self._emit(*self._queue.popleft())
            else:
                return
        self._schedule()

    def _replay(self) -> None:
        """One page of history, never beyond what the live queue begins with."""
        try:
            page = self._hub.history(self._cursor, PAGE_EVENTS)
        except KvmdError as error:
            self._part(error.slug)
            return
        for event in page:
            if event.cursor > self._replay_to:
                break
            if self.wants(event.type):
                self._emit(event.cursor, _encode(event))
            self._cursor = event.cursor
        if not page or page[-1].cursor >= self._replay_to:
            self._cursor = self._replay_to

    def _emit(self, cursor: int, body: bytes) -> None:
        params = b'{"subscription":"%b",%b}' % (self.name.encode(), body)
        self._cursor = cursor
        self._outlet.send(encode_notification("event", params))

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._outlet.later(self._flow)

    def _part(self, code: str) -> None:
        """It cannot go on ("lagged": too slow): say where it stopped, and hang up."""
        self._hub.drop(self)
        self._queue.clear()
        params = {
            "subscription": self.name,
            "cursor": self._cursor,
            "code": code,
            "hint": f"subscribe again with since = {self._cursor}",
        }
        self._outlet.hang_up(encode_notification("events.end", json.dumps(params, separators=(",", ":")).encode()))


def _no_history(_cursor: int, _limit: int) -> Sequence[Event]:
    return ()


class EventHub:
    """Where the daemon publishes and clients subscribe.

    `cursor` is that of the last event before this process; `oldest` gives the lowest cursor history still has.
    """

    def __init__(
        self, history: History = _no_history, *, cursor: int = 0, oldest: Callable[[], int] = lambda: 0
    ) -> None:
        self.history = history
        self.cursor = cursor
        self._oldest = oldest
        self._subscriptions: list[Subscription] = []
        self._made = 0

    @property
    def subscribers(self) -> int:
        """How many subscriptions there are."""
        return len(self._subscriptions)

    def publish(self, event: Event) -> None:
        """Give an event to all who want it. Events must come in the order of their cursors."""
        self.cursor = event.cursor
        body: bytes | None = None
        for subscription in tuple(self._subscriptions):
            if subscription.wants(event.type):
                body = body or _encode(event)
                subscription.offer(event.cursor, body)

    def subscribe(self, outlet: Outlet, since: int | None, types: Sequence[str] | None) -> Subscription:
        """A held subscription from after `since` (None: from now). Conflict when that is no longer, or not yet, had."""
        if since is not None and since > self.cursor:
            raise Conflict(
                f"cursor {since} lies ahead of the last event, {self.cursor}: the history was begun anew",
                hint="read the state afresh and subscribe without since",
                cursor=self.cursor,
            )
        if since is not None and since < self.cursor and since + 1 < self._oldest():
            raise Conflict(
                f"events after cursor {since} are no longer kept",
                hint="read the state afresh and subscribe without since",
                cursor=self.cursor,
                oldest=self._oldest(),
            )
        self._made += 1
        start = self.cursor if since is None else since
        subscription = Subscription(self, outlet, f"s{self._made}", start, types)
        outlet.attach(subscription)
        self._subscriptions.append(subscription)
        return subscription

    def has(self, subscription: Subscription) -> bool:
        """Whether it still gets events."""
        return subscription in self._subscriptions

    def drop(self, subscription: Subscription) -> None:
        """Forget it; forgetting twice is fine."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
