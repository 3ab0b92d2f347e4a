"""Guard and limits on the real kernel: what a guest writes into its TAP, and what of it arrives.

The test is the guest: it holds the TAP's descriptor, as QEMU does, and writes whole frames, right and forged ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, IPv6Interface
from pathlib import Path
from typing import Any

import pytest

from kvmd.actions import Action, ReplaceRuleset, ShapePort
from kvmd.config.guest import Guest
from kvmd.config.network import Network
from kvmd.effects import nft
from kvmd.facts import Facts, Link
from kvmd.plan.guard import BURST_BYTES, link_local
from kvmd.plan.links import bridge_mac, tap_alias, tap_name
from kvmd.plan.nfttable import PORTS
from kvmd.plan.ports import plan_ports, tbf_of
from kvmd.units import Rate
from tests.rig.frames import BROADCAST, arp, arrives, ether, icmpv6, ipv6, received, send, udp4
from tests.rig.networkrig import Rig, nat, network_rig

pytestmark = pytest.mark.system

WEB, DB, STRANGER = "52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:99"
UUIDS = {"web": "6f0d2c6e-9a0f-4a57-8a0c-3b3f7b6f7a11", "db": "6f0d2c6e-9a0f-4a57-8a0c-3b3f7b6f7a12"}
MACS = {("web", "lan"): WEB, ("db", "lan"): DB}
WEB_TAP = tap_name(UUIDS["web"], "lan")
BRIDGE = bridge_mac("kvlan")
OWN_V6, NEIGHBOUR_V6, ROUTER_V6 = "fd50::20", "fd50::21", link_local(bridge_mac("kvlan"))


def guest(**nic: Any) -> Guest:
    return Guest.model_validate({"memory": {"size": "64MiB"}, "nic": {"lan": {"network": "lan", **nic}}})


@dataclass
class Ports:
    """The host with the network lan, and the guests' TAPs as they are opened at a start."""

    rig: Rig
    guests: dict[str, Guest] = field(default_factory=dict)
    taps: dict[str, int] = field(default_factory=dict)

    async def look(self) -> tuple[Action, ...]:
        facts = Facts(links=await self.rig.netlink.observe_links(), nft_ports=await nft.observe(PORTS))
        actions, problems = plan_ports(self.rig.networks, self.guests, MACS, UUIDS, facts)
        assert problems == ()
        return actions

    async def converge(self) -> list[str]:
        actions = await self.look()
        for action in actions:
            match action:
                case ReplaceRuleset():
                    await nft.replace(action)
                case ShapePort():
                    await self.rig.netlink.shape(action.tap, tbf_of(action.rate))
                case _:
                    raise AssertionError(action)
        assert await self.look() == ()
        return [action.line() for action in actions]

    async def start(self, name: str) -> int:
        tap = tap_name(UUIDS[name], "lan")
        tbf = tbf_of(self.guests[name].nic["lan"].rate_in)
        alias = tap_alias("lan", name, "lan")
        (fd,) = await self.rig.netlink.open_tap(tap, bridge="kvlan", mtu=1500, alias=alias, tbf=tbf)
        self.taps[name] = fd
        return fd

    async def link(self, name: str) -> Link | None:
        return await self.rig.link(tap_name(UUIDS[name], "lan"))

    def dropped(self) -> dict[str, tuple[int, int]]:
        """Purpose -> (packets, bytes) of every drop of a port that counted any."""
        listing = json.loads(self.rig.host.run("nft", "-j", "list", "table", "bridge", "kvmd"))
        found: dict[str, tuple[int, int]] = {}
        for rule in (item["rule"] for item in listing["nftables"] if "rule" in item):
            for part in rule["expr"]:
                if "counter" in part and part["counter"]["packets"]:
                    purpose = rule["comment"].partition(": ")[2]
                    found[purpose] = (part["counter"]["packets"], part["counter"]["bytes"])
        return found

    def tc(self) -> dict[str, Any]:
        """The queue of web's TAP with its counters."""
        (queue,) = json.loads(self.rig.host.run("tc", "-s", "-j", "qdisc", "show", "dev", WEB_TAP))
        return dict(queue)


@pytest.fixture
async def ports(tmp_path: Path) -> AsyncIterator[Ports]:
    async with network_rig(tmp_path) as rig:
        lan = nat()
        v6 = Network.model_validate(
            {
                "network": {"mode": "nat"},
                "ipv6": {"address": IPv6Interface("fd50::1/64"), "mode": "dhcp"},
                "ipv4": lan.ipv4,
            }
        ).ipv6
        rig.networks = {"lan": lan.model_copy(update={"ipv6": v6})}
        await rig.converge()
        ports = Ports(rig)
        try:
            yield ports
        finally:
            for fd in ports.taps.values():
                os.close(fd)


@contextlib.contextmanager
def counted(ports: Ports, purpose: str) -> Iterator[None]:
    """Exactly the drop of this purpose grows, by one packet."""
    before = ports.dropped()
    yield
    after = ports.dropped()
    grown = {name: after[name][0] - before.get(name, (0, 0))[0] for name in after if after[name] != before.get(name)}
    assert grown == {purpose: 1}


OWN, NEIGHBOUR, ROUTER = "192.168.50.20", "192.168.50.21", "192.168.50.1"
DHCP = {"sport": 68, "dport": 67}
ADVERTISES = {"sport": 67, "dport": 68}
RIGHT = {
    "arp": arp(WEB, OWN, NEIGHBOUR),
    "arp probe": arp(WEB, "0.0.0.0", OWN),
    "ipv4": udp4(WEB, DB, OWN, NEIGHBOUR, b"right"),
    "dhcp client": udp4(WEB, BROADCAST, "0.0.0.0", "255.255.255.255", b"discover", **DHCP),
    "ipv6": ipv6(WEB, DB, OWN_V6, NEIGHBOUR_V6, 17, b"\x0f\xa0\x0f\xa0\0\x0b\0\0six"),
    "link-local": ipv6(WEB, DB, "fe80::1:2:3", NEIGHBOUR_V6, 17, b"\x0f\xa0\x0f\xa0\0\x0b\0\0low"),
    "duplicate address detection": icmpv6(
        WEB, "33:33:ff:00:00:20", "::", "ff02::1:ff00:20", 135, bytes(4) + IPv6Address(OWN_V6).packed
    ),
    "own advertisement": icmpv6(WEB, DB, OWN_V6, NEIGHBOUR_V6, 136, bytes(4) + IPv6Address(OWN_V6).packed),
}
FORGED = [
    ("another MAC", udp4(STRANGER, DB, OWN, NEIGHBOUR, b"forged")),
    ("another MAC", arp(DB, NEIGHBOUR, ROUTER)),
    ("a VLAN of its own choice", udp4(WEB, DB, OWN, NEIGHBOUR, b"forged", vlan=7)),
    ("neither IP nor ARP", ether(WEB, "01:80:c2:00:00:00", 38, b"\x42\x42\x03" + bytes(35))),  # spanning tree
    ("neither IP nor ARP", ether(WEB, DB, 0x8863, b"forged")),
    ("ARP with another MAC", arp(WEB, OWN, NEIGHBOUR, claimed_mac=STRANGER, reply=True)),
    ("ARP with another address", arp(WEB, ROUTER, NEIGHBOUR, reply=True)),
    ("ARP with another address", arp(WEB, NEIGHBOUR, ROUTER)),
    ("another IPv4 address", udp4(WEB, DB, NEIGHBOUR, ROUTER, b"forged")),
    ("another IPv4 address", udp4(WEB, BRIDGE, "203.0.113.5", "203.0.113.9", b"forged")),
    ("IPv4 without address", udp4(WEB, DB, "0.0.0.0", NEIGHBOUR, b"forged")),
    ("answers of a DHCP server", udp4(WEB, DB, OWN, NEIGHBOUR, b"forged", **ADVERTISES)),
    ("answers of a DHCP server", ipv6(WEB, DB, "fe80::9", NEIGHBOUR_V6, 17, b"\x02\x23\x02\x22\0\x0b\0\0bad")),
    ("IPv6 router", icmpv6(WEB, "33:33:00:00:00:01", "fe80::9", "ff02::1", 134, bytes(12))),
    ("IPv6 router", icmpv6(WEB, DB, "fe80::9", NEIGHBOUR_V6, 137, bytes(36))),
    ("another IPv6 address", ipv6(WEB, DB, "fd50::99", NEIGHBOUR_V6, 17, b"\x0f\xa0\x0f\xa0\0\x0b\0\0bad")),
    ("another IPv6 address", ipv6(WEB, DB, "2001:db8::1", NEIGHBOUR_V6, 17, b"\x0f\xa0\x0f\xa0\0\x0b\0\0bad")),
    ("a neighbour's IPv6 address", ipv6(WEB, DB, ROUTER_V6, NEIGHBOUR_V6, 17, b"\x0f\xa0\x0f\xa0\0\x0b\0\0bad")),
    (
        "announces a neighbour's IPv6 address",
        icmpv6(WEB, DB, "fe80::9", NEIGHBOUR_V6, 136, bytes(4) + IPv6Address(ROUTER_V6).packed),
    ),
    (
        "announces a neighbour's IPv6 address",
        icmpv6(WEB, DB, OWN_V6, NEIGHBOUR_V6, 136, bytes(4) + IPv6Address("fd50::1").packed),
    ),
]


async def test_a_guarded_port_lets_out_its_own_and_counts_every_forgery(ports: Ports) -> None:
    fixed = {"ipv4": IPv4Address(OWN), "ipv6": IPv6Address(OWN_V6)}
    ports.guests = {"web": guest(guard=True, **fixed), "db": guest(ipv4=IPv4Address(NEIGHBOUR))}
    assert await ports.converge() == ["+ nft table bridge kvmd"]
    web, db = await ports.start("web"), await ports.start("db")
    for what, frame in RIGHT.items():
        send(web, frame)
        assert await asyncio.to_thread(arrives, db, frame), what
    assert ports.dropped() == {}
    for purpose, frame in FORGED:
        with counted(ports, purpose):
            send(web, frame)
    assert not {frame for _, frame in FORGED} & set(received(db))
    assert {purpose for purpose, _ in FORGED} == set(ports.dropped()), "a rule no frame here breaks"

    unguarded = udp4(STRANGER, BROADCAST, "203.0.113.5", "255.255.255.255", b"free")
    send(db, unguarded)
    assert await asyncio.to_thread(arrives, web, unguarded), "the rules are one port's alone"


async def test_without_a_fixed_address_it_may_take_any_but_those_of_others(ports: Ports) -> None:
    ports.guests = {"web": guest(guard=True), "db": guest(ipv4=IPv4Address(NEIGHBOUR))}
    await ports.converge()
    web, db = await ports.start("web"), await ports.start("db")
    free = udp4(WEB, DB, "192.168.50.150", NEIGHBOUR, b"leased")
    send(web, free)
    assert await asyncio.to_thread(arrives, db, free)
    for purpose, frame in (
        ("a neighbour's IPv4 address", udp4(WEB, DB, ROUTER, NEIGHBOUR, b"forged")),
        ("a neighbour's IPv4 address", udp4(WEB, BRIDGE, NEIGHBOUR, ROUTER, b"forged")),
        ("ARP with a neighbour's address", arp(WEB, NEIGHBOUR, ROUTER)),
        ("another IPv4 address", udp4(WEB, DB, "192.168.51.9", NEIGHBOUR, b"forged")),
    ):
        with counted(ports, purpose):
            send(web, frame)


async def test_guard_comes_and_goes_under_a_running_guest(ports: Ports) -> None:
    ports.guests = {"web": guest(ipv4=IPv4Address(OWN)), "db": guest(ipv4=IPv4Address(NEIGHBOUR))}
    assert await ports.converge() == []
    web, db = await ports.start("web"), await ports.start("db")
    forged = udp4(STRANGER, DB, "192.168.50.77", NEIGHBOUR, b"forged")
    send(web, forged)
    assert await asyncio.to_thread(arrives, db, forged)
    ports.guests["web"] = guest(guard=True, ipv4=IPv4Address(OWN))
    assert await ports.converge() == ["+ nft table bridge kvmd"]
    with counted(ports, "another MAC"):
        send(web, forged)
    ports.guests["web"] = guest(ipv4=IPv4Address(OWN))
    assert await ports.converge() == ["- nft table bridge kvmd"]
    send(web, forged)
    assert await asyncio.to_thread(arrives, db, forged)


@pytest.mark.parametrize(
    ("drift", "line"),
    [
        ("nft delete table bridge kvmd", "+ nft table bridge kvmd"),
        (f"nft flush chain bridge kvmd {WEB_TAP}", "~ nft table bridge kvmd: as declared again"),
        ("nft insert rule bridge kvmd prerouting accept", "~ nft table bridge kvmd: as declared again"),
        (f"tc qdisc del dev {WEB_TAP} root", "~ guest web: nic.lan.rate_in none -> 10Mbit"),
        (f"tc qdisc replace dev {WEB_TAP} root pfifo", "~ guest web: nic.lan.rate_in none -> 10Mbit"),
        (
            f"tc qdisc replace dev {WEB_TAP} root tbf rate 1mbit burst 20000 limit 40000",
            "~ guest web: nic.lan.rate_in 1Mbit -> 10Mbit",
        ),
    ],
)
async def test_each_drift_is_planned_as_one_line_and_mended(ports: Ports, drift: str, line: str) -> None:
    ports.guests = {"web": guest(guard=True, rate_in=Rate.parse("10Mbit"), rate_out=Rate.parse("10Mbit"))}
    await ports.converge()
    await ports.start("web")
    assert await ports.look() == ()
    ports.rig.host.run(*drift.split())
    assert await ports.converge() == [line]


async def test_towards_the_guest_no_more_passes_than_the_rate_and_the_burst(ports: Ports) -> None:
    rate = Rate.parse("1Mbit")
    ports.guests = {"web": guest(rate_in=rate)}
    await ports.converge()
    web = await ports.start("web")
    link, queue = await ports.link("web"), tbf_of(rate)
    assert link is not None and queue is not None and link.tbf == queue
    ports.guests["db"] = guest()
    db = await ports.start("db")
    frame = udp4(DB, WEB, NEIGHBOUR, OWN, bytes(1400))
    begun = time.monotonic()
    for _ in range(1500):
        send(db, frame)
    passed = sum(len(frame) for frame in received(web))
    elapsed_s = time.monotonic() - begun
    seen = ports.tc()
    assert seen["kind"] == "tbf" and seen["drops"] > 0 and seen["overlimits"] > 0
    assert 0 < passed <= queue.burst_bytes + rate / 8 * elapsed_s + len(frame)

    ports.guests["web"] = guest()
    assert await ports.converge() == ["~ guest web: nic.lan.rate_in 1Mbit -> none"]
    assert ports.tc()["kind"] != "tbf"
    os.close(ports.taps.pop("web"))
    assert await ports.link("web") is None
    await ports.rig.netlink.shape(WEB_TAP, queue)  # the TAP is gone: nothing to do


async def test_from_the_guest_no_more_passes_than_the_rate_and_a_second(ports: Ports) -> None:
    rate = Rate.parse("1Mbit")
    ports.guests = {"web": guest(rate_out=rate)}
    assert await ports.converge() == ["+ nft table bridge kvmd"]
    web = await ports.start("web")
    frame = udp4(WEB, BRIDGE, OWN, ROUTER, bytes(1400))
    begun = time.monotonic()
    for _ in range(1500):
        send(web, frame)
    elapsed_s = time.monotonic() - begun
    packets, dropped = ports.dropped()["rate_out"]
    sent = 1500 * (len(frame) - 14)  # a bridge's rules count without the Ethernet header
    assert packets > 0
    assert 0 < sent - dropped <= BURST_BYTES + rate / 8 * (elapsed_s + 1) + 1500
    ports.guests["web"] = guest(rate_out=Rate.parse("2Gbit"))
    assert await ports.converge() == ["~ nft table bridge kvmd: rules differ"]
    for _ in range(100):
        send(web, frame)
    assert ports.dropped() == {}


async def test_limits_at_both_ends_of_what_is_allowed(ports: Ports) -> None:
    for text in ("8Kbit", "32Gbit"):
        ports.guests = {"web": guest(rate_in=Rate.parse(text), rate_out=Rate.parse(text))}
        await ports.converge()
        await ports.start("web")
        link = await ports.link("web")
        assert link is not None and link.tbf == tbf_of(Rate.parse(text))
        assert await ports.look() == ()
        os.close(ports.taps.pop("web"))
