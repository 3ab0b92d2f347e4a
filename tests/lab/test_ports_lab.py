"""Guests' ports where /dev/vhost-net is: queues served by the kernel, QEMU's own bridge helper, scripts that the
hardened unit runs, and limits and guard on a distribution's kernel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.rig.lab import Lab
from tests.rig.labhost import LabHost, kvmd_in

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

HELPER = "/usr/lib/qemu/qemu-bridge-helper"
LAN = """
[network]
mode = "nat"
bridge = "kvlan"
[ipv4]
address = "192.168.50.1/24"
[ipv4.dhcp]
range = ["192.168.50.100", "192.168.50.200"]
[forward.web]
listen = ":8080"
to = "web:80"
"""
WEB = """
[machine]
accel = "kvm"
default_nic = false
[cpu]
vcpus = 2
model = "host"
allow_overcommit = true
[memory]
size = "192MiB"
[boot]
kernel = "/srv/vm/vmlinuz"
initrd = "/srv/vm/initrd"
cmdline = "console=ttyS0 quiet mitigations=off kvmd.ip=dhcp kvmd.httpd=1 kvmd.role=web"
[serial.console]
log = true
[nic.lan]
network = "lan"
ipv4 = "192.168.50.20"
queues = 2
vhost = true
guard = true
rate_in = "200Mbit"
rate_out = "100Mbit"
"""
# A boot sector that halts: its TAP is what the test is about.
HALTED = """
[machine]
accel = "tcg"
default_nic = false
[memory]
size = "32MiB"
[disk.root]
file = "/srv/vm/halted.img"
format = "raw"
cache = "writeback"
readonly = true
[nic.odd]
{keys}
"""
# Run in the lab: the page behind the forward.
FETCH = "import urllib.request as u; print(u.urlopen('http://192.168.50.1:8080/', timeout=20).read().decode())"


@pytest.fixture(scope="module")
def host(lab: Lab) -> Iterator[LabHost]:
    lab.check("ip link add labbr1 type bridge && ip link set labbr1 up")
    try:
        with kvmd_in(lab) as host:
            lab.check("head -c 510 /dev/zero >/srv/vm/halted.img && printf '\\125\\252' >>/srv/vm/halted.img")
            lab.check("printf '\\353\\376' | dd of=/srv/vm/halted.img conv=notrunc status=none")
            host.network("lan", LAN)
            host.guest("web", WEB)
            host.apply()
            yield host
    finally:
        lab.run("ip link del labbr1; rm -rf /etc/qemu/bridge.conf /root/ports-lab")


def pid(host: LabHost, name: str) -> int:
    return int(host.show(name)["pid"])


def test_two_queues_are_served_by_the_kernel_and_the_forward_reaches_the_guest(host: LabHost) -> None:
    lab = host.lab
    lab.check("kvmd-cli start web", timeout_s=180)
    host.wait_serial("web", "KVMD-GUEST LEASE eth0 192.168.50.20")
    qemu = pid(host, "web")
    opened = lab.check(f"ls -l /proc/{qemu}/fd")
    assert opened.count("/dev/vhost-net") == 2 and opened.count("/dev/net/tun") == 2
    workers = lab.check(f"(ps -eo comm; ps -T -p {qemu} -o comm) | sort | grep -c '^vhost-'").strip()
    assert int(workers) >= 2
    arguments = lab.check(f"tr '\\0' '\\n' </proc/{qemu}/cmdline")
    assert '"vhostfds":' in arguments and "script" not in arguments
    lab.wait_for(f'python3 -c "{FETCH}" | grep -q "hello from web"', timeout_s=120)


def test_limits_and_guard_on_this_kernel_are_as_planned(host: LabHost) -> None:
    lab = host.lab
    plan = host.plan()
    assert (plan["actions"], plan["problems"]) == ([], [])
    links = json.loads(lab.check("ip -j link show master kvlan"))
    tap = next(link["ifname"] for link in links if link["ifname"].startswith("kv"))
    assert "tbf" in lab.check(f"tc qdisc show dev {tap}")
    lab.check(f"tc qdisc del dev {tap} root && nft flush chain bridge kvmd {tap}")
    lines = [action["line"] for action in host.plan()["actions"]]
    assert lines == ["~ nft table bridge kvmd: as declared again", "~ guest web: nic.lan.rate_in none -> 200Mbit"]
    host.apply()
    assert host.plan()["actions"] == []


def test_the_cable_of_a_guest_under_kvm(host: LabHost) -> None:
    host.guest("web", WEB + "link = false\n")
    host.apply()
    host.restart()
    assert host.plan()["actions"] == []
    host.guest("web", WEB)
    host.lab.wait_for("kvmd-cli --json plan | grep -q 'pulled -> plugged in' || kvmd-cli --json plan", timeout_s=60)
    host.apply()
    host.lab.wait_for(f'python3 -c "{FETCH}" | grep -q "hello from web"', timeout_s=120)


def test_qemus_own_helper_and_a_script_run_in_the_units_sandbox(host: LabHost) -> None:
    lab = host.lab
    lab.check("mkdir -p /etc/qemu /root/ports-lab && echo allow labbr1 > /etc/qemu/bridge.conf")
    host.guest("helped", HALTED.format(keys=f'type = "tap"\nhelper = "{HELPER}"\nbr = "labbr1"'))
    lab.check("kvmd-cli start helped", timeout_s=120)
    assert "kvmd::helped:odd" in lab.check("ip link show master labbr1")
    lab.check("kvmd-cli kill helped", timeout_s=60)
    assert lab.check("ip link show master labbr1").strip() == ""

    host.guest("helped", HALTED.format(keys=f'type = "tap"\nhelper = "{HELPER}"\nbr = "labbr9"'))
    refused = lab.run("kvmd-cli start helped", timeout_s=120)
    assert refused.returncode != 0 and "labbr9" in refused.stderr + refused.stdout

    for name, text in (("up", "ip link set $1 master labbr1 up"), ("down", "echo $1 >/root/ports-lab/gone")):
        lab.check(f"printf '#!/bin/sh\\n{text}\\n' >/root/ports-lab/{name} && chmod 755 /root/ports-lab/{name}")
    scripts = 'script = "/root/ports-lab/up"\ndownscript = "/root/ports-lab/down"'
    host.guest("helped", HALTED.format(keys=f'type = "tap"\nifname = "tap7"\n{scripts}\nvhost = true'))
    lab.check("kvmd-cli start helped", timeout_s=120)
    assert "tap7" in lab.check("ip link show master labbr1")
    assert "/dev/vhost-net" in lab.check(f"ls -l /proc/{pid(host, 'helped')}/fd")
    lab.check("kill -9 $(systemctl show -P MainPID kvmd-guest@helped); kvmd-cli kill helped || true", timeout_s=60)
    lab.wait_for("grep -q tap7 /root/ports-lab/gone", timeout_s=60)
    lab.check("rm /etc/kvmd/guests.d/helped.toml")
