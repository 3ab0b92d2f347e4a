"""Devices' interrupts on housekeeping CPUs, off those of guests: cpu.irq_affinity = "housekeeping". Pure.

Each interrupt goes to the housekeeping CPUs of its device's node (of all nodes where it has none), and what devices
that come later ask for goes to housekeeping as well. Tuning knobs all: what someone else sets afterwards is respected.
Left alone are those the kernel manages itself (a queue per CPU, as NVMe's: they fire only for what that CPU asked for)
and those of devices that guests own (vfio-…).
"""

from __future__ import annotations

from kvmd.actions import Action, Problem, WriteKnob
from kvmd.config.host import Host
from kvmd.facts import Facts, Interrupt
from kvmd.plan.assignment import usable_cpus
from kvmd.plan.cpus import Placements
from kvmd.units import CpuSet

DEFAULT = "/proc/irq/default_smp_affinity"
KNOBS = (DEFAULT,)
WHY = "cpu.irq_affinity is housekeeping"


def plan_interrupts(placements: Placements, host: Host, facts: Facts) -> tuple[tuple[Action, ...], tuple[Problem, ...]]:
    """Writes that bring the interrupts where they belong beside these guests, and what cannot be had."""
    if host.cpu.irq_affinity != "housekeeping":
        return (), ()
    housekeeping = placements.housekeeping
    rest = CpuSet(usable_cpus(facts.cpus) - housekeeping)
    if not rest:
        return (), (Problem("interrupts", f"{WHY}, and every CPU is: there is nothing to keep them off"),)
    if problem := _rival(facts, rest):
        return (), (problem,)
    actions: list[Action] = [*_default(facts, housekeeping)]
    for interrupt in facts.interrupts:
        if interrupt.fixed or interrupt.is_guests or interrupt.affinity <= housekeeping:
            continue
        actions.append(
            WriteKnob(
                path=f"/proc/irq/{interrupt.number}/smp_affinity_list",
                old=str(interrupt.affinity),
                new=str(_near(interrupt, housekeeping, facts)),
                why=f"{WHY}; {interrupt.device}",
                requirement=False,
            )
        )
    owned = CpuSet(cpu for found in placements.of.values() if found.is_exclusive for cpu in found.cpus)
    return tuple(actions), _stuck(facts, CpuSet(owned - housekeeping))


def _near(interrupt: Interrupt, housekeeping: CpuSet, facts: Facts) -> CpuSet:
    """Housekeeping CPUs of the device's node, or all."""
    if interrupt.node is None:
        return housekeeping
    near = CpuSet(cpu.id for cpu in facts.cpus.cpus if cpu.node == interrupt.node and cpu.id in housekeeping)
    return near or housekeeping


def _default(facts: Facts, housekeeping: CpuSet) -> list[WriteKnob]:
    """The mask of interrupts to come; a mask, for it has no file that takes a list."""
    now = facts.knobs.get(DEFAULT, "")
    digits = now.replace(",", "")
    try:
        bits = int(digits, 16)
    except ValueError:
        return []  # this kernel has none
    wanted = sum(1 << cpu for cpu in housekeeping)
    if bits == wanted or wanted.bit_length() > 4 * len(digits):
        return []
    padded = f"{wanted:0{len(digits)}x}"
    head = len(padded) % 8
    groups = [padded[:head]] * bool(head) + [padded[index : index + 8] for index in range(head, len(padded), 8)]
    return [WriteKnob(path=DEFAULT, old=now, new=",".join(groups), why=WHY, requirement=False)]


def _rival(facts: Facts, rest: CpuSet) -> Problem | None:
    """irqbalance where it may move interrupts to CPUs outside housekeeping: two writers of one file."""
    if facts.irqbalance is None:
        return None
    isolated = facts.cpus.isolated | facts.cpus.nohz_full
    banned = isolated if facts.irqbalance.banned is None else facts.irqbalance.banned
    if rest <= banned:
        return None
    return Problem(
        "interrupts",
        f"{WHY}, and irqbalance (pid {facts.irqbalance.pid}) may move them to CPUs {CpuSet(rest - banned)}: "
        "kvmd leaves them to it",
        f"IRQBALANCE_BANNED_CPULIST={rest} in /etc/default/irqbalance, then: systemctl restart irqbalance",
    )


def _stuck(facts: Facts, owned: CpuSet) -> tuple[Problem, ...]:
    """Interrupts that arrive at a guest's own CPUs although they shall not."""
    there = [each for each in facts.interrupts if not each.is_guests and each.arrives & owned]
    managed = [each for each in there if each.fixed]
    moving = [each for each in there if not each.fixed and not each.affinity & owned]
    found = []
    if managed:
        hint = "they fire for I/O that was asked for there; isolcpus=managed_irq,... keeps them away where it can"
        found.append(_arriving(managed, owned, "the kernel manages them itself", hint))
    if moving:
        hint = "nothing is to be done: one that never fires disturbs nobody"
        found.append(_arriving(moving, owned, "each moves when it fires next", hint))
    return tuple(found)


def _arriving(interrupts: list[Interrupt], owned: CpuSet, why: str, hint: str) -> Problem:
    numbers = CpuSet(each.number for each in interrupts)
    devices = sorted({each.device for each in interrupts})
    shown = ", ".join(devices[:3]) + (f" and {len(devices) - 3} more" if len(devices) > 3 else "")
    where = CpuSet(cpu for each in interrupts for cpu in each.arrives & owned)
    return Problem("interrupts", f"interrupts {numbers} ({shown}) arrive at CPUs {where} of guests: {why}", hint)
