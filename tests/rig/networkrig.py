"""Networks on the real kernel, below the daemon: bridges, rules, servers and fake guests in private namespaces.

`Rig.reconcile` is what the manager does: observe, plan, carry out. Fake guests are namespaces with a veth into the
bridge; busybox is their DHCP client, web server and browser.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

from kvmd.actions import (
    Action,
    EnsureBridge,
    Problem,
    RemoveBridge,
    ReplaceRuleset,
    SetPortVlans,
    StartDnsmasq,
    StopDnsmasq,
    WriteKnob,
)
from kvmd.config.guest import Guest
from kvmd.config.network import Network
from kvmd.effects import nft
from kvmd.effects.dnsmasq import Dnsmasqs
from kvmd.effects.netlink import Netlink
from kvmd.effects.routes import ra_uplinks
from kvmd.effects.tree import Tree
from kvmd.facts import Facts, Link
from kvmd.plan.network import KNOBS, plan_network
from kvmd.plan.nfttable import NETWORKS
from kvmd.units import Duration
from tests.rig.netns import Namespace, inside, private_namespace, veth

WEB_MAC = "02:00:00:00:00:01"
LEASE_SCRIPT = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
[ -z "$router" ] || ip route add default via "$router"
echo "$dns" > "$STATE.dns"
echo "$ip" > "$STATE.ip"
"""


def nat(bridge: str = "kvlan", **about: Any) -> Network:
    return Network.model_validate(
        {
            "network": {"mode": "nat", "bridge": bridge, **about},
            "ipv4": {
                "address": IPv4Interface("192.168.50.1/24"),
                "dhcp": {"range": (IPv4Address("192.168.50.100"), IPv4Address("192.168.50.200"))},
            },
            "dns": {"domain": "lan.example", "upstream": (IPv4Address("203.0.113.9"),)},
        }
    )


def isolated(**about: Any) -> Network:
    return Network.model_validate(
        {
            "network": {"mode": "isolated", "bridge": "kvlab", **about},
            "ipv4": {
                "address": IPv4Interface("192.168.60.1/24"),
                "dhcp": {
                    "range": (IPv4Address("192.168.60.100"), IPv4Address("192.168.60.200")),
                    "lease": Duration(3600),
                },
            },
        }
    )


def guest(network: str, ipv4: str | None = None) -> Guest:
    nic: dict[str, Any] = {"network": network}
    if ipv4:
        nic["ipv4"] = IPv4Address(ipv4)
    return Guest.model_validate({"memory": {"size": "64MiB"}, "nic": {"lan": nic}})


@dataclass
class Rig:
    """The host's side of the tests."""

    netlink: Netlink
    dnsmasqs: Dnsmasqs
    host: Namespace
    networks: dict[str, Network] = field(default_factory=dict)
    guests: dict[str, Guest] = field(default_factory=dict)
    macs: dict[tuple[str, str], str] = field(default_factory=dict)

    async def look(self) -> tuple[tuple[Action, ...], tuple[Problem, ...]]:
        """What a plan has to say now."""
        facts = Facts(
            links=(links := await self.netlink.observe_links(vlans=True)),
            vlan_filtering=await self.netlink.can_filter_vlans(links),
            nft=await nft.observe(NETWORKS),
            dnsmasq=self.dnsmasqs.observe(),
            knobs={path: read(path) for path in KNOBS if exists(path)},
            foreign_rules=await nft.list_foreign(),
            ra_uplinks=ra_uplinks(Tree()),
        )
        return plan_network(self.networks, self.guests, self.macs, facts)

    async def plan(self) -> list[Action]:
        """The actions; there must be no problem."""
        actions, problems = await self.look()
        assert not [str(problem) for problem in problems]
        return list(actions)

    async def apply(self, action: Action) -> None:
        match action:
            case EnsureBridge():
                await self.netlink.ensure_bridge(action)
            case SetPortVlans():
                await self.netlink.set_port_vlans(action)
            case RemoveBridge():
                await self.netlink.remove_bridge(action)
            case ReplaceRuleset():
                await nft.replace(action)
            case StartDnsmasq():
                await self.dnsmasqs.start(action)
            case StopDnsmasq():
                await self.dnsmasqs.stop(action)
            case WriteKnob():
                write(action.path, action.new)
            case _:
                raise AssertionError(action)

    async def reconcile(self, *, problems: bool = False) -> list[str]:
        """Plan and carry out; the lines. `problems` may be there if the test says so."""
        actions = (await self.look())[0] if problems else await self.plan()
        for action in actions:
            await self.apply(action)
        return [action.line() for action in actions]

    async def converge(self) -> list[str]:
        lines = await self.reconcile()
        assert [action.line() for action in await self.plan()] == []
        return lines

    async def link(self, name: str) -> Link | None:
        return next((link for link in await self.netlink.observe_links() if link.name == name), None)


@contextlib.asynccontextmanager
async def network_rig(directory: Path) -> AsyncIterator[Rig]:
    """A host of its own; state and run directories lie in `directory`."""
    with private_namespace("host") as host, inside(host):
        async with Netlink() as netlink:
            rig = Rig(netlink, Dnsmasqs(directory / "run", directory / "state"), host)
            try:
                yield rig
            finally:
                for server in rig.dnsmasqs.observe():
                    await rig.dnsmasqs.stop(StopDnsmasq(network=server.network, why="the test ends"))


@contextlib.contextmanager
def plugged_in(rig: Rig, bridge: str, mac: str | None = None) -> Iterator[Namespace]:
    """A fake guest: a namespace with `eth0`, its cable in the bridge."""
    with private_namespace("guest") as fake:
        port = f"kvt{fake.name[-4:]}"
        veth(rig.host, port, fake, "eth0")
        if mac:
            fake.ip(f"link set eth0 address {mac}")
        rig.host.ip(f"link set {port} master {bridge}")
        try:
            yield fake
        finally:
            rig.host.ip(f"link del {port}")


def lease(fake: Namespace, directory: Path) -> str:
    """Let busybox ask for an address; returns it."""
    script, state = directory / f"{fake.name}.sh", directory / fake.name
    script.write_text(LEASE_SCRIPT)
    script.chmod(0o755)
    fake.run("env", f"STATE={state}", "busybox", "udhcpc", "-i", "eth0", "-nqf", "-t5", "-T1", "-s", str(script))
    return Path(f"{state}.ip").read_text().strip()


@contextlib.contextmanager
def web_server(namespace: Namespace, root: Path, page: str, address: str) -> Iterator[None]:
    root.mkdir(exist_ok=True)
    (root / "index.html").write_text(page)
    with namespace.running("busybox", "httpd", "-f", "-p", f"{address}:80", "-h", str(root)):
        deadline = time.monotonic() + 5
        while page not in fetch(namespace, address, timeout_s=1):
            assert time.monotonic() < deadline, "the web server does not answer where it runs"
        yield


def fetch(namespace: Namespace, address: str, timeout_s: int = 4) -> str:
    """The page, or what went wrong. (The wget of Debian's static busybox dies of a segmentation fault.)"""
    script = "import sys, urllib.request as u; u.install_opener(u.build_opener(u.ProxyHandler({})))"
    script += "; print(u.urlopen(sys.argv[1], timeout=float(sys.argv[2])).read().decode())"
    return namespace.run(sys.executable, "-I", "-c", script, f"http://{address}/", str(timeout_s), check=False)


def ping(namespace: Namespace, address: str) -> bool:
    return "bytes from" in namespace.run("busybox", "ping", "-c1", "-W2", address, check=False)


def exists(path: str) -> bool:
    return Path(path).exists()


def read(path: str) -> str:
    return Path(path).read_text().strip()


def write(path: str, text: str) -> None:
    Path(path).write_text(text)


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@contextlib.contextmanager
def internet(rig: Rig) -> Iterator[Namespace]:
    """A second namespace behind the host's uplink; it has no route to the guests' addresses."""
    with private_namespace("outside") as outside:
        veth(rig.host, "uplink", outside, "eth0")
        rig.host.ip("addr add 203.0.113.1/24 dev uplink")
        outside.ip("addr add 203.0.113.9/24 dev eth0")
        rig.host.ip("route add default via 203.0.113.9")
        yield outside
