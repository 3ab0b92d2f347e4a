"""How fast ksmd may scan when `ksm.mode = "kvmd"`: by what merging is measured to bring for its CPU time. Pure.

The plan (plan/ksm.py) switches merging on and sets a first rate; from then on this law alone moves `pages_to_scan`.
Nothing merges before a page was seen unchanged twice, so judgement comes after two full scans. Where merging does not
pay it rests, ever longer. A knob that someone else changed is left to them. Counters: Documentation/admin-guide/mm/
ksm.rst.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from kvmd.tuning.constants import MIB
from kvmd.tuning.decision import mib
from kvmd.tuning.snapshot import Mode

TRICKLE_CPU = 0.02  # design, shares of one CPU
RUN_CPU = 0.10
BOOST_CPU = 0.35
REST_PAGES = 1  # run stays 1, which is the plan's knob: a page a batch costs nothing
MIN_PAGES, MAX_PAGES = 16, 20_000
JUDGE_SCANS = 2  # design
PAYS_BYTES = 16 * MIB  # less profit than this in all is not worth a running thread
GOOD_BYTES_PER_CPU_S = 32 * MIB
POOR_BYTES_PER_CPU_S = 4 * MIB
REST_S = 600.0  # design: retry later, later, later
REST_MAX_S = 4 * 3600.0


class Gear(StrEnum):
    """How much of a CPU ksmd may use."""

    REST = "rest"
    TRICKLE = "trickle"
    RUN = "run"
    BOOST = "boost"


_CPU = {Gear.REST: 0.0, Gear.TRICKLE: TRICKLE_CPU, Gear.RUN: RUN_CPU, Gear.BOOST: BOOST_CPU}


@dataclass(frozen=True, slots=True)
class KsmSample:
    """The KSM counters and knobs once read. None: this kernel does not have it."""

    run: int
    pages_to_scan: int
    sleep_ms: int
    full_scans: int
    pages_sharing: int
    profit_bytes: int  # general_profit, or pages_sharing in bytes where the kernel has none
    pages_scanned: int | None = None
    advisor: str | None = None
    cpu_s: float | None = None  # CPU seconds of ksmd since boot


@dataclass(frozen=True, slots=True)
class KsmLimits:
    """`owned`: ksm.mode is "kvmd". `max_cpu` is a share of one CPU, `members` how many guests may be merged.

    `written`: the rate kvmd last wrote in this boot, also before its last restart; None: as far as this run knows.
    """

    owned: bool = False
    mode: Mode = Mode.ADVISE
    max_cpu: float = 0.10
    members: int = 0
    written: int | None = None


@dataclass(frozen=True, slots=True)
class KsmState:
    """`written` is the rate last set by us; the `base` figures are from the begin of the present trial."""

    gear: Gear = Gear.TRICKLE
    written: int | None = None
    base: KsmSample | None = None
    last: KsmSample | None = None
    last_s: float = 0.0
    cpu_s_per_page: float | None = None
    rest_s: float = 0.0
    rest_until_s: float | None = None
    members: int = 0


@dataclass(frozen=True, slots=True)
class KsmDecision:
    """`pages_to_scan` None: leave it as it is."""

    gear: Gear
    rule: str
    why: str
    pages_to_scan: int | None = None


def decide_ksm(
    state: KsmState, sample: KsmSample, limits: KsmLimits, *, host_is_tight: bool, now_s: float
) -> tuple[KsmState, KsmDecision]:
    """One look, every KSM_TICK_S. The rate it returns must be reported by `ksm_applied` once written."""
    yielded = _yielded(state if limits.written is None else replace(state, written=limits.written), sample)
    state = replace(_measured(state, sample, now_s), last=sample, last_s=now_s)
    if not limits.owned or yielded is not None:
        why = yielded or "ksm.mode is not kvmd"
        return state, KsmDecision(state.gear, "yielded" if yielded else "not-owned", why)
    state, rule, why = _shift(state, sample, limits, host_is_tight=host_is_tight, now_s=now_s)
    pages = _rate(state, sample, limits)
    return state, KsmDecision(state.gear, rule, why, None if pages == sample.pages_to_scan else pages)


def ksm_applied(state: KsmState, pages_to_scan: int) -> KsmState:
    """After the rate was written."""
    return replace(state, written=pages_to_scan)


def _yielded(state: KsmState, sample: KsmSample) -> str | None:
    """Whose knob it is, if no longer ours."""
    if sample.run != 1:
        return f"someone set run to {sample.run}: left to them"
    if sample.advisor not in (None, "none"):
        return f"the kernel's advisor ({sample.advisor}) was switched on: left to it"
    if state.written is not None and sample.pages_to_scan != state.written:
        return f"someone set pages_to_scan to {sample.pages_to_scan} (kvmd: {state.written}): left to them"
    return None


def _measured(state: KsmState, sample: KsmSample, now_s: float) -> KsmState:
    """Cost per page from what ksmd used since the last look."""
    last = state.last
    if last is None or sample.cpu_s is None or last.cpu_s is None:
        return state
    scanned: float
    if sample.pages_scanned is not None and last.pages_scanned is not None:
        scanned = sample.pages_scanned - last.pages_scanned
    else:
        scanned = last.pages_to_scan * (now_s - state.last_s) * 1000 / max(1, last.sleep_ms)
    used = sample.cpu_s - last.cpu_s
    if scanned < 1000 or used <= 0:
        return state  # the clock ticks of /proc are too coarse for less
    cost = used / scanned
    old = state.cpu_s_per_page
    return replace(state, cpu_s_per_page=cost if old is None else 0.7 * old + 0.3 * cost)


def _shift(
    state: KsmState, sample: KsmSample, limits: KsmLimits, *, host_is_tight: bool, now_s: float
) -> tuple[KsmState, str, str]:
    """The gear for now, and why."""
    newcomers = limits.members > state.members
    state = replace(state, members=limits.members)
    if limits.members < 2:
        return replace(state, gear=Gear.REST, base=None), "no-members", "fewer than two guests may share pages"
    if state.gear is Gear.REST or state.base is None:
        waiting = state.rest_until_s is not None and now_s < state.rest_until_s
        if waiting and not newcomers:
            left = (state.rest_until_s or 0.0) - now_s
            return replace(state, gear=Gear.REST), "resting", f"merging did not pay; tried again in {left:.0f} s"
        why = "a guest joined" if newcomers else "a new trial"
        return replace(state, gear=Gear.TRICKLE, base=sample), "trial", f"{why}: judged after {JUDGE_SCANS} full scans"
    if sample.full_scans - state.base.full_scans < JUDGE_SCANS:
        return state, "trial", f"scan {sample.full_scans - state.base.full_scans} of {JUDGE_SCANS} before judging"
    return _judge(state, sample, state.base, host_is_tight=host_is_tight, now_s=now_s)


def _judge(
    state: KsmState, sample: KsmSample, base: KsmSample, *, host_is_tight: bool, now_s: float
) -> tuple[KsmState, str, str]:
    used = (sample.cpu_s or 0.0) - (base.cpu_s or 0.0)
    gained = sample.profit_bytes - base.profit_bytes
    per_s = gained / used if used > 0 else 0.0
    figures = f"profit {mib(sample.profit_bytes)}, {mib(gained)} of it since for {used:.1f} s of ksmd"
    if sample.profit_bytes < PAYS_BYTES:
        rest_s = min(REST_MAX_S, state.rest_s * 2 if state.rest_s else REST_S)
        rested = replace(state, gear=Gear.REST, base=None, rest_s=rest_s, rest_until_s=now_s + rest_s)
        return rested, "does-not-pay", f"{figures}: rests for {rest_s:.0f} s"
    state = replace(state, base=sample, rest_s=0.0, rest_until_s=None)
    if per_s >= GOOD_BYTES_PER_CPU_S:
        gear = Gear.BOOST if host_is_tight else Gear.RUN
        return replace(state, gear=gear), "pays", figures
    if per_s < POOR_BYTES_PER_CPU_S:
        return replace(state, gear=Gear.TRICKLE), "kept", f"{figures}: only enough to keep what is merged"
    return state, "steady", figures


def _rate(state: KsmState, sample: KsmSample, limits: KsmLimits) -> int:
    """Pages a batch for the gear's CPU share, at the measured cost; unmeasured, what the plan began with."""
    if state.gear is Gear.REST:
        return REST_PAGES
    if state.cpu_s_per_page is None:
        return max(MIN_PAGES, sample.pages_to_scan)
    share = min(_CPU[state.gear], limits.max_cpu)
    # a batch takes share/(1-share) of the pause between two
    pages = share / (1 - min(share, 0.9)) * sample.sleep_ms / 1000 / state.cpu_s_per_page
    wanted = max(MIN_PAGES, min(MAX_PAGES, round(pages)))
    near = abs(wanted - sample.pages_to_scan) <= 0.2 * sample.pages_to_scan  # not worth a write
    return sample.pages_to_scan if near else wanted
