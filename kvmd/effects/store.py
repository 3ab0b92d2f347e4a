"""kvmd's durable state: what must be known again after kvmd, or the host, stopped at any instant.

state.db holds intents, the journal of host effects, wanted states, uids and crash counts: small, in WAL mode with
synchronous=FULL, so a method that returned has reached the disk (0.4 ms); what only this boot needs is there with
the next one. Methods are synchronous, for one thread. What can be rebuilt or merely looked at later (events,
decisions) belongs into history.db.

A damaged file is set aside and `rebuilt` says so; one of a newer kvmd is refused. Where the directory cannot be
written (`degraded`), reads answer from what there is, each write tries again and raises HostFailed while it fails.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvmd.effects.database import Corrupt, NewerSchema, Schema, copy_to, open_database, primary_code, set_aside
from kvmd.effects.database import transaction as _transaction
from kvmd.effects.records import OUTLIVE_BOOT, GuestEnd, GuestRun, Hold, Wanted, WantedState
from kvmd.errors import Conflict, HostFailed, Refused
from kvmd.facts import JournalEntry, Process, TunedKnob

__all__ = ["SCHEMA", "GuestEnd", "GuestRun", "Hold", "JournalEntry", "Store", "Wanted"]

_log = logging.getLogger(__name__)

_KEPT_CRASHES = 100  # per guest; restart.limit is far below
_GUEST_TABLES = ("wanted", "hold", "run", "ended", "uid", "crash")

SCHEMA = Schema(
    steps=(
        (
            """CREATE TABLE journal (id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE,
               original TEXT NOT NULL, new TEXT NOT NULL, boot_id TEXT NOT NULL, why TEXT NOT NULL) STRICT""",
            """CREATE TABLE wanted (guest TEXT PRIMARY KEY, state TEXT NOT NULL CHECK (state IN ('running', 'stopped')),
               actor TEXT NOT NULL, reason TEXT NOT NULL, time REAL NOT NULL) STRICT""",
            """CREATE TABLE hold (guest TEXT PRIMARY KEY, actor TEXT NOT NULL, reason TEXT NOT NULL,
               time REAL NOT NULL) STRICT""",
            """CREATE TABLE run (guest TEXT PRIMARY KEY, uuid TEXT NOT NULL, uid INTEGER NOT NULL,
               boot_id TEXT NOT NULL, nonce TEXT NOT NULL, begun_at REAL NOT NULL, pid INTEGER, start_time INTEGER,
               running_at REAL, config_text TEXT NOT NULL, argv TEXT NOT NULL) STRICT""",
            """CREATE TABLE ended (guest TEXT PRIMARY KEY, reason TEXT NOT NULL, detail TEXT NOT NULL,
               time REAL NOT NULL, begun_at REAL, pid INTEGER, start_time INTEGER) STRICT""",
            "CREATE TABLE uid (guest TEXT PRIMARY KEY, uid INTEGER NOT NULL UNIQUE) STRICT",
            "CREATE TABLE crash (guest TEXT NOT NULL, time REAL NOT NULL) STRICT",
            "CREATE INDEX crash_by_guest ON crash (guest, time)",
            "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
        ),
        (
            """CREATE TABLE tuned (path TEXT PRIMARY KEY, ours TEXT NOT NULL, why TEXT NOT NULL, theirs TEXT,
               boot_id TEXT NOT NULL) STRICT""",
        ),
    ),
    tables=frozenset({"journal", "meta", "tuned", *_GUEST_TABLES}),
)


class Store:
    """state.db of one state directory, which must exist. One instance per daemon, used by one thread."""

    def __init__(self, state_dir: Path, *, schema: Schema = SCHEMA) -> None:
        """Open or make the database. Raises Refused when a newer kvmd wrote it; anything else is survived."""
        self.path = state_dir / "state.db"
        self.rebuilt: str | None = None  # a sentence to show loudly: the state was lost and begins empty
        self.degraded: str | None = None  # a sentence: why nothing can be written at present
        self._schema = schema
        self._ends_due: dict[str, GuestEnd] = {}  # ends that could not be written when they happened
        self._db = self._open()

    def close(self) -> None:
        """Close the file; the instance is of no use afterwards."""
        with contextlib.suppress(sqlite3.Error):
            self._db.close()

    # ---- opening and failing ----------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        was_degraded, self.degraded = self.degraded, None
        try:
            emptied = self.path.exists() and self.path.stat().st_size == 0
            try:
                connection = open_database(self.path, self._schema, "FULL", check=True)
            except Corrupt as damage:
                aside = set_aside(self.path, "corrupt")
                self._tell_rebuilt(f"{self.path} was damaged ({damage}); it is kept as {aside.name}")
                return open_database(self.path, self._schema, "FULL", check=True)
            if emptied:
                self._tell_rebuilt(f"{self.path} was empty, as an interrupted copy or a full disk leaves it")
            return connection
        except NewerSchema as error:
            raise Refused(
                f"{self.path} was written by a newer kvmd: schema {error.found}, this one knows {error.known}",
                hint=f"install that kvmd again, or go back to the copy {self.path}.v{error.known} if there is one",
            ) from error
        except (sqlite3.Error, OSError) as error:
            self.degraded = f"{self.path} cannot be written: {error}"
            if not was_degraded:
                _log.error("%s; nothing is recorded, guests are left as they are", self.degraded)
            return self._open_degraded()

    def _tell_rebuilt(self, what: str) -> None:
        self.rebuilt = f"{what}; kvmd begins with an empty state and adopts what runs"
        _log.error("%s", self.rebuilt)

    def _open_degraded(self) -> sqlite3.Connection:
        """What can still be read, else an empty database in memory."""
        for query in ("mode=ro", "mode=ro&immutable=1"):  # immutable: read-only medium, without what is in the -wal
            with contextlib.suppress(sqlite3.Error):
                connection = sqlite3.connect(f"{self.path.absolute().as_uri()}?{query}", uri=True, isolation_level=None)
                if connection.execute("PRAGMA user_version").fetchone()[0] == self._schema.version:
                    return connection
                connection.close()
        connection = sqlite3.connect(":memory:", isolation_level=None)
        for step in self._schema.steps:
            for statement in step:
                connection.execute(statement)
        return connection

    @contextlib.contextmanager
    def _write(self, doing: str, *, of_this_boot: bool = False) -> Iterator[sqlite3.Connection]:
        """One durable transaction. HostFailed when it cannot be had: then nothing of it happened.

        `of_this_boot`: what means nothing after a power failure, since no QEMU survives one, has only to survive
        kvmd. It is in the kernel's hands when this returns; the next other transaction takes it to the disk.
        """
        if self.degraded:
            self.close()
            self._db = self._open()
        if self.degraded:
            raise HostFailed(f"cannot record {doing}: {self.degraded}", hint=f"see `df {self.path.parent}` and `mount`")
        try:
            self._db.execute(f"PRAGMA synchronous = {'NORMAL' if of_this_boot else 'FULL'}")
            with _transaction(self._db):
                for end in self._ends_due.values():
                    _insert_end(self._db, end)
                yield self._db
        except sqlite3.Error as error:
            if primary_code(error) in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
                # After a failed fsync the kernel has dropped the pages: the next write gets a descriptor of its own.
                self.degraded = f"{self.path}: {error}"
            hint = f"free space on the file system of {self.path.parent}; running guests are unaffected"
            raise HostFailed(f"cannot record {doing}: {error}", hint=hint, path=str(self.path)) from error
        self._ends_due.clear()

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            hint = "run `kvmd-cli db check`; guests are unaffected"
            raise HostFailed(f"cannot read {self.path}: {error}", hint=hint) from error

    def check(self) -> tuple[str, ...]:
        """Damage found by reading everything (for `db check`); empty when sound."""
        faults = tuple(str(row[0]) for row in self._rows("PRAGMA integrity_check"))
        return () if faults == ("ok",) else faults

    def backup(self, target: Path) -> None:
        """Write a consistent copy, synced, mode 0600, replacing `target`. HostFailed."""
        try:
            copy_to(self._db, target)
        except (sqlite3.Error, OSError) as error:
            raise HostFailed(f"cannot copy {self.path} to {target}: {error}") from error

    # ---- journal of host effects ------------------------------------------------------------------------------

    def journal(self, effect_key: str, original: str, new: str, boot_id: str, why: str) -> None:
        """Record an effect; to be called before it is done. The first `original` of this boot stays."""
        with self._write(effect_key) as db:
            db.execute("DELETE FROM journal WHERE key = ? AND boot_id <> ?", (effect_key, boot_id))
            db.execute(
                """INSERT INTO journal (key, original, new, boot_id, why) VALUES (?, ?, ?, ?, ?)
                   ON CONFLICT (key) DO UPDATE SET new = excluded.new, why = excluded.why""",
                (effect_key, original, new, boot_id, why),
            )

    def journalled(self, boot_id: str) -> tuple[JournalEntry, ...]:
        """Effects of that boot in the order they were first done; undo them from the last to the first."""
        sql = "SELECT key, original, new, boot_id, why FROM journal WHERE boot_id = ? ORDER BY id"
        return tuple(JournalEntry(*row) for row in self._rows(sql, boot_id))

    def forget(self, effect_key: str) -> None:
        """The effect is undone (or was never done)."""
        with self._write(f"the end of {effect_key}") as db:
            db.execute("DELETE FROM journal WHERE key = ?", (effect_key,))
            db.execute("DELETE FROM tuned WHERE ? = 'knob:' || path", (effect_key,))

    def drop_other_boots(self, boot_id: str) -> int:
        """Forget the effects of earlier boots, which the reboot undid; returns how many there were.

        What outlives a reboot (a file) counts as of this one from now on.
        """
        with self._write("the new boot") as db:
            db.execute("DELETE FROM tuned WHERE boot_id <> ?", (boot_id,))
            for kind in OUTLIVE_BOOT:
                db.execute("UPDATE journal SET boot_id = ? WHERE key LIKE ?", (boot_id, f"{kind}:%"))
            return int(db.execute("DELETE FROM journal WHERE boot_id <> ?", (boot_id,)).rowcount)

    def set_tuned(self, knob: TunedKnob, boot_id: str) -> None:
        """A tuning knob was written and read back, or (with `theirs`) left to somebody else in that boot."""
        with self._write(f"the value of {knob.path}", of_this_boot=True) as db:
            values = (knob.path, knob.ours, knob.why, knob.theirs, boot_id)
            db.execute("INSERT OR REPLACE INTO tuned VALUES (?, ?, ?, ?, ?)", values)

    def tuned(self, boot_id: str) -> tuple[TunedKnob, ...]:
        """Tuning knobs kvmd wrote in that boot, by path."""
        sql = "SELECT path, ours, why, theirs FROM tuned WHERE boot_id = ? ORDER BY path"
        return tuple(TunedKnob(*row) for row in self._rows(sql, boot_id))

    # ---- wanted states and holds ------------------------------------------------------------------------------

    def set_wanted(self, name: str, wanted: WantedState, actor: str, reason: str, time: float) -> None:
        """Record what was asked of a guest; the next boot asks `start.auto` anew."""
        with self._write(f"that guest {name} shall be {wanted}", of_this_boot=True) as db:
            db.execute("INSERT OR REPLACE INTO wanted VALUES (?, ?, ?, ?, ?)", (name, wanted, actor, reason, time))

    def wanted(self, name: str) -> Wanted | None:
        """What was last asked of a guest; None if nothing ever was."""
        rows = self._rows("SELECT guest, state, actor, reason, time FROM wanted WHERE guest = ?", name)
        return Wanted(*rows[0]) if rows else None

    def all_wanted(self) -> tuple[Wanted, ...]:
        """Of all guests, by name."""
        return tuple(
            Wanted(*r) for r in self._rows("SELECT guest, state, actor, reason, time FROM wanted ORDER BY guest")
        )

    def set_hold(self, name: str, actor: str, reason: str, time: float) -> None:
        """Keep automatic hands off a guest."""
        with self._write(f"the hold on guest {name}") as db:
            db.execute("INSERT OR REPLACE INTO hold VALUES (?, ?, ?, ?)", (name, actor, reason, time))

    def clear_hold(self, name: str) -> None:
        """Lift a hold; without one, nothing happens."""
        with self._write(f"the end of the hold on guest {name}") as db:
            db.execute("DELETE FROM hold WHERE guest = ?", (name,))

    def holds(self) -> tuple[Hold, ...]:
        """All holds, by guest."""
        return tuple(Hold(*row) for row in self._rows("SELECT guest, actor, reason, time FROM hold ORDER BY guest"))

    # ---- runs -------------------------------------------------------------------------------------------------

    def begin_start(self, run: GuestRun) -> GuestRun:
        """Record the intent to start, before its first effect. Conflict when a run of the guest has not ended."""
        with self._write(f"the start of guest {run.name}") as db:
            if db.execute("SELECT 1 FROM run WHERE guest = ?", (run.name,)).fetchone():
                raise Conflict(f"guest {run.name}: an earlier run is still on record", hint="adopt or end it first")
            texts = (run.config_text, json.dumps(run.argv))
            db.execute(
                """INSERT INTO run (guest, uuid, uid, boot_id, nonce, begun_at, config_text, argv)
                   VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
                (run.name, run.uuid, run.uid, run.boot_id, run.nonce, run.begun_at, *texts),
            )
        return run

    def record_process(self, name: str, pid: int, start_time: int) -> GuestRun:
        """The run's QEMU was born: `start_time` in clock ticks since boot. Conflict without a begun start."""
        return self._update_run(name, "pid = ?, start_time = ?", pid, start_time)

    def record_launch(self, name: str, config_text: str, argv: Sequence[str]) -> GuestRun:
        """With which TOML text and argv the run is started. Conflict without a begun start."""
        return self._update_run(name, "config_text = ?, argv = ?", config_text, json.dumps(list(argv)))

    def record_running(self, name: str, time: float) -> GuestRun:
        """The run's guest was let go. Conflict without a begun start."""
        return self._update_run(name, "running_at = ?", time)

    def _update_run(self, name: str, assignment: str, *values: Any) -> GuestRun:
        # `assignment` is a literal of the callers above, never data.
        with self._write(f"the state of guest {name}", of_this_boot=True) as db:
            if not db.execute(f"UPDATE run SET {assignment} WHERE guest = ?", (*values, name)).rowcount:
                raise Conflict(f"guest {name}: no start is on record")
        return next(run for run in self.runs() if run.name == name)

    def runs(self) -> tuple[GuestRun, ...]:
        """All runs that were begun and have not ended, by guest."""
        sql = """SELECT guest, uuid, uid, boot_id, nonce, begun_at, pid, start_time, running_at, config_text, argv
                 FROM run ORDER BY guest"""
        return tuple(_run(row) for row in self._rows(sql) if row[0] not in self._ends_due)

    def end_run(self, name: str, reason: str, detail: str, time: float) -> bool:
        """Record how the guest's run ended; its run goes. Without a run only the end is kept.

        Never raises: the guest has ended whether it can be written or not. False means it is kept in memory and
        written with the next record that succeeds.
        """
        run = next((run for run in self._runs_or_none() if run.name == name), None)
        end = GuestEnd(name, reason, detail, time, run.begun_at if run else None, run.process if run else None)
        self._ends_due[name] = end
        try:
            with self._write(f"the end of guest {name}"):
                pass  # _write itself carries what is due
        except HostFailed as error:
            _log.error("%s; kept in memory", error.message, extra={"KVMD_GUEST": name})
            return False
        return True

    def _runs_or_none(self) -> tuple[GuestRun, ...]:
        try:
            return self.runs()
        except HostFailed:
            return ()

    def last_end(self, name: str) -> GuestEnd | None:
        """How the guest's last ended run ended."""
        if name in self._ends_due:
            return self._ends_due[name]
        sql = "SELECT guest, reason, detail, time, begun_at, pid, start_time FROM ended WHERE guest = ?"
        rows = self._rows(sql, name)
        if not rows:
            return None
        guest, reason, detail, time, begun_at, pid, start_time = rows[0]
        return GuestEnd(guest, reason, detail, time, begun_at, _process(pid, start_time))

    def record_crash(self, name: str, time: float) -> None:
        """Count a crash towards restart.limit; the last hundred are kept."""
        with self._write(f"the crash of guest {name}") as db:
            db.execute("INSERT INTO crash VALUES (?, ?)", (name, time))
            db.execute(
                """DELETE FROM crash WHERE guest = ?1 AND rowid NOT IN
                   (SELECT rowid FROM crash WHERE guest = ?1 ORDER BY rowid DESC LIMIT ?2)""",
                (name, _KEPT_CRASHES),
            )

    def crashes_since(self, name: str, time: float) -> int:
        """Crashes of a guest at or after that time; a time in the future (clock set back) counts as well."""
        return int(self._rows("SELECT count(*) FROM crash WHERE guest = ? AND time >= ?", name, time)[0][0])

    def clear_crashes(self, name: str) -> None:
        """Someone started the guest by hand: it has its full budget again."""
        with self._write(f"a new restart budget of guest {name}") as db:
            db.execute("DELETE FROM crash WHERE guest = ?", (name,))

    # ---- uids, guests, small things ---------------------------------------------------------------------------

    def allot_uid(self, name: str, low: int, high: int, busy: Callable[[int], bool]) -> int:
        """The guest's uid within low..high: the remembered one, else the lowest that no guest has.

        One that `busy` says some process still has is passed over, the remembered one too: what lives there may be
        a QEMU that broke out. Raises Refused when none is left.
        """
        taken: dict[int, str] = {uid: guest for guest, uid in self._rows("SELECT guest, uid FROM uid")}
        mine = next((uid for uid, guest in taken.items() if guest == name), None)
        if mine is not None and low <= mine <= high and not busy(mine):
            return mine
        for uid in range(low, high + 1):
            if uid not in taken and not busy(uid):
                with self._write(f"the uid of guest {name}") as db:
                    db.execute("INSERT OR REPLACE INTO uid VALUES (?, ?)", (name, uid))
                return uid
        used = sum(low <= uid <= high for uid in taken)
        raise Refused(
            f"guest {name}: no uid is left in {low}-{high}: {used} belong to guests, processes have the rest",
            hint="widen qemu.uid_range in kvmd.toml, or remove guests no longer needed",
        )

    def forget_guest(self, name: str) -> None:
        """The guest was deleted: everything about it goes, its uid becomes free. Conflict while a run is on record."""
        with self._write(f"the removal of guest {name}") as db:
            if db.execute("SELECT 1 FROM run WHERE guest = ?", (name,)).fetchone():
                raise Conflict(f"guest {name}: a run is still on record", hint=f"kvmd-cli stop {name}")
            for table in _GUEST_TABLES:
                db.execute(f"DELETE FROM {table} WHERE guest = ?", (name,))

    def set_meta(self, key: str, value: str) -> None:
        """Remember one small fact (the last boot's id, the time of the last backup)."""
        with self._write(key) as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def meta(self, key: str) -> str | None:
        """What `set_meta` was told; None if nothing."""
        rows = self._rows("SELECT value FROM meta WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    def metas(self, prefix: str) -> Mapping[str, str]:
        """All of `set_meta` whose key begins with `prefix`."""
        return dict(self._rows("SELECT key, value FROM meta WHERE substr(key, 1, ?) = ?", len(prefix), prefix))


def _process(pid: int | None, start_time: int | None) -> Process | None:
    return None if pid is None or start_time is None else Process(pid, start_time)


def _run(row: tuple[Any, ...]) -> GuestRun:
    name, uuid, uid, boot_id, nonce, begun_at, pid, start_time, running_at, config_text, argv = row
    run = GuestRun(name=name, uuid=uuid, uid=uid, boot_id=boot_id, nonce=nonce, begun_at=begun_at)
    return replace(
        run,
        process=_process(pid, start_time),
        running_at=running_at,
        config_text=config_text,
        argv=tuple(json.loads(argv)),
    )


def _insert_end(db: sqlite3.Connection, end: GuestEnd) -> None:
    process = (end.process.pid, end.process.start_time) if end.process else (None, None)
    db.execute("DELETE FROM run WHERE guest = ?", (end.guest,))
    values = (end.guest, end.reason, end.detail, end.time, end.begun_at, *process)
    db.execute("INSERT OR REPLACE INTO ended VALUES (?, ?, ?, ?, ?, ?, ?)", values)
