"""One SQLite file opened as kvmd's databases are: private, in WAL mode, of a known schema version.

Says precisely what is wrong with a file (`Corrupt`, `NewerSchema`) and can set it aside; what then happens is the
business of store (durable state: loud) and history (telemetry: start afresh). Knows no table.

Sources: sqlite.org/wal.html, /pragma.html#pragma_user_version, /rescode.html.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_BUSY_TIMEOUT_MS = 2000  # `kvmd db check` may read meanwhile; nobody else writes
_COMPANIONS = ("", "-wal", "-shm")  # of one database, in the order they are set aside
_CORRUPT_CODES = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class Corrupt(Exception):
    """The file is no database, or a damaged one, or lacks what its version must have."""


class NewerSchema(Exception):
    """A later kvmd wrote the file. `found` and `known` are schema versions."""

    def __init__(self, found: int, known: int) -> None:
        super().__init__(f"schema {found} is newer than {known}")
        self.found, self.known = found, known


@dataclass(frozen=True, slots=True)
class Schema:
    """`steps[i]` are the statements that make version i+1 out of version i; version 0 is an empty file."""

    steps: tuple[tuple[str, ...], ...]
    tables: frozenset[str]  # what the last version must have

    @property
    def version(self) -> int:
        """The version this program reads and writes."""
        return len(self.steps)


def open_database(
    path: Path, schema: Schema, synchronous: Literal["FULL", "NORMAL"], *, check: bool
) -> sqlite3.Connection:
    """Open `path`, made with mode 0600 if missing, and bring it to the schema's version.

    Before an older version is migrated, a copy is kept beside it as NAME.v<old>. `check` reads the whole file for
    damage: right for a small one. The connection is in autocommit mode; use `transaction`.
    Raises Corrupt, NewerSchema (file untouched), sqlite3.Error, OSError.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        _prepare(connection, path, schema, synchronous, check=check)
    except sqlite3.DatabaseError as error:
        connection.close()
        if is_damage(error):
            raise Corrupt(str(error)) from error
        raise
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, schema: Schema, synchronous: str, *, check: bool) -> None:
    if path.stat().st_size == 0:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # must come before anything else, a read included
    found = _version(connection)
    if found > schema.version:
        raise NewerSchema(found, schema.version)
    if found == 0 and _tables(connection):
        raise Corrupt("it has tables but no schema version")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    if check:
        faults = [row[0] for row in connection.execute("PRAGMA quick_check(5)")]
        if faults != ["ok"]:
            raise Corrupt("; ".join(faults))
    if 0 < found < schema.version:
        copy_to(connection, path.with_name(f"{path.name}.v{found}"))
    for version in range(found, schema.version):
        with transaction(connection):
            for statement in schema.steps[version]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version + 1}")
    if missing := schema.tables - _tables(connection):
        raise Corrupt(f"it lacks the tables {', '.join(sorted(missing))}")


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _tables(connection: sqlite3.Connection) -> frozenset[str]:
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    return frozenset(row[0] for row in rows)


def primary_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code (the low byte); 0 for an error of the Python binding itself."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def is_damage(error: sqlite3.Error) -> bool:
    """Whether SQLite means that the file itself is damaged or no database."""
    return primary_code(error) in _CORRUPT_CODES


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing. The write lock is taken at once, so a commit cannot fail for a rival's sake."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            if connection.in_transaction:  # SQLite itself rolls back on SQLITE_FULL and SQLITE_IOERR
                connection.execute("ROLLBACK")
        raise


def copy_to(connection: sqlite3.Connection, target: Path) -> None:
    """A consistent, synced copy with mode 0600 (an older one is replaced). sqlite3.Error, OSError."""
    temp = target.with_name(f".{target.name}.kvmd-tmp")
    with contextlib.suppress(FileNotFoundError):
        temp.unlink()
    os.close(os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    copy = sqlite3.connect(temp, isolation_level=None)
    try:
        connection.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, complete without a -wal
    finally:
        copy.close()
    fd = os.open(temp, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    temp.rename(target)


def set_aside(path: Path, label: str) -> Path:
    """Rename a database with its -wal and -shm to NAME.<label>-<UTC time>; returns the new path. OSError.

    The companions move with it: a new database must never meet the write-ahead log of the old one.
    """
    stem = f"{path.name}.{label}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    aside, attempt = path.with_name(stem), 1
    while aside.exists():
        attempt += 1
        aside = path.with_name(f"{stem}.{attempt}")
    for companion in _COMPANIONS:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + companion).rename(aside.with_name(aside.name + companion))
    return aside
