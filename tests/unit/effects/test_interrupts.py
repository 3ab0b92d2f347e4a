"""Interrupts and irqbalance as /proc tells them, and the file the kernel lets nobody change."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import cast

import pytest

from kvmd.actions import WriteKnob
from kvmd.effects.apply import HostApplier
from kvmd.effects.dnsmasq import Dnsmasqs
from kvmd.effects.interrupts import observe_interrupts, observe_irqbalance
from kvmd.effects.netlink import Netlink
from kvmd.effects.records import EffectKind
from kvmd.effects.store import Store
from kvmd.effects.sysfs import HostTree
from kvmd.effects.tree import Tree
from kvmd.errors import HostFailed
from kvmd.facts import Facts, Irqbalance
from kvmd.plan.release import plan_release
from kvmd.units import CpuSet
from tests.rig.hosts import write_tree


def one(number: int, affinity: str, *handlers: str, **more: str) -> dict[str, str]:
    here = f"/proc/irq/{number}"
    files = {f"{here}/smp_affinity_list": f"{affinity}\n", f"{here}/spurious": "count 0\n"}
    files |= {f"{here}/{name}": f"{value}\n" for name, value in more.items()}
    return files | {f"{here}/{handler}/.keep": "" for handler in handlers}


def test_interrupts_that_devices_use(tmp_path: Path) -> None:
    files = one(9, "0-3", "eth0-rx", "eth0-tx", effective_affinity_list="2", node="1")
    files |= one(24, "1", "nvme0q1", node="-1") | one(25, "0-3") | one(100, "0", "ttyS0")
    write_tree(files | {"/proc/irq/default_smp_affinity": "f\n"}, tmp_path)
    (tmp_path / "proc/irq/24/smp_affinity_list").chmod(0o444)
    found = observe_interrupts(Tree(tmp_path), {"/proc/irq/100/smp_affinity_list"})
    assert [(each.number, each.device, str(each.affinity), each.node, each.fixed) for each in found] == [
        (9, "eth0-rx eth0-tx", "0-3", 1, False),
        (24, "nvme0q1", "1", None, True),
        (100, "ttyS0", "0", None, True),
    ]
    assert [each.effective for each in found] == [CpuSet([2]), None, None]


@pytest.mark.parametrize(
    ("environment", "banned"),
    [
        ("PATH=/bin\0IRQBALANCE_BANNED_CPULIST=2-3,8\0", CpuSet([2, 3, 8])),
        ("PATH=/bin\0", None),
        ("IRQBALANCE_BANNED_CPULIST=nonsense\0", CpuSet()),
    ],
)
def test_irqbalance_and_what_it_stays_off(tmp_path: Path, environment: str, banned: CpuSet | None) -> None:
    assert observe_irqbalance(Tree(tmp_path)) is None
    write_tree({"/proc/7/comm": "bash\n", "/proc/88/comm": "irqbalance\n", "/proc/88/environ": environment}, tmp_path)
    assert observe_irqbalance(Tree(tmp_path)) == Irqbalance(88, banned)


class ManagedIrq(HostTree):
    """A host whose kernel refuses with `refusal`."""

    refusal = errno.EIO

    def write(self, path: str, value: str) -> None:
        raise HostFailed(f"cannot write {path}", path=path, value=value, errno=self.refusal)


async def test_an_interrupt_the_kernel_manages_is_tried_once_and_said(tmp_path: Path) -> None:
    write_tree(one(24, "1", "nvme0q1") | {"/proc/sys/kernel/random/boot_id": "b\n"}, tmp_path)
    tree = ManagedIrq(tmp_path)
    (tmp_path / "state").mkdir()
    store = Store(tmp_path / "state")
    applier = HostApplier(tree, cast(Netlink, None), cast(Dnsmasqs, None), store)
    path = "/proc/irq/24/smp_affinity_list"
    await applier.apply(WriteKnob(path=path, old="1", new="0", why="test", requirement=False))
    (entry,) = store.journalled("b")
    assert (entry.kind, entry.subject) == (EffectKind.FIXED_IRQ, path)
    assert observe_interrupts(tree, {entry.subject})[0].fixed
    (undo,) = plan_release([(entry.kind, entry.subject, entry.original, entry.new)], Facts())
    assert (undo.action, undo.kept) == (None, None)
    ManagedIrq.refusal = errno.EINVAL
    try:
        with pytest.raises(HostFailed):
            await applier.apply(WriteKnob(path=path, old="1", new="0", why="test", requirement=False))
        with pytest.raises(HostFailed):
            await applier.apply(WriteKnob(path="/proc/sys/vm/swappiness", old="1", new="0", why="test"))
    finally:
        ManagedIrq.refusal = errno.EIO
        store.close()
