"""The best set of CPUs for one dedicated guest, among those that are free.

"Best" is one tuple, compared left to right: few NUMA nodes, near ones, cores of one speed, fast ones, few last-level
caches, no core shared with somebody, few cores taken in part, then the tightest fit (so that large gaps stay for
large guests), then the lowest ids. Total and deterministic: the same question always has the same answer.

Trying all sets is out of the question on a big host, so sets are built: the fewest groups (nodes, then caches) that
can hold the guest, filled by whole cores. On small machines the result equals the exhaustive one; a test compares.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
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


def best_set(
    topology: CpuTopology, pool: Collection[int], count: int, smt: Smt, *, busy: Collection[int]
) -> tuple[int, ...] | None:
    """`count` CPUs of `pool` in core order, None when the rules of `smt` leave none.

    `busy` are CPUs that others use: cores that have one are the last choice, and none at all for smt "isolate".
    """
    chooser = _Chooser(topology, pool, count, smt, busy)
    best = min(chooser.candidates(), key=chooser.score, default=None)
    return None if best is None else in_core_order(best, topology)


def in_core_order(cpus: Iterable[int], topology: CpuTopology) -> tuple[int, ...]:
    """Threads of one core side by side, then cores of one cache, then nodes: the order in which QEMU numbers vCPUs."""
    wanted = set(cpus)
    return tuple(
        cpu.id
        for cpu in sorted(topology.cpus, key=lambda cpu: (cpu.node, cpu.l3, cpu.core, cpu.id))
        if cpu.id in wanted
    )


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
    def __init__(
        self, topology: CpuTopology, pool: Collection[int], count: int, smt: Smt, busy: Collection[int]
    ) -> None:
        self.count = count
        self.smt = smt
        self.busy = frozenset(busy) - frozenset(pool)
        self.pool = [cpu for cpu in topology.cpus if cpu.id in pool]
        self.by_id = {cpu.id: cpu for cpu in topology.cpus}
        self.classes = speed_classes(topology)
        self.distances = topology.distances
        self.node_index = {node: index for index, node in enumerate(sorted({cpu.node for cpu in topology.cpus}))}
        self.threads: dict[int, set[int]] = {}
        for cpu in topology.cpus:
            self.threads.setdefault(cpu.core, set()).add(cpu.id)

    def score(self, cpus: Collection[int]) -> Score:
        """Smaller is better; see the module's first lines for the order."""
        chosen = [self.by_id[cpu] for cpu in cpus]
        nodes, caches = {cpu.node for cpu in chosen}, {cpu.l3 for cpu in chosen}
        classes = {self.classes[cpu.id] for cpu in chosen}
        cores = {cpu.core for cpu in chosen}
        return (
            len(nodes),
            self._distance(nodes),
            len(classes),
            sum(self.classes[cpu.id] for cpu in chosen),
            len(caches),
            sum(1 for core in cores if self.threads[core] & self.busy),
            sum(1 for core in cores if not self.threads[core] <= set(cpus)),
            sum(1 for cpu in self.pool if cpu.node in nodes),
            sum(1 for cpu in self.pool if cpu.l3 in caches),
            tuple(sorted(cpus)),
        )

    def _distance(self, nodes: Collection[int]) -> int:
        if len(self.distances) != len(self.node_index):
            return 0
        places = [self.node_index[node] for node in sorted(nodes)]
        return sum(self.distances[a][b] for a, b in combinations(places, 2))

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
                is_shared=bool(self.threads[core] & self.busy),
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
