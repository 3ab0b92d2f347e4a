"""Which CPUs the devices' interrupts may go to and do go to, and whether irqbalance moves them too. Reading only.

Documentation/core-api/irq/irq-affinity.rst; `effective_affinity_list` is where an interrupt really arrives, of the
CPUs it may. irqbalance(1) tells the CPUs it stays off in its environment.
"""

from __future__ import annotations

import stat
from collections.abc import Collection

from kvmd.effects.proc import pids
from kvmd.effects.tree import Tree
from kvmd.facts import Interrupt, Irqbalance
from kvmd.units import CpuSet

IRQ = "/proc/irq"
BANNED = b"IRQBALANCE_BANNED_CPULIST="


def observe_interrupts(tree: Tree, fixed: Collection[str]) -> tuple[Interrupt, ...]:
    """All interrupts that a device uses, by number. `fixed`: files in which the kernel has refused a change."""
    found = []
    for number in sorted(int(name) for name in tree.names(IRQ) if name.isdigit()):
        path = f"{IRQ}/{number}/smp_affinity_list"
        actions = _actions(tree, number)
        affinity = tree.cpus(path)
        if not actions or affinity is None:
            continue
        node = tree.number(f"{IRQ}/{number}/node")
        found.append(
            Interrupt(
                number=number,
                device=" ".join(actions),
                affinity=affinity,
                effective=tree.cpus(f"{IRQ}/{number}/effective_affinity_list"),
                node=node if node is not None and node >= 0 else None,
                fixed=path in fixed or not _is_writable(tree, path),
            )
        )
    return tuple(found)


def observe_irqbalance(tree: Tree) -> Irqbalance | None:
    """The balancer that runs, with the CPUs it was told to stay off; None when there is none."""
    for pid in pids(tree):
        if tree.read(f"/proc/{pid}/comm") != "irqbalance":
            continue
        for entry in (tree.read_bytes(f"/proc/{pid}/environ") or b"").split(b"\0"):
            if entry.startswith(BANNED):
                try:
                    return Irqbalance(pid, CpuSet.parse(entry.removeprefix(BANNED).decode("ascii", "replace")))
                except ValueError:
                    return Irqbalance(pid, CpuSet())
        return Irqbalance(pid, None)
    return None


def _actions(tree: Tree, number: int) -> list[str]:
    """Names of the handlers: the kernel makes a directory for each."""
    folder = tree.path(f"{IRQ}/{number}")
    return [name for name in tree.names(f"{IRQ}/{number}") if (folder / name).is_dir()]


def _is_writable(tree: Tree, path: str) -> bool:
    """Since 6.13 the file of an interrupt that the kernel manages has no write permission."""
    try:
        return bool(tree.path(path).stat().st_mode & stat.S_IWUSR)
    except OSError:
        return False
