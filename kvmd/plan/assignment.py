"""The CPUs of the host as they are given away, one guest after the other, and why one goes without.

`cpus` decides the order in which guests come; `cores` finds the best set among what is free. This module keeps the
books: what is housekeeping, isolated, dedicated, kept empty beside an isolating guest, or named for QEMU's threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kvmd.actions import Problem
from kvmd.config.guest import Guest
from kvmd.config.host import HostCpu
from kvmd.facts import EMPTY, CpuTopology
from kvmd.plan.cores import Machine, Smt, best_set
from kvmd.units import CpuSet


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a guest's threads may run: one CPU set per vCPU, one for all other threads.

    `nodes` are the NUMA nodes its memory belongs on, ascending; () when it has no node of its own.
    """

    vcpus: tuple[CpuSet, ...]
    emulator: CpuSet
    nodes: tuple[int, ...] = ()

    @property
    def is_exclusive(self) -> bool:
        """Whether each vCPU has one CPU."""
        return all(len(vcpu) == 1 for vcpu in self.vcpus)

    @property
    def cpus(self) -> CpuSet:
        """All CPUs of the vCPUs."""
        return CpuSet(cpu for vcpu in self.vcpus for cpu in vcpu)


@dataclass(frozen=True, slots=True)
class CpuWish:
    """What a guest's [cpu] asks of the host."""

    vcpus: int = 1
    placement: str = "shared"  # none, shared, dedicated, manual
    isolated: str = "prefer"  # avoid, prefer, require
    smt: str = "prefer"  # prefer, require, isolate
    pin: tuple[int, ...] | None = None
    emulator: CpuSet | None = None
    allow_overcommit: bool = False
    nodes: CpuSet | None = None  # NUMA nodes the vCPUs stay on

    @classmethod
    def of(cls, guest: Guest) -> CpuWish:
        """The wish in a guest's file."""
        cpu = guest.cpu
        return cls(
            vcpus=cpu.vcpus,
            placement=cpu.placement,
            isolated=cpu.isolated,
            smt=cpu.smt,
            pin=cpu.pin,
            emulator=cpu.emulator,
            allow_overcommit=cpu.allow_overcommit,
            nodes=cpu.nodes,
        )


def housekeeping_of(topology: CpuTopology, host: HostCpu) -> CpuSet:
    """CPUs for the host and QEMU's own threads, never empty and never isolated (unless all are).

    "auto": the first core of each node, as long as that leaves a CPU for guests; else the first core; else the first
    CPU.
    """
    usable = usable_cpus(topology)
    ordinary = CpuSet(usable - topology.isolated) or usable
    if isinstance(host.housekeeping, CpuSet):
        return CpuSet(host.housekeeping & ordinary) or _first_cores(topology, ordinary, usable)
    return _first_cores(topology, ordinary, usable)


def _first_cores(topology: CpuTopology, ordinary: CpuSet, usable: CpuSet) -> CpuSet:
    cpus = sorted((cpu for cpu in topology.cpus if cpu.id in ordinary), key=lambda cpu: cpu.id)
    first_of_node: dict[int, int] = {}
    for cpu in cpus:
        first_of_node.setdefault(cpu.node, cpu.core)
    for cores in (set(first_of_node.values()), {cpus[0].core}):
        chosen = CpuSet(cpu.id for cpu in cpus if cpu.core in cores)
        if usable - chosen:
            return chosen
    return CpuSet([min(ordinary)])


def usable_cpus(topology: CpuTopology) -> CpuSet:
    """Online CPUs that our cpuset allows."""
    return CpuSet(topology.online & topology.allowed) or topology.online


class Assignment:
    """The CPUs as they are being given away."""

    def __init__(self, topology: CpuTopology, host: HostCpu, preferred: Mapping[str, Sequence[int]] = EMPTY) -> None:
        """`preferred`: nodes that are better than others for a guest, best first."""
        self.host = host
        self.preferred = preferred
        self.usable = usable_cpus(topology)
        self.isolated = CpuSet(topology.isolated & self.usable)
        self.housekeeping = housekeeping_of(topology, host)
        self.machine = Machine.of(topology)
        self.dedicated: set[int] = set()  # hold a vCPU of their own
        self.idle: set[int] = set()  # siblings that smt = "isolate" keeps empty
        self.emulators: set[int] = set()  # named by some guest's cpu.emulator
        self.placed: dict[str, Placement] = {}
        self.refused: set[str] = set()
        self.problems: list[Problem] = []
        self._check_housekeeping()

    def _check_housekeeping(self) -> None:
        wanted = self.host.housekeeping
        if not isinstance(wanted, CpuSet):
            return
        if lost := CpuSet(wanted - self.usable):
            self.warn("cpu.housekeeping", f"CPUs {lost} are offline or not allowed; in use: {self.housekeeping}")
        if lost := CpuSet(wanted & self.isolated):
            self.warn("cpu.housekeeping", f"CPUs {lost} are isolated (isolcpus=) and stay out of it")
        cores = {self.machine.by_id[cpu].core for cpu in self.housekeeping}
        beside = {cpu for core in cores for cpu in self.machine.threads[core]}
        if halves := CpuSet((beside & self.usable) - self.housekeeping - self.isolated):
            self.warn(
                "cpu.housekeeping",
                f"CPUs {halves} share a core with it: the host's own work slows whoever runs there",
                f'cpu.housekeeping = "{CpuSet(self.housekeeping | halves)}"',
            )

    def warn(self, subject: str, message: str, hint: str | None = None) -> None:
        self.problems.append(Problem(subject, message, hint))

    def refuse(self, name: str, message: str, hint: str | None = None) -> None:
        self.refused.add(name)
        self.problems.append(Problem(f"guest {name}", message, hint, frozenset({name})))

    def respect(self, vcpus: tuple[CpuSet, ...]) -> None:
        """A running guest without a file: CPUs it has to itself stay its own."""
        if all(len(vcpu) == 1 for vcpu in vcpus):
            self.dedicated |= {cpu for vcpu in vcpus for cpu in vcpu}

    def claim_emulator(self, name: str, wish: CpuWish) -> None:
        """CPUs named for QEMU's threads are no candidates for anyone's dedicated vCPU."""
        wanted = wish.emulator or CpuSet()
        if outside := CpuSet(wanted - self.usable):
            self.refuse(name, f"cpu.emulator names CPUs {outside}, which are offline or not allowed here")
        elif within := CpuSet(wanted & self.isolated):
            self.refuse(
                name,
                f"cpu.emulator names CPUs {within}, which are isolated: several threads would share the first of them",
                f"name CPUs of {CpuSet(self.usable - self.isolated)}, or leave the key out",
            )
        else:
            self.emulators |= wanted

    def check_nodes(self, name: str, wish: CpuWish) -> None:
        """cpu.nodes names nodes that have CPUs we may use."""
        if wish.nodes is None:
            return
        able = CpuSet(node for node, cpus in self.machine.nodes.items() if cpus & self.usable)
        if lost := CpuSet(wish.nodes - able):
            self.refuse(
                name,
                f"cpu.nodes names nodes {lost}, which have no CPU that is online and allowed; those that have: {able}",
            )

    def check_count(self, name: str, wish: CpuWish) -> None:
        """More vCPUs than CPUs in one guest make it slower than fewer would."""
        reach = self._within(wish, self.usable)
        if wish.vcpus <= len(reach) or name in self.refused:
            return
        where = "this host has" if wish.nodes is None else f"nodes {wish.nodes} (cpu.nodes) have"
        message = f"{name} has {wish.vcpus} vCPUs, {where} {len(reach)} CPUs"
        if wish.allow_overcommit and wish.placement in ("none", "shared"):
            self.warn(f"guest {name}", message)
        else:
            self.refuse(name, message, f"cpu.vcpus = {len(reach)}, or cpu.allow_overcommit = true")

    def _within(self, wish: CpuWish, cpus: CpuSet) -> CpuSet:
        """Those of `cpus` that cpu.nodes leaves."""
        return cpus if wish.nodes is None else CpuSet(cpus & self.machine.cpus_of(wish.nodes))

    def place_exclusive(self, name: str, wish: CpuWish, has: tuple[CpuSet, ...] | None) -> None:
        """Guests whose vCPUs get a CPU each."""
        if wish.placement == "manual":
            self._place_manual(name, wish)
        elif wish.placement == "dedicated":
            kept = self._kept(wish, has) if has else None
            if kept is None:
                kept = self._find(name, wish)
            if kept is not None:
                self._dedicate(name, wish, kept)

    def _place_manual(self, name: str, wish: CpuWish) -> None:
        pins = wish.pin or ()
        if len(pins) != wish.vcpus:
            self.refuse(name, f"cpu.pin names {len(pins)} CPUs for {wish.vcpus} vCPUs", "name one host CPU per vCPU")
            return
        if outside := CpuSet(set(pins) - self.usable):
            self.refuse(name, f"cpu.pin names CPUs {outside}; online and allowed are {self.usable}")
            return
        if strays := CpuSet(set(pins) - self._within(wish, self.usable)):
            self.refuse(
                name,
                f"cpu.pin names CPUs {strays}, which are not on nodes {wish.nodes} (cpu.nodes)",
                f"CPUs there: {self._within(wish, self.usable)}",
            )
            return
        if clash := CpuSet(set(pins) & self.dedicated):
            self.refuse(name, f"cpu.pin names CPUs {clash}, which another guest has to itself")
            return
        twice = CpuSet(cpu for cpu in pins if pins.count(cpu) > 1)
        if twice & self.isolated:
            self.refuse(name, f"cpu.pin puts several vCPUs on isolated CPUs {CpuSet(twice & self.isolated)}")
            return
        if twice:
            self.warn(f"guest {name}", f"cpu.pin puts several vCPUs on CPUs {twice}")
        if shared := CpuSet(set(pins) & self.housekeeping):
            self.warn(f"guest {name}", f"cpu.pin names housekeeping CPUs {shared}: the host's own work runs there too")
        self._dedicate(name, wish, list(pins))

    def _dedicate(self, name: str, wish: CpuWish, cpus: list[int]) -> None:
        self.dedicated |= set(cpus) - self.housekeeping
        if wish.smt == "isolate":
            cores = {self.machine.by_id[cpu].core for cpu in cpus}
            self.idle |= {other for core in cores for other in self.machine.threads[core]}.difference(cpus)
        nodes = self.machine.nodes_of(cpus)
        near = CpuSet(self.housekeeping & self.machine.cpus_of(nodes))
        emulator = wish.emulator or near or self.housekeeping
        self.placed[name] = Placement(tuple(CpuSet([cpu]) for cpu in cpus), emulator, nodes)

    def _pools(self, wish: CpuWish) -> list[CpuSet]:
        """Free candidates, best first."""
        free = self._within(wish, self.usable) - self.dedicated - self.idle - self.housekeeping - self.emulators
        isolated = CpuSet(free & self.isolated)
        ordinary = CpuSet(free - self.isolated)
        match wish.isolated:
            case "require":
                return [isolated]
            case "avoid":
                return [ordinary]
            case _:
                return [isolated, ordinary, CpuSet(free)]

    def _busy(self) -> set[int]:
        return self.dedicated | self.housekeeping | self.emulators

    def _find(self, name: str, wish: CpuWish) -> list[int] | None:
        pools = self._pools(wish)
        nodes = [self.machine.nodes.get(node, frozenset()) for node in self.preferred.get(name, ())]
        for pool in pools:
            # first beside its memory and devices, as long as one node holds it whole
            for scope in (*(pool & there for there in nodes), pool):
                found = best_set(self.machine, scope, wish.vcpus, Smt(wish.smt), busy=self._busy())
                if found is not None:
                    return list(found)
        self._refuse_dedicated(name, wish, pools)
        return None

    def _kept(self, wish: CpuWish, has: tuple[CpuSet, ...]) -> list[int] | None:
        """What the guest has now, if it still obeys every rule."""
        cpus = [cpu for vcpu in has for cpu in vcpu]
        if any(len(vcpu) != 1 for vcpu in has) or len(cpus) != wish.vcpus or len(set(cpus)) != len(cpus):
            return None
        if not any(pool.issuperset(cpus) for pool in self._pools(wish)):
            return None
        return cpus if self.machine.obeys(cpus, Smt(wish.smt), self._busy()) else None

    def _refuse_dedicated(self, name: str, wish: CpuWish, pools: list[CpuSet]) -> None:
        free = pools[-1]
        kind = {"require": "isolated ", "avoid": "not isolated "}.get(wish.isolated, "")
        parts = [f"{len(self.usable)} CPU{'' if len(self.usable) == 1 else 's'}", f"housekeeping {self.housekeeping}"]
        if self.dedicated - self.housekeeping:
            owners = sorted(
                owner for owner, placement in self.placed.items() if len(placement.vcpus[0]) == 1 and owner != name
            )
            parts.append(f"dedicated {CpuSet(self.dedicated)}" + (f" ({', '.join(owners)})" if owners else ""))
        if self.idle:
            parts.append(f"kept empty beside them {CpuSet(self.idle)}")
        if self.isolated or wish.isolated == "require":
            parts.append(f"isolated {self.isolated or 'none'}")
        if wish.nodes is not None:
            kind += f"on nodes {wish.nodes} "
            parts[0] += f", {len(self._within(wish, self.usable))} on these nodes"
        count = f"{len(free)} {kind}{'is' if len(free) == 1 else 'are'} left"
        wanted = f"{wish.vcpus} dedicated CPU{'' if wish.vcpus == 1 else 's'}"
        message = f"{name} wants {wanted}, {count} outside housekeeping ({'; '.join(parts)})"
        hint = f"cpu.vcpus = {len(free)}, " if 0 < len(free) < wish.vcpus else ""
        if len(free) >= wish.vcpus:
            threads = max(len(ids) for ids in self.machine.threads.values())
            message += f", and not as smt = {wish.smt} needs them"
            if wish.smt == "require":
                message += " (this host has no SMT)" if threads == 1 else f" (whole cores of {threads} threads)"
            hint = 'cpu.smt = "prefer", '
        elif wish.isolated == "require":
            hint += 'cpu.isolated = "prefer", isolcpus= on the kernel command line, '
        self.refuse(name, message, f'{hint}or cpu.placement = "shared"')

    def place_floating(self, name: str, wish: CpuWish) -> None:
        """Guests the scheduler moves about: off the isolated CPUs, and off the dedicated ones when `shared`."""
        if wish.placement not in ("none", "shared"):
            return
        everywhere = self.shared if wish.placement == "shared" else self.ordinary
        cpus = self._within(wish, everywhere)
        if not cpus:
            there = self._within(wish, self.usable)
            self.refuse(
                name,
                f"{name} shares CPUs of nodes {wish.nodes} (cpu.nodes), and of {there} there none is left: "
                f"isolated {CpuSet(there & self.isolated) or 'none'}, dedicated "
                f"{CpuSet(there & (self.dedicated | self.idle)) or 'none'}",
                f"take cpu.nodes out, or name nodes of CPUs {everywhere}",
            )
            return
        nodes = () if wish.nodes is None else tuple(sorted(wish.nodes))
        self.placed[name] = Placement((cpus,) * wish.vcpus, wish.emulator or cpus, nodes)

    @property
    def ordinary(self) -> CpuSet:
        """What the scheduler balances over, whoever may have it; everything where all is isolated."""
        return CpuSet(self.usable - self.isolated) or self.usable

    @cached_property
    def shared(self) -> CpuSet:
        """What is neither isolated nor anyone's own; at the least housekeeping. Asked once all exclusive guests are."""
        return CpuSet(self.usable - self.isolated - self.dedicated - self.idle) or self.housekeeping

    def warn_overcommit(self, wishes: Mapping[str, CpuWish]) -> None:
        floating = sorted(name for name in self.placed if wishes[name].placement in ("none", "shared"))
        vcpus = sum(wishes[name].vcpus for name in floating)
        if vcpus > self.host.overcommit_ratio * len(self.shared):
            self.warn(
                "cpu.overcommit_ratio",
                f"{vcpus} vCPUs of {len(floating)} guests share {len(self.shared)} CPUs ({self.shared}): "
                f"{vcpus / len(self.shared):.1f} each, the ratio in host.toml is {self.host.overcommit_ratio:g}",
                "stop or shrink guests, or raise the ratio",
            )
        unkept = sorted(name for name in floating if wishes[name].placement == "none")
        exposed = CpuSet(self.dedicated - self.isolated)
        if unkept and exposed:
            self.warn(
                "cpu.placement",
                f"{', '.join(unkept)} may run on CPUs {exposed}, which other guests have dedicated",
                'cpu.placement = "shared" keeps them off',
            )
