"""The best set of CPUs for one dedicated guest, among those that are free.

"Best" is one tuple, compared left to right: few NUMA nodes, near ones, cores of one speed, fast ones, few last-level
caches, no core shared with somebody, few cores taken in part, then the tightest fit (so that large gaps stay for
large guests), then the lowest ids. Total and deterministic: the same question always has the same answer.

Trying all sets is out of the question on a big host, so sets are built: the fewest groups (nodes, then caches) that
can hold the guest, filled by whole cores. On small machines the result equals the exhaustive one; a test compares.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations

from kvmd.facts import Cpu, CpuTopology

SAME_SPEED = 0.85  # of the fastest of its class: turbo bins of like cores differ less, core types more
MAX_COMBINATIONS = 500  # groups of groups tried one by one; beyond that the roomiest are taken

Score = tuple[int, int, int, int, int, int, int, int, int, tuple[int, ...]]


class Smt(StrEnum):
    """`cpu.smt`: threads of a core together if possible, always whole cores, or one vCPU per core."""

    PREFER = "prefer"
    REQUIRE = "require"
    ISOLATE = "isolate"


@dataclass(frozen=True, slots=True)
class Machine:
    """The topology turned over for look-ups: made once, asked for every guest."""

    by_id: Mapping[int, Cpu]
    rank: Mapping[int, int]  # place in the order in which QEMU numbers vCPUs: node, cache, core, thread
    threads: Mapping[int, frozenset[int]]  # of each core
    classes: Mapping[int, int]  # of each CPU: 0 is the fastest kind of core
    distances: Mapping[tuple[int, int], int]  # between two nodes; empty where the firmware does not say
    nodes: Mapping[int, frozenset[int]]  # CPUs of each node that has any

    @classmethod
    def of(cls, topology: CpuTopology) -> Machine:
        """The same for any order of `topology.cpus`."""
        cpus = topology.cpus
        ordered = sorted(cpus, key=lambda cpu: (cpu.node, cpu.l3, cpu.core, cpu.id))
        nodes = sorted({cpu.node for cpu in cpus})
        named = topology.nodes or tuple(nodes)
        known = len(named) == len(topology.distances)
        return cls(
            by_id={cpu.id: cpu for cpu in cpus},
            rank={cpu.id: place for place, cpu in enumerate(ordered)},
            threads=_grouped((cpu.core, cpu.id) for cpu in cpus),
            classes=speed_classes(topology),
            distances={
                (a, b): topology.distances[i][j] for i, a in enumerate(named) for j, b in enumerate(named) if known
            },
            nodes=_grouped((cpu.node, cpu.id) for cpu in cpus),
        )

    def in_order(self, cpus: Iterable[int]) -> tuple[int, ...]:
        """Threads of one core side by side, then cores of one cache, then nodes."""
        return tuple(sorted(cpus, key=self.rank.__getitem__))

    def cpus_of(self, nodes: Iterable[int]) -> frozenset[int]:
        """All CPUs of these nodes."""
        return frozenset(cpu for node in nodes for cpu in self.nodes.get(node, ()))

    def nodes_of(self, cpus: Iterable[int]) -> tuple[int, ...]:
        """Nodes of these CPUs, ascending; a CPU that is offline has none."""
        return tuple(sorted({self.by_id[cpu].node for cpu in cpus if cpu in self.by_id}))

    def obeys(self, cpus: Collection[int], smt: Smt, busy: Collection[int]) -> bool:
        """Whether these very CPUs may be one guest's by the rule of `smt`, with `busy` in use by others."""
        cores = [self.by_id[cpu].core for cpu in cpus]
        match smt:
            case Smt.ISOLATE:
                others = set(busy) - set(cpus)
                return len(set(cores)) == len(cores) and not any(self.threads[core] & others for core in cores)
            case Smt.REQUIRE:
                return all(len(self.threads[core]) > 1 and self.threads[core] <= set(cpus) for core in set(cores))
            case _:
                return True


def _grouped(pairs: Iterable[tuple[int, int]]) -> Mapping[int, frozenset[int]]:
    found: dict[int, set[int]] = {}
    for group, member in pairs:
        found.setdefault(group, set()).add(member)
    return {group: frozenset(members) for group, members in found.items()}


def best_set(
    machine: Machine, pool: Collection[int], count: int, smt: Smt, *, busy: Collection[int]
) -> tuple[int, ...] | None:
    """`count` CPUs of `pool` in core order, None when the rules of `smt` leave none.

    `busy` are CPUs that others use: cores that have one are the last choice, and none at all for smt "isolate".
    """
    if len(pool) < count:
        return None
    chooser = _Chooser(machine, pool, count, smt, busy)
    best = min(chooser.candidates(), key=chooser.score, default=None)
    return None if best is None else machine.in_order(best)


def speed_classes(topology: CpuTopology) -> dict[int, int]:
    """CPU -> 0 for the fastest kind of core, 1 for the next."""
    classes: dict[int, int] = {}
    top, current = 0, -1
    for capacity in sorted({cpu.capacity for cpu in topology.cpus}, reverse=True):
        if current < 0 or capacity < SAME_SPEED * top:
            top, current = capacity, current + 1
        classes[capacity] = current
    return {cpu.id: classes[cpu.capacity] for cpu in topology.cpus}


@dataclass(frozen=True, slots=True)
class _Core:
    """What of one core a scope offers."""

    first: int
    l3: int
    free: tuple[int, ...]
    is_whole: bool  # all its threads are free
    is_shared: bool  # one of its threads is somebody's


class _Chooser:
    def __init__(self, machine: Machine, pool: Collection[int], count: int, smt: Smt, busy: Collection[int]) -> None:
        self.count = count
        self.smt = smt
        self.pool = [machine.by_id[cpu] for cpu in sorted(pool)]
        self.machine = machine
        self.by_id = machine.by_id
        self.classes = machine.classes
        self.threads = machine.threads
        beside = frozenset(busy).difference(pool)
        # cores of which others have a thread; a CPU of theirs may have gone offline
        self.shared = {machine.by_id[cpu].core for cpu in beside if cpu in machine.by_id}
        self.on_node = Counter(cpu.node for cpu in self.pool)
        self.in_cache = Counter(cpu.l3 for cpu in self.pool)

    def score(self, cpus: Collection[int]) -> Score:
        """Smaller is better; see the module's first lines for the order."""
        own = set(cpus)
        chosen = [self.by_id[cpu] for cpu in cpus]
        nodes, caches = {cpu.node for cpu in chosen}, {cpu.l3 for cpu in chosen}
        classes = [self.classes[cpu] for cpu in cpus]
        cores = {cpu.core for cpu in chosen}
        return (
            len(nodes),
            self._distance(nodes),
            len(set(classes)),
            sum(classes),
            len(caches),
            len(cores & self.shared),
            sum(1 for core in cores if not self.threads[core] <= own),
            sum(self.on_node[node] for node in nodes),
            sum(self.in_cache[cache] for cache in caches),
            tuple(sorted(cpus)),
        )

    def _distance(self, nodes: Collection[int]) -> int:
        return sum(self.machine.distances.get(pair, 0) for pair in combinations(sorted(nodes), 2))

    def candidates(self) -> Iterator[tuple[int, ...]]:
        """Sets on the fewest nodes that can hold the guest; within those, by speed and by cache."""
        by_node: dict[int, list[Cpu]] = {}
        for cpu in self.pool:
            by_node.setdefault(cpu.node, []).append(cpu)
        for scope in self._smallest(list(by_node.values())):
            kinds = sorted({self.classes[cpu.id] for cpu in scope})
            scopes = [[cpu for cpu in scope if self.classes[cpu.id] == kind] for kind in kinds]
            # slower cores only to complete the faster ones
            scopes += [[cpu for cpu in scope if self.classes[cpu.id] <= kind] for kind in kinds[1:]]
            for kind_scope in scopes:
                by_cache: dict[int, list[Cpu]] = {}
                for cpu in kind_scope:
                    by_cache.setdefault(cpu.l3, []).append(cpu)
                for cache_scope in self._smallest(list(by_cache.values())):
                    yield from self._fills(cache_scope)

    def _smallest(self, groups: Sequence[Sequence[Cpu]]) -> list[list[Cpu]]:
        """All unions of as few groups as can hold the guest; with very many, one of the roomiest."""
        ordered = sorted(groups, key=lambda group: (-len(group), group[0].id))
        for size in range(1, len(ordered) + 1):
            if math.comb(len(ordered), size) > MAX_COMBINATIONS:
                unions = [self._union([*ordered[: size - 1], last]) for last in ordered[size - 1 :]]
            else:
                unions = [self._union(chosen) for chosen in combinations(ordered, size)]
            fitting = [union for union in unions if len(union) >= self.count and any(self._fills(union))]
            if fitting:
                return fitting
        return []

    @staticmethod
    def _union(groups: Iterable[Sequence[Cpu]]) -> list[Cpu]:
        return [cpu for group in groups for cpu in group]

    def _cores(self, scope: Sequence[Cpu]) -> list[_Core]:
        free: dict[int, list[int]] = {}
        for cpu in scope:
            free.setdefault(cpu.core, []).append(cpu.id)
        cores = [
            _Core(
                first=core,
                l3=self.by_id[core].l3,
                free=tuple(sorted(ids)),
                is_whole=len(ids) == len(self.threads[core]),
                is_shared=core in self.shared,
            )
            for core, ids in free.items()
        ]
        return sorted(cores, key=lambda core: (core.is_shared, not core.is_whole, core.first))

    def _fills(self, scope: Sequence[Cpu]) -> Iterator[tuple[int, ...]]:
        """One or a few ways to take `count` CPUs out of the scope, by the rule of `smt`."""
        cores = self._cores(scope)
        match self.smt:
            case Smt.ISOLATE:
                usable = [core for core in cores if not core.is_shared]
                # cores with fewer threads first: less is left idle
                usable.sort(key=lambda core: (self.classes[core.free[0]], len(self.threads[core.first]), core.first))
                if len(usable) >= self.count:
                    yield tuple(core.free[0] for core in usable[: self.count])
            case Smt.REQUIRE:
                whole = [core for core in cores if core.is_whole and len(core.free) > 1]
                whole.sort(key=lambda core: (self.classes[core.free[0]], -len(core.free), core.first))
                yield from self._take(whole, exact=True)
            case _:
                yield from self._take(cores, exact=False)
                yield from self._take(sorted(cores, key=lambda core: (core.is_shared, core.first)), exact=False)
                fast_first = sorted(
                    cores, key=lambda core: (self.classes[core.free[0]], core.is_shared, not core.is_whole, core.first)
                )
                yield from self._take(fast_first, exact=False)

    def _take(self, cores: Sequence[_Core], *, exact: bool) -> Iterator[tuple[int, ...]]:
        """Core after core; the last one, when it is too large, is changed for one that fits better if there is any."""
        taken: list[int] = []
        for index, core in enumerate(cores):
            left = self.count - len(taken)
            if left == 0:
                break
            if len(core.free) <= left:
                taken += core.free
                continue
            fitting = [other for other in cores[index:] if len(other.free) == left]
            if fitting:
                yield (*taken, *fitting[0].free)
            if exact:
                continue
            yield (*taken, *core.free[:left])
            return
        if len(taken) == self.count:
            yield tuple(taken)
