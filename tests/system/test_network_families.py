"""Routed networks and IPv6 on the real kernel: who gets which address, who reaches whom, and what drifts is mended."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from pathlib import Path
from typing import Any

import pytest

from kvmd.config.guest import Guest
from kvmd.config.network import Network
from kvmd.plan.network import FORWARDING, FORWARDING6
from tests.rig.netns import Namespace, private_namespace, veth
from tests.rig.networkrig import WEB_MAC, Rig, lease, network_rig, ping, plugged_in, write

pytestmark = pytest.mark.system

DHCP6 = Path(__file__).resolve().parents[1] / "rig/dhcp6.py"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with network_rig(tmp_path) as made:
        yield made


def network(mode: str, name: str, third: int, ipv6: str = "", **tables: Any) -> Network:
    wish: dict[str, Any] = {
        "network": {"mode": mode, "bridge": f"kv{name}"},
        "ipv4": {
            "address": IPv4Interface(f"10.0.{third}.1/24"),
            "dhcp": {"range": (IPv4Address(f"10.0.{third}.100"), IPv4Address(f"10.0.{third}.200"))},
        },
        "dns": {"domain": f"{name}.test", "upstream": (IPv4Address("203.0.113.9"),)},
    }
    if ipv6:
        wish["ipv6"] = {"address": IPv6Interface(f"fd{third}::1/64"), "mode": ipv6}
    return Network.model_validate(wish | tables)


def guest(network: str, ipv6: str) -> Guest:
    nic = {"network": network, "ipv6": IPv6Address(ipv6)}
    return Guest.model_validate({"memory": {"size": "64MiB"}, "nic": {"lan": nic}})


@contextlib.contextmanager
def upstream(rig: Rig, *routes: str) -> Iterator[Namespace]:
    """A router behind the host's uplink, with these routes to the host's networks."""
    with private_namespace("upstream") as outside:
        veth(rig.host, "uplink", outside, "eth0")
        for namespace, device, tail in ((rig.host, "uplink", "1"), (outside, "eth0", "9")):
            namespace.ip(f"addr add 203.0.113.{tail}/24 dev {device}")
            namespace.ip(f"addr add 2001:db8::{tail}/64 dev {device} nodad")
        rig.host.ip("route add default via 203.0.113.9")
        rig.host.ip("route add default via 2001:db8::9")
        for route in routes:
            outside.ip(f"route add {route} via {'2001:db8::1' if ':' in route else '203.0.113.1'}")
        yield outside


def until(what: Callable[[], Any], timeout_s: float = 15.0) -> Any:
    """What it gives once it gives something."""
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, f"{what} stayed empty"
        time.sleep(0.1)
    return found


def global_address(fake: Namespace) -> str | None:
    """The IPv6 address a fake guest has and may use."""
    for line in fake.ip("-o -6 addr show dev eth0 scope global").splitlines():
        if "tentative" not in line:
            return line.split()[3].partition("/")[0]
    return None


async def test_a_routed_guest_is_itself_outside_and_reached_from_there(rig: Rig, tmp_path: Path) -> None:
    rig.networks = {"dmz": network("routed", "dmz", 60, "dhcp"), "lan": network("nat", "lan", 50, "slaac")}
    rig.guests, rig.macs = {"web": guest("dmz", "fd60::20")}, {("web", "lan"): WEB_MAC}
    with upstream(rig, "10.0.60.0/24", "fd60::/64", "10.0.50.0/24", "fd50::/64") as outside:
        await rig.converge()
        with plugged_in(rig, "kvdmz", WEB_MAC) as web, plugged_in(rig, "kvlan") as client:
            four, hidden = lease(web, tmp_path), lease(client, tmp_path)
            six, server = web.run(sys.executable, "-I", str(DHCP6), "eth0").split()
            assert (six, server) == ("fd60::20", "fd60::1")
            web.ip(f"addr add {six}/64 dev eth0 nodad")
            until(lambda: "default" in web.ip("-6 route"))
            hidden6 = until(lambda: "default" in client.ip("-6 route") and global_address(client))
            for address in ("203.0.113.9", "2001:db8::9"):
                assert ping(web, address)
            for address in (four, six):
                assert ping(outside, address), "what is routed to the network reaches its guests"
                assert ping(client, address), "and so do guests of a NAT network"
            for address in (hidden, hidden6):
                assert not ping(web, address), "nothing reaches into the NAT network"
                assert not ping(outside, address)
            seen = [lease.address for lease in rig.dnsmasqs.leases("dmz")]
            assert seen == [four, six]
            assert {found.mac for found in rig.dnsmasqs.leases("dmz")} == {WEB_MAC}
            asked = [(client.name, "2001:db8::9"), (web.name, "2001:db8::9")]
            assert [_source(outside, rig, name, target) for name, target in asked] == ["2001:db8::1", six]
            rig.host.run("nft", "delete", "table", "inet", "kvmd")
            assert ping(outside, hidden), "it was the rules that kept it out"
            await rig.converge()


def _source(outside: Namespace, rig: Rig, name: str, target: str) -> str:
    """The address under which a fake guest is seen outside: a listener there says who came."""
    serve = (
        "import socket; s = socket.create_server(('::', 7777), family=socket.AF_INET6); s.settimeout(10);"
        "c, a = s.accept(); c.send(a[0].encode()); c.close()"
    )
    call = (
        "import socket, sys, time\nfor _ in range(50):\n  try:\n"
        "    print(socket.create_connection((sys.argv[1], 7777), 5).recv(99).decode()); break\n"
        "  except ConnectionRefusedError: time.sleep(0.1)\n"
    )
    with outside.running(sys.executable, "-I", "-c", serve):
        return Namespace(name).run(sys.executable, "-I", "-c", call, target).strip()


async def test_slaac_gives_addresses_a_router_and_a_name_server_and_an_isolated_network_no_router(rig: Rig) -> None:
    rig.networks = {"lan": network("nat", "lan", 50, "slaac"), "lab": network("isolated", "lab", 70, "slaac")}
    await rig.converge()
    with plugged_in(rig, "kvlan") as one, plugged_in(rig, "kvlan") as two, plugged_in(rig, "kvlab") as cell:
        first, second, alone = (until(lambda n=n: global_address(n)) for n in (one, two, cell))
        assert first.startswith("fd50::") and second.startswith("fd50::") and alone.startswith("fd70::")
        assert ping(one, second) and ping(one, "fd50::1") and ping(cell, "fd70::1")
        assert "default" in one.ip("-6 route") and "default" not in cell.ip("-6 route")
        answer = one.run("busybox", "nslookup", "-type=a", "nobody.lan.test", "fd50::1", check=False)
        assert "NXDOMAIN" in answer or "can't find" in answer, "the name server answers at the IPv6 address"
        cell.ip("-6 route add default via fd70::1")
        assert not ping(cell, first), "and a router made by hand leads nowhere"
    assert FORWARDING6 in "".join(action.line() for action in await _after_forwarding_was_taken_back(rig))


async def _after_forwarding_was_taken_back(rig: Rig) -> list[Any]:
    write(FORWARDING6, "0")
    found = await rig.plan()
    await rig.converge()
    return found


async def test_a_pool_address_by_dhcpv6_and_its_name(rig: Rig) -> None:
    rig.networks = {"lan": network("nat", "lan", 50, "dhcp")}
    rig.guests, rig.macs = {"web": guest("lan", "fd50::20")}, {("web", "lan"): WEB_MAC}
    await rig.converge()
    with plugged_in(rig, "kvlan") as stranger, plugged_in(rig, "kvlan", WEB_MAC) as web:
        pooled, server = stranger.run(sys.executable, "-I", str(DHCP6), "eth0").split()
        assert pooled.startswith("fd50::1:") and server == "fd50::1"
        assert web.run(sys.executable, "-I", str(DHCP6), "eth0").split()[0] == "fd50::20"
        stranger.ip(f"addr add {pooled}/64 dev eth0 nodad")
        assert "fd50::20" in stranger.run("busybox", "nslookup", "web.lan.test", "fd50::1", check=False)


DRIFTS = [
    (f"sysctl -qw {FORWARDING6.removeprefix('/proc/sys/').replace('/', '.')}=0", f"~ {FORWARDING6}: 0 -> 1"),
    (f"sysctl -qw {FORWARDING.removeprefix('/proc/sys/').replace('/', '.')}=0", f"~ {FORWARDING}: 0 -> 1"),
    ("ip addr del fd60::1/64 dev kvdmz", "~ bridge kvdmz: address +fd60::1/64"),
    ("ip addr add fd66::1/64 dev kvdmz nodad", "~ bridge kvdmz: address -fd66::1/64"),
]


@pytest.mark.parametrize(("drift", "line"), DRIFTS)
async def test_each_drift_of_ipv6_is_one_line_and_mended(rig: Rig, drift: str, line: str) -> None:
    rig.networks = {"dmz": network("routed", "dmz", 60, "slaac")}
    await rig.converge()
    rig.host.run(*drift.split())
    assert await rig.converge() == [line]


async def test_a_host_that_keeps_ipv6_off_for_new_links_has_it_on_kvmds_bridge(rig: Rig) -> None:
    rig.host.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
    rig.networks = {"lan": network("nat", "lan", 50, "slaac")}
    await rig.converge()
    link = await rig.link("kvlan")
    assert link is not None and "fd50::1/64" in link.addresses


async def test_the_hosts_own_router_is_not_forgotten(rig: Rig) -> None:
    """A host that has its way out from router advertisements: forwarding stays off and the plan says what to do."""
    with private_namespace("router") as router:
        veth(rig.host, "uplink", router, "eth0")
        router.ip("addr add 2001:db8::9/64 dev eth0 nodad")
        router.run("sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
        with router.running(
            "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=eth0", "--bind-dynamic",
            "--enable-ra", "--dhcp-range=2001:db8::,ra-only,64", "--leasefile-ro", "--pid-file=",
        ):  # fmt: skip
            until(lambda: "proto ra" in rig.host.ip("-6 route show default"))
            rig.networks = {"lan": network("nat", "lan", 50, "slaac")}
            lines = await rig.reconcile(problems=True)
            assert not any(FORWARDING6 in line for line in lines)
            (problem,) = (await rig.look())[1]
            assert "uplink" in problem.message and "accept_ra=2" in str(problem.hint)
            assert "proto ra" in rig.host.ip("-6 route show default")
            rig.host.run("sysctl", "-qw", "net.ipv6.conf.uplink.accept_ra=2")
            assert await rig.converge() == [f"~ {FORWARDING6}: 0 -> 1"]
            assert "proto ra" in rig.host.ip("-6 route show default"), "the way out is still there"
