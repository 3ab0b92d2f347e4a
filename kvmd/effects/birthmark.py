"""RUN/standby/NAME: whoever brings a guest into being holds its lock meanwhile, kvmd or its standby, so never both.

The lock (flock(2)) ends with its holder whatever happens. In the file a standby leaves what it had to leave out of a
guest it started; kvmd says it once it has adopted that guest.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from kvmd.effects.files import host_failed
from kvmd.errors import Conflict


@contextlib.contextmanager
def held(marks: Path, guest: str) -> Iterator[None]:
    """Be the one who starts the guest. Conflict when a standby is at it; HostFailed."""
    try:
        mark = os.open(marks / guest, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise host_failed("make", marks / guest, error) from None
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(mark, 0)
        yield
    except BlockingIOError:
        raise Conflict(f"guest {guest}: it is being started without kvmd", hint="kvmd adopts it in a moment") from None
    finally:
        os.close(mark)


def all_held(marks: Path) -> frozenset[str]:
    """Guests that somebody brings into being at this moment."""
    with contextlib.suppress(FileNotFoundError):
        return frozenset(mark.name for mark in marks.iterdir() if _is_held(mark))
    return frozenset()


def take_notes(marks: Path, guest: str) -> tuple[str, ...]:
    """What a standby left out when it started the guest, a line each, for people; () from the second time on."""
    with contextlib.suppress(OSError):
        notes = (marks / guest).read_text("utf-8", "replace").splitlines()
        os.truncate(marks / guest, 0)
        return tuple(notes)
    return ()


def _is_held(mark: Path) -> bool:
    with mark.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
