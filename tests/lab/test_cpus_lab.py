"""CPUs on a whole machine: isolated ones, every thread of a guest, interrupts, one that goes offline, NUMA nodes.

vhost has kernel threads on this kernel; NVMe has interrupts the kernel keeps; the boot loader's drop-in is written from
inside the sandbox of kvmd.service.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kvmd.units import CpuSet
from tests.rig.lab import Lab, LabFailed
from tests.rig.labhost import IMAGES, LabHost, kvmd_in

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

HOST = """
[cpu]
irq_affinity = "housekeeping"
"""
NETWORK = """
[network]
mode = "isolated"
bridge = "kvlab"
"""
DROP_IN = "/etc/default/grub.d/50-kvmd.cfg"
# What Debian's update-grub is for us: it sources the drop-ins and keeps what came out.
UPDATE_GRUB = """#!/bin/sh
GRUB_CMDLINE_LINUX=quiet
for x in /etc/default/grub.d/*.cfg; do [ ! -e "$x" ] || . "$x"; done
echo "$GRUB_CMDLINE_LINUX" >/run/test-grub
"""


def halted(name: str, cpu: str, nic: str = "") -> str:
    """A guest that halts at once: its threads are what counts."""
    return f"""
[machine]
accel = "kvm"
default_nic = false
[cpu]
model = "host"
{cpu}
[memory]
size = "64MiB"
[disk.root]
file = "{IMAGES}/{name}.img"
format = "raw"
cache = "writeback"
{nic}
"""


def boot_sector(lab: Lab, name: str) -> None:
    """cli; hlt; and again should anything wake it."""
    lab.check(f"head -c 510 /dev/zero >{IMAGES}/{name}.img && printf '\\125\\252' >>{IMAGES}/{name}.img")
    lab.check(f"printf '\\372\\364\\353\\375' | dd of={IMAGES}/{name}.img conv=notrunc status=none")


def cpus(host: LabHost) -> Any:
    return host.cli("host", "cpus")


def lines(host: LabHost) -> list[str]:
    return [action["line"] for action in host.plan()["actions"]]


# ---- 4 CPUs, 2 and 3 isolated ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(lab: Lab) -> Iterator[LabHost]:
    with kvmd_in(lab, host=HOST) as found:
        found.network("lab", NETWORK)
        boot_sector(lab, "own")
        found.guest("own", halted("own", 'placement = "dedicated"\nisolated = "require"', '[nic.lab]\nnetwork = "lab"'))
        found.apply()
        lab.check("kvmd-cli start own", timeout_s=120)
        yield found


def test_who_sits_where(host: LabHost) -> None:
    found = cpus(host)
    roles = {cpu["id"]: cpu["roles"] for cpu in found["cpus"]}
    assert "isolated" in roles[2]
    assert "isolated" in roles[3]
    assert "housekeeping" in roles[0]
    assert [cpu["vcpus"] for cpu in found["cpus"] if cpu["id"] in (2, 3) and cpu["vcpus"]] == [["own:0"]]
    assert found["guests"][0]["placed"]
    assert "own:0" in host.lab.check("kvmd-cli host cpus", timeout_s=60)


def test_vhost_s_threads_are_the_guest_s_too(host: LabHost) -> None:
    """This kernel (6.1) has them as kernel threads; the next pass brings back one that strayed."""
    pid = host.show("own")["pid"]
    worker = host.lab.check(f"pgrep -x vhost-{pid}").split()[0]
    threads = {thread["name"]: thread["cpus"] for thread in cpus(host)["guests"][0]["threads"]}
    assert threads[f"vhost-{pid}"] == "0"
    assert set(threads.values()) == {"0"}
    host.lab.check(f"taskset -pc 0-3 {worker}")
    (line,) = lines(host)
    assert line.startswith("~ guest own: ")
    assert f"vhost-{pid} on 0-3 -> 0" in line
    host.cli("reconcile")
    assert lines(host) == []
    assert host.lab.check(f"sed -n 's/^Cpus_allowed_list:.//p' /proc/{worker}/status").strip() == "0"


def test_interrupts_stay_on_housekeeping_but_for_those_the_kernel_manages(host: LabHost) -> None:
    assert lines(host) == [], "refused once and known from then on"
    shown = host.lab.check("grep -s . /proc/irq/*/smp_affinity_list /proc/irq/*/effective_affinity_list; true")
    files: dict[str, dict[str, str]] = {}
    for line in shown.splitlines():
        path, _, value = line.partition(":")
        files.setdefault(path.split("/")[3], {})[path.rsplit("/", 1)[1]] = value
    used = host.lab.check("for d in /proc/irq/*/; do for h in $d*/; do [ ! -d $h ] || echo $d; done; done | sort -u")
    numbers = {line.split("/")[3] for line in used.split()}
    fixed = host.lab.check("journalctl -b -u kvmd -o cat | grep 'the kernel manages this interrupt itself' || true")
    held = {line.split("/")[3] for line in fixed.splitlines()}
    moved = {number for number in numbers if files[number]["smp_affinity_list"] == "0"}
    assert moved, shown
    assert numbers - moved <= held, (numbers, moved, held)
    assert held, "NVMe has a queue for each CPU, and keeps them"
    told = " ".join(problem["message"] for problem in host.plan()["problems"])
    (own,) = host.show("own")["placement"]["vcpus"]
    for number in moved:
        # one that has not fired since still has its old place, which is told where a guest's own CPU is meant
        arrives = CpuSet.parse(files[number].get("effective_affinity_list", ""))
        assert int(own) not in arrives or "moves when it fires next" in told, files[number]
    assert any(CpuSet.parse(files[number].get("effective_affinity_list", "")) == CpuSet([0]) for number in moved)
    shown_to_people = host.cli("host", "cpus")["interrupts"]
    assert {str(each["number"]) for each in shown_to_people if each["kept"]} >= held
    assert int(host.lab.check("cat /proc/irq/default_smp_affinity").replace(",", ""), 16) == 1


def test_a_cpu_that_goes_offline_and_comes_back(host: LabHost) -> None:
    (own,) = host.show("own")["placement"]["vcpus"]
    other = {"2": "3", "3": "2"}[own]
    try:
        host.lab.check(f"echo 0 >/sys/devices/system/cpu/cpu{own}/online")
        host.cli("reconcile")
        assert host.show("own")["placement"]["vcpus"] == [other]
        assert [cpu["id"] for cpu in cpus(host)["cpus"] if "offline" in cpu["roles"]] == [int(own)]
        host.lab.check(f"echo 0 >/sys/devices/system/cpu/cpu{other}/online")
        problems = host.plan()["problems"]
        assert any("own wants 1 dedicated CPU, 0 isolated are left" in problem["message"] for problem in problems)
        assert host.show("own")["state"] == "running", "nobody is stopped for it"
    finally:
        host.lab.check(
            f"echo 1 >/sys/devices/system/cpu/cpu{own}/online; echo 1 >/sys/devices/system/cpu/cpu{other}/online"
        )
    host.cli("reconcile")
    assert host.show("own")["placement"]["vcpus"][0] in ("2", "3")
    assert lines(host) == []


def test_the_kernel_s_command_line_from_inside_the_sandbox(host: LabHost) -> None:
    """kvmd.service may write the one file, update-grub is run by who asked, and all of it is taken back."""
    lab = host.lab
    looked = lab.run(["kvmd-cli", "--json", "host", "kernel-args"], timeout_s=60)
    assert looked.returncode == 10
    words = {word["key"]: word for word in json.loads(looked.stdout)["words"]}
    assert words["isolcpus"]["enough"], "CPUs 2-3 are isolated, and one is enough"
    assert words["nohz_full"]["wanted"] == "nohz_full=2-3", "the list that is there is the list for all"
    with pytest.raises(LabFailed, match="takes no file of kvmd's"):
        lab.check("kvmd-cli --yes host kernel-args --write", timeout_s=60)
    had = lab.run("ls /etc/default/grub /usr/sbin/update-grub /etc/default/grub.d").stdout
    assert had == "", "this lab boots without a boot loader"
    try:
        lab.write("/etc/default/grub", "GRUB_CMDLINE_LINUX=quiet\n")
        lab.write("/usr/sbin/update-grub", UPDATE_GRUB, 0o755)
        shown = lab.check("kvmd-cli --yes host kernel-args --write --update", timeout_s=60)
        assert f"+ {DROP_IN}: nohz_full=2-3 rcu_nocbs=2-3 irqaffinity=0" in shown
        assert lab.check("cat /run/test-grub").strip() == "quiet nohz_full=2-3 rcu_nocbs=2-3 irqaffinity=0"
        assert lab.check(f"stat -c '%a %U' {DROP_IN}").strip() == "644 root"
        assert "nothing to do" in lab.check("kvmd-cli --yes host kernel-args --write", timeout_s=60)
        host.restart()
        lab.check("kvmd-cli --yes host kernel-args --remove --update", timeout_s=60)
        assert lab.check("cat /run/test-grub").strip() == "quiet"
        assert lab.run(f"ls {DROP_IN}").returncode != 0
    finally:
        lab.run("rm -rf /etc/default/grub /etc/default/grub.d /usr/sbin/update-grub /run/test-grub")


# ---- two nodes of two cores with two threads -------------------------------------------------------------------


@pytest.fixture(scope="module")
def numa(lab_numa: Lab) -> Iterator[LabHost]:
    with kvmd_in(lab_numa) as found:
        for name, keys in (
            ("far", 'vcpus = 2\nplacement = "dedicated"\nnodes = "1"'),
            ("near", 'vcpus = 2\nnodes = "0"'),
            ("lone", 'placement = "dedicated"\nsmt = "isolate"'),
        ):
            boot_sector(lab_numa, name)
            found.guest(name, halted(name, keys))
        found.apply()
        for name in ("far", "near", "lone"):
            lab_numa.check(f"kvmd-cli start {name}", timeout_s=120)
        yield found


def test_vcpus_and_memory_stay_on_the_named_nodes(numa: LabHost) -> None:
    """far: both threads of the core of node 1 that is not housekeeping; its memory there as well."""
    far, near = numa.show("far"), numa.show("near")
    assert sorted(far["placement"]["vcpus"]) == ["6", "7"]
    assert far["placement"]["emulator"] == "4-5"
    assert set(near["placement"]["vcpus"]) == {near["placement"]["emulator"]}
    assert CpuSet.parse(near["placement"]["emulator"]) <= CpuSet(range(4))
    for guest, node in ((far, 1), (near, 0)):
        maps = numa.lab.check(f"grep -E 'prefer(=|:)?.*{node}' /proc/{guest['pid']}/numa_maps")
        assert maps
    assert lines(numa) == []


def test_nobody_runs_beside_an_isolating_guest(numa: LabHost) -> None:
    (own,) = numa.show("lone")["placement"]["vcpus"]
    siblings = CpuSet.parse(
        numa.lab.check(f"cat /sys/devices/system/cpu/cpu{own}/topology/thread_siblings_list").strip()
    )
    assert len(siblings) == 2
    beside = CpuSet(siblings - {int(own)})
    for guest in cpus(numa)["guests"]:
        if guest["name"] != "lone":
            assert not any(CpuSet.parse(mask) & beside for mask in guest["vcpus"])
