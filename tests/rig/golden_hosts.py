"""The golden pictures of tests/data/placements: for each host of tests/data/hosts its topology as kvmd reads it, and
where a handful of guests go, alone and together."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvmd.actions import Problem
from kvmd.config.host import HostCpu
from kvmd.facts import Cpu, CpuTopology
from kvmd.plan.cpus import CpuWish, Placement, housekeeping_of, place, place_all
from kvmd.units import CpuSet
from tests.rig.hosts import DATA, load

HOST = HostCpu()
GUESTS = {
    "one": CpuWish(1, "dedicated"),
    "two": CpuWish(2, "dedicated"),
    "four": CpuWish(4, "dedicated"),
    "nine": CpuWish(9, "dedicated"),
    "whole-cores": CpuWish(4, "dedicated", smt="require"),
    "lone-threads": CpuWish(2, "dedicated", smt="isolate"),
    "must-be-isolated": CpuWish(2, "dedicated", isolated="require"),
    "never-isolated": CpuWish(2, "dedicated", isolated="avoid"),
    "node1": CpuWish(2, "dedicated", nodes=CpuSet([1])),
    "shared": CpuWish(2, "shared"),
    "free": CpuWish(2, "none"),
}
TOGETHER = ("one", "two", "four", "lone-threads", "shared")


def names() -> list[str]:
    """All recorded and made-up hosts."""
    return sorted(path.stem for path in DATA.glob("*.json"))


def text(name: str) -> str:
    """The picture of one host."""
    with tempfile.TemporaryDirectory() as root:
        shape = load(name, Path(root)).observe_cpus()
    lines = [f"# {name}", "", *topology_lines(shape), "", "# each guest alone"]
    lines += [_line(guest, place(guest, {guest: wish}, shape, HOST)) for guest, wish in GUESTS.items()]
    answer = place_all({guest: GUESTS[guest] for guest in TOGETHER}, shape, HOST)
    lines += ["", "# all of these at once"]
    lines += [_line(guest, answer.of.get(guest)) for guest in TOGETHER]
    lines += [f"! {problem.subject}: {problem.message}" for problem in answer.problems]
    return "\n".join(lines) + "\n"


def topology_lines(shape: CpuTopology) -> Iterator[str]:
    """Everything of a topology, cores that follow each other on a line."""
    yield f"online {shape.online}; offline {_or_none(shape.offline)}; allowed {shape.allowed}"
    yield f"isolated {_or_none(shape.isolated)}; nohz_full {_or_none(shape.nohz_full)}"
    yield f"nodes {CpuSet(shape.nodes)}; distances {' / '.join(' '.join(map(str, row)) for row in shape.distances)}"
    yield f"housekeeping {housekeeping_of(shape, HOST)}"
    groups: dict[tuple[int, ...], dict[int, list[Cpu]]] = {}
    for cpu in sorted(shape.cpus, key=lambda cpu: (cpu.node, cpu.package, cpu.die, cpu.l3, -cpu.capacity, cpu.id)):
        place = (cpu.node, cpu.package, cpu.die, cpu.l3, cpu.capacity)
        groups.setdefault(place, {}).setdefault(cpu.core, []).append(cpu)
    for (node, package, die, l3, capacity), cores in groups.items():
        shown = " ".join("+".join(str(cpu.id) for cpu in core) for core in cores.values())
        yield f"node {node} package {package} die {die} l3 {l3} capacity {capacity}: cores {shown}"


def _or_none(cpus: CpuSet) -> str:
    return str(cpus) or "none"


def _line(guest: str, found: Placement | Problem | None) -> str:
    if found is None:
        return f"{guest}: refused"
    if isinstance(found, Problem):
        return f"{guest}: refused: {found.message}"
    vcpus = [str(cpus) for cpus in found.vcpus]
    shown = vcpus[0] if len(set(vcpus)) == 1 else " ".join(vcpus)
    memory = f"; memory on {','.join(map(str, found.nodes))}" if found.nodes else ""
    return f"{guest}: vCPUs {shown}; the rest {found.emulator}{memory}"
