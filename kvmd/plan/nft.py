"""The one nftables table of kvmd, `inet kvmd`, as text: pure, and the same text for the same networks in any order.

The table is replaced whole, in one transaction. What was put there is written into it, as the comment of the only
rule of the chain `about`: a digest of the text, and a digest of the *shape* (chains, and the comments of their rules
in order). The first tells kvmd that the files ask for something else now, the second that somebody else has been in
the table. The shape is used, not the listing, because nft's listing differs from what was fed to it and from version
to version.

Reference for statements and hooks: nft(8). This module must not run nft.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from kvmd.config.network import Network, bridge_name

TABLE = "inet kvmd"
REMOVE = f"add table {TABLE}\ndelete table {TABLE}\n"  # `add` first: deleting what is not there is an error
EDITED = " edited"  # behind the fingerprint of a table that is not as we left it
_MARK = "kvmd sha256:"
_ABOUT = "about"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. The comment names network and purpose; nft takes at most 128 bytes of it."""

    text: str
    comment: str


@dataclass(frozen=True, slots=True)
class Chain:
    """One base chain. `priority` as a number: that is how nft lists it in JSON in every version."""

    name: str
    kind: str
    hook: str
    priority: int
    rules: tuple[Rule, ...]
    policy: str = "accept"


@dataclass(frozen=True, slots=True)
class _Fence:
    """What the rules need to know of one network."""

    name: str
    bridge: str
    subnet: str | None
    address: str | None
    nat: bool
    uplink: str | None  # None: any way out
    guests_isolated: bool
    host_access: bool
    dhcp: bool
    dns: bool


def _fences(networks: Mapping[str, Network]) -> tuple[_Fence, ...]:
    found = []
    for name, network in sorted(networks.items()):
        if network.network.mode == "bridge":
            continue
        ipv4 = network.ipv4
        found.append(
            _Fence(
                name=name,
                bridge=bridge_name(name, network),
                subnet=str(ipv4.address.network) if ipv4 else None,
                address=str(ipv4.address.ip) if ipv4 else None,
                nat=network.network.mode == "nat",
                uplink=None if network.nat.uplink == "auto" else network.nat.uplink,
                guests_isolated=network.network.guests_isolated,
                host_access=network.firewall.host_access,
                dhcp=ipv4 is not None and ipv4.dhcp is not None,
                dns=ipv4 is not None and network.dns.enabled,
            )
        )
    return tuple(found)


def build_ruleset(networks: Mapping[str, Network]) -> str:
    """Input for `nft -f -` that makes the table what these networks need; "" when they need none."""
    fences = _fences(networks)
    if not fences:
        return ""
    chains = _chains(fences)
    body = "".join(map(_chain_text, chains))
    digest = hashlib.sha256(body.encode()).hexdigest()[:32]
    about = f'\tchain {_ABOUT} {{\n\t\treturn comment "{_MARK}{digest} shape:{_shape_of(chains)}"\n\t}}\n'
    return f"{REMOVE}table {TABLE} {{\n{about}{body}}}\n"


def fingerprint(text: str) -> str | None:
    """The fingerprint inside a text of `build_ruleset`; None for the empty one."""
    start = text.find(_MARK)
    return None if start < 0 else text[start : text.index('"', start)]


def _chains(fences: tuple[_Fence, ...]) -> tuple[Chain, ...]:
    chains = (
        Chain("forward", "filter", "forward", 0, tuple(_forward(fences))),
        Chain("input", "filter", "input", 0, tuple(_input(fences))),
        Chain("postrouting", "nat", "postrouting", 100, tuple(_postrouting(fences))),
    )
    return tuple(chain for chain in chains if chain.rules)


def _forward(fences: tuple[_Fence, ...]) -> Iterator[Rule]:
    """First all that leads into a network, then all that leads out: else one network's way out is another's way in."""
    for net in fences:
        to = f'oifname "{net.bridge}"'
        if net.guests_isolated:
            yield Rule(f'iifname "{net.bridge}" {to} drop', f"{net.name}: guests are isolated from each other")
        else:
            yield Rule(f'iifname "{net.bridge}" {to} accept', f"{net.name}: guest to guest")
        if net.nat:
            yield Rule(f"{to} ct state established,related accept", f"{net.name}: answers")
        yield Rule(f"{to} drop", f"{net.name}: nothing reaches in")
    for net in fences:
        out = f'iifname "{net.bridge}"'
        if net.nat:
            way = f' oifname "{net.uplink}"' if net.uplink else ""
            yield Rule(f"{out}{way} ip saddr {net.subnet} accept", f"{net.name}: guests out")
        yield Rule(f"{out} drop", f"{net.name}: no other way out")


def _input(fences: tuple[_Fence, ...]) -> Iterator[Rule]:
    """What guests may ask of the host itself."""
    for net in fences:
        at = f'iifname "{net.bridge}"'
        # Linux accepts router advertisements by default: a guest could make itself the host's IPv6 router.
        yield Rule(f"{at} icmpv6 type nd-router-advert drop", f"{net.name}: no guest routes for the host")
        if net.address:
            # The kernel answers for any of its addresses on every link: this one is for the network alone.
            others = f'iifname != {{ "lo", "{net.bridge}" }}'
            # `new`: answers to what the host itself asked for from that address come in by the uplink.
            match = f"{others} ip daddr {net.address} ct state new"
            yield Rule(f"{match} drop", f"{net.name}: gateway from inside only")
        if not net.host_access:
            yield from _services_only(net, at)


def _services_only(net: _Fence, at: str) -> Iterator[Rule]:
    yield Rule(f"{at} ct state established,related accept", f"{net.name}: answers to the host")
    yield Rule(f"{at} meta l4proto {{ icmp, ipv6-icmp }} accept", f"{net.name}: ping and neighbours")
    if net.dhcp:
        yield Rule(f"{at} udp dport 67 accept", f"{net.name}: DHCP")
    if net.dns:
        yield Rule(f"{at} ip daddr {net.address} meta l4proto {{ tcp, udp }} th dport 53 accept", f"{net.name}: DNS")
    yield Rule(f"{at} drop", f"{net.name}: firewall.host_access = false")


def _postrouting(fences: tuple[_Fence, ...]) -> Iterator[Rule]:
    for net in fences:
        if net.nat:
            way = f'oifname "{net.uplink}"' if net.uplink else f'oifname != "{net.bridge}"'
            yield Rule(f"ip saddr {net.subnet} ip daddr != {net.subnet} {way} masquerade", f"{net.name}: NAT")


def _chain_text(chain: Chain) -> str:
    head = f"type {chain.kind} hook {chain.hook} priority {chain.priority}; policy {chain.policy};"
    rules = "".join(f'\t\t{rule.text} comment "{rule.comment}"\n' for rule in chain.rules)
    return f"\tchain {chain.name} {{\n\t\t{head}\n{rules}\t}}\n"


def _shape_of(chains: Iterable[Chain]) -> str:
    return _digest(
        ([chain.name, chain.hook, chain.priority, chain.policy], [rule.comment for rule in chain.rules])
        for chain in chains
    )


def _digest(chains: Iterable[tuple[list[object], list[str]]]) -> str:
    return hashlib.sha256(json.dumps(sorted(chains)).encode()).hexdigest()[:16]


def read_fingerprint(listing: str) -> str:
    """The fingerprint in what `nft -j list table inet kvmd` prints, EDITED behind it if somebody changed the table.

    A table without our mark gives "unmarked". Raises ValueError for anything that is not such a listing.
    """
    heads: dict[str, list[object]] = {}
    comments: dict[str, list[str]] = {}
    try:
        for item in json.loads(listing)["nftables"]:
            if "chain" in item:
                chain = item["chain"]
                heads[chain["name"]] = [chain["name"], chain.get("hook"), chain.get("prio"), chain.get("policy")]
            elif "rule" in item:
                comments.setdefault(item["rule"]["chain"], []).append(item["rule"].get("comment", ""))
            elif item.keys() & {"set", "map", "element", "flowtable"}:
                heads[f"+{len(heads)}"] = sorted(item)  # we make none
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a listing of nft: {error!r}") from None
    marks = comments.pop(_ABOUT, [])
    heads.pop(_ABOUT, None)
    if len(marks) != 1 or not marks[0].startswith(_MARK):
        return "unmarked"
    shape = _digest((head, comments.get(name, [])) for name, head in heads.items())
    return marks[0] if marks[0].endswith(f" shape:{shape}") else marks[0] + EDITED
