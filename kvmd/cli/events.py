"""`events`: what happened, in order, with the actor of each; from a cursor or a time on, once or for ever."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

from kvmd.cli import render
from kvmd.cli.arguments import Parsed, UsageError
from kvmd.cli.session import Session
from kvmd.rpc.client import Client, RemoteError

LAST = 50  # events shown without --since
LAST_FOLLOWED = 10


def events(session: Session, parsed: Parsed) -> int:
    """Print events; ends with the newest one there was at the start, or never with -f."""
    follow = parsed.on("--follow")
    if follow:
        # Python's own handler only takes a note: a Ctrl-C just before the read would wait for the next event.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    guest = parsed.word("NAME") or None
    since, after = _since(parsed.text("--since"))
    with session.client() as client:
        newest = int(client.call("events.subscribe")["cursor"])
    if since is None:
        since = max(0, newest - (LAST_FOLLOWED if follow else LAST)) if after is None else 0
    asked = bool(parsed.text("--since")) and after is None
    found: list[Mapping[str, Any]] = []
    for event in _stream(session, since, newest, follow=follow, asked=asked):
        if (guest and event["guest"] != guest) or (after is not None and event["time"] < after):
            continue
        shown = {key: event[key] for key in ("cursor", "time", "type", "guest", "actor", "data")}
        if session.json and not follow:
            found.append(shown)
        else:
            session.out(json.dumps(shown, separators=(",", ":")) if session.json else line(shown))
            if follow:
                session.flush()
    if session.json and not follow:
        session.document({"events": found, "cursor": newest})
    return 0


def line(event: Mapping[str, Any]) -> str:
    """One event for people."""
    data = event["data"]
    told = " ".join(f"{key}={_value(value)}" for key, value in data.items() if value not in (None, ""))
    parts = [render.moment(event["time"]), str(event["cursor"]), event["type"], event["guest"] or "-"]
    parts += [f"by {event['actor']}"] if event["actor"] else []
    return render.clean("  ".join([*parts, told]).rstrip())


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _since(text: str | None) -> tuple[int | None, float | None]:
    """A cursor, or the time before which nothing is wanted."""
    if text is None:
        return None, None
    if text.isdecimal():
        return int(text), None
    from kvmd.units import Duration

    try:
        return None, time.time() - Duration.parse(text)
    except ValueError:
        raise UsageError(f'--since: "{text}" is neither a cursor nor a time ago such as "2h"') from None


def _stream(session: Session, since: int, newest: int, *, follow: bool, asked: bool) -> Iterator[Mapping[str, Any]]:
    """Events after `since`; up to `newest` unless following. What history no longer has is skipped."""
    while follow or since < newest:
        try:
            with Client(session.socket, session.timeout_s or 30.0) as client:
                for event in client.events(since):
                    since = event["cursor"]
                    yield event
                    if not follow and since >= newest:
                        return
        except RemoteError as error:
            since = _resume(session, error, since, asked=asked)


def _resume(session: Session, error: RemoteError, since: int, *, asked: bool) -> int:
    """Where to go on: after the last event seen by a reader that was too slow, or at the oldest one kept."""
    cursor, oldest = error.details.get("cursor"), error.details.get("oldest")
    if error.slug == "lagged" and isinstance(cursor, int) and cursor >= since:
        return cursor
    if error.slug == "conflict" and isinstance(oldest, int) and oldest - 1 > since:
        if asked:
            session.say(f"events before {oldest} are no longer kept")
        return oldest - 1
    raise error
