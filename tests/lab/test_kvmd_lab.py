"""kvmd on the production platform in small: installed, enabled, a Linux guest under real KVM, a crash, a reboot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rig.lab import Lab
from tests.rig.labhost import LabHost, kvm_guest, kvmd_in

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

HOST = """
[cpu]
irq_affinity = "housekeeping"
[hugepages.2MiB]
pages = 64
"""
LAN = """
[network]
mode = "nat"
bridge = "kvlan"
[ipv4]
address = "192.168.50.1/24"
[ipv4.dhcp]
range = ["192.168.50.100", "192.168.50.200"]
"""
WEB = kvm_guest(
    "web",
    cpu='placement = "dedicated"\nisolated = "require"',
    nic='[nic.lan]\nnetwork = "lan"',
    extra='[start]\nauto = true\n[limits]\nmemory_max = "512MiB"\ncpu_weight = 250',
    cmdline="kvmd.ip=dhcp",
)
# QEMU takes all of the guest's memory at once, and may not have more than just that.
HOG = kvm_guest("hog", memory="prealloc = true", extra='[limits]\nmemory_max = "192MiB"\n[on]\ncrash = "stay_off"')
POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
UNIT = "/sys/fs/cgroup/machine.slice/kvmd-guest@web.service"


@pytest.fixture(scope="module")
def kvmd(lab: Lab) -> Iterator[LabHost]:
    """The lab with kvmd installed by scripts/install, enabled, and one guest declared; taken away afterwards."""
    with kvmd_in(lab, host=HOST) as host:
        host.network("lan", LAN)
        host.guest("web", WEB)
        host.apply()
        host.cli("start", "web")
        yield host


def wait_up(kvmd: LabHost) -> dict[str, Any]:
    """Until the guest has a lease; what kvmd says of it then."""
    kvmd.wait_serial("web", "KVMD-GUEST LEASE")
    found: dict[str, Any] = kvmd.show("web")
    return found


def test_a_linux_guest_runs_under_real_kvm_as_a_unit_on_an_isolated_cpu(kvmd: LabHost) -> None:
    guest = wait_up(kvmd)
    assert guest["state"] == "running"
    pid = guest["pid"]
    assert "kvmd-guest@web.service" in kvmd.lab.check(f"cat /proc/{pid}/cgroup")
    status = kvmd.lab.check(f"cat /proc/{pid}/status")
    assert "CapEff:\t0000000000000000" in status
    assert "Seccomp:\t2" in status
    arguments = kvmd.lab.check(f"tr '\\0' ' ' </proc/{pid}/cmdline")
    assert "-accel kvm" in arguments
    assert "-cpu host" in arguments
    (cpu,) = guest["placement"]["vcpus"]
    assert cpu in ("2", "3")  # isolcpus=2,3
    assert kvmd.lab.run("kvmd-cli plan", timeout_s=60).returncode == 0  # 10 would mean: something to do
    assert kvmd.lab.check(f"cat {POOL}") == "64\n"


def test_nothing_else_comes_near_its_cpu(kvmd: LabHost) -> None:
    """QEMU's other threads, the kernel's for its network card and its timer, the interrupts of the host's card."""
    guest = wait_up(kvmd)
    pid, housekeeping = guest["pid"], guest["placement"]["emulator"]
    threads = kvmd.affinity(pid)
    assert threads.pop("CPU 0/KVM") == guest["placement"]["vcpus"][0]
    assert set(threads.values()) == {housekeeping}
    listed = "for t in $(pgrep '^vhost-'); do sed -n 's/^Cpus_allowed_list:\\t//p' /proc/$t/status; done"
    assert set(kvmd.lab.check(listed).split()) == {housekeeping}
    # Where they go from their next one on; one that never fires again is not moved by the kernel.
    card = "cd /proc/irq && cat $(ls /sys/class/net/en*/device/../msi_irqs | sed 's:$:/smp_affinity_list:')"
    assert set(kvmd.lab.check(card).split()) == {housekeeping}


def test_limits_are_its_cgroups(kvmd: LabHost) -> None:
    wait_up(kvmd)
    limits = kvmd.lab.check(f"cd {UNIT} && cat memory.max cpu.weight memory.swap.max pids.max").split()
    assert limits == [str(512 << 20), "250", "max", "4096"]
    assert int(kvmd.lab.check(f"cat {UNIT}/memory.current")) > 32 << 20  # what it holds is counted there


def test_a_guest_over_its_limit_is_killed_by_the_kernel_and_no_other_notices(kvmd: LabHost) -> None:
    before = wait_up(kvmd)
    kvmd.guest("hog", HOG)
    kvmd.apply()
    started = kvmd.lab.run("kvmd-cli start hog", timeout_s=240)
    assert (started.returncode, "without a word" in started.stderr) == (1, True), started
    assert "Memory cgroup out of memory" in kvmd.lab.check("journalctl -b -k --no-pager")
    after = kvmd.show("web")
    assert (after["pid"], after["state"]) == (before["pid"], "running")
    kvmd.lab.check("rm /etc/kvmd/guests.d/hog.toml && kvmd-cli --yes apply --prune", timeout_s=120)


def test_kvmd_is_killed_and_the_guest_is_not(kvmd: LabHost) -> None:
    before = wait_up(kvmd)
    kvmd.restart()
    after = kvmd.show("web")
    assert (after["pid"], after["state"]) == (before["pid"], "running")


def test_doctor_finds_nothing_that_would_stop_a_guest(kvmd: LabHost) -> None:
    wait_up(kvmd)
    checks = json.loads(kvmd.lab.run("kvmd-cli --json doctor", timeout_s=120).stdout)
    failed = [check for check in checks.get("checks", checks) if check["status"] == "fail"]
    assert not [check for check in failed if check["name"] in ("kvm", "tun", "qemu", "nft", "dnsmasq", "forwarding")]


def test_after_a_reboot_pages_network_and_guest_are_there_again(kvmd: LabHost) -> None:
    before = wait_up(kvmd)
    boot = kvmd.lab.boot_id
    kvmd.lab.check("truncate -s 0 /var/log/kvmd/web/serial-console.log")
    kvmd.lab.reboot()
    assert kvmd.lab.boot_id != boot
    assert len(kvmd.lab.check("journalctl --list-boots --no-pager").splitlines()) >= 2
    kvmd.lab.wait_for("systemctl is-active --quiet kvmd", timeout_s=240)
    after = wait_up(kvmd)
    assert (after["state"], after["uuid"]) == ("running", before["uuid"])
    assert kvmd.lab.check(f"cat {POOL}") == "64\n"
    assert kvmd.lab.run("kvmd-cli plan", timeout_s=60).returncode == 0
