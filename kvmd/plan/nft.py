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

from kvmd.config.network import Network, bridge_name, is_translated

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

    @property
    def forwards(self) -> bool:
        """Whether anything of it passes the host at all."""
        return self.mode in ("nat", "routed")


def _fences(networks: Mapping[str, Network]) -> tuple[_Fence, ...]:
    found = []
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
