"""kvmd on the production platform in small: installed, enabled, a Linux guest under real KVM, a crash, a reboot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rig.guestimage import guest_kernel
from tests.rig.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

GUEST = """
[machine]
accel = "kvm"
default_nic = false
[start]
auto = true
[cpu]
model = "host"
placement = "dedicated"
isolated = "require"
[memory]
size = "192MiB"
[boot]
kernel = "{kernel}"
initrd = "{initrd}"
cmdline = "console=ttyS0 quiet mitigations=off kvmd.ip=dhcp kvmd.role=web"
[nic.lan]
network = "lan"
[serial.console]
log = true
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


@pytest.fixture(scope="module")
def kvmd(lab: Lab) -> Iterator[Lab]:
    """The lab with kvmd installed by scripts/install, enabled, and one guest declared; taken away afterwards."""
    lab.check("KVMD_WHEELS=/opt/kvmd-wheels /src/kvmd/scripts/install", timeout_s=600)
    kernel, initrd = guest_kernel()
    lab.check(f"mkdir -p /srv/vm && cp {kernel} /srv/vm/vmlinuz && cp {initrd} /srv/vm/initrd && chmod 644 /srv/vm/*")
    lab.write("/etc/kvmd/networks.d/lan.toml", LAN)
    lab.write("/etc/kvmd/guests.d/web.toml", GUEST.format(kernel="/srv/vm/vmlinuz", initrd="/srv/vm/initrd"))
    lab.check("systemctl enable --quiet --now kvmd", timeout_s=120)
    yield lab
    lab.run("kvmd-cli kill web; systemctl disable --now kvmd; /src/kvmd/scripts/uninstall --purge", timeout_s=240)
    lab.run("systemctl reset-failed; rm -rf /srv/vm")


def show(lab: Lab) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lab.check("kvmd-cli --json show web", timeout_s=60))
    return found


def wait_up(lab: Lab) -> dict[str, Any]:
    """Until the guest has a lease and kvmd says running."""
    log = "/var/log/kvmd/web/serial-console.log"
    lab.wait_for(f"grep -q 'KVMD-GUEST LEASE' {log}", timeout_s=300)
    return show(lab)


def test_a_linux_guest_runs_under_real_kvm_as_a_unit_on_an_isolated_cpu(kvmd: Lab) -> None:
    guest = wait_up(kvmd)
    assert guest["state"] == "running"
    pid = guest["pid"]
    assert "kvmd-guest@web.service" in kvmd.check(f"cat /proc/{pid}/cgroup")
    status = kvmd.check(f"cat /proc/{pid}/status")
    assert "CapEff:\t0000000000000000" in status
    assert "Seccomp:\t2" in status
    arguments = kvmd.check(f"tr '\\0' ' ' </proc/{pid}/cmdline")
    assert "-accel kvm" in arguments
    assert "-cpu host" in arguments
    (cpu,) = guest["placement"]["vcpus"]
    assert cpu in ("2", "3")  # isolcpus=2,3
    assert kvmd.run("kvmd-cli plan", timeout_s=60).returncode == 0  # 10 would mean: something to do


def test_kvmd_is_killed_and_the_guest_is_not(kvmd: Lab) -> None:
    before = wait_up(kvmd)
    kvmd.check("systemctl kill --signal=SIGKILL kvmd")
    kvmd.wait_for("systemctl is-active --quiet kvmd && kvmd-cli list", timeout_s=120)
    after = show(kvmd)
    assert (after["pid"], after["state"]) == (before["pid"], "running")


def test_doctor_finds_nothing_that_would_stop_a_guest(kvmd: Lab) -> None:
    wait_up(kvmd)
    checks = json.loads(kvmd.run("kvmd-cli --json doctor", timeout_s=120).stdout)
    failed = [check for check in checks.get("checks", checks) if check["status"] == "fail"]
    assert not [check for check in failed if check["name"] in ("kvm", "tun", "qemu", "nft", "dnsmasq", "forwarding")]


def test_after_a_reboot_the_guest_is_there_again(kvmd: Lab) -> None:
    before = wait_up(kvmd)
    boot = kvmd.boot_id
    kvmd.check("truncate -s 0 /var/log/kvmd/web/serial-console.log")
    kvmd.reboot()
    assert kvmd.boot_id != boot
    kvmd.wait_for("systemctl is-active --quiet kvmd", timeout_s=240)
    after = wait_up(kvmd)
    assert (after["state"], after["uuid"]) == ("running", before["uuid"])
    assert kvmd.run("kvmd-cli plan", timeout_s=60).returncode == 0
