"""Doctor's checks of the network, each broken on a directory that looks like a host."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kvmd.errors import HostFailed
from tests.rig.doctorhost import NETWORK, DoctorHost, doctor_host, expect, socket_row

HEADER = "  sl  local_address ...\n"
ANY = "0" * 32
ROUTES6 = f"""\
20010db8000000000000000000000000 40 {ANY} 00 {ANY} 00000100 00000001 00000000 00040001     eth1
{ANY} 00 {ANY} 00 fe800000000000000000000000000009 00000400 00000001 00000000 00450003     eth0
{ANY} 00 {ANY} 00 {ANY} ffffffff 00000001 00000000 00200200       lo
"""
BRIDGED = '[network]\nmode = "bridge"\nbridge = "br0"\n'


@pytest.fixture
def box() -> Iterator[DoctorHost]:
    with doctor_host() as found:
        yield found


def _ruleset(*chains: str, policy: str = "drop", table: str = "filter", family: str = "ip") -> str:
    """What `nft -j list ruleset` says of a forward chain with this policy, and of chains beside it."""
    place = {"family": family, "table": table}
    items: list[dict[str, Any]] = [{"table": {"family": family, "name": table}}]
    items.append({"chain": {**place, "name": "FORWARD", "type": "filter", "hook": "forward", "policy": policy}})
    items += [{"chain": {**place, "name": name}} for name in chains]
    return json.dumps({"nftables": items})


def test_nft_is_not_installed(box: DoctorHost) -> None:
    box.remove("/usr/sbin/nft")
    expect(box, "nft", "fail", "network lan", fix="apt-get install nftables")
    box.config("networks.d/lan.toml", BRIDGED)
    expect(box, "nft", "skip")


def test_dnsmasq_is_not_installed(box: DoctorHost) -> None:
    box.remove("/usr/sbin/dnsmasq")
    expect(box, "dnsmasq", "fail", "network lan", fix="apt-get install dnsmasq-base")
    box.config("networks.d/lan.toml", NETWORK.partition("[ipv4.dhcp]")[0] + "[dns]\nenabled = false\n")
    expect(box, "dnsmasq", "skip")


def test_forwarding_was_switched_off(box: DoctorHost) -> None:
    box.write("/proc/sys/net/ipv4/ip_forward", "0\n")
    expect(box, "forwarding", "fail", "ip_forward is 0", "lan", fix="kvmd-cli apply")
    box.close()
    expect(box, "forwarding", "warn", fix="systemctl start kvmd")  # kvmd switches it on when it starts


def test_ipv6_is_forwarded_unless_the_host_would_forget_its_own_router(box: DoctorHost) -> None:
    box.config("networks.d/lan.toml", NETWORK.replace('"nat"', '"routed"') + '[ipv6]\naddress = "fd50::1/64"\n')
    box.write("/proc/sys/net/ipv6/conf/all/forwarding", "0\n")
    expect(box, "forwarding", "fail", "conf.all.forwarding is 0", "lan", fix="kvmd-cli apply")
    box.write("/proc/thread-self/net/ipv6_route", ROUTES6)
    box.write("/proc/sys/net/ipv6/conf/eth0/accept_ra", "1\n")
    expect(box, "forwarding", "fail", "on eth0", fix="sysctl -w net.ipv6.conf.eth0.accept_ra=2 && kvmd-cli apply")
    box.write("/proc/sys/net/ipv6/conf/all/forwarding", "1\n")
    expect(box, "forwarding", "ok")


@pytest.mark.parametrize(
    ("ruleset", "owner", "fix"),
    [
        (_ruleset("DOCKER-USER"), "(Docker)", "iptables -I DOCKER-USER -i kvlan"),
        (_ruleset("ufw-user-forward"), "(ufw)", "ufw route allow in on kvlan"),
        (_ruleset(table="firewalld", family="inet"), "(firewalld)", "firewall-cmd"),
        (_ruleset(), "policy drop", "kvlan"),
    ],
)
def test_somebody_drops_what_is_forwarded(box: DoctorHost, ruleset: str, owner: str, fix: str) -> None:
    box.ruleset = ruleset
    expect(box, "firewall", "fail", "network lan", owner, "policy drop", fix=fix)
    box.ruleset = _ruleset("DOCKER-USER", policy="accept")
    expect(box, "firewall", "ok")


def test_the_old_iptables_is_in_use(box: DoctorHost) -> None:
    box.write("/proc/net/ip_tables_names", "nat\nfilter\n")
    expect(box, "firewall", "warn", "old iptables", fix="iptables-legacy -I FORWARD -i kvlan")


def test_rules_that_cannot_be_listed(box: DoctorHost, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(self: DoctorHost) -> str:
        raise HostFailed("nft is not installed")

    monkeypatch.setattr(DoctorHost, "_ruleset", refused)
    expect(box, "firewall", "skip", "nft is not installed")


def test_a_listing_of_another_shape(box: DoctorHost) -> None:
    box.ruleset = json.dumps({"nftables": [{"chain": "what?"}]})
    expect(box, "firewall", "skip", "not a listing of nft")
    box.write("/proc/sys/net/bridge/bridge-nf-call-iptables", "1\n")
    expect(box, "bridge-nf", "warn")


def test_frames_between_guests_pass_iptables(box: DoctorHost) -> None:
    box.write("/proc/sys/net/bridge/bridge-nf-call-iptables", "1\n")
    expect(box, "bridge-nf", "warn", "bridge-nf-call-iptables is 1", fix="net.bridge.bridge-nf-call-iptables=0")
    box.ruleset = _ruleset()
    expect(box, "bridge-nf", "fail", "kvlan lose frames")
    box.config("networks.d/lan.toml", BRIDGED)
    expect(box, "bridge-nf", "fail", "br0 lose frames")


def test_there_is_no_bridge_to_join(box: DoctorHost) -> None:
    box.config("networks.d/servers.toml", BRIDGED)
    expect(box, "bridges", "fail", "network servers", '"br0"', fix="bridge_ports eth0")
    box.process(800, "systemd-network")
    expect(box, "bridges", "fail", fix="/etc/systemd/network/10-br0.netdev")
    box.process(801, "NetworkManager")
    expect(box, "bridges", "fail", fix="nmcli connection add type bridge ifname br0")
    box.write("/etc/netplan/50-cloud-init.yaml", "network: {}\n")
    expect(box, "bridges", "fail", fix="netplan try")
    box.link("br0", bridge=True)
    expect(box, "bridges", "ok", "br0")


def test_what_is_to_be_joined_is_no_bridge(box: DoctorHost) -> None:
    box.config("networks.d/servers.toml", BRIDGED.replace("br0", "eth0"))
    expect(box, "bridges", "fail", '"eth0" is an interface', fix="networks.d/servers.toml")


@pytest.mark.parametrize(
    ("program", "fix"),
    [
        ("dnsmasq", "except-interface=kvlan"),
        ("systemd-resolve", "DNSStubListenerExtra"),
        ("named", "listen-on"),
        ("unbound", "interface: 127.0.0.1"),
        ("pdns_recursor", "systemctl disable --now pdns_recursor"),
    ],
)
def test_somebody_holds_the_dns_port(box: DoctorHost, program: str, fix: str) -> None:
    box.write("/proc/net/udp", HEADER + socket_row("0.0.0.0", 53, 77))
    box.process(777, program, inodes=(77,))
    expect(box, "dns-ports", "fail", f"{program} (pid 777) holds 0.0.0.0:53", "lan", fix=fix)


def test_the_port_on_the_bridges_own_address_counts_and_on_another_does_not(box: DoctorHost) -> None:
    box.write("/proc/net/udp", HEADER)
    box.write("/proc/net/tcp", HEADER + socket_row("192.168.50.1", 53, 77, state="0A"))
    expect(box, "dns-ports", "fail", "another program", "192.168.50.1:53", fix="ss -lnp")
    box.write("/proc/net/tcp", HEADER + socket_row("127.0.0.53", 53, 77, state="0A"))
    expect(box, "dns-ports", "ok")
    box.write("/proc/net/tcp", HEADER + socket_row("192.168.50.1", 53, 77, state="01"))  # a connection, no listener
    expect(box, "dns-ports", "ok")


def test_another_name_server_on_all_ipv6_addresses(box: DoctorHost) -> None:
    row = socket_row("0.0.0.0", 53, 77).replace("00000000:0035", f"{'0' * 32}:0035")
    box.write("/proc/net/udp6", HEADER + row)
    box.process(777, "named", inodes=(77,))
    expect(box, "dns-ports", "fail", "named (pid 777) holds :::53")


def test_another_dhcp_server(box: DoctorHost) -> None:
    box.write("/proc/net/udp", HEADER + socket_row("0.0.0.0", 67, 77))
    box.process(777, "dhcpd", inodes=(77,))
    expect(box, "dns-ports", "warn", "dhcpd (pid 777)", "two DHCP servers", fix="systemctl disable --now dhcpd")
    box.process(777, "dnsmasq", f"dnsmasq --conf-file={box.paths.run}/networks/lan/dnsmasq.conf", inodes=())
    expect(box, "dns-ports", "ok")


def test_a_tap_of_a_guest_that_is_gone(box: DoctorHost) -> None:
    box.remove("/proc/4242")
    expect(box, "leftover-links", "warn", "kv0123456789ab", "guest web", fix="ip link delete kv0123456789ab")


def test_a_bridge_of_a_network_that_is_gone(box: DoctorHost) -> None:
    box.link("kvold", alias="kvmd:old", bridge=True)
    expect(box, "leftover-links", "warn", "kvold", "network old", fix="kvmd-cli apply")


def test_links_of_others_are_not_ours(box: DoctorHost) -> None:
    box.link("tap9", alias="kvmdx:lan:gone:lan", tap=True)
    box.link("virbr0", bridge=True)
    expect(box, "leftover-links", "ok")


def test_a_bridge_for_vlans_is_made_filtering_and_one_of_kvmds_own_is_nobodys_to_make(box: DoctorHost) -> None:
    box.config("networks.d/lan.toml", BRIDGED + "vlan_filtering = true\n")
    expect(box, "bridges", "fail", 'no bridge "br0"', fix="up ip link set br0 type bridge vlan_filtering 1")
    box.write("/etc/netplan/50.yaml", "")
    expect(box, "bridges", "fail", fix="ip link set br0 type bridge vlan_filtering 1")
    box.config("networks.d/lan.toml", BRIDGED + '[uplink]\ninterface = "enp4s0"\n')
    expect(box, "bridges", "skip")
