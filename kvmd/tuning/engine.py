"""Policy and guard rails as one pure machine: what the daemon, the simulator and a replay all turn.

tick -> decisions that passed the rails; the caller carries them out (or only advises) and reports each one that was
handed to QEMU with `applied`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvmd.tuning import rails
from kvmd.tuning.decision import Decision, Seen
from kvmd.tuning.policy import decide
from kvmd.tuning.snapshot import Limits, Snapshot
from kvmd.tuning.state import PolicyState, commit
from kvmd.tuning.view import GuestView


@dataclass(frozen=True, slots=True)
class EngineState:
    """Everything remembered between ticks."""

    policy: PolicyState = field(default_factory=PolicyState)
    rails: rails.RailState = field(default_factory=rails.RailState)


@dataclass(frozen=True, slots=True)
class Tick:
    """One tick's outcome. `decisions` passed the rails, `wanted` are the policy's own, both by guest name."""

    state: EngineState
    decisions: tuple[Decision, ...]
    wanted: tuple[Decision, ...]
    views: tuple[GuestView, ...]
    seen: tuple[Seen, ...]
    busy: frozenset[str]


def tick(state: EngineState, snapshot: Snapshot, limits: Limits) -> Tick:
    """Decide once."""
    outlook = decide(state.policy, snapshot, limits)
    watched = rails.watch(state.rails, snapshot)
    for seen in outlook.seen:
        watched = rails.record_effect(watched, seen.guest, effective=seen.effective, now_s=snapshot.time_s)
    decisions = rails.check_all(outlook.decisions, snapshot, limits, watched)
    return Tick(
        EngineState(outlook.state, watched), decisions, outlook.decisions, outlook.views, outlook.seen, outlook.busy
    )


def applied(state: EngineState, decision: Decision, now_s: float) -> EngineState:
    """After one step was handed to QEMU at `now_s`."""
    return EngineState(commit(state.policy, decision, now_s), rails.record(state.rails, decision, now_s))
