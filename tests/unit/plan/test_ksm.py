"""Knobs of merging, transparent hugepages and swappiness, on kernels with and without each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import Action, WriteKnob
from kvmd.config.host import Host
from kvmd.facts import Facts
from kvmd.plan.ksm import KNOBS, KSM, SWAPPINESS, THP, plan_ksm, start_pages
from tests.rig.hosts import topology

OLD_KERNEL = {
    f"{KSM}/run": "0",
    f"{KSM}/pages_to_scan": "100",
    f"{KSM}/sleep_millisecs": "20",
    f"{KSM}/merge_across_nodes": "1",
    f"{KSM}/pages_shared": "0",
    f"{THP}/enabled": "always",
    f"{THP}/defrag": "madvise",
    SWAPPINESS: "60",
}
NEW_KERNEL = OLD_KERNEL | {
    f"{KSM}/advisor_mode": "none",
    f"{KSM}/advisor_max_cpu": "70",
    f"{KSM}/advisor_target_scan_time": "200",
    f"{KSM}/advisor_min_pages_to_scan": "500",
    f"{KSM}/advisor_max_pages_to_scan": "30000",
    f"{KSM}/smart_scan": "1",
    f"{KSM}/use_zero_pages": "0",
    f"{KSM}/max_page_sharing": "256",
    f"{THP}/shmem_enabled": "never",
    f"{THP}/khugepaged/defrag": "1",
}


def host(**tables: dict[str, Any]) -> Host:
    return Host.model_validate(tables)


def facts(knobs: dict[str, str], *, nodes: int = 1) -> Facts:
    return Facts(cpus=topology(nodes=nodes), knobs=knobs)


def writes(actions: Iterable[Action]) -> list[tuple[str, str]]:
    return [(each.path.rpartition("/")[2], each.new) for each in actions if isinstance(each, WriteKnob)]


class Kernel:
    """What KSM's files do when written (mm/ksm.c): the advisor owns pages_to_scan, and resets it when it changes."""

    def __init__(self, knobs: dict[str, str]) -> None:
        self.knobs = dict(knobs)

    def write(self, action: Action) -> None:
        assert isinstance(action, WriteKnob)
        assert self.knobs[action.path] == action.old or action.path.endswith("pages_to_scan")
        assert action.path in KNOBS
        assert not action.requirement
        name = action.path.rpartition("/")[2]
        if name == "pages_to_scan":
            assert self.knobs.get(f"{KSM}/advisor_mode", "none") == "none", "EINVAL"
        if name in ("merge_across_nodes", "max_page_sharing"):
            assert self.knobs[f"{KSM}/pages_shared"] == "0", "EBUSY"
        if name == "advisor_mode":
            self.knobs[f"{KSM}/pages_to_scan"] = "500" if action.new == "scan-time" else "100"
        self.knobs[action.path] = action.new


def test_keep_touches_nothing_and_off_stops_only_what_runs() -> None:
    merging = OLD_KERNEL | {f"{KSM}/run": "1"}
    assert plan_ksm(host(ksm={"mode": "keep"}), facts(merging)) == ((), ())
    assert writes(plan_ksm(host(), facts(merging))[0]) == [("run", "0")]
    assert plan_ksm(host(), facts(OLD_KERNEL)) == ((), ())
    assert plan_ksm(host(), facts(OLD_KERNEL | {f"{KSM}/run": "2"})) == ((), ())
    assert plan_ksm(host(), facts({})) == ((), ()), "off is true of a kernel without KSM"


def test_kernel_mode_drives_the_advisor_and_never_its_pages() -> None:
    asked = host(ksm={"mode": "kernel", "max_cpu": "15%", "scan_target": "5min"})
    actions, problems = plan_ksm(asked, facts(NEW_KERNEL))
    assert writes(actions) == [
        ("advisor_mode", "scan-time"),
        ("advisor_max_cpu", "15"),
        ("advisor_target_scan_time", "300"),
        ("run", "1"),
    ]
    assert not problems
    assert "ksm.mode is kernel" in actions[0].why


def test_kernel_mode_without_an_advisor_is_a_fixed_rate() -> None:
    actions, _ = plan_ksm(host(ksm={"mode": "kernel", "max_cpu": "5%"}), facts(OLD_KERNEL))
    assert writes(actions) == [("pages_to_scan", "500"), ("run", "1")]
    assert [start_pages(share) for share in (0.0001, 0.1, 1.0)] == [64, 1000, 1250]


def test_kvmd_mode_takes_the_rate_once_and_leaves_it_to_the_agent() -> None:
    asked = host(ksm={"mode": "kvmd"})
    advised = NEW_KERNEL | {f"{KSM}/advisor_mode": "scan-time", f"{KSM}/run": "1", f"{KSM}/pages_to_scan": "1000"}
    assert writes(plan_ksm(asked, facts(advised))[0]) == [("advisor_mode", "none"), ("pages_to_scan", "1000")]
    moved = NEW_KERNEL | {f"{KSM}/run": "1", f"{KSM}/pages_to_scan": "777"}
    assert plan_ksm(asked, facts(moved)) == ((), ())


def test_across_nodes_needs_nothing_merged() -> None:
    asked = host(ksm={"mode": "kvmd"})
    assert ("merge_across_nodes", "0") not in writes(plan_ksm(asked, facts(OLD_KERNEL))[0]), "one node: no meaning"
    actions, problems = plan_ksm(asked, facts(OLD_KERNEL, nodes=2))
    assert writes(actions)[0] == ("merge_across_nodes", "0")
    assert not problems
    actions, problems = plan_ksm(asked, facts(OLD_KERNEL | {f"{KSM}/pages_shared": "12"}, nodes=2))
    assert "merge_across_nodes" not in [name for name, _ in writes(actions)]
    assert "(12 now)" in problems[0].message
    assert "echo 2" in (problems[0].hint or "")
    assert not problems[0].guests


def test_every_other_knob_of_merging() -> None:
    wish = {"smart_scan": False, "use_zero_pages": True, "max_page_sharing": 64, "sleep": "50ms"}
    asked = host(ksm={"mode": "kernel", "min_pages": 100, "max_pages": 9000, **wish})
    actions, problems = plan_ksm(asked, facts(NEW_KERNEL))
    assert not problems
    assert writes(actions) == [
        ("max_page_sharing", "64"),
        ("use_zero_pages", "1"),
        ("smart_scan", "0"),
        ("sleep_millisecs", "50"),
        ("advisor_mode", "scan-time"),
        ("advisor_min_pages_to_scan", "100"),
        ("advisor_max_pages_to_scan", "9000"),
        ("advisor_max_cpu", "10"),
        ("run", "1"),
    ]
    assert [action.why for action in actions][:2] == ["ksm.max_page_sharing is 64", "ksm.use_zero_pages is true"]
    own = host(ksm={"mode": "kvmd", "sleep": "40ms", "max_cpu": "5%"})
    assert ("pages_to_scan", "1000") in writes(plan_ksm(own, facts(NEW_KERNEL))[0]), "5 % of 40 ms at 2 us a page"
    actions, problems = plan_ksm(asked, facts(NEW_KERNEL | {f"{KSM}/pages_shared": "7"}))
    assert "max_page_sharing" not in [name for name, _ in writes(actions)]
    assert "(7 now)" in problems[0].message
    lacking = [problem.subject for problem in plan_ksm(asked, facts(OLD_KERNEL))[1]]
    assert lacking == [f"{KSM}/{name}" for name in ("max_page_sharing", "use_zero_pages", "smart_scan")]


def test_thp_of_shared_memory_and_of_khugepaged() -> None:
    asked = host(thp={"shmem_enabled": "advise", "khugepaged_defrag": False})
    assert writes(plan_ksm(asked, facts(NEW_KERNEL))[0]) == [("shmem_enabled", "advise"), ("defrag", "0")]
    assert [problem.subject for problem in plan_ksm(asked, facts(OLD_KERNEL))[1]] == [
        f"{THP}/shmem_enabled",
        f"{THP}/khugepaged/defrag",
    ]


def test_thp_and_swappiness() -> None:
    asked = host(thp={"enabled": "madvise", "defrag": "madvise"}, swap={"swappiness": 10})
    actions, _ = plan_ksm(asked, facts(OLD_KERNEL))
    assert writes(actions) == [("enabled", "madvise"), ("swappiness", "10")]
    assert actions[0].line() == f"~ {THP}/enabled: always -> madvise"


@pytest.mark.parametrize("mode", ["kernel", "kvmd"])
def test_a_kernel_without_the_knob_is_a_problem(mode: str) -> None:
    actions, problems = plan_ksm(host(ksm={"mode": mode}, thp={"enabled": "never"}), facts({}))
    assert not actions
    assert [problem.subject for problem in problems] == [f"{KSM}/run", f"{THP}/enabled"]


@given(
    st.sampled_from(["keep", "off", "kernel", "kvmd"]),
    st.sampled_from([OLD_KERNEL, NEW_KERNEL]),
    st.sampled_from(["0", "1", "2"]),
    st.sampled_from(["0", "5"]),
    st.sampled_from(["none", "scan-time"]),
    st.sampled_from(["keep", "always", "never"]),
    st.integers(1, 100),
    st.sampled_from([1, 2]),
    st.fixed_dictionaries(
        {},
        optional={
            "smart_scan": st.booleans(),
            "use_zero_pages": st.booleans(),
            "max_page_sharing": st.integers(2, 300),
            "sleep": st.sampled_from(["1ms", "20ms", "1s"]),
            "max_pages": st.integers(1, 40000),
        },
    ),
)
def test_applied_once_it_is_done(
    mode: str,
    kernel: dict[str, str],
    run: str,
    shared: str,
    advisor: str,
    thp: str,
    percent: int,
    nodes: int,
    more: dict[str, Any],
) -> None:
    knobs = kernel | {f"{KSM}/run": run, f"{KSM}/pages_shared": shared}
    if f"{KSM}/advisor_mode" in knobs:
        knobs[f"{KSM}/advisor_mode"] = advisor
    asked = host(ksm={"mode": mode, "max_cpu": f"{percent}%", **more}, thp={"enabled": thp})
    before = facts(knobs, nodes=nodes)
    actions, problems = plan_ksm(asked, before)
    machine = Kernel(knobs)
    for action in actions:
        machine.write(action)
    assert plan_ksm(asked, replace(before, knobs=machine.knobs)) == ((), problems)
    if mode in ("kernel", "kvmd"):
        assert machine.knobs[f"{KSM}/run"] == "1"
