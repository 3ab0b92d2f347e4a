"""VLANs on a kernel that has them: access and trunk ports, what leaves by the NIC, what drifts, a foreign bridge.

Fake guests' ports are TAPs of real guests where kvmd opens them, and the frames of the other side are seen on a dummy
or veth. The lab's own network is not touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rig.lab import Lab
from tests.rig.labhost import take_away

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

TRUNK = """
[network]
mode = "isolated"
bridge = "kvtrunk"
vlan_filtering = true
"""
JOINED = """
[network]
mode = "bridge"
bridge = "labbr0"
vlan_filtering = true
"""
# A boot sector that halts: its TAP is what the test is about.
GUEST = """
[machine]
accel = "tcg"
default_nic = false
[memory]
size = "32MiB"
[disk.root]
file = "/srv/vm/{name}.img"
format = "raw"
cache = "writeback"
[nic.a]
network = "trunk"
{keys}
"""


@pytest.fixture(scope="module")
def kvmd(lab: Lab) -> Iterator[Lab]:
    """The lab with kvmd running from the checkout's environment, two guests on a filtering bridge."""
    lab.install()
    lab.check("mkdir -p /srv/vm /etc/kvmd/networks.d /etc/kvmd/guests.d && rm -f /etc/kvmd/networks.d/*.toml")
    lab.write("/etc/kvmd/networks.d/trunk.toml", TRUNK)
    for name, keys in (("one", "vlan = 10"), ("two", "vlans = [10, 20, 21]\nnative_vlan = 5")):
        # "jmp $" and the mark of a boot sector.
        lab.check(f"head -c 510 /dev/zero >/srv/vm/{name}.img && printf '\\125\\252' >>/srv/vm/{name}.img")
        lab.check(f"printf '\\353\\376' | dd of=/srv/vm/{name}.img conv=notrunc status=none")
        lab.write(f"/etc/kvmd/guests.d/{name}.toml", GUEST.format(name=name, keys=keys))
    lab.check("systemctl enable --quiet --now kvmd", timeout_s=120)
    lab.wait_for("kvmd-cli --json status", timeout_s=120)
    for name in ("one", "two"):
        lab.check(f"kvmd-cli start {name}", timeout_s=240)
    yield lab
    take_away(lab)
    lab.run("ip link del labbr0; ip link del labbr1")


def tap(lab: Lab, guest: str) -> str:
    found: dict[str, Any] = json.loads(lab.check(f"kvmd-cli --json show {guest}", timeout_s=60))
    (nic,) = found["nics"]
    return str(nic["tap"])


def vlans(lab: Lab, port: str) -> list[tuple[int, tuple[str, ...]]]:
    """What bridge(8) says of a port: VLAN and flags, ranges taken apart."""
    (found,) = json.loads(lab.check(f"bridge -j vlan show dev {port}"))
    return [
        (vid, tuple(each.get("flags", ())))
        for each in found["vlans"]
        for vid in range(each["vlan"], each.get("vlanEnd", each["vlan"]) + 1)
    ]


ONE = [(10, ("PVID", "Egress Untagged"))]
TWO = [(5, ("PVID", "Egress Untagged")), (10, ()), (20, ()), (21, ())]


def test_ports_carry_what_the_files_say(kvmd: Lab) -> None:
    assert "vlan_filtering 1" in kvmd.check("ip -d link show kvtrunk")
    assert vlans(kvmd, tap(kvmd, "one")) == ONE
    assert vlans(kvmd, tap(kvmd, "two")) == TWO
    assert kvmd.run("kvmd-cli plan", timeout_s=60).returncode == 0


@pytest.mark.parametrize(
    "drift",
    [
        "bridge vlan add dev {port} vid 30",
        "bridge vlan del dev {port} vid 10",
        "bridge vlan add dev {port} vid 1 pvid untagged",
        "ip link set kvtrunk type bridge vlan_filtering 0",
    ],
)
def test_what_somebody_changed_is_one_line_and_mended(kvmd: Lab, drift: str) -> None:
    port = tap(kvmd, "one")
    kvmd.check("systemctl stop kvmd-reconcile.timer; " + drift.format(port=port))
    kvmd.check("kvmd-cli reconcile", timeout_s=60)
    assert vlans(kvmd, port) == ONE
    assert "vlan_filtering 1" in kvmd.check("ip -d link show kvtrunk")
    assert kvmd.run("kvmd-cli plan", timeout_s=60).returncode == 0


def test_a_changed_file_changes_the_port_of_the_running_guest(kvmd: Lab) -> None:
    kvmd.write("/etc/kvmd/guests.d/one.toml", GUEST.format(name="one", keys="vlans = [20, 21, 22]"))
    try:
        plan = kvmd.run("kvmd-cli plan", timeout_s=60)
        assert plan.returncode == 10 and "VLANs 10 untagged -> 20-22" in plan.stdout
        kvmd.check("kvmd-cli apply --yes", timeout_s=120)
        assert vlans(kvmd, tap(kvmd, "one")) == [(20, ()), (21, ()), (22, ())]
    finally:
        kvmd.write("/etc/kvmd/guests.d/one.toml", GUEST.format(name="one", keys="vlan = 10"))
        kvmd.check("kvmd-cli apply --yes", timeout_s=120)
    assert vlans(kvmd, tap(kvmd, "one")) == ONE


def test_frames_stay_in_their_vlan(kvmd: Lab) -> None:
    """Three namespaces as stations on the same bridge: access 10 and trunk 10 hear each other, access 20 does not."""
    stations = (("a", "10 pvid untagged", "eth0"), ("b", "10", "eth0.10"), ("c", "20 pvid untagged", "eth0"))
    try:
        for number, (name, vlan, device) in enumerate(stations, 1):
            kvmd.check(
                f"ip netns add {name} && ip link add v{name} type veth peer name eth0 netns {name}"
                f" && ip link set v{name} master kvtrunk up && bridge vlan del dev v{name} vid 1"
                f" && bridge vlan add dev v{name} vid {vlan} && ip -n {name} link set eth0 up"
            )
            if "." in device:
                kvmd.check(f"ip -n {name} link add link eth0 name {device} type vlan id 10")
            kvmd.check(f"ip -n {name} addr add 10.9.9.{number}/24 dev {device} && ip -n {name} link set {device} up")
        kvmd.wait_for("ip netns exec a ping -c 1 -W 2 10.9.9.2", timeout_s=30)
        assert kvmd.run("ip netns exec a ping -c 1 -W 2 10.9.9.3").returncode != 0
        assert kvmd.run("ip netns exec b ping -c 1 -W 2 10.9.9.3").returncode != 0
    finally:
        kvmd.run("for n in a b c; do ip netns del $n; ip link del v$n; done")


def test_a_foreign_bridge_is_not_switched_over(kvmd: Lab) -> None:
    kvmd.check("ip link add labbr0 type bridge && ip link set labbr0 up")
    kvmd.write("/etc/kvmd/networks.d/joined.toml", JOINED)
    try:
        plan = kvmd.run("kvmd-cli plan", timeout_s=60)
        assert "labbr0" in plan.stdout + plan.stderr
        assert "ip link set labbr0 type bridge vlan_filtering 1" in plan.stdout + plan.stderr
        kvmd.run("kvmd-cli apply --yes", timeout_s=120)
        assert "vlan_filtering 0" in kvmd.check("ip -d link show labbr0")
        kvmd.check("ip link set labbr0 type bridge vlan_filtering 1")
        assert kvmd.run("kvmd-cli plan", timeout_s=60).returncode == 0
    finally:
        kvmd.run("rm /etc/kvmd/networks.d/joined.toml; ip link del labbr0")
        kvmd.check("kvmd-cli reconcile", timeout_s=60)
