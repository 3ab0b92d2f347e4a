"""Two NUMA nodes: pools of both page sizes on each, guests whose CPUs and memory are on one node, pages given back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rig.lab import Lab
from tests.rig.labhost import LabHost, kvm_guest, kvmd_in

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1200)]

HOST = """
[cpu]
housekeeping = "0,4"
[hugepages.2MiB]
pages = { node0 = 128, node1 = 128 }
[hugepages.1GiB]
pages = { node0 = 1, node1 = 2 }
"""
NODE = "/sys/devices/system/node/node{node}"
CPUS = {0: {"0", "1", "2", "3"}, 1: {"4", "5", "6", "7"}}
DEDICATED = 'vcpus = 2\nplacement = "dedicated"'
HUGE = kvm_guest("huge", size="128MiB", cpu=DEDICATED, memory='backing = "hugepages"')
GIGANTIC = kvm_guest("gigantic", size="1GiB", cpu=DEDICATED, memory='backing = "hugepages"\npage_size = "1GiB"')


@pytest.fixture(scope="module")
def kvmd(lab_numa: Lab) -> Iterator[LabHost]:
    with kvmd_in(lab_numa, host=HOST) as host:
        yield host


def pool(lab: Lab, node: int, kib: int, counter: str = "nr_hugepages") -> int:
    """Pages of one node's pool."""
    return int(lab.check(f"cat {NODE.format(node=node)}/hugepages/hugepages-{kib}kB/{counter}"))


def pages_by_node(lab: Lab, pid: int, page_kib: int) -> dict[int, int]:
    """Huge pages of a process on each node, by numa_maps (Documentation/filesystems/proc.rst)."""
    found: dict[int, int] = {}
    for line in lab.check(f"cat /proc/{pid}/numa_maps").splitlines():
        if f"kernelpagesize_kB={page_kib}" in line.split() and " huge " in line:
            for node, count in re.findall(r" N(\d+)=(\d+)", line):
                found[int(node)] = found.get(int(node), 0) + int(count)
    return found


def node_of(guest: dict[str, Any]) -> int:
    """The one node all vCPUs are on."""
    vcpus = set(guest["placement"]["vcpus"])
    (node,) = (node for node, cpus in CPUS.items() if vcpus <= cpus)
    return node


def test_kvmd_reserves_both_sizes_on_both_nodes(kvmd: LabHost) -> None:
    kvmd.apply()
    assert [pool(kvmd.lab, node, 2048) for node in CPUS] == [128, 128]
    assert [pool(kvmd.lab, node, 1048576) for node in CPUS] == [1, 2]
    assert kvmd.plan()["actions"] == []


@pytest.mark.parametrize(
    ("name", "text", "page_kib", "pages"),
    [("huge", HUGE, 2048, 64), ("gigantic", GIGANTIC, 1048576, 1)],
    ids=["2MiB", "1GiB"],
)
def test_a_guests_memory_is_on_the_node_of_its_cpus(
    kvmd: LabHost, name: str, text: str, page_kib: int, pages: int
) -> None:
    kvmd.guest(name, text)
    kvmd.apply()
    kvmd.cli("start", name)
    kvmd.wait_serial(name, f"KVMD-GUEST READY role={name}")
    guest = kvmd.show(name)
    node, pid = node_of(guest), guest["pid"]
    assert pages_by_node(kvmd.lab, pid, page_kib) == {node: pages}
    free = {each: pool(kvmd.lab, each, page_kib, "free_hugepages") for each in CPUS}
    assert free[node] == pool(kvmd.lab, node, page_kib) - pages
    assert free[1 - node] == pool(kvmd.lab, 1 - node, page_kib)
    # One vCPU to one CPU, and never a thread of QEMU's own on them.
    affinity = kvmd.affinity(pid)
    vcpus = {cpus for thread, cpus in affinity.items() if thread.startswith("CPU ")}
    assert vcpus == set(guest["placement"]["vcpus"])
    others = {cpus for thread, cpus in affinity.items() if not thread.startswith("CPU ")}
    assert others == {guest["placement"]["emulator"]}
    assert kvmd.plan()["actions"] == []
    kvmd.cli("kill", name)
    kvmd.lab.check(f"rm /etc/kvmd/guests.d/{name}.toml")


def test_released_pools_are_what_they_were(kvmd: LabHost) -> None:
    kvmd.cli("--yes", "host", "release")
    assert [pool(kvmd.lab, node, 2048) for node in CPUS] == [0, 0]
    assert [pool(kvmd.lab, node, 1048576) for node in CPUS] == [1, 1]
