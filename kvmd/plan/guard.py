"""What leaves a guest's port, the table `bridge kvmd`: nobody else's addresses, and no more than it may. Pure.

Every port that is guarded or limited has a chain named after its TAP; one map leads there. The rules hold whether or
not the TAP is there, so that no frame ever leaves before they do. They stand on the bridge's prerouting hook, where
frames to neighbours and to the host itself pass alike (nft(8), "bridge address family"). Drops are counted:
`nft list table bridge kvmd`. Not stopped here: frames to the bridge itself, which no hook sees (spanning tree where the
bridge does it, LLDP; net/bridge/br_input.c, br_handle_frame); they go no further.

A limit is nft's token bucket. The kernel's bucket holds one second's worth and the burst (net/netfilter/nft_limit.c,
nft_limit_init), so in any t seconds at most rate x (t + 1) + BURST_BYTES pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address

from kvmd.plan.nfttable import PORTS, Chain, Rule, base, table_text

# One unsegmented send of a guest is up to 64 KiB: a smaller bucket would never let it pass.
BURST_BYTES = 1 << 16
_LINK_LOCAL = "fe80::/10"


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a guarded port may say it is."""

    mac: str
    ipv4: tuple[str, ...] = ()  # addresses or subnets
    not_ipv4: tuple[str, ...] = ()  # of those, other machines' addresses
    ipv6: tuple[str, ...] = ()  # beside link-local ones
    not_ipv6: tuple[str, ...] = ()  # other machines' addresses, also link-local ones
    tagged: bool = False  # the bridge filters VLANs: tags are its business
    trunk: bool = False  # its addresses belong to several networks, of which kvmd knows one


@dataclass(frozen=True, slots=True)
class Fence:
    """The rules one port has."""

    tap: str
    who: str  # "web/lan": guest and NIC
    allowed: Allowed | None = None
    rate_out: int | None = None  # bits a second


def build_port_rules(fences: Iterable[Fence]) -> str:
    """Input for `nft -f -` that makes the table these ports' rules; "" when no port has any."""
    wanted = sorted((fence for fence in fences if fence.allowed or fence.rate_out), key=lambda fence: fence.tap)
    if not wanted:
        return ""
    chains = [Chain(fence.tap, tuple(_rules(fence))) for fence in wanted]
    ways = ", ".join(f'"{fence.tap}" : jump {fence.tap}' for fence in wanted)
    enter = Rule(f"iifname vmap {{ {ways} }}", "each port to its chain")
    return table_text(PORTS, (*chains, base("prerouting", "filter", "prerouting", -200, (enter,))))


def _rules(fence: Fence) -> Iterator[Rule]:
    if fence.allowed:
        for match, purpose in _foreign(fence.allowed):
            yield Rule(f"{match} counter drop", f"{fence.who}: {purpose}")
    if fence.rate_out:
        limit = f"limit rate over {fence.rate_out // 8} bytes/second burst {BURST_BYTES} bytes"
        yield Rule(f"{limit} counter drop", f"{fence.who}: rate_out")


def _foreign(allowed: Allowed) -> Iterator[tuple[str, str]]:
    """(match, purpose) of what must not leave."""
    mac = allowed.mac
    yield f"ether saddr != {mac}", "another MAC"
    if not allowed.tagged:
        yield "ether type { 8021q, 8021ad }", "a VLAN of its own choice"
    yield "meta protocol != { ip, ip6, arp }", "neither IP nor ARP"
    yield f"arp saddr ether != {mac}", "ARP with another MAC"
    if not allowed.trunk:
        yield from _foreign_ipv4(allowed)
    yield "udp sport { 67, 547 }", "answers of a DHCP server"
    yield "icmpv6 type { nd-router-advert, nd-redirect }", "IPv6 router"
    if not allowed.trunk:
        yield from _foreign_ipv6(allowed)


def _foreign_ipv4(allowed: Allowed) -> Iterator[tuple[str, str]]:
    """0.0.0.0 is who has no address yet: it may ask whether one is taken (RFC 5227) and for a lease."""
    own = _set((*allowed.ipv4, "0.0.0.0"))
    yield f"arp saddr ip != {own}", "ARP with another address"
    yield f"ip saddr != {own}", "another IPv4 address"
    yield "ip saddr 0.0.0.0 ip protocol != udp", "IPv4 without address"
    yield "ip saddr 0.0.0.0 udp dport != 67", "IPv4 without address"
    if allowed.not_ipv4:
        yield f"arp saddr ip {_set(allowed.not_ipv4)}", "ARP with a neighbour's address"
        yield f"ip saddr {_set(allowed.not_ipv4)}", "a neighbour's IPv4 address"


def _foreign_ipv6(allowed: Allowed) -> Iterator[tuple[str, str]]:
    """Link-local ones are free: guests make them as they like. A target of an advertisement is at byte 8 (RFC 4861)."""
    yield f"ip6 saddr != {_set((_LINK_LOCAL, '::', *allowed.ipv6))}", "another IPv6 address"
    if allowed.not_ipv6:
        numbers = _set([f"{int(IPv6Address(address)):#034x}" for address in allowed.not_ipv6])
        yield f"ip6 saddr {_set(allowed.not_ipv6)}", "a neighbour's IPv6 address"
        yield f"icmpv6 type nd-neighbor-advert @th,64,128 {numbers}", "announces a neighbour's IPv6 address"


def _set(items: Sequence[str]) -> str:
    return "{ " + ", ".join(dict.fromkeys(items)) + " }"


def link_local(mac: str) -> str:
    """The address a Linux bridge with that MAC makes itself (RFC 4291, appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    low = bytes((octets[0] ^ 2, *octets[1:3], 0xFF, 0xFE, *octets[3:]))
    return str(IPv6Address(b"\xfe\x80" + bytes(6) + low))
