"""The real engine in a simulated world: traces as data, and a checker that knows the rules but not the code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmd.tuning import constants as c
from kvmd.tuning import simulate
from kvmd.tuning.decision import Kind
from kvmd.tuning.simulate import GuestTrace, Run, Trace

MIB = 1 << 20
TRACES = Path(__file__).parents[2] / "data" / "traces"
NAMES = sorted(path.stem for path in TRACES.glob("*.json"))


def load(name: str) -> Trace:
    return Trace.from_json(json.loads((TRACES / f"{name}.json").read_text()))


def violations(run: Run) -> list[str]:
    """Every broken promise of a run, by the raw record: figures written here anew, not taken from the code."""
    found = []
    guests = {guest.name: guest for guest in run.trace.guests}
    last_give: dict[str, float] = {}
    last_write: dict[str, float] = {}
    for step in run.steps:
        decision, name = step.decision, step.decision.guest
        guest, reading = guests[name], step.sample.reading
        here = f"{step.time_s:.0f} s {name} {decision.kind} {decision.from_bytes} -> {decision.to_bytes}"
        low, high = guest.guaranteed_mib * MIB, guest.memory_mib * MIB
        if not low <= decision.to_bytes <= high:
            found.append(f"{here}: outside [guaranteed, M]")
        if guest.hugepages or guest.vfio or guest.mode != "apply":
            found.append(f"{here}: not to be touched")
        if step.time_s - last_write.get(name, -10.0) < 1.0:
            found.append(f"{here}: two writes within a second")
        last_write[name] = step.time_s
        if decision.kind is Kind.GIVE:
            last_give[name] = step.time_s
            continue
        age = step.sample.stats_age_s(step.time_s)
        if guest.stats in ("none", "liar") or age is None or age > 10 or reading is None:
            found.append(f"{here}: taken without figures to go by")
        size = decision.from_bytes - decision.to_bytes
        spare = (reading.available_bytes if reading else None) or 0
        if size > spare / 2:
            found.append(f"{here}: more than half of what it can spare ({spare})")
        point = next(point for point in run.points if point.time_s == step.time_s)
        usable = (run.trace.total_mib - run.trace.hugetlb_mib - run.trace.reserve_mib) * MIB
        crisis = point.host_spare_bytes < 0.03 * usable
        dire = (crisis and point.host_spare_bytes <= -run.trace.reserve_mib * MIB // 2) or not run.trace.reserve_mib
        if size > max(512 * MIB, 0.08 * high) and not crisis:
            found.append(f"{here}: above the step limit")
        if size < 16 * MIB:
            found.append(f"{here}: a crumb")
        if step.time_s - last_give.get(name, -100.0) < 60 and not dire:
            found.append(f"{here}: taken back within a minute of giving")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_no_trace_breaks_a_rule(name: str) -> None:
    run = simulate.run(load(name))
    assert run.steps or name in ("mixed",), "a trace in which nothing moves proves nothing"
    assert violations(run) == []


@pytest.mark.parametrize("name", NAMES)
def test_same_trace_same_decisions(name: str) -> None:
    trace = load(name)
    assert simulate.run(trace).decisions == simulate.run(trace).decisions


def test_checker_sees_a_broken_rule() -> None:
    """The checker itself: a run whose guarantee is raised afterwards must not pass."""
    run = simulate.run(load("starving"))
    guests = tuple(GuestTrace(g.name, g.memory_mib, g.demand, guaranteed_mib=500) for g in run.trace.guests)
    forged = Trace("forged", 1, run.trace.total_mib, guests)
    assert any("outside" in line for line in violations(Run(forged, run.points, run.steps)))


def test_starving_guest_gets_its_neighbours_memory_in_time() -> None:
    run = simulate.run(load("starving"))
    pressed_at = next(time for time, decision in run.decisions if decision.rule in ("relief", "waiting"))
    first = next(step for step in run.steps if step.decision.guest == "starving" and step.decision.kind is Kind.GIVE)
    assert first.time_s - pressed_at <= 10
    relief = simulate.time_to_relief_s(run, "starving")
    assert relief is not None
    assert relief <= 20
    assert simulate.shortage_gib_s(run, "idle") == 0
    idle, starving = run.points[-1].guests
    assert idle[0] < 300 * MIB
    assert starving[0] > 380 * MIB
    taken = [step.decision for step in run.steps if step.decision.rule == "transfer"]
    assert taken
    assert "starving wants" in taken[0].why


def test_transfer_does_not_create_memory() -> None:
    """What is given in the starving trace was taken before: the sum of targets never rises above its start."""
    run = simulate.run(load("starving"))
    sums = [sum(target for _, target, _ in point.guests) for point in run.points]
    assert max(sums) <= sums[0]


def test_spike_is_relieved() -> None:
    run = simulate.run(load("spike"))
    relief = simulate.time_to_relief_s(run, "web")
    assert relief is not None
    assert relief <= 30
    assert simulate.shortage_gib_s(run, "a") == simulate.shortage_gib_s(run, "b") == 0


def test_wave_is_followed() -> None:
    """Two guests take turns in needing memory; nearly all of what they lack without transfer is found."""
    run = simulate.run(load("wave"))
    needed = sum(guest.demand_bytes(point.time_s) for guest in run.trace.guests for point in run.points) / (1 << 30)
    assert simulate.shortage_gib_s(run) < 0.03 * needed


@pytest.mark.parametrize("name", ["starving", "boot", "liar", "blind", "mixed", "infeasible"])
def test_no_oscillation_at_steady_state(name: str) -> None:
    """These traces are constant in their second half: a target that moved both ways there would be nervousness."""
    trace = load(name)
    run = simulate.run(trace)
    assert simulate.reversals(run, after_s=trace.duration_s * 0.6) == 0


def test_booting_guests_are_given_nothing_to_suffer() -> None:
    run = simulate.run(load("boot"))
    early = [step for step in run.steps if step.decision.kind is Kind.TAKE and step.decision.guest in "abc"]
    assert all(step.time_s >= 20 for step in early)
    assert any(step.decision.guest == "d" and step.decision.kind is Kind.TAKE for step in run.steps)


def test_liar_and_blind_lose_nothing_and_the_greedy_gets_no_more_than_its_size() -> None:
    run = simulate.run(load("liar"))
    assert not [step for step in run.steps if step.decision.guest == "liar" and step.decision.kind is Kind.TAKE]
    assert simulate.shortage_gib_s(run, "honest") == 0
    blind = simulate.run(load("blind"))
    taken = {step.decision.guest for step in blind.steps if step.decision.kind is Kind.TAKE}
    assert "driverless" not in taken
    late = [s for s in blind.steps if s.decision.guest == "silent" and s.decision.kind is Kind.TAKE and s.time_s > 50]
    assert late == []


def test_hugepage_and_vfio_guests_are_left_alone_and_say_why() -> None:
    run = simulate.run(load("mixed"))
    assert {step.decision.guest for step in run.steps} <= {"plain"}
    rules = {decision.guest: decision.rule for _, decision in run.decisions}
    assert rules["huge"] == "hugepages"
    assert rules["nic"] == "vfio"


def test_infeasible_keeps_the_guarantees() -> None:
    run = simulate.run(load("infeasible"))
    assert all(target >= 1024 * MIB for point in run.points for _, target, _ in point.guests)
    waiting = [decision for _, decision in run.decisions if decision.rule == "waiting"]
    assert waiting
    assert waiting[-1].limited_by
    assert simulate.shortage_gib_s(run) > 0


def test_without_host_figures_nothing_is_done() -> None:
    base = load("starving")
    trace = Trace("blind-host", 120, base.total_mib, base.guests, base.own_mib, base.reserve_mib, host_blind_at_s=30.0)
    run = simulate.run(trace)
    assert [step for step in run.steps if step.time_s >= 30] == []
    assert run.decisions[-1][1].rule == "no-host-figures"


CORNERS = st.lists(
    st.tuples(st.integers(0, 120), st.integers(0, 3000)), min_size=1, max_size=5, unique_by=lambda corner: corner[0]
).map(lambda corners: tuple((float(at), float(mib)) for at, mib in sorted(corners)))


@pytest.mark.parametrize("late_s", [0.0, 2.0, 4.0])
def test_no_more_is_taken_because_the_host_sees_it_late(late_s: float) -> None:
    """Caches grow until the host is in CRIT. What is taken is what is missing, however late MemAvailable tells."""
    guests = tuple(
        GuestTrace(f"g{number}", 6144, ((0.0, 1000.0),), guaranteed_mib=1024, cache_mib=4000) for number in range(3)
    )
    done = simulate.run(Trace("late", 120, 16384, guests, own_mib=850, host_late_s=late_s))
    assert any("host CRIT" in decision.why for _, decision in done.decisions)
    left = done.points[-1].host_spare_bytes / (16384 * MIB)
    assert c.SOFT_BELOW < left < c.OK_ABOVE  # neither short nor so much that it goes back to where it came from
    assert simulate.reversals(done) == 0


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    guests = []
    for name in "abcd"[: draw(st.integers(1, 4))]:
        memory = draw(st.integers(64, 3072))
        guaranteed = draw(st.integers(0, memory))
        guests.append(
            GuestTrace(
                name,
                memory,
                draw(CORNERS),
                guaranteed_mib=guaranteed,
                shares=draw(st.integers(1, 10000)),
                cache_mib=draw(st.integers(0, 3000)),
                start_mib=draw(st.none() | st.integers(guaranteed, memory).filter(bool)),
                booted_s=draw(st.sampled_from([0.0, 60.0, 3600.0])),
                stats=draw(st.sampled_from(["honest", "honest", "honest", "none", "liar", "greedy", "silent"])),
                silent_at_s=float(draw(st.integers(0, 100))),
                hugepages=draw(st.integers(0, 9)) == 0,
                vfio=draw(st.integers(0, 9)) == 0,
                mode=draw(st.sampled_from(["apply", "apply", "apply", "advise", "off"])),
                balloon_mib_per_s=float(draw(st.sampled_from([0, 5, 100, 400]))),
            )
        )
    total = draw(st.integers(1024, 12288))
    return Trace(
        "random",
        120.0,
        total,
        tuple(guests),
        own_mib=draw(st.integers(0, total // 4)),
        reserve_mib=draw(st.integers(0, total)),
        host_blind_at_s=draw(st.none() | st.just(60.0)),
    )


@settings(deadline=None)
@given(traces())
def test_no_random_world_breaks_a_rule(trace: Trace) -> None:
    run = simulate.run(trace)
    assert violations(run) == []
    for point in run.points:
        for guest, (_actual, target, _short) in zip(trace.guests, point.guests, strict=True):
            assert target <= guest.memory_mib * MIB
            assert target >= min(guest.start_mib or guest.memory_mib, guest.guaranteed_mib) * MIB
    assert all(decision.why for _, decision in run.decisions)
