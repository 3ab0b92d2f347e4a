"""Who may start on this machine, shown before and obeyed then; what a real QEMU is measured to need."""

from __future__ import annotations

import json

import pytest

from kvmd.effects.sensors import HostSensors
from kvmd.effects.sysfs import HostTree
from kvmd.plan.admission import OVERHEAD_BASE_BYTES
from kvmd.rpc.client import RemoteError
from tests.rig.guestfiles import tiny
from tests.rig.kvmdhost import KvmdHost

pytestmark = pytest.mark.system

MIB, GIB = 1 << 20, 1 << 30


def small(host: KvmdHost) -> int:
    """A reserve that leaves guests half of what this machine has for them; the size of a guest of which one fits.

    Others start and end QEMUs meanwhile, which count: so guests are large, though they touch next to nothing.
    """
    tree = HostTree()
    memory = tree.observe_memory()
    free = memory.total_bytes - memory.hugetlb_bytes - tree.foreign_qemu([])
    reserve = (memory.total_bytes - free // 2) // MIB - (memory.total_bytes - free) // MIB
    host.write("host.toml", f'[memory]\nreserve = "{reserve}MiB"\nadmission = "strict"\n')
    return int(free / 2 * 0.7) // MIB * MIB


def test_the_sum_is_shown_before_a_start_and_is_what_decides(host: KvmdHost) -> None:
    """Room for one of two: the plan says so for both, a dry start as well, and the start itself agrees."""
    size = small(host)
    for name in ("a", "b"):
        host.guest(name, tiny(host, name, size=f"{size // MIB}MiB", extra="[start]\nauto = true\n"))
    host.start()
    host.wait_state("a", "running")
    found = host.call("host.plan")
    (refused,) = found["admissions"]
    assert (refused["guest"], refused["rule"], refused["admitted"]) == ("b", "strict", False)
    assert refused["own_bytes"] == refused["others_bytes"] == size + OVERHEAD_BASE_BYTES + size // 256
    assert refused["remaining_bytes"] < 0
    shown = host.cli("plan", check=False).stdout
    assert f"memory:\n  {refused['line'].split(' of ')[0]} of " in shown, "the same sum, but for others' QEMUs"
    dry = json.loads(host.cli("--json", "start", "b", "--dry-run").stdout)
    assert [one["admitted"] for one in dry["admissions"]] == [False]
    with pytest.raises(RemoteError, match="not enough memory") as error:
        host.call("guest.start", name="b")
    assert error.value.slug == "refused"

    host.call("guest.kill", name="a")
    (fits,) = host.call("host.admission", names=["b"])["admissions"]
    assert fits["admitted"]
    assert "reserve" in fits["terms"]
    one, two = host.call("host.admission", names=["b", "a"])["admissions"]
    assert (one["admitted"], two["admitted"]) == (True, False), "one after the other"
    host.call("guest.start", name="b")
    host.call("guest.kill", name="b")


def test_what_a_qemu_holds_beside_its_guest_is_measured(host: KvmdHost) -> None:
    """All of the guest's memory is touched, and none of it is taken for QEMU's own."""
    host.guest("web", tiny(host, "web", size="512MiB", memory="prealloc = true\n"))
    host.start()
    host.call("guest.start", name="web")
    host.wait_serial("web", "web is up")
    found = HostSensors().footprint(host.show("web")["pid"], 512 * MIB)
    assert found is not None
    assert 512 * MIB <= found.guest_bytes <= 528 * MIB
    assert 4 * MIB < found.other_bytes < OVERHEAD_BASE_BYTES
    host.call("guest.kill", name="web")
