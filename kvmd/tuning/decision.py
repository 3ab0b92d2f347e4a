"""A decision of the tuning agent with everything needed to explain it; and what was then seen of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What is done to a guest. TAKE inflates its balloon, GIVE deflates it."""

    TAKE = "take"
    GIVE = "give"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One guest, one tick. `rule` is the short name of what decided: it changes when the reason does.

    `urgent` marks a GIVE to a guest in need; guard rails always let it pass. `for_guests_bytes` is the part of a TAKE
    that is meant for pressed guests; the rest is the host's.
    """

    guest: str
    kind: Kind
    from_bytes: int
    to_bytes: int
    rule: str
    why: str
    considered: tuple[str, ...] = ()
    limited_by: str | None = None
    expected: str | None = None
    urgent: bool = False
    for_guests_bytes: int = 0

    @property
    def step_bytes(self) -> int:
        """How much moves, without a sign."""
        return abs(self.to_bytes - self.from_bytes)


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of a guest's last applied move, found one or more ticks later."""

    guest: str
    effective: bool
    text: str


def mib(count_bytes: float) -> str:
    """For people: "312 MiB", "1.4 GiB"."""
    if abs(count_bytes) >= 10 << 30:
        return f"{count_bytes / (1 << 30):.0f} GiB"
    if abs(count_bytes) >= 1 << 30:
        return f"{count_bytes / (1 << 30):.1f} GiB"
    return f"{count_bytes / (1 << 20):.0f} MiB"
