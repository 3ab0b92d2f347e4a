"""How tight the host's memory is: OK, SOFT, HARD or CRIT, worse at once, better only after a while. Pure.

The share judged is MemAvailable above `memory.reserve`, of the RAM guests may use (outside hugepage pools and reserve).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from kvmd.tuning import constants as c
from kvmd.tuning.decision import mib
from kvmd.tuning.snapshot import HostSample, spare_bytes, usable_bytes


class HostState(IntEnum):
    """Ordered: a higher value is worse."""

    OK = 0
    SOFT = 1
    HARD = 2
    CRIT = 3


@dataclass(frozen=True, slots=True)
class HostView:
    """The host as judged. `spare_bytes` may be negative; `better` counts samples that argue for a better state."""

    state: HostState
    usable_bytes: int
    spare_bytes: int
    share: float
    why: str
    better: int = 0
    reserve_bytes: int = 0
    psi_full: float = 0.0

    @property
    def in_crisis(self) -> bool:
        """CRIT by this very sample, not only by hysteresis: donors have no step limit."""
        worse = self.share < c.CRIT_BELOW + c.HYSTERESIS or self.psi_full > c.CRIT_PSI_FULL
        return self.state is HostState.CRIT and worse

    @property
    def is_dire(self) -> bool:
        """CRIT with half of the host's own reserve eaten: the host comes first, and holds protect no more."""
        eaten = self.spare_bytes <= -self.reserve_bytes // 2
        return self.in_crisis and (eaten or self.reserve_bytes == 0)

    def room_above(self, share: float) -> int:
        """Bytes above this share of the usable RAM; negative when below it."""
        return self.spare_bytes - int(share * self.usable_bytes)


def judge(previous: HostView | None, host: HostSample, reserve_bytes: int) -> HostView:
    """The host's state after one more sample."""
    usable, spare = usable_bytes(host, reserve_bytes), spare_bytes(host, reserve_bytes)
    share = spare / usable if usable else 0.0
    psi = host.psi_full if host.psi_full is not None and share < c.PSI_RELEVANT_BELOW else 0.0
    down = _state(share, psi, 0.0)
    before = previous.state if previous else down
    better = 0
    state = before
    if down > before:
        state = down
    else:
        up = _state_leaving(share, psi, before)
        if up < before:
            better = (previous.better if previous else 0) + 1
            if better >= c.SAMPLES_UP:
                state, better = up, 0
    why = f"host {state.name}: {share:.1%} of {mib(usable)} left for guests ({mib(spare)})"
    if psi >= c.HARD_PSI_FULL:
        why += f", all tasks stalled on memory {psi:.0%} of the time"
    return HostView(state, usable, spare, share, why, better, reserve_bytes, psi)


def _state(share: float, psi: float, margin: float) -> HostState:
    if share < c.CRIT_BELOW + margin or psi > c.CRIT_PSI_FULL:
        return HostState.CRIT
    if share < c.HARD_BELOW + margin or psi > c.HARD_PSI_FULL:
        return HostState.HARD
    if share < c.SOFT_BELOW + margin:
        return HostState.SOFT
    return HostState.OK


def _state_leaving(share: float, psi: float, before: HostState) -> HostState:
    """The state a bettering host has reached: thresholds raised by the hysteresis, and OK only above its own."""
    reached = _state(share, psi, c.HYSTERESIS)
    if reached is HostState.OK and share <= c.OK_ABOVE:
        return HostState.SOFT if before is not HostState.OK else HostState.OK
    return min(reached, before)
