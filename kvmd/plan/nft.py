"""The rules of kvmd's networks, the table `inet kvmd`: pure, and the same text for the same networks in any order.

Reference for statements and hooks: nft(8). How a table is rendered and recognised: nfttable.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from kvmd.config.network import Network, bridge_name, is_translated
from kvmd.plan.forwards import Opening
from kvmd.plan.nfttable import NETWORKS, Chain, Rule, base, table_text


@dataclass(frozen=True, slots=True)
class _Family:
    """One address family of a network."""

    word: str  # nft's: "ip", "ip6"
    number: str  # "ipv4", "ipv6", as in `meta nfproto`
    subnet: str
    address: str
    translated: bool


@dataclass(frozen=True, slots=True)
class _Fence:
    """What the rules need to know of one network."""

    name: str
    bridge: str
    mode: str
    families: tuple[_Family, ...]
    uplink: str | None  # None: any way out
    guests_isolated: bool
    host_access: bool
    dhcp: bool
    dhcp6: bool
    dns: bool
    ways_in: tuple[Opening, ...]

    @property
    def forwards(self) -> bool:
        """Whether anything of it passes the host at all."""
        return self.mode in ("nat", "routed")


def _fences(networks: Mapping[str, Network], openings: Iterable[Opening]) -> tuple[_Fence, ...]:
    found = []
    ways_in = sorted(openings, key=lambda way: way.name)
    for name, network in sorted(networks.items()):
        if network.network.mode == "bridge":
            continue
        found.append(
            _Fence(
                name=name,
                bridge=bridge_name(name, network),
                mode=network.network.mode,
                families=tuple(_families(network)),
                uplink=None if network.nat.uplink == "auto" else network.nat.uplink,
                guests_isolated=network.network.guests_isolated,
                host_access=network.firewall.host_access,
                dhcp=network.ipv4 is not None and network.ipv4.dhcp is not None,
                dhcp6=network.ipv6 is not None and network.ipv6.mode != "none",
                dns=network.dns.enabled,
                ways_in=tuple(way for way in ways_in if way.network == name),
            )
        )
    return tuple(found)


def _families(network: Network) -> Iterator[_Family]:
    nat = network.network.mode == "nat"
    if network.ipv4 is not None:
        v4 = network.ipv4.address
        yield _Family("ip", "ipv4", str(v4.network), str(v4.ip), nat)
    if network.ipv6 is not None:
        v6 = network.ipv6.address
        yield _Family("ip6", "ipv6", str(v6.network), str(v6.ip), nat and is_translated(v6))


def build_ruleset(networks: Mapping[str, Network], openings: Iterable[Opening] = ()) -> str:
    """Input for `nft -f -` that makes the table what these networks and forwards need; "" when they need none."""
    return table_text(NETWORKS, _chains(_fences(networks, openings)))


def _chains(fences: tuple[_Fence, ...]) -> tuple[Chain, ...]:
    redirects = tuple(_redirect(way) for net in fences for way in net.ways_in)
    return (
        base("prerouting", "nat", "prerouting", -100, redirects),
        base("output", "nat", "output", -100, redirects),
        base("forward", "filter", "forward", 0, _forward(fences)),
        base("input", "filter", "input", 0, _input(fences)),
        base("postrouting", "nat", "postrouting", 100, (*_postrouting(fences), *_hairpins(fences))),
    )


def _redirect(way: Opening) -> Rule:
    """From the host's port to the guest's. Loopback stays out: a packet from 127.0.0.1 cannot leave the host."""
    at = f"ip daddr {way.address}" if way.address else "ip daddr != 127.0.0.0/8 fib daddr type local"
    match = f"{at} {way.protocol} dport {way.port}"
    return Rule(f"{match} dnat ip to {way.guest_address}:{way.guest_port}", _name(way))


def _name(way: Opening) -> str:
    return f"{way.network}: forward {way.name}"


def _arrives(way: Opening) -> str:
    return f"ip daddr {way.guest_address} {way.protocol} dport {way.guest_port} ct status dnat"


def _hairpins(fences: tuple[_Fence, ...]) -> Iterator[Rule]:
    """A guest that asks for the host's port is sent back into its own network: the answer must come by the host."""
    for net in fences:
        subnet = next((family.subnet for family in net.families if family.word == "ip"), None)
        for way in net.ways_in if subnet else ():
            match = f'oifname "{net.bridge}" ip saddr {subnet} {_arrives(way)}'
            yield Rule(f"{match} masquerade", f"{_name(way)}: from inside")


def _forward(fences: tuple[_Fence, ...]) -> Iterator[Rule]:
    """A packet has to be let out by the network it leaves, then in by the one it enters; then it may pass."""
    for net in fences:
        same = f'iifname "{net.bridge}" oifname "{net.bridge}"'
        if net.guests_isolated:
            yield Rule(f"{same} drop", f"{net.name}: guests are isolated from each other")
        else:
            yield Rule(f"{same} accept", f"{net.name}: guest to guest")
    for net in fences:
        yield from _leaving(net)
    for net in fences:
        yield from _entering(net)
    for net in fences:
        if net.forwards:
            yield Rule(f'iifname "{net.bridge}" accept', f"{net.name}: guests out")


def _leaving(net: _Fence) -> Iterator[Rule]:
    out = f'iifname "{net.bridge}"'
    if not net.forwards:
        yield Rule(f"{out} drop", f"{net.name}: no way out")
        return
    if net.ways_in:
        yield Rule(f"{out} ct status dnat ct direction reply accept", f"{net.name}: answers of forwards")
    if net.uplink:
        yield Rule(f'{out} oifname != "{net.uplink}" drop', f"{net.name}: no other way out")
    known = {family.number: family for family in net.families}
    for number in ("ipv4", "ipv6"):
        family = known.get(number)
        foreign = f"{family.word} saddr != {family.subnet}" if family else f"meta nfproto {number}"
        yield Rule(f"{out} {foreign} drop", f"{net.name}: {number} of its own addresses only")


def _entering(net: _Fence) -> Iterator[Rule]:
    to = f'oifname "{net.bridge}"'
    if net.forwards:
        yield Rule(f"{to} ct state established,related accept", f"{net.name}: answers")
    for opening in net.ways_in:
        yield Rule(f"{to} {_arrives(opening)} accept", _name(opening))
    if net.mode == "routed":
        way = f' iifname "{net.uplink}"' if net.uplink else ""
        for family in net.families:
            yield Rule(
                f"{to}{way} {family.word} daddr {family.subnet} accept", f"{net.name}: {family.number} routed in"
            )
    yield Rule(f"{to} drop", f"{net.name}: nothing reaches in")


def _input(fences: tuple[_Fence, ...]) -> Iterator[Rule]:
    """What guests may ask of the host itself."""
    for net in fences:
        at = f'iifname "{net.bridge}"'
        # Linux accepts router advertisements by default: a guest could make itself the host's IPv6 router.
        yield Rule(f"{at} icmpv6 type nd-router-advert drop", f"{net.name}: no guest routes for the host")
        for family in net.families:
            # The kernel answers for any of its addresses on every link: this one is for the network alone.
            others = f'iifname != {{ "lo", "{net.bridge}" }}'
            # `new`: answers to what the host itself asked for from that address come in by the uplink.
            match = f"{others} {family.word} daddr {family.address} ct state new"
            yield Rule(f"{match} drop", f"{net.name}: {family.number} gateway from inside only")
        if not net.host_access:
            yield from _services_only(net, at)


def _services_only(net: _Fence, at: str) -> Iterator[Rule]:
    yield Rule(f"{at} ct state established,related accept", f"{net.name}: answers to the host")
    yield Rule(f"{at} meta l4proto {{ icmp, ipv6-icmp }} accept", f"{net.name}: ping and neighbours")
    if net.dhcp:
        yield Rule(f"{at} udp dport 67 accept", f"{net.name}: DHCP")
    if net.dhcp6:
        yield Rule(f"{at} udp dport 547 accept", f"{net.name}: DHCPv6")
    for family in net.families if net.dns else ():
        match = f"{at} {family.word} daddr {family.address} meta l4proto {{ tcp, udp }} th dport 53"
        yield Rule(f"{match} accept", f"{net.name}: DNS by {family.number}")
    yield Rule(f"{at} drop", f"{net.name}: firewall.host_access = false")


def _postrouting(fences: tuple[_Fence, ...]) -> Iterator[Rule]:
    for net in fences:
        for family in net.families:
            if family.translated:
                way = f'oifname "{net.uplink}"' if net.uplink else f'oifname != "{net.bridge}"'
                word, subnet = family.word, family.subnet
                match = f"{word} saddr {subnet} {word} daddr != {subnet} {way}"
                yield Rule(f"{match} masquerade", f"{net.name}: {family.number} NAT")
