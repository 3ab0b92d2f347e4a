"""What the tuning agent sees and what it may do, as frozen data: one Snapshot a tick, one Limits per configuration.

Bytes and seconds throughout; `time_s` is a monotonic clock, `wall_s` the civil one (for records only). No judging
here beyond telling "unknown" from a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from kvmd.tuning.constants import TICK_S

_UNKNOWN = frozenset({-1, 2**64 - 1})  # QEMU docs/interop/virtio-balloon-stats.rst: a stat the guest does not report
_MAX_BYTES = 1 << 62


class Mode(StrEnum):
    """What becomes of a decision."""

    OFF = "off"
    ADVISE = "advise"
    APPLY = "apply"


@dataclass(frozen=True, slots=True)
class HostSample:
    """One reading of /proc/meminfo, /proc/vmstat and /proc/pressure/memory. Counters run from boot."""

    total_bytes: int
    available_bytes: int  # MemAvailable: MemFree + Cached would count shared guest memory as free
    hugetlb_bytes: int = 0
    swap_total_bytes: int = 0
    swap_free_bytes: int = 0
    swap_in_pages: int = 0
    swap_out_pages: int = 0
    major_faults: int = 0
    psi_some: float | None = None  # share of the last 10 s, 0..1; None: this kernel has no PSI
    psi_full: float | None = None


@dataclass(frozen=True, slots=True)
class BalloonReading:
    """What one guest's balloon answered. A figure the guest did not report is None."""

    actual_bytes: int
    last_update: int = 0  # QEMU's clock in whole seconds when the driver last reported; 0: never
    available_bytes: int | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None
    swap_in_bytes: int | None = None
    major_faults: int | None = None

    @classmethod
    def from_qmp(cls, actual_bytes: int, guest_stats: Mapping[str, object] | None) -> BalloonReading:
        """From `query-balloon`'s actual and the `guest-stats` property ({"stats": {...}, "last-update": n}).

        Never raises: everything that is not a sane non-negative integer is "unknown".
        """
        reply = guest_stats or {}
        stats = reply.get("stats")
        stats = stats if isinstance(stats, Mapping) else {}
        return cls(
            actual_bytes=actual_bytes,
            last_update=_figure(reply.get("last-update")) or 0,
            available_bytes=_figure(stats.get("stat-available-memory")),
            free_bytes=_figure(stats.get("stat-free-memory")),
            total_bytes=_figure(stats.get("stat-total-memory")),
            swap_in_bytes=_figure(stats.get("stat-swap-in")),
            major_faults=_figure(stats.get("stat-major-faults")),
        )


def _figure(value: object) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool) or value in _UNKNOWN or not 0 <= value < _MAX_BYTES:
        return None
    return value


@dataclass(frozen=True, slots=True)
class GuestFacts:
    """What the running QEMU is, as far as it decides about ballooning. `memory_bytes` is M, its full size."""

    name: str
    memory_bytes: int
    state: str = "running"  # guest/lifecycle.State's values
    booted_s: float = 0.0  # since QEMU started running the guest
    balloon: bool = True  # has the device
    hugepages: bool = False
    locked: bool = False
    vfio: bool = False
    confidential: bool = False
    migrating: bool = False
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class GuestSample:
    """Facts and the newest reading of one guest. `read_at_s` and `stats_at_s` are on the snapshot's clock."""

    facts: GuestFacts
    reading: BalloonReading | None = None
    read_at_s: float | None = None
    stats_at_s: float | None = None  # when these very figures were first seen; None: never any
    poll_s: float = TICK_S
    rss_bytes: int | None = None
    psi_some: float | None = None  # of the guest itself, where its agent tells

    @property
    def name(self) -> str:
        """The guest's name."""
        return self.facts.name

    def stats_age_s(self, now_s: float) -> float | None:
        """Age of the driver's figures, None when it never gave any."""
        return None if self.stats_at_s is None else max(0.0, now_s - self.stats_at_s)


def stats_seen_at(
    previous: BalloonReading | None,
    previous_at_s: float | None,
    reading: BalloonReading,
    *,
    now_s: float,
    wall_s: float,
) -> float | None:
    """When (monotonic) the figures in `reading` were first seen.

    `last-update` has whole seconds of a clock that may be set, so it only says whether the figures are new; their age
    is measured from then. Only the very first reading's age comes from the civil clock.
    """
    if reading.last_update == 0:
        return None
    if previous is None or previous_at_s is None:
        return now_s - max(0.0, wall_s - reading.last_update - 1.0)
    return previous_at_s if previous.last_update == reading.last_update else now_s


@dataclass(frozen=True, slots=True)
class GuestLimits:
    """What the guest's file and the host's say about tuning this guest."""

    guaranteed_bytes: int
    shares: int = 100
    mode: Mode = Mode.ADVISE
    dedicated: bool = False  # dedicated CPUs: its memory is left alone as well


@dataclass(frozen=True, slots=True)
class Limits:
    """What configuration allows. `mode` is the host's for ballooning; a guest without limits is not tuned."""

    mode: Mode = Mode.ADVISE
    reserve_bytes: int = 0
    guests: Mapping[str, GuestLimits] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One tick's view of everything. `host` is None when it could not be read: then nothing is done."""

    time_s: float
    wall_s: float
    host: HostSample | None
    guests: tuple[GuestSample, ...] = ()


def usable_bytes(host: HostSample, reserve_bytes: int) -> int:
    """U: RAM outside the hugepage pools and the host's own reserve, never below 0."""
    return max(0, host.total_bytes - host.hugetlb_bytes - reserve_bytes)


def spare_bytes(host: HostSample, reserve_bytes: int) -> int:
    """What guests could still be given: MemAvailable above the reserve. Negative when the reserve is eaten into."""
    return host.available_bytes - reserve_bytes
