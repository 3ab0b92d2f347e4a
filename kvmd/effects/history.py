"""Telemetry: events with a cursor, the tuning agent's decisions, samples of what guests need, in history.db. Never in
anybody's way.

Capped by age and size, committed in batches, deletable at any time: a missing or damaged file is begun anew, and no
method raises for what the disk does. Nothing may depend on a row being here; what must be known is in state.db.

Cursors only ever grow, also over a restart, a crash that loses the last batch, or the deletion of the file: they
begin at the clock's milliseconds and count up by one, which a clock overtakes as long as fewer than a thousand
events a second happen on average. (A clock set far back and a deleted file together break that.)
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections import deque
from collections.abc import Collection, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from kvmd.effects.database import Corrupt, NewerSchema, Schema, is_damage, open_database, set_aside, transaction
from kvmd.effects.records import Decision, Event, Sample
from kvmd.facts import Usage
from kvmd.tuning.usage import summarise

_log = logging.getLogger(__name__)

_BUFFER = 10_000  # events and decisions each, kept while nothing can be written
_EVENT_COLUMNS = "cursor, time, type, guest, actor, data"
_TRIM_SHARE = 10  # at the size cap, the oldest tenth goes at a time

SCHEMA = Schema(
    steps=(
        (
            """CREATE TABLE event (cursor INTEGER PRIMARY KEY, time REAL NOT NULL, type TEXT NOT NULL, guest TEXT,
               actor TEXT, data TEXT NOT NULL) STRICT""",
            "CREATE TABLE decision (id INTEGER PRIMARY KEY, time REAL NOT NULL, guest TEXT, data TEXT NOT NULL) STRICT",
            "CREATE INDEX event_by_time ON event (time)",
            "CREATE INDEX decision_by_guest ON decision (guest, id)",
            "CREATE INDEX decision_by_time ON decision (time)",
        ),
        (
            """CREATE TABLE sample (id INTEGER PRIMARY KEY, time REAL NOT NULL, guest TEXT NOT NULL,
               demand_bytes INTEGER NOT NULL, overhead_bytes INTEGER) STRICT""",
            "CREATE INDEX sample_by_time ON sample (time)",
        ),
    ),
    tables=frozenset({"event", "decision", "sample"}),
)


class History:
    """history.db of one state directory. Used by one thread; the daemon calls `flush` every half second."""

    def __init__(self, state_dir: Path, *, now: float) -> None:
        """Open, or begin anew; `now` in UNIX seconds starts the cursors. Never raises for the disk's sake."""
        self.path = state_dir / "history.db"
        self.dropped = 0  # events and decisions lost because nothing could be written for long
        self._events: deque[Event] = deque()
        self._decisions: deque[Decision] = deque()
        self._samples: deque[Sample] = deque()
        self._usage: Mapping[str, Usage] | None = None  # of all samples; None: to be looked up again
        self._db: sqlite3.Connection | None = None
        self._inode: int | None = None
        self._failing = False
        self._open()
        self._cursor = max(self._stored_cursor() + _BUFFER, int(now * 1000))

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self.flush()
        self._close()

    @property
    def cursor(self) -> int:
        """Cursor of the newest event; the next one is greater."""
        return self._cursor

    def append(self, *, time: float, type: str, guest: str | None, actor: str | None, data: str) -> Event:  # noqa: A002
        """Take an event (`data`: text of a JSON object); cheap, on disk with the next flush. Returns it with cursor."""
        self._cursor += 1
        event = Event(self._cursor, time, type, guest, actor, data)
        self._events.append(event)
        self._limit(self._events)
        return event

    def add_decision(self, guest: str | None, data: str, time: float) -> None:
        """Take a decision (`data`: text of a JSON object); cheap, on disk with the next flush."""
        self._decisions.append(Decision(time, guest, data))
        self._limit(self._decisions)

    def add_sample(self, sample: Sample) -> None:
        """Take a sample of a guest; cheap, on disk with the next flush."""
        self._samples.append(sample)
        self._limit(self._samples)
        self._usage = None

    def usage(self, now: float) -> Mapping[str, Usage]:
        """What each guest was seen to need, from all samples that are kept; looked up once for each round of them."""
        if self._usage is None:
            self.flush()
            sql = "SELECT time, guest, demand_bytes, overhead_bytes FROM sample"
            self._usage = summarise((Sample(*row) for row in self._all(sql)), now)
        return self._usage

    def flush(self) -> bool:
        """Write what is buffered in one commit. False: it could not be done, the buffer is kept for the next time."""
        if not self._events and not self._decisions and not self._samples:
            return True
        if self._db is None or self._was_deleted():
            self._close()
            self._open()
        if self._db is None:
            return False
        try:
            with transaction(self._db):
                self._db.executemany(
                    "INSERT OR REPLACE INTO event VALUES (?, ?, ?, ?, ?, ?)",
                    [(e.cursor, e.time, e.type, e.guest, e.actor, e.data) for e in self._events],
                )
                self._db.executemany(
                    "INSERT INTO decision (time, guest, data) VALUES (?, ?, ?)",
                    [(d.time, d.guest, d.data) for d in self._decisions],
                )
                self._db.executemany(
                    "INSERT INTO sample (time, guest, demand_bytes, overhead_bytes) VALUES (?, ?, ?, ?)",
                    [(s.time, s.guest, s.demand_bytes, s.overhead_bytes) for s in self._samples],
                )
        except sqlite3.Error as error:
            self._fail(error)
            return False
        self._events.clear()
        self._decisions.clear()
        self._samples.clear()
        self._say_back()
        return True

    def events_since(self, cursor: int, types: Collection[str] = (), limit: int = 1000) -> tuple[Event, ...]:
        """Up to `limit` events after `cursor`, oldest first, of these types (none given: all)."""
        self.flush()
        found: list[Event] = []
        if self._db is not None:
            places = ",".join("?" * len(types))
            where = f"AND type IN ({places})" if types else ""
            sql = f"SELECT {_EVENT_COLUMNS} FROM event WHERE cursor > ? {where} ORDER BY cursor LIMIT ?"
            try:
                found = [Event(*row) for row in self._db.execute(sql, (cursor, *types, limit))]
            except sqlite3.Error as error:
                self._fail(error)
        waiting = (e for e in self._events if e.cursor > cursor and (not types or e.type in types))
        return (*found, *islice(waiting, max(0, limit - len(found))))

    def oldest_cursor(self) -> int:
        """Cursor of the oldest event still kept; `cursor` + 1 if there is none. A subscriber behind it missed some."""
        self.flush()
        stored = self._one("SELECT min(cursor) FROM event")
        if stored is not None:
            return stored
        return self._events[0].cursor if self._events else self._cursor + 1

    def decisions(self, guest: str | None, limit: int = 100) -> tuple[Decision, ...]:
        """Up to `limit` decisions about a guest (None: about all and the host), newest first."""
        self.flush()
        found: list[Decision] = []
        if self._db is not None:
            where, values = ("WHERE guest = ?", (guest,)) if guest is not None else ("", ())
            sql = f"SELECT time, guest, data FROM decision {where} ORDER BY id DESC LIMIT ?"
            try:
                found = [Decision(*row) for row in self._db.execute(sql, (*values, limit))]
            except sqlite3.Error as error:
                self._fail(error)
        waiting = (d for d in reversed(self._decisions) if guest is None or d.guest == guest)
        return (*waiting, *found)[:limit]

    def prune(self, now: float, max_age_s: float, max_bytes: int, samples_s: float | None = None) -> bool:
        """Drop what is older than `max_age_s`, samples older than `samples_s`, then the oldest until at most
        `max_bytes` are used. False: not done."""
        self.flush()
        if self._db is None:
            return False
        try:
            with transaction(self._db):
                for table in ("event", "decision"):
                    self._db.execute(f"DELETE FROM {table} WHERE time < ?", (now - max_age_s,))
                self._db.execute("DELETE FROM sample WHERE time < ?", (now - (samples_s or max_age_s),))
                self._usage = None
            while self._used_bytes() > max_bytes and self._drop_oldest():
                pass
            # This pragma frees one page per row it returns, and execute() stops at the first row without columns.
            self._db.executescript("PRAGMA incremental_vacuum")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error as error:
            self._fail(error)
            return False
        return True

    def _drop_oldest(self) -> bool:
        """Delete the oldest tenth of each table; False when nothing is left."""
        assert self._db is not None
        dropped = 0
        with transaction(self._db):
            for table, key in (("event", "cursor"), ("decision", "id"), ("sample", "id")):
                count = int(self._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
                sql = f"DELETE FROM {table} WHERE {key} IN (SELECT {key} FROM {table} ORDER BY {key} LIMIT ?)"
                dropped += self._db.execute(sql, (-(-count // _TRIM_SHARE),)).rowcount
        return dropped > 0

    def _used_bytes(self) -> int:
        pages, free, size = (self._one(f"PRAGMA {name}") or 0 for name in ("page_count", "freelist_count", "page_size"))
        return (pages - free) * size

    def _all(self, sql: str) -> list[tuple[Any, ...]]:
        if self._db is None:
            return []
        try:
            return self._db.execute(sql).fetchall()
        except sqlite3.Error as error:
            self._fail(error)
            return []

    def _one(self, sql: str) -> int | None:
        if self._db is None:
            return None
        try:
            row = self._db.execute(sql).fetchone()
        except sqlite3.Error as error:
            self._fail(error)
            return None
        return None if row is None or row[0] is None else int(row[0])

    def _stored_cursor(self) -> int:
        return self._one("SELECT max(cursor) FROM event") or 0

    def _limit(self, buffer: deque[Event] | deque[Decision] | deque[Sample]) -> None:
        if len(buffer) > _BUFFER:
            buffer.popleft()
            self.dropped += 1

    # ---- opening, losing, getting back ------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            try:
                self._db = open_database(self.path, SCHEMA, "NORMAL", check=False)
            except (Corrupt, NewerSchema) as error:
                self._begin_anew("corrupt" if isinstance(error, Corrupt) else "newer", error)
                self._db = open_database(self.path, SCHEMA, "NORMAL", check=False)
            self._inode = self.path.stat().st_ino
        except (sqlite3.Error, OSError) as error:
            self._fail(error)

    def _begin_anew(self, label: str, error: Exception) -> None:
        aside = set_aside(self.path, label)
        _log.warning("%s: %s; kept as %s, the history begins anew", self.path, error, aside.name)

    def _was_deleted(self) -> bool:
        try:
            return self.path.stat().st_ino != self._inode
        except OSError:
            return True

    def _fail(self, error: Exception) -> None:
        """Close, and set a damaged file aside; the next flush opens again. Said once, until it works again."""
        self._close()
        if isinstance(error, sqlite3.Error) and is_damage(error):
            with contextlib.suppress(OSError):
                self._begin_anew("corrupt", error)
        if not self._failing:
            _log.warning("%s: %s; up to %d events are kept in memory", self.path, error, _BUFFER)
        self._failing = True

    def _say_back(self) -> None:
        if self._failing:
            _log.info("%s: written again, %d entries were lost", self.path, self.dropped)
        self._failing = False

    def _close(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
        self._db = None
