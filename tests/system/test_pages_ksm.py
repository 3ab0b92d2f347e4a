"""Hugepages and the memory knobs through the machine's own /sys: a few pages, and every value put back.

Pages and KSM belong to the whole machine: one lock file, small numbers, and what was found is restored. The request
no host can meet is made to a copy of this machine's files that answers like the kernel, never to the machine.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvmd.actions import Action, SetHugepages, WriteKnob
from kvmd.config.host import Host
from kvmd.effects.sysfs import HostTree
from kvmd.errors import HostFailed
from kvmd.facts import Facts
from kvmd.plan.hugepages import PageNeed, plan_hugepages
from kvmd.plan.ksm import KNOBS, KSM, SWAPPINESS, plan_ksm
from tests.rig.hosts import MIB, REPO, StingyHost, write_tree
from tests.rig.machinestate import machine_lock

pytestmark = pytest.mark.system

P2 = 2 * MIB
FEW = 8
MAP_HUGETLB = 0x40000  # linux/mman.h; the mmap module does not name it


@pytest.fixture
def machine() -> Iterator[HostTree]:
    """This machine, alone, with pools and knobs put back afterwards."""
    tree = HostTree()
    with machine_lock():
        pools = tree.observe_hugepages()
        knobs = tree.observe_knobs(KNOBS)
        try:
            yield tree
        finally:
            for pool in pools:
                tree.set_hugepages(pool.node, pool.page_bytes, pool.total - pool.surplus)
            # the advisor first: it owns pages_to_scan and resets it
            for path in sorted(knobs, key=lambda path: not path.endswith("advisor_mode")):
                if not path.endswith("pages_shared") and tree.observe_knobs([path])[path] != knobs[path]:
                    tree.write_knob(path, knobs[path])
            assert tree.observe_hugepages() == pools
            assert {**tree.observe_knobs(KNOBS), f"{KSM}/pages_shared": ""} == {**knobs, f"{KSM}/pages_shared": ""}


def observe(tree: HostTree) -> Facts:
    return Facts(
        cpus=tree.observe_cpus(),
        memory=tree.observe_memory(),
        hugepages=tree.observe_hugepages(),
        knobs=tree.observe_knobs(KNOBS),
    )


def apply(tree: HostTree, actions: tuple[Action, ...]) -> None:
    for action in actions:
        match action:
            case SetHugepages():
                tree.set_hugepages(action.node, action.page_bytes, action.new, compact=action.compact)
            case WriteKnob():
                tree.write_knob(action.path, action.new)
            case _:
                raise AssertionError(action)


def host(**tables: Mapping[str, Any]) -> Host:
    return Host.model_validate(tables)


def pages(tree: HostTree) -> tuple[int, int, int]:
    """Total, in use and reserved 2 MiB pages of all nodes."""
    pools = [pool for pool in tree.observe_hugepages() if pool.page_bytes == P2]
    return sum(p.total for p in pools), sum(p.used for p in pools), sum(p.reserved for p in pools)


def test_a_few_pages_are_reserved_and_given_back(machine: HostTree) -> None:
    before, used, reserved = pages(machine)
    declared = host(hugepages={"2MiB": {"pages": "auto"}}).hugepages
    needs = {"web": PageNeed(P2, FEW)}
    originals = {(pool.node, pool.page_bytes): pool.total - pool.surplus for pool in machine.observe_hugepages()}
    short = max(0, used + reserved + FEW - before)

    actions, problems = plan_hugepages(declared, needs, observe(machine), reserve=0, originals=originals)
    assert not problems
    apply(machine, actions)
    assert pages(machine)[0] == before + short
    assert plan_hugepages(declared, needs, observe(machine), reserve=0, originals=originals) == ((), ())

    actions, _ = plan_hugepages(declared, {}, observe(machine), reserve=0, originals=originals)
    apply(machine, actions)
    assert pages(machine)[0] == before


def test_pages_in_use_are_never_taken_away(machine: HostTree) -> None:
    before, used, reserved = pages(machine)
    floor = used + reserved
    if before - floor < FEW:
        machine.set_hugepages(0, P2, machine_pool(machine).total + FEW)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB
    with mmap.mmap(-1, 2 * P2, flags=flags) as area:
        assert pages(machine)[1:] == (used, reserved + 2), "mapped and promised"
        area[0] = 1
        assert pages(machine)[1:] == (used + 1, reserved + 1), "one touched"
        area[P2] = 1
        zero = host(hugepages={"2MiB": {"pages": 0}}).hugepages
        actions, problems = plan_hugepages(zero, {}, observe(machine), reserve=0)
        apply(machine, actions)
        assert pages(machine)[0] == floor + 2
        assert [f"are declared, {floor + 2} are in use" in problem.message for problem in problems][:1] == [True]
        assert plan_hugepages(zero, {}, observe(machine), reserve=0)[0] == ()
        assert machine.set_hugepages(0, P2, 0) >= 2, "the effect itself holds the line too"
        assert sum(pool.surplus for pool in machine.observe_hugepages()) == 0


def machine_pool(tree: HostTree) -> Any:
    return next(pool for pool in tree.observe_hugepages() if (pool.node, pool.page_bytes) == (0, P2))


def test_what_no_host_has_is_rolled_back_on_a_copy_of_this_one(tmp_path: Path) -> None:
    recorded = subprocess.run(
        [sys.executable, REPO / "scripts" / "record-host"], check=True, capture_output=True, timeout=60
    )
    write_tree(json.loads(recorded.stdout), tmp_path)
    copy = StingyHost(tmp_path, room=11393)
    assert copy.observe_cpus().online == HostTree().observe_cpus().online
    old = machine_pool(copy).total
    with pytest.raises(HostFailed, match="asked 1000000000 pages of 2MiB on node 0, the host gave 11393"):
        copy.set_hugepages(0, P2, 10**9)
    assert machine_pool(copy).total == old
    huge = host(hugepages={"2MiB": {"pages": 10**9}}).hugepages
    actions, problems = plan_hugepages(huge, {}, observe(copy), reserve=0)
    assert not actions, "and a plan never gets that far"
    assert "1000000000 pages" in problems[0].message


def test_ksm_modes_on_this_kernel(machine: HostTree) -> None:
    if machine.read(f"{KSM}/run") is None:
        pytest.skip("this kernel has no KSM")
    for mode, run in (("kernel", "1"), ("kvmd", "1"), ("kernel", "1"), ("off", "0")):
        wanted = host(ksm={"mode": mode, "max_cpu": "7%"})
        actions, problems = plan_ksm(wanted, observe(machine))
        assert not problems
        apply(machine, actions)
        assert machine.read(f"{KSM}/run") == run
        assert plan_ksm(wanted, observe(machine)) == ((), ())
        if mode == "kvmd":
            assert machine.read(f"{KSM}/pages_to_scan") == "700"
            machine.write_knob(f"{KSM}/pages_to_scan", "64")
            assert plan_ksm(wanted, observe(machine)) == ((), ()), "the rate is the agent's"


def test_the_advisor_refuses_a_rate_and_the_error_says_so(machine: HostTree) -> None:
    if machine.read(f"{KSM}/run") is None:
        pytest.skip("this kernel has no KSM")
    if machine.read(f"{KSM}/advisor_mode") is None:
        assert "advisor_mode" not in " ".join(action.line() for action in plan_ksm(host(), observe(machine))[0])
        return
    machine.write_knob(f"{KSM}/advisor_mode", "scan-time")
    with pytest.raises(HostFailed, match=r'cannot write "200" to .*pages_to_scan: Invalid argument'):
        machine.write_knob(f"{KSM}/pages_to_scan", "200")


def test_swappiness_and_thp(machine: HostTree) -> None:
    now = int(machine.read(SWAPPINESS) or 60)
    wanted = host(swap={"swappiness": 10 if now != 10 else 20}, thp={"defrag": "never"})
    apply(machine, plan_ksm(wanted, observe(machine))[0])
    assert machine.read(SWAPPINESS) == str(wanted.swap.swappiness)
    assert plan_ksm(wanted, observe(machine)) == ((), ())


def test_this_process_as_the_kernel_shows_it() -> None:
    tree = HostTree()
    own = tree.process(os.getpid())
    assert own is not None
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    assert own.start_time == ticks
    assert os.getpid() in tree.threads(os.getpid())
    assert os.sched_getaffinity(0) <= tree.observe_cpus().online
