"""How many hugepages each node keeps, from what host.toml declares and what the guests need.

`pages = "auto"` follows the guests that should run; a number or a table of nodes is obeyed. A pool is never asked to
go below what is in use, and an automatic one never below what it was before kvmd touched it: those pages are
someone's. A size that host.toml does not mention is left alone, and a guest that wants it takes what is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from kvmd.actions import Action, Problem, SetHugepages
from kvmd.config.host import HugepagePoolConfig
from kvmd.facts import EMPTY, Facts, FreeBlocks, HugepagePool
from kvmd.plan.fragmentation import boot_arguments, explain, in_one_piece
from kvmd.units import CpuSet, Size

GIGANTIC = 1 << 30
NODE_TOTALS_TRUSTED = 0.9  # of MemTotal: with late memory initialisation the nodes' own totals lag far behind

PoolKey = tuple[int, int]  # node, page_bytes


@dataclass(frozen=True, slots=True)
class PageNeed:
    """Hugepages of one guest that should run."""

    page_bytes: int
    pages: int
    nodes: tuple[int, ...] = ()  # memory.nodes; (): wherever pages are
    policy: str = "bind"  # only from them; "preferred": rather from them; "interleave": as many from each
    fallback: bool = False  # memory.fallback = "thp": it may start without

    @property
    def bound(self) -> tuple[int, ...]:
        """The nodes its pages must be on; () when others would do."""
        return self.nodes if self.policy == "bind" else ()


def plan_hugepages(
    wishes: Mapping[str, HugepagePoolConfig],
    needs: Mapping[str, PageNeed],
    facts: Facts,
    *,
    reserve: int,
    promised: int = 0,
    originals: Mapping[PoolKey, int] = EMPTY,
) -> tuple[tuple[Action, ...], tuple[Problem, ...]]:
    """Actions that give every declared pool its size (shrinking first), and what cannot be had, with the guests.

    `wishes` by page size ("2MiB"), `needs` of all guests that should run, `reserve` in bytes for the host itself,
    `promised` bytes that guests which run may still come to hold outside the pools, `originals` what each pool held
    before kvmd first changed it (a pool that is missing there was never changed).
    """
    declared = {int(Size.parse(text)): wish for text, wish in wishes.items()}
    wanted = {need.page_bytes for need in needs.values()}
    present = {pool.page_bytes for pool in facts.hugepages}
    problems = [_no_such_size(size, present, needs) for size in sorted((declared.keys() | wanted) - present)]
    # numbers before automatic pools, large pages before small: what a person wrote and what is hardest to get
    plans = [
        _SizePlan.of(size, declared.get(size), needs, facts, originals)
        for size in sorted(present, key=lambda size: (_is_auto(declared.get(size)), -size))
    ]
    budget = _Budget.of(facts, reserve, promised, plans)
    for plan in plans:
        plan.decide(budget)
        problems += [*plan.problems, *plan.unmet()]
    actions = sorted(
        (action for plan in plans for action in plan.actions()),
        key=lambda action: (action.new > action.old, -action.page_bytes, action.node),
    )
    return tuple(actions), tuple(sorted(problems, key=lambda problem: (problem.subject, problem.message)))


@dataclass(slots=True)
class _Budget:
    """Bytes that pools may still take, of the host and of each node; every decision draws on it."""

    total: int
    reserve: int
    promised: int
    host: int
    nodes: dict[int, int]

    @classmethod
    def of(cls, facts: Facts, reserve: int, promised: int, plans: Iterable[_SizePlan]) -> _Budget:
        memory = facts.memory
        present = sum(pool.total * pool.page_bytes for pool in facts.hugepages)
        # no more than RAM without the reserve and what guests have, and no growth beyond what is available now
        host = min(memory.total_bytes - reserve - promised, present + memory.available_bytes)
        totals = memory.node_total_bytes
        trusted = len(totals) > 1 and sum(totals.values()) >= NODE_TOTALS_TRUSTED * memory.total_bytes
        nodes = {pool.node: totals.get(pool.node, 0) if trusted else memory.total_bytes for pool in facts.hugepages}
        budget = cls(memory.total_bytes, reserve, promised, host, nodes)
        for plan in plans:
            for node, floor in plan.floor.items():
                budget.draw(node, floor * plan.page_bytes)
        return budget

    def room(self, node: int, page_bytes: int) -> int:
        """Further pages the node can take."""
        return max(0, min(self.host, self.nodes[node]) // page_bytes)

    def draw(self, node: int, amount: int) -> None:
        self.host -= amount
        self.nodes[node] -= amount

    def sum(self) -> str:
        guests = f" - {_human(self.promised)} of guests that run" if self.promised else ""
        return f"{_human(self.total)} RAM - {_human(self.reserve)} reserve{guests}"


@dataclass(slots=True)
class _SizePlan:
    """The decision for one page size, filled in step by step."""

    page_bytes: int
    wish: HugepagePoolConfig | None
    pools: dict[int, HugepagePool]
    needs: dict[str, PageNeed]
    running: dict[str, int]  # pages of this size that each of our guests has
    floor: dict[int, int]  # pages that stay whatever is decided: in use, or there before kvmd
    blocks: Mapping[int, FreeBlocks] = field(default_factory=dict)  # by node
    target: dict[int, int] = field(default_factory=dict)
    reasons: dict[int, list[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    short: dict[str, str] = field(default_factory=dict)  # guest -> why the pool was not made large enough for it

    @classmethod
    def of(
        cls,
        page_bytes: int,
        wish: HugepagePoolConfig | None,
        needs: Mapping[str, PageNeed],
        facts: Facts,
        originals: Mapping[PoolKey, int],
    ) -> _SizePlan:
        pools = {pool.node: pool for pool in sorted(facts.hugepages, key=_node) if pool.page_bytes == page_bytes}
        if wish is None:  # left as it is: what was there before kvmd is nothing a guest can have now
            kept = {node: _persistent(pool) for node, pool in pools.items()}
        elif _is_auto(wish):
            kept = {node: originals.get((node, page_bytes), _persistent(pool)) for node, pool in pools.items()}
        else:
            kept = dict.fromkeys(pools, 0)
        return cls(
            page_bytes=page_bytes,
            wish=wish,
            pools=pools,
            needs={name: needs[name] for name in sorted(needs) if needs[name].page_bytes == page_bytes},
            running={g.name: _pages(g.memory_bytes, page_bytes) for g in facts.guests if g.page_bytes == page_bytes},
            floor={node: max(_held(pool), kept[node]) for node, pool in pools.items()},
            blocks={found.node: found for found in facts.free_blocks},
        )

    def decide(self, budget: _Budget) -> None:
        """Fill in `target`, draw it from the budget, and note what could not be had."""
        pages = self.wish.pages if self.wish else "as it is"
        if self.wish is None:
            self.target = dict(self.floor)
        elif isinstance(pages, str):
            self._decide_auto(int(self.wish.spare), budget)
        elif isinstance(pages, int):
            self._decide_exact(self._spread(pages), budget)
        else:
            self._decide_exact(self._by_node(pages), budget)

    def _decide_auto(self, spare_bytes: int, budget: _Budget) -> None:
        self.target = {node: _held(pool) for node, pool in self.pools.items()}
        for node, pages in self.target.items():
            self._because(node, pages, "in use")
        # the running first: what they lack is for their next start with a larger size
        for name, need in sorted(self.needs.items(), key=lambda item: (item[0] not in self.running, item[0])):
            missing = need.pages - self.running.get(name, 0)
            if missing > 0 and not self._place(replace(need, pages=missing), name, budget):
                self.short[name] = f"the host cannot keep so many: {budget.sum()}"
        spare = _pages(spare_bytes, self.page_bytes)
        if spare and not self._place(PageNeed(self.page_bytes, spare), "spare", budget):
            self.problems.append(
                Problem(
                    subject=f"hugepages {Size(self.page_bytes)}",
                    message=f"no room for the spare of {spare} pages ({_human(spare * self.page_bytes)}): "
                    f"{_human(max(0, budget.host))} left of {budget.sum()}",
                    hint=f"lower hugepages.{Size(self.page_bytes)}.spare in host.toml",
                )
            )
        for node, floor in self.floor.items():
            self._because(node, floor - self.target[node], "there before kvmd")
            self.target[node] = max(self.target[node], floor)

    def _place(self, need: PageNeed, what: str, budget: _Budget) -> bool:
        """Put pages on the nodes asked for, or the best one, or several; False and nothing done when there is no room.

        Best: where they are already, else where most room is. Pages below the floor cost nothing, they exist.
        """
        own = {n: max(0, self.floor[n] - self.target[n]) for n in self.pools}
        rooms = {n: own[n] + budget.room(n, self.page_bytes) for n in self.pools if n in need.bound or not need.bound}
        order = sorted(rooms, key=lambda n: (n not in need.nodes, own[n] < need.pages, -rooms[n], n))
        parts = dict.fromkeys(rooms, 0)
        host = max(0, budget.host // self.page_bytes)
        left = need.pages
        for n, most in (*_even(need, rooms), *((n, need.pages) for n in order)):
            free = max(0, own[n] - parts[n])
            new = min(max(0, min(most, left) - free), rooms[n] - max(own[n], parts[n]), host)
            part = min(most, left, free) + new
            parts[n] += part
            left -= part
            host -= new
        if left > 0:
            return False
        for n, part in parts.items():
            self.target[n] += part
            budget.draw(n, max(0, part - own[n]) * self.page_bytes)
            self._because(n, part, what)
        return True

    def _decide_exact(self, wanted: Mapping[int, int], budget: _Budget) -> None:
        """Nodes that are not named stay as they are; what would not fit is refused as a whole."""
        growth = {n: max(0, pages - _held(self.pools[n])) * self.page_bytes for n, pages in wanted.items()}
        crowded = [n for n in growth if growth[n] > budget.nodes[n]]
        is_growing = any(pages > _persistent(self.pools[n]) for n, pages in wanted.items())
        if is_growing and (sum(growth.values()) > budget.host or crowded):
            self.problems.append(self._too_many(wanted, growth, crowded, budget))
            wanted = {}
        for node, pool in self.pools.items():
            held = _held(pool)
            pages = wanted.get(node, _persistent(pool))
            if node in wanted and pages < held:
                self._below_use(f" node {node}", pages, held)
            self.target[node] = max(pages, held)
            budget.draw(node, (self.target[node] - held) * self.page_bytes)
            self.reasons[node] = [f"{wanted.get(node, 'not')} declared"]

    def _below_use(self, where: str, declared: int, held: int) -> None:
        message = f"{declared} pages are declared, {held} are in use: they stay until they are free"
        self.problems.append(Problem(f"hugepages {Size(self.page_bytes)}{where}", message))

    def _too_many(
        self, wanted: Mapping[int, int], growth: Mapping[int, int], crowded: list[int], budget: _Budget
    ) -> Problem:
        total = sum(wanted.values())
        more, room, where = sum(growth.values()), budget.host, ""
        if crowded:
            more, room, where = growth[crowded[0]], budget.nodes[crowded[0]], f" on node {crowded[0]}"
        return Problem(
            subject=f"hugepages {Size(self.page_bytes)}",
            message=f"{total} pages = {_human(total * self.page_bytes)}: that is {_human(more)} beyond what is in use"
            f"{where}, and there is room for {_human(max(0, room))} ({budget.sum()}, and what is available now)",
            hint=f"lower hugepages.{Size(self.page_bytes)}.pages or memory.reserve in host.toml",
        )

    def _spread(self, count: int) -> dict[int, int]:
        """Even over the nodes, as the kernel itself spreads; a node that holds more leaves less to the others."""
        wanted = {node: _held(pool) for node, pool in self.pools.items()}
        left = count - sum(wanted.values())
        if left < 0:
            self._below_use("", count, sum(wanted.values()))
        while left > 0:
            low = min(wanted.values())
            lowest = [node for node in wanted if wanted[node] == low]
            following = min((pages for pages in wanted.values() if pages > low), default=None)
            step = left // len(lowest) if following is None else min(following - low, left // len(lowest))
            if step == 0:
                lowest, step = lowest[:left], 1
            for node in lowest:
                wanted[node] += step
            left -= step * len(lowest)
        return wanted

    def _by_node(self, table: Mapping[str, int]) -> dict[int, int]:
        wanted = {}
        for name, pages in sorted(table.items()):
            digits = name.removeprefix("node")
            if digits.isdecimal() and int(digits) in self.pools:
                wanted[int(digits)] = pages
                continue
            self.problems.append(
                Problem(
                    subject=f"hugepages {Size(self.page_bytes)}",
                    message=f"pages names {name}, this host has {_nodes(self.pools)}",
                    hint=f"correct hugepages.{Size(self.page_bytes)}.pages in host.toml",
                )
            )
        return wanted

    def _because(self, node: int, pages: int, what: str) -> None:
        if pages > 0:
            self.reasons.setdefault(node, []).append(f"{what} {pages}")

    def unmet(self) -> Iterable[Problem]:
        """One problem for each guest whose pages will not be there, in the order in which guests would take them."""
        free = {node: self.target[node] - _held(pool) for node, pool in self.pools.items()}
        asking = [item for item in self.needs.items() if item[0] not in self.running]
        for name, need in sorted(asking, key=lambda item: (not item[1].bound, item[0])):
            nodes = [n for n in sorted(free, key=lambda n: -free[n]) if n in need.bound or not need.bound]
            there = sum(free[n] for n in nodes)
            if there < need.pages or name in self.short:
                yield self._unmet_by(name, need, there)
                continue
            pages = need.pages
            for n in nodes:
                part = min(pages, free[n])
                free[n] -= part
                pages -= part

    def _unmet_by(self, name: str, need: PageNeed, there: int) -> Problem:
        where = f" on node {CpuSet(need.bound)}" if need.bound else ""
        size = Size(self.page_bytes)
        message = (
            f"{name} wants {need.pages} pages of {size} ({_human(need.pages * self.page_bytes)}){where}, "
            f"{there} are left for it"
        )
        if name in self.short:
            message += f"; {self.short[name]}"
        if self.wish is None:
            hint = f'declare [hugepages.{size}] with pages = "auto" in host.toml'
        elif name in self.short:
            hint = "make memory.size smaller, stop another guest, or lower memory.reserve in host.toml"
        else:
            hint = f'raise hugepages.{size}.pages in host.toml by {need.pages - there}, or write pages = "auto"'
        if need.fallback:
            message += "; it may start on transparent huge pages (memory.fallback)"
        return Problem(f"guest {name}", message, hint, frozenset() if need.fallback else frozenset({name}))

    def actions(self) -> Iterable[SetHugepages]:
        """What differs from the target; a size that is not declared never differs."""
        if self.wish is None:
            return
        for node, pool in self.pools.items():
            old, new = _persistent(pool), self.target[node]
            if old == new:
                continue
            why = (
                f"hugepages.{Size(self.page_bytes)}.pages: {', '.join(self.reasons.get(node) or ['nobody needs them'])}"
            )
            if self.page_bytes >= GIGANTIC and new > old:
                why += f"; sure only from boot on: {boot_arguments(self.page_bytes, self.target)}"
            elif node in self.blocks and in_one_piece(self.blocks[node], self.page_bytes) < new - old:
                why += f"; {explain(self.blocks[node], self.page_bytes)}"
            yield SetHugepages(
                why=why, node=node, page_bytes=self.page_bytes, old=old, new=new, compact=self.wish.compact
            )


def _no_such_size(page_bytes: int, present: Iterable[int], needs: Mapping[str, PageNeed]) -> Problem:
    sizes = ", ".join(str(Size(size)) for size in sorted(present)) or "none"
    wanting = {name: need for name, need in needs.items() if need.page_bytes == page_bytes}
    return Problem(
        subject=f"hugepages {Size(page_bytes)}",
        message=f"this host has no pages of {Size(page_bytes)} (it has: {sizes})"
        + (f"; wanted by {', '.join(sorted(wanting))}" if wanting else ""),
        hint="choose a size the processor and kernel offer; 1GiB needs the CPU flag pdpe1gb",
        guests=frozenset(name for name, need in wanting.items() if not need.fallback),
    )


def _is_auto(wish: HugepagePoolConfig | None) -> bool:
    return wish is not None and isinstance(wish.pages, str)


def _even(need: PageNeed, rooms: Mapping[int, int]) -> Iterable[tuple[int, int]]:
    """What each node gives first when pages are taken in turn from all of them."""
    nodes = [n for n in need.nodes if n in rooms] if need.policy == "interleave" else []
    return [(n, need.pages // len(nodes) + (i < need.pages % len(nodes))) for i, n in enumerate(nodes)]


def _held(pool: HugepagePool) -> int:
    """Pages that some process has or was promised."""
    return pool.used + pool.reserved


def _persistent(pool: HugepagePool) -> int:
    """What nr_hugepages was last set to: surplus pages leave by themselves."""
    return pool.total - pool.surplus


def _pages(amount: int, page_bytes: int) -> int:
    return -(-amount // page_bytes)


def _node(pool: HugepagePool) -> int:
    return pool.node


def _nodes(nodes: Iterable[int]) -> str:
    return ", ".join(f"node{node}" for node in sorted(nodes))


def _human(amount: int) -> str:
    return Size(amount).human()
