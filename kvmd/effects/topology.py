"""The host's processors as sysfs tells them: cores, caches, nodes, isolation, what we may use.

Offline CPUs, gaps in the ids, nodes without CPUs and kernels from 2.6.18 on (masks instead of lists, no die, no
cluster) are all ordinary here. Documentation/admin-guide/cputopology.rst and ABI/stable/sysfs-devices-node.
"""

from __future__ import annotations

import os
import posixpath
import re

from kvmd.effects.tree import Tree
from kvmd.facts import Cpu, CpuTopology
from kvmd.units import CpuSet

CPU = "/sys/devices/system/cpu"
NODE = "/sys/devices/system/node"


def observe_topology(tree: Tree) -> CpuTopology:
    """All online CPUs with their place; the fields that a kernel does not tell have the value of a flat machine."""
    online = _online(tree)
    node_of, nodes = _nodes(tree)
    capacities = _capacities(tree, online)
    cpus = tuple(
        _cpu(tree, cpu, node=node_of.get(cpu, 0), capacity=capacities[cpu], online=online) for cpu in sorted(online)
    )
    named = sorted({*nodes, *(cpu.node for cpu in cpus)})  # a node's own directory may be missing
    isolated = tree.cpus(f"{CPU}/isolated") or CpuSet()
    return CpuTopology(
        cpus=cpus,
        isolated=CpuSet(isolated & online),
        nohz_full=CpuSet((tree.cpus(f"{CPU}/nohz_full") or CpuSet()) & online),
        allowed=CpuSet(_allowed(tree, isolated, online) & online),
        offline=CpuSet((tree.cpus(f"{CPU}/present") or CpuSet(tree.numbered(CPU, "cpu"))) - online),
        nodes=tuple(named),
        distances=_distances(tree, nodes) if named == nodes else (),
    )


def _online(tree: Tree) -> CpuSet:
    listed = tree.cpus(f"{CPU}/online")
    if listed:
        return listed
    # before 2.6.26 there is no list; a CPU that cannot be taken offline has no `online` of its own
    found = [cpu for cpu in tree.numbered(CPU, "cpu") if tree.read(f"{CPU}/cpu{cpu}/online") != "0"]
    if found:
        return CpuSet(found)
    processors = re.findall(r"^processor\s*:\s*(\d+)", tree.read("/proc/cpuinfo") or "", re.MULTILINE)
    return CpuSet(int(processor) for processor in processors) or CpuSet([0])


def _nodes(tree: Tree) -> tuple[dict[int, int], list[int]]:
    """Node of each CPU, and all nodes that exist (a node may have memory and no CPU, or the reverse)."""
    nodes = tree.numbered(NODE, "node")
    node_of: dict[int, int] = {}
    for node in nodes:
        members = tree.cpus(f"{NODE}/node{node}/cpulist") or tree.cpu_mask(f"{NODE}/node{node}/cpumap") or CpuSet()
        node_of |= dict.fromkeys(members, node)
    return node_of, nodes


def _cpu(tree: Tree, cpu: int, *, node: int, capacity: int, online: CpuSet) -> Cpu:
    topology = f"{CPU}/cpu{cpu}/topology"
    siblings = _members(tree, topology, "core_cpus", "thread_siblings") or {cpu}
    return Cpu(
        id=cpu,
        node=node,
        package=max(0, tree.number(f"{topology}/physical_package_id") or 0),
        die=max(0, tree.number(f"{topology}/die_id") or 0),  # -1: the firmware does not say
        core=min(siblings & online, default=cpu),
        l3=min(_last_cache(tree, cpu) & online, default=cpu),
        capacity=capacity,
    )


def _members(tree: Tree, directory: str, *names: str) -> CpuSet:
    for name in names:
        found = tree.cpus(f"{directory}/{name}_list") or tree.cpu_mask(f"{directory}/{name}")
        if found:
            return found
    return CpuSet()


def _last_cache(tree: Tree, cpu: int) -> CpuSet:
    """CPUs that share the level-3 cache, or the highest level there is (a machine may end at level 2)."""
    cache = f"{CPU}/cpu{cpu}/cache"
    best: tuple[int, CpuSet] = (0, CpuSet([cpu]))
    for index in tree.numbered(cache, "index"):
        level = tree.number(f"{cache}/index{index}/level") or 0
        if best[0] < level <= 3:
            shared = _members(tree, f"{cache}/index{index}", "shared_cpu")
            shared = shared or tree.cpu_mask(f"{cache}/index{index}/shared_cpu_map") or CpuSet()
            best = (level, shared) if shared else best
    return best[1]


def _capacities(tree: Tree, online: CpuSet) -> dict[int, int]:
    """cpu_capacity (1024 = the fastest), else scaled from the top frequency.

    Not from ACPI CPPC's highest_perf: where cores are ranked by preference, like cores differ in it by a third.
    """
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        values = {cpu: tree.number(f"{CPU}/cpu{cpu}/{name}") or 0 for cpu in online}
        if all(value > 0 for value in values.values()):
            top = max(values.values())
            return {cpu: max(1, value * 1024 // top) for cpu, value in values.items()}
    return dict.fromkeys(online, 1024)


def _distances(tree: Tree, nodes: list[int]) -> tuple[tuple[int, ...], ...]:
    """The matrix in node order; () when any row is missing or has the wrong length (10 = local, ACPI SLIT)."""
    rows = [(tree.read(f"{NODE}/node{node}/distance") or "").split() for node in nodes]
    if not nodes or any(len(row) != len(nodes) or not all(cell.isdigit() for cell in row) for row in rows):
        return ()
    return tuple(tuple(int(cell) for cell in row) for row in rows)


def _allowed(tree: Tree, isolated: CpuSet, online: CpuSet) -> CpuSet:
    """CPUs a guest's thread may be put on: the effective cpuset of the cgroup guests are in.

    The affinity of this process is no limit (we set each thread's own), and with isolcpus it lacks exactly the CPUs
    that are meant for guests; it stands in, with those added, where no cpuset controller can be seen.
    """
    for path in _cpuset_files(tree):
        found = tree.cpus(path)
        if found:
            return found
    if tree.is_live:
        return CpuSet(os.sched_getaffinity(0) | isolated)
    return online


def _cpuset_files(tree: Tree) -> list[str]:
    """Files that may hold the guests' effective cpuset, nearest first (cgroup v1 with and without prefix, and v2)."""
    groups = {}
    for line in (tree.read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        groups[controllers] = path or "/"
    named = tree.read("/proc/self/cpuset") or "/"  # cpuset(7): where the controller is, of either version
    files = []
    for line in (tree.read("/proc/self/mounts") or tree.read("/proc/mounts") or "").splitlines():
        fields = line.split()
        if len(fields) < 4:
            continue
        mount, kind, options = fields[1], fields[2], fields[3].split(",")
        if kind == "cpuset" or (kind == "cgroup" and "cpuset" in options):
            own = next((path for held, path in groups.items() if "cpuset" in held.split(",")), named)
            names = ["cpuset.effective_cpus", "cpuset.cpus", "cpus"]
        elif kind == "cgroup2":
            own, names = groups.get("", named), ["cpuset.cpus.effective"]
        else:
            continue
        files += [posixpath.join(mount, folder, name) for folder in _upwards(_of_guests(own)) for name in names]
    return files


def _of_guests(own: str) -> str:
    """Where guests are when we are in `own`: beside us, or as units of systemd in machine.slice, whose AllowedCPUs=
    may well be what system.slice's are not."""
    head, ours, _ = own.partition("/system.slice/kvmd.service")
    return f"{head}/machine.slice" if ours else own


def _upwards(folder: str) -> list[str]:
    parts = [part for part in folder.split("/") if part not in ("", "..")]
    return ["/".join(parts[:length]) for length in range(len(parts), -1, -1)]
