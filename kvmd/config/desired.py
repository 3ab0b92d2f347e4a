"""What loading gives: the desired state, and what is wrong with the files. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from kvmd.config.daemon import Daemon
from kvmd.config.guest import Guest
from kvmd.config.host import Host
from kvmd.config.network import Network

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with one file. `file` is relative to the configuration directory, lines count from 1."""

    file: str
    line: int | None
    key: str | None
    message: str
    hint: str | None = None
    severity: Severity = "error"

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        parts = [place, "warning" if self.severity == "warning" else None, self.key, self.message]
        text = ": ".join(part for part in parts if part)
        return f"{text} ({self.hint})" if self.hint else text


@dataclass(frozen=True, slots=True)
class Desired:
    """What shall be. Names are sorted.

    `stale` holds the names of guests that come from their last good version, and the file names (`host.toml`,
    `networks.d/lan.toml`, `kvmd.toml`) of other files that do. A guest's name has no dot, so they never mix.
    """

    daemon: Daemon = field(default_factory=Daemon)
    host: Host = field(default_factory=Host)
    networks: Mapping[str, Network] = field(default_factory=dict)
    guests: Mapping[str, Guest] = field(default_factory=dict)
    stale: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A desired state that can always be used, the faults (at most 51), and the bytes of each file read.

    `faulty` names every file with an error, also those whose faults are not among the 50 shown. `keep` is
    what `save_last_good` writes, `listed` the names seen in each directory that could be read.
    """

    desired: Desired
    faults: tuple[Fault, ...] = ()
    sources: Mapping[str, bytes] = field(default_factory=dict)
    faulty: frozenset[str] = frozenset()
    keep: Mapping[str, bytes] = field(default_factory=dict)
    listed: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def errors(self) -> tuple[Fault, ...]:
        """The faults that are not mere warnings."""
        return tuple(fault for fault in self.faults if fault.severity == "error")
