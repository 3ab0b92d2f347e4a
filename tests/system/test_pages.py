"""Guests on hugepages: the machine's own pages, reserved for them, used by them, and given back.

Pages belong to the whole machine: a few of them, alone with the lock, and what was found is restored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmd.rpc.client import RemoteError
from tests.rig.guestfiles import tiny
from tests.rig.kvmdhost import KvmdHost
from tests.rig.machinestate import Memory, differences, machine_lock
from tests.rig.memoryscene import MIB, meminfo, until

pytestmark = pytest.mark.system

P2 = 2 << 20
PAGES = 16  # of one guest
HUGE = 'backing = "hugepages"'


@pytest.fixture
def machine() -> Iterator[Memory]:
    """This machine's memory as it was and shall be again; named before `host` in a test, so that guests end first."""
    with machine_lock():
        memory = Memory.observe()
        yield memory
        memory.restore()
        assert differences(memory, Memory.observe()) == []


def huge(host: KvmdHost, name: str, memory: str = "") -> str:
    """A guest of PAGES pages: a boot sector, which is enough for its QEMU to take them all."""
    return tiny(host, name, size=f"{PAGES * 2}MiB", memory=f"{HUGE}\n{memory}")


def used() -> int:
    """Pages of 2 MiB that somebody has."""
    return sum(pool.used for pool in Memory.observe().pools if pool.page_bytes == P2)


def in_pages(pid: int) -> int:
    """Bytes a process has in mappings of 2 MiB pages."""
    total, is_huge = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "KernelPageSize":
            is_huge = value.split() == ["2048", "kB"]
        elif is_huge and key in ("Shared_Hugetlb", "Private_Hugetlb"):
            total += int(value.split()[0]) * 1024
    return total


def test_a_guests_pages_from_plan_to_release(machine: Memory, host: KvmdHost, life: str) -> None:
    host.write("host.toml", '[hugepages.2MiB]\npages = "auto"\n[tuning]\nmode = "apply"\n')
    host.start()
    before, before_used = machine.pages(), used()
    host.guest("web", huge(host, "web"))
    (line,) = [action["line"] for action in host.call("host.plan")["actions"] if "hugepages" in action["line"]]
    assert line == f"~ hugepages 2MiB node 0: {before} -> {before + PAGES} pages"
    host.call("host.apply")
    assert Memory.observe().pages() == before + PAGES
    assert host.call("host.plan")["actions"] == []

    host.call("guest.start", name="web")
    host.wait_serial("web", "web is up")
    if life == "adopted":
        host.restart()
    pid = host.show("web")["pid"]
    assert in_pages(pid) == PAGES * P2
    assert used() == before_used + PAGES
    assert host.call("host.plan")["actions"] == [], "pages in use are not planned for twice"

    host.call("guest.kill", name="web")
    assert used() == before_used
    host.call("host.release")
    assert Memory.observe().pages() == before


def test_pages_in_use_survive_a_smaller_wish(machine: Memory, host: KvmdHost) -> None:
    """Files that no longer ask for pages take none from a running guest; what it does not need goes back at once."""
    host.write("host.toml", '[hugepages.2MiB]\npages = "auto"\nspare = "4MiB"\n')
    host.guest("web", huge(host, "web"))
    host.start()
    host.call("host.apply")
    host.call("guest.start", name="web")
    spare = Memory.observe().pages() - PAGES
    assert spare == machine.pages() + 2
    with pytest.raises(RemoteError, match="web needs hugepages 2MiB node 0"):
        host.call("host.release")
    host.write("host.toml", f"[hugepages.2MiB]\npages = {PAGES // 2}\n")
    report = host.call("host.apply", allow=["host"])
    assert any(f"{PAGES} are in use" in problem["message"] for problem in report["problems"]), report
    assert Memory.observe().pages() == PAGES
    assert in_pages(host.show("web")["pid"]) == PAGES * P2
    host.call("guest.kill", name="web")
    host.call("host.release")
    assert Memory.observe().pages() == machine.pages()


def test_too_few_pages_are_a_refusal_or_said(machine: Memory, host: KvmdHost) -> None:
    """Without a fallback the guest does not start and is told what is missing; with one it starts, and says so."""
    host.write("host.toml", f"[hugepages.2MiB]\npages = {machine.pages() + PAGES // 2}\n")
    host.guest("strict", huge(host, "strict"))
    host.guest("soft", huge(host, "soft", 'fallback = "thp"'))
    host.start()
    host.call("host.apply")
    (problem,) = [one for one in host.call("host.plan")["problems"] if one["guests"] == ["strict"]]
    assert f"wants {PAGES} pages of 2MiB (32 MiB), " in problem["message"]
    assert 'pages = "auto"' in problem["hint"]
    with pytest.raises(RemoteError, match="32MiB of 2MiB hugepages") as error:
        host.call("guest.start", name="strict")
    assert (error.value.slug, "[hugepages]" in (error.value.hint or "")) == ("refused", True)
    assert host.show("strict")["pid"] is None
    host.call("guest.start", name="soft")
    shown = host.show("soft")
    assert in_pages(shown["pid"]) == 0
    assert any("transparent" in warning for warning in shown["warnings"]), shown["warnings"]


def test_a_guest_on_hugepages_is_never_ballooned(machine: Memory, host: KvmdHost, life: str) -> None:
    """Its file cannot ask for it, and the agent leaves it alone on a host that has nothing left, saying why."""
    host.write("host.toml", '[hugepages.2MiB]\npages = "auto"\n[tuning]\nmode = "apply"\n')
    host.guest("web", huge(host, "web", "[memory.balloon]\nenabled = true\n"))
    host.start()
    (fault,) = host.call("host.plan")["faults"]
    assert (fault["key"], fault["severity"]) == ("memory.balloon.enabled", "error")
    host.guest("web", huge(host, "web"))
    host.call("host.apply")
    host.call("guest.start", name="web")
    text = (host.config / "host.toml").read_text()
    host.write("host.toml", f'[memory]\nreserve = "{_all_of_it()}"\n{text}')
    host.call("host.reconcile")
    if life == "adopted":
        host.restart()
    until("the agent sees a host in need", lambda: host.call("tune.status")["host_state"] == "CRIT", host, timeout_s=30)
    (guest,) = host.call("tune.status")["guests"]
    assert not guest["eligible"]
    assert "its memory is hugepages" in guest["reason"]
    decisions = host.call("tune.explain", name="web", limit=100)["decisions"]
    assert {one["action"] for one in decisions} == {"none"}
    assert all("hugepages" in one["why"] for one in decisions)


def _all_of_it() -> str:
    """A reserve that leaves guests nothing, also when other programs give back as much as they hold meanwhile."""
    found = meminfo()
    return f"{max(found['MemAvailable'], found['MemTotal'] - (512 * MIB)) // MIB}MiB"
