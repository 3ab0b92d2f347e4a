"""Which decisions are worth keeping, and how they are told: steps always, everything else when its reason changes.

A step is handed to the recorder once it was seen what became of it, so that a row of the history is complete.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from kvmd.tuning.decision import Decision, Kind, Seen

RECENT = 20
PENDING_MAX_S = 120.0  # a step nothing was heard of for so long is recorded as it is

_SHAPE = (
    "time",
    "action",
    "guest",
    "from_bytes",
    "to_bytes",
    "why",
    "considered",
    "limited_by",
    "expected",
    "seen",
    "applied",
)


class StoredDecision(Protocol):
    """A row of the history; `data` is the JSON text given to `add_decision`."""

    @property
    def data(self) -> str: ...


class Recorder(Protocol):
    """Where decisions are kept; effects/history.History is one. Neither method may raise."""

    def add_decision(self, guest: str | None, data: str, time: float) -> None: ...

    def decisions(self, guest: str | None, limit: int = 100) -> Sequence[StoredDecision]:
        """The newest first."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision as told to people. `guest` None: about the host (page merging). `time` is UNIX seconds."""

    time: float
    action: str
    guest: str | None
    from_bytes: int | None
    to_bytes: int | None
    why: str
    rule: str
    considered: tuple[str, ...] = ()
    limited_by: str | None = None
    expected: str | None = None
    seen: str | None = None
    applied: bool = False
    snapshot: str = ""  # fingerprint of what was known

    @classmethod
    def of(cls, decision: Decision, *, time: float, applied: bool, snapshot: str) -> Entry:
        """The entry of one guest's decision."""
        return cls(
            time=time,
            action=decision.kind.value,
            guest=decision.guest,
            from_bytes=decision.from_bytes,
            to_bytes=decision.to_bytes,
            why=decision.why,
            rule=decision.rule,
            considered=decision.considered,
            limited_by=decision.limited_by,
            expected=decision.expected,
            applied=applied,
            snapshot=snapshot,
        )

    def shape(self) -> dict[str, Any]:
        """What RPC clients get of it."""
        everything = asdict(self)
        return {name: everything[name] for name in _SHAPE}


class Logbook:
    """Entries of this run of kvmd, handed on to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._recent: deque[Entry] = deque(maxlen=RECENT)
        self._pending: dict[str, Entry] = {}
        self._reasons: dict[str | None, tuple[str, str, str | None]] = {}

    def note(self, entry: Entry) -> bool:
        """Keep the entry if it is a step or its reason is new. True if it was kept."""
        reason = (entry.action, entry.rule, entry.limited_by if entry.rule.startswith("veto") else None)
        is_new = self._reasons.get(entry.guest) != reason
        self._reasons[entry.guest] = reason
        if not entry.applied and not is_new:
            return False
        if entry.action != Kind.NONE:
            self._recent.append(entry)
        if entry.applied and entry.guest is not None and entry.expected is not None:
            self._finish(entry.guest, "followed by another step before its end was seen")
            self._pending[entry.guest] = entry
        else:
            self._store(entry)
        return True

    def seen(self, seen: Seen) -> None:
        """What became of the guest's last step."""
        self._finish(seen.guest, seen.text)

    def close_old(self, now: float) -> None:
        """Hand on steps whose end nobody saw (the guest is gone, kvmd ends)."""
        for name in [name for name, entry in self._pending.items() if now - entry.time > PENDING_MAX_S]:
            self._finish(name, "its end was not seen")

    def close(self) -> None:
        """Hand on everything."""
        for name in list(self._pending):
            self._finish(name, "kvmd ended before its end was seen")

    def forget(self, guest: str) -> None:
        """The guest is gone: its next decision is a new one."""
        self._finish(guest, "the guest ended")
        self._reasons.pop(guest, None)

    def recent(self) -> list[dict[str, Any]]:
        """The last steps and advice about any guest, the newest last."""
        return [entry.shape() for entry in self._recent]

    def explain(self, guest: str, limit: int) -> list[dict[str, Any]]:
        """A guest's entries, the newest last, older runs of kvmd included."""
        pending = self._pending.get(guest)
        found = [entry for row in self._recorder.decisions(guest, limit) if (entry := _shape_of(row.data)) is not None]
        found.reverse()
        if pending is not None:
            found.append(pending.shape())
            found.sort(key=lambda entry: entry["time"])
        return found[-limit:]

    def _finish(self, guest: str, text: str) -> None:
        entry = self._pending.pop(guest, None)
        if entry is None:
            return
        finished = replace(entry, seen=text)
        if entry in self._recent:
            self._recent[self._recent.index(entry)] = finished
        self._store(finished)

    def _store(self, entry: Entry) -> None:
        self._recorder.add_decision(entry.guest, json.dumps(asdict(entry)), entry.time)


def _shape_of(text: str) -> dict[str, Any] | None:
    """A stored entry as clients get it; None for a row of another version that lacks something."""
    try:
        stored = json.loads(text)
    except ValueError:
        return None
    if not isinstance(stored, Mapping) or not all(name in stored for name in _SHAPE):
        return None
    return {name: stored[name] for name in _SHAPE}
