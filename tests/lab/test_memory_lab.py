"""Memory on a whole host: zram as a module, kvmd.service's own sandbox, locked guests, swap over a reboot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rig.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

HOST = """
[swap.file]
path = "/var/lib/kvmd/swap"
size = "32MiB"
[swap.zram]
size = "64MiB"
[hugepages.2MiB]
[modules]
load = ["zram"]
"""
GUEST = """
[machine]
accel = "kvm"
default_nic = false
[cpu]
model = "host"
[start]
timeout = "2min"
[memory]
size = "32MiB"
{memory}
"""
LOCKED = GUEST.format(memory="lock = true")
PAGED = GUEST.format(memory='backing = "file"\npath = "/srv/pages"\npage_size = "2MiB"')


@pytest.fixture(scope="module")
def kvmd(lab: Lab) -> Iterator[Lab]:
    """The lab with kvmd installed and running as its service; taken away afterwards."""
    lab.install()
    lab.write("/etc/kvmd/host.toml", HOST)
    lab.write("/etc/kvmd/guests.d/locked.toml", LOCKED)
    lab.write("/etc/kvmd/guests.d/paged.toml", PAGED)
    lab.check("systemctl enable --quiet --now kvmd", timeout_s=120)
    yield lab
    lab.run("kvmd-cli kill locked paged; kvmd-cli --yes host release", timeout_s=240)
    lab.run("systemctl disable --now kvmd; /src/kvmd/scripts/uninstall --purge; systemctl reset-failed", timeout_s=240)


def lines(lab: Lab) -> list[str]:
    """Lines of the plan."""
    found: dict[str, Any] = json.loads(lab.run("kvmd-cli --json plan", timeout_s=60).stdout)
    return [action["line"] for action in found["actions"]]


def applied(lab: Lab) -> None:
    """Two passes: the second finds the module that the first loaded."""
    for _ in range(2):
        lab.run("kvmd-cli --yes apply", timeout_s=120)
    assert [line for line in lines(lab) if "swap" in line or "hugetlbfs" in line] == []


def test_swap_file_and_zram_are_made_by_the_service(kvmd: Lab) -> None:
    applied(kvmd)
    swaps = kvmd.check("cat /proc/swaps")
    assert "zram" in swaps
    assert "/var/lib/kvmd/swap" in swaps
    assert kvmd.check("stat -c '%a %U %s' /var/lib/kvmd/swap") == f"600 root {32 << 20}\n"
    kvmd.check("systemctl restart kvmd", timeout_s=120)
    assert [line for line in lines(kvmd) if "swap" in line] == [], "another mount namespace, the same swap"


def test_a_locked_guest_has_all_its_memory_in_ram(kvmd: Lab) -> None:
    kvmd.check("kvmd-cli start locked", timeout_s=120)
    pid = json.loads(kvmd.check("kvmd-cli --json show locked"))["pid"]
    (locked,) = [int(line.split()[1]) for line in kvmd.check(f"cat /proc/{pid}/status").splitlines() if "VmLck" in line]
    assert locked >= 32 << 10
    assert kvmd.check("systemctl show -p LimitMEMLOCK --value kvmd-guest@locked") == "infinity\n"
    kvmd.check("kvmd-cli kill locked", timeout_s=60)


def test_a_guest_on_a_hugetlbfs_that_the_service_mounted(kvmd: Lab) -> None:
    kvmd.check("kvmd-cli start paged", timeout_s=120)
    pid = json.loads(kvmd.check("kvmd-cli --json show paged"))["pid"]
    huge = kvmd.check(f"grep -h Hugetlb: /proc/{pid}/smaps")
    assert sum(int(line.split()[1]) for line in huge.splitlines()) == 32 << 10
    kvmd.check("kvmd-cli kill paged", timeout_s=60)


def test_after_a_reboot_the_same_file_is_swapped_to_and_release_removes_it(kvmd: Lab) -> None:
    inode = kvmd.check("stat -c %i /var/lib/kvmd/swap")
    kvmd.reboot()
    kvmd.wait_for("systemctl is-active --quiet kvmd", timeout_s=240)
    applied(kvmd)
    assert kvmd.check("stat -c %i /var/lib/kvmd/swap") == inode
    assert "/var/lib/kvmd/swap" in kvmd.check("cat /proc/swaps")
    kvmd.check("kvmd-cli --yes host release", timeout_s=120)
    assert kvmd.run("test -e /var/lib/kvmd/swap").returncode != 0
    assert len(kvmd.check("cat /proc/swaps").splitlines()) == 1
