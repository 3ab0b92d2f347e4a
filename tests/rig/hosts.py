"""Hosts for tests: recorded trees, made-up ones, and a kernel whose hugepages run out.

`load(NAME, DIR)` unpacks tests/data/hosts/NAME.json below DIR; `unpack_hwloc` does it with one of the trees shared
beside the repository. `python -m tests.rig.hosts` writes the made-up trees (called synthetic-*) anew.
"""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path

from kvmd.effects.sysfs import HostTree
from kvmd.facts import Cpu, CpuTopology, Facts, HugepagePool, Memory
from kvmd.units import CpuSet

REPO = Path(__file__).resolve().parents[2]
DATA = REPO / "tests" / "data" / "hosts"
HWLOC = REPO.parent / "shared" / "data" / "hwloc"  # beside the repository where it is developed, nowhere else
NO_HWLOC = "none-here"
MIB, GIB = 1 << 20, 1 << 30


def load(name: str, root: Path) -> HostTree:
    """The recorded host below `root`."""
    recorded: dict[str, str] = json.loads((DATA / f"{name}.json").read_text())
    write_tree({path: text for path, text in recorded.items() if path != "source"}, root)
    return HostTree(root)


def write_tree(files: dict[str, str], root: Path) -> None:
    """Make the files, by absolute path of the pictured host, below `root`."""
    for path, text in files.items():
        file = root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def hwloc_names() -> list[str]:
    """Archives that can be unpacked here, [NO_HWLOC] where there are none (an empty parameter list is a skip)."""
    return sorted(path.name.removesuffix(".tar.bz2") for path in HWLOC.glob("*.tar.bz2")) or [NO_HWLOC]


def unpack_hwloc(name: str, root: Path) -> HostTree:
    """One of the real machines gathered by the hwloc project; NO_HWLOC gives the recorded flat host."""
    if name == NO_HWLOC:
        return load("flat-2cpu", root)
    with tarfile.open(HWLOC / f"{name}.tar.bz2") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() and _is_wanted(member.name) else None
            if content is not None:
                file = root / member.name.partition("/")[2]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content.read())
            elif member.issym() and member.name.endswith("/cpufreq") and not member.linkname.startswith("/"):
                link = root / member.name.partition("/")[2]
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(member.linkname)
    return HostTree(root)


def _is_wanted(name: str) -> bool:
    inside = "/" + name.partition("/")[2]
    return inside.startswith(("/sys/devices/system", "/sys/kernel", "/sys/fs", "/proc", "/cgroup", "/dev/cpuset"))


def topology(
    *,
    nodes: int = 1,
    caches: int = 1,
    cores: int = 4,
    threads: int = 1,
    isolated: Iterable[int] = (),
    offline: Iterable[int] = (),
    siblings_last: bool = False,
) -> CpuTopology:
    """`nodes` x `caches` x `cores` x `threads`; ids run along the cores, or, as on most x86, thread by thread."""
    total = nodes * caches * cores
    cpus = []
    for core in range(total):
        ids = [core + thread * total if siblings_last else core * threads + thread for thread in range(threads)]
        ids = [cpu for cpu in ids if cpu not in set(offline)]
        cache = core // cores
        first_core = cache * cores
        l3 = first_core if siblings_last else first_core * threads
        cpus += [Cpu(id=cpu, node=cache // caches, package=cache // caches, core=min(ids), l3=l3) for cpu in ids]
    online = CpuSet(cpu.id for cpu in cpus)
    absent = CpuSet(range(total * threads)) - online
    distances = tuple(tuple(10 if a == b else 21 for b in range(nodes)) for a in range(nodes))
    return CpuTopology(
        cpus=tuple(sorted(cpus, key=lambda cpu: cpu.id)),
        isolated=CpuSet(set(isolated) & online),
        allowed=online,
        offline=CpuSet(absent),
        nodes=tuple(range(nodes)),
        distances=distances,
    )


def memory_facts(
    *pools: HugepagePool, total: int = 16 * GIB, available: int | None = None, swap: int = 0, nodes: int = 1
) -> Facts:
    """Facts of a host with this memory; what pools hold is not available."""
    held = sum(pool.total * pool.page_bytes for pool in pools)
    free = total - held - total // 16 if available is None else available
    return Facts(
        cpus=topology(nodes=nodes),
        memory=Memory(
            total_bytes=total,
            available_bytes=free,
            swap_total_bytes=swap,
            swap_free_bytes=swap,
            hugetlb_bytes=held,
            node_total_bytes=dict.fromkeys(range(nodes), total // nodes),
            node_free_bytes=dict.fromkeys(range(nodes), free // nodes),
        ),
        hugepages=pools,
    )


class StingyHost(HostTree):
    """A recorded tree whose hugepage files answer like the kernel: no error, as many pages as there are.

    `room` pages can be had per node before compaction, `compacted` after it. Every write is in `writes`.
    """

    def __init__(self, root: Path, *, room: int, compacted: int | None = None) -> None:
        super().__init__(root)
        self.room = room
        self.compacted = room if compacted is None else compacted
        self.writes: list[tuple[str, str]] = []
        self.refuse: Callable[[str], None] = lambda path: None

    def write(self, path: str, value: str) -> None:
        self.writes.append((path, value))
        self.refuse(path)
        if path.endswith(("/compact", "/compact_memory")):
            self.room = self.compacted
            return
        if not path.endswith("/nr_hugepages"):
            super().write(path, value)
            return
        pool = path.removesuffix("nr_hugepages")
        used = (self.number(path) or 0) - (self.number(pool + "free_hugepages") or 0)
        persistent = min(int(value), self.room) if int(value) > used else int(value)
        surplus = max(0, used - persistent)
        super().write(path, str(persistent + surplus))
        super().write(pool + "free_hugepages", str(persistent + surplus - used))
        super().write(pool + "surplus_hugepages", str(surplus))


def synthetic(
    shape: CpuTopology,
    *,
    total: int = 64 * GIB,
    kernel: str = "6.1.0",
    advisor: bool = False,
    no_memory: Collection[int] = (),
) -> dict[str, str]:
    """Files of a made-up host with that topology, `total` bytes of memory (none on the nodes `no_memory`) and pools of
    2 MiB and 1 GiB on each node that has some."""
    cpu, node = "/sys/devices/system/cpu", "/sys/devices/system/node"
    online = shape.online
    arguments = f"isolcpus={shape.isolated}" * bool(shape.isolated) + f" nohz_full={shape.nohz_full}" * bool(
        shape.nohz_full
    )
    files = {
        "source": "synthetic: made by tests/rig/hosts.py, no such machine was seen",
        f"{cpu}/online": f"{online}\n",
        f"{cpu}/present": f"{CpuSet(online | shape.offline)}\n",
        f"{cpu}/isolated": f"{shape.isolated}\n",
        f"{cpu}/nohz_full": f"{shape.nohz_full or ' (null)'}\n",
        "/proc/cmdline": f"{arguments.strip()}\n",
        "/proc/meminfo": f"MemTotal: {total >> 10} kB\nMemFree: {total >> 11} kB\nMemAvailable: {total >> 11} kB\n"
        "SwapTotal: 0 kB\nSwapFree: 0 kB\nHugePages_Total: 0\nHugetlb: 0 kB\n",
        "/proc/sys/kernel/osrelease": f"{kernel}\n",
        "/proc/sys/kernel/random/boot_id": "00000000-0000-4000-8000-000000000002\n",
        "/proc/sys/vm/swappiness": "60\n",
        "/proc/self/cgroup": "0::/\n",
        "/proc/self/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n",
        "/sys/fs/cgroup/cpuset.cpus.effective": f"{shape.allowed}\n",
        "/sys/module/kvm_amd/refcnt": "0\n",
        "/sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never\n",
        "/sys/kernel/mm/transparent_hugepage/defrag": "always defer defer+madvise [madvise] never\n",
    }
    knobs = {
        "run": "0",
        "pages_to_scan": "100",
        "sleep_millisecs": "20",
        "merge_across_nodes": "1",
        "pages_shared": "0",
    }
    if advisor:
        knobs |= {"advisor_mode": "[none] scan-time", "advisor_max_cpu": "70", "advisor_target_scan_time": "200"}
    files |= {f"/sys/kernel/mm/ksm/{name}": f"{value}\n" for name, value in knobs.items()}
    uneven = len({each.capacity for each in shape.cpus}) > 1
    for each in shape.cpus:
        here = f"{cpu}/cpu{each.id}"
        files[f"{here}/topology/physical_package_id"] = f"{each.package}\n"
        files[f"{here}/topology/die_id"] = f"{each.die}\n"
        core = CpuSet(other.id for other in shape.cpus if other.core == each.core)
        files[f"{here}/topology/core_cpus_list"] = f"{core}\n"
        files[f"{here}/cache/index3/level"] = "3\n"
        shared = CpuSet(other.id for other in shape.cpus if other.l3 == each.l3)
        files[f"{here}/cache/index3/shared_cpu_list"] = f"{shared}\n"
        if uneven:
            files[f"{here}/cpu_capacity"] = f"{each.capacity}\n"
    for cpu_id in shape.offline:
        files[f"{cpu}/cpu{cpu_id}/online"] = "0\n"
    holding = [each for each in shape.nodes if each not in no_memory]
    for index, each_node in enumerate(shape.nodes):
        here = f"{node}/node{each_node}"
        files[f"{here}/cpulist"] = f"{CpuSet(each.id for each in shape.cpus if each.node == each_node)}\n"
        files[f"{here}/distance"] = " ".join(str(cell) for cell in shape.distances[index]) + "\n"
        files[f"{here}/compact"] = ""
        share = total // len(holding) >> 10 if each_node in holding else 0
        files[f"{here}/meminfo"] = f"Node {each_node} MemTotal: {share} kB\nNode {each_node} MemFree: {share // 2} kB\n"
        for page_kib in (2048, 1 << 20):
            for name in ("nr", "free", "surplus"):
                files[f"{here}/hugepages/hugepages-{page_kib}kB/{name}_hugepages"] = "0\n"
    for page_kib in (2048, 1 << 20):
        for name in ("nr", "free", "surplus", "resv"):
            files[f"/sys/kernel/mm/hugepages/hugepages-{page_kib}kB/{name}_hugepages"] = "0\n"
    return files


def renumbered(shape: CpuTopology, number: Callable[[int], int]) -> CpuTopology:
    """The same machine with other CPU ids."""
    cpus = [replace(cpu, id=number(cpu.id), core=number(cpu.core), l3=number(cpu.l3)) for cpu in shape.cpus]
    return replace(
        shape,
        cpus=tuple(sorted(cpus, key=lambda cpu: cpu.id)),
        isolated=CpuSet(number(cpu) for cpu in shape.isolated),
        allowed=CpuSet(number(cpu) for cpu in shape.allowed),
        offline=CpuSet(),
    )


def made_up() -> dict[str, tuple[CpuTopology, tuple[int, ...]]]:
    """Every made-up host: its topology, and the nodes without memory."""
    half = (4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
    two = topology(nodes=2, caches=2, cores=4, threads=2, isolated=half, siblings_last=True, offline=(17,))
    pairs = topology(cores=4, threads=2)
    hybrid = topology(cores=8)  # 0-3 fast, 4-7 slow
    lone = topology(nodes=2, cores=4)  # and a third node, of memory alone
    three = tuple(tuple(10 if a == b else 20 if 2 not in (a, b) else 28 for b in range(3)) for a in range(3))
    near = tuple(tuple(10 if a == b else 16 if a // 2 == b // 2 else 32 for b in range(4)) for a in range(4))
    eight = topology(cores=8, isolated=range(1, 8))
    found = {
        "1socket": (topology(cores=6), ()),
        "2node-smt": (replace(two, nohz_full=two.isolated), ()),
        "4node": (replace(topology(nodes=4, cores=4, threads=2, siblings_last=True), distances=near), ()),
        "smt-off": (topology(cores=4, threads=2, siblings_last=True, offline=range(4, 8)), ()),
        "l3-groups": (topology(nodes=2, caches=4, cores=4, threads=2, siblings_last=True), ()),
        "hybrid": (
            replace(hybrid, cpus=tuple(replace(cpu, capacity=1024 if cpu.id < 4 else 570) for cpu in hybrid.cpus)),
            (),
        ),
        "node-without-memory": (topology(nodes=2, cores=4, threads=2), (1,)),
        "node-without-cpus": (replace(lone, nodes=(0, 1, 2), distances=three), ()),
        "sparse-ids": (renumbered(pairs, lambda cpu: cpu * 3 + 16 * (cpu > 3)), ()),
        "all-but-one-isolated": (replace(eight, nohz_full=eight.isolated), ()),
        "one-sibling-isolated": (topology(cores=4, threads=2, isolated=[3, 5, 7]), ()),
        "cpuset-limited": (replace(topology(nodes=2, cores=4, threads=2), allowed=CpuSet.parse("2-5,8-11")), ()),
    }  # fmt: skip
    return {f"synthetic-{name}": made for name, made in found.items()}


def main() -> int:
    """Write the made-up trees."""
    for name, (shape, no_memory) in made_up().items():
        files = synthetic(shape, no_memory=no_memory)
        (DATA / f"{name}.json").write_text(json.dumps(files, indent=0, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
