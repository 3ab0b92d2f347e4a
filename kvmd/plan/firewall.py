"""Who else stands in the way of a network's packets: the rest of the host's ruleset, read for `doctor`. Pure.

kvmd accepts its networks' traffic in its own table, but an accept there does not overrule a drop in another table on
the same hook (nft(8), "verdict statements"): Docker, firewalld, ufw or a hand-made policy still drops it. kvmd changes
nothing of theirs; it says which rule it is and what its owner's tool has to be told.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvmd.actions import Problem
from kvmd.config.network import Network, bridge_name, is_forwarding
from kvmd.facts import Facts

BRIDGE_NF = (
    "/proc/sys/net/bridge/bridge-nf-call-iptables",
    "/proc/sys/net/bridge/bridge-nf-call-ip6tables",
)
_OURS = ("inet", "kvmd")
FAMILIES = frozenset({"ip", "inet"})  # where IPv4 packets pass
_DROPS = ("drop", "reject")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that drops, and what to do about it."""

    where: str  # "table ip filter, chain FORWARD"
    what: str  # "policy drop"
    owner: str | None  # "Docker", "firewalld", "ufw"
    hint: str


def forwarding_tables(chains_json: str) -> tuple[str, ...]:
    """Tables, not ours, that have a chain on the forward hook, in `nft -j list chains` output. Raises ValueError."""
    try:
        chains = [item["chain"] for item in json.loads(chains_json)["nftables"] if "chain" in item]
        found = {
            f"{chain['family']} {chain['table']}"
            for chain in chains
            if chain.get("hook") == "forward" and chain["family"] in ("ip", "ip6", "inet")
        }
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a listing of nft: {error!r}") from None
    return tuple(sorted(found - {" ".join(_OURS)}))


def foreign_forward_drops(ruleset_json: str, bridge: str, families: frozenset[str] = FAMILIES) -> tuple[Finding, ...]:
    """What drops forwarded packets of `bridge` outside kvmd's table, in `nft -j list ruleset` output.

    `families`: nft's, in which the bridge's packets pass: "ip", "ip6" and "inet", which is both.

    A chain counts if its policy is drop or one of its rules drops the bridge's or everybody's packets, unless it, or a
    chain it jumps to, accepts what comes from the bridge. Rules that look at more than interfaces are not judged.
    Raises ValueError.
    """
    try:
        items = json.loads(ruleset_json)["nftables"]
        chains = [item["chain"] for item in items if "chain" in item]
        rules = [item["rule"] for item in items if "rule" in item]
        tables = {(item["table"]["family"], item["table"]["name"]) for item in items if "table" in item}
        return tuple(_drops(chains, rules, tables, bridge, families))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a listing of nft: {error!r}") from None


def _drops(
    chains: list[dict[str, Any]],
    rules: list[dict[str, Any]],
    tables: set[tuple[str, str]],
    bridge: str,
    families: frozenset[str],
) -> Iterator[Finding]:
    for chain in chains:
        table = (chain["family"], chain["table"])
        if chain.get("hook") != "forward" or chain["family"] not in families or table == _OURS:
            continue
        content: dict[str, list[dict[str, Any]]] = {}
        for rule in rules:
            if (rule["family"], rule["table"]) == table:
                content.setdefault(rule["chain"], []).append(rule)
        if _lets_pass(content, chain["name"], bridge, frozenset()):
            continue
        where = f"table {chain['family']} {chain['table']}, chain {chain['name']}"
        owner = _owner(table, chains, tables)
        if chain.get("policy") == "drop":
            yield Finding(where, "policy drop", owner, _hint(owner, bridge))
        for rule in content.get(chain["name"], []):
            if _drops_bridge(rule, bridge):
                yield Finding(where, _verdict(rule) or "drop", owner, _hint(owner, bridge))


def _owner(table: tuple[str, str], chains: list[dict[str, Any]], tables: set[tuple[str, str]]) -> str | None:
    names = {chain["name"] for chain in chains if (chain["family"], chain["table"]) == table}
    if table[1] == "firewalld":
        return "firewalld"
    if any(name.startswith("DOCKER") for name in names) or table[1].startswith("docker"):
        return "Docker"
    if any(name.startswith("ufw-") for name in names):
        return "ufw"
    if ("inet", "firewalld") in tables and table[1] == "filter":
        return "firewalld"
    return None


def _hint(owner: str | None, bridge: str) -> str:
    match owner:
        case "Docker":
            return (
                f"iptables -I DOCKER-USER -i {bridge} -j ACCEPT; iptables -I DOCKER-USER -o {bridge} -j ACCEPT"
                ' (or "ip-forward-no-drop": true in /etc/docker/daemon.json)'
            )
        case "firewalld":
            return f"firewall-cmd --permanent --zone=trusted --add-interface={bridge} && firewall-cmd --reload"
        case "ufw":
            return f"ufw route allow in on {bridge}; ufw route allow out on {bridge}"
        case _:
            return f"let packets in from and out to {bridge} pass in that chain"


def _matches(rule: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part["match"] for part in rule["expr"] if isinstance(part, dict) and "match" in part]


def _interfaces(match: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """("iifname", names) of a match on an interface's name; None for any other match."""
    left, right = match.get("left"), match.get("right")
    key = left.get("meta", {}).get("key") if isinstance(left, dict) else None
    if key not in ("iifname", "oifname", "iif", "oif") or match.get("op") != "==":
        return None
    if isinstance(right, dict):
        right = right.get("set")
    return key, [name for name in (right if isinstance(right, list) else [right]) if isinstance(name, str)]


def _verdict(rule: Mapping[str, Any]) -> str | None:
    for part in rule["expr"]:
        for verdict in ("accept", *_DROPS):
            if isinstance(part, dict) and verdict in part:
                return verdict
    return None


def _named(name: str, bridge: str) -> bool:
    return name == bridge or (name.endswith("*") and bridge.startswith(name[:-1]))


def _lets_pass(content: Mapping[str, list[dict[str, Any]]], chain: str, bridge: str, seen: frozenset[str]) -> bool:
    """Whether the chain, or one it jumps to for this bridge, accepts what comes from the bridge, or everything."""
    if chain in seen:
        return False
    for rule in content.get(chain, []):
        if not _speaks_of(rule, bridge) or _looks_further(rule):
            continue
        if _verdict(rule) == "accept":
            return True
        if any(_lets_pass(content, target, bridge, seen | {chain}) for target in _jumps(rule)):
            return True
    return False


def _speaks_of(rule: Mapping[str, Any], bridge: str) -> bool:
    """About all packets, or those from the bridge; one way out is enough: it is the administrator's word."""
    found = [_interfaces(match) for match in _matches(rule)]
    sources = [one for one in found if one is not None and one[0].startswith("iif")]
    named = all(any(_named(name, bridge) for name in names) for _, names in sources)
    return None not in found and named and bool(sources or not found)


def _jumps(rule: Mapping[str, Any]) -> list[str]:
    """Names of the chains a rule leads to."""
    return [
        part[kind]["target"]
        for part in rule["expr"]
        for kind in ("jump", "goto")
        if isinstance(part, dict) and kind in part
    ]


def _looks_further(rule: Mapping[str, Any]) -> bool:
    """Conditions that nft cannot show as matches: old iptables modules, and limits."""
    return any(isinstance(part, dict) and part.keys() & {"xt", "limit"} for part in rule["expr"])


def _drops_bridge(rule: Mapping[str, Any], bridge: str) -> bool:
    """Drops what comes from or goes to the bridge, or everything; only if it looks at nothing else."""
    if _verdict(rule) not in _DROPS or _looks_further(rule):
        return False
    found = [_interfaces(match) for match in _matches(rule)]
    return all(one is not None and any(_named(n, bridge) for n in one[1]) for one in found)


def plan_firewall(networks: Mapping[str, Network], facts: Facts) -> tuple[Problem, ...]:
    """Who else drops packets of declared networks. Nothing of theirs is changed, and no guest is stopped for it."""
    if facts.foreign_rules is None:
        return ()
    problems = []
    for name, network in sorted(networks.items()):
        for drop in _drops_of(bridge_name(name, network), _families(network, facts), facts.foreign_rules):
            by = f" ({drop.owner})" if drop.owner else ""
            lost = "guests cannot get out"
            if not is_forwarding(network):
                lost = "frames between its guests are lost too, since br_netfilter sends them there"
            problems.append(Problem(f"network {name}", f"{drop.where}{by} has {drop.what}: {lost}", drop.hint))
    return tuple(problems)


def _families(network: Network, facts: Facts) -> frozenset[str]:
    """nft's families that see the network's packets: those it is routed with, or those br_netfilter shows frames to."""
    if is_forwarding(network):
        seen = [network.ipv4 is not None, network.ipv6 is not None]
    else:
        seen = [facts.knobs.get(path) == "1" for path in BRIDGE_NF]
    found = {family for family, here in zip(("ip", "ip6"), seen, strict=True) if here}
    return frozenset(found | {"inet"} if found else found)


def _drops_of(bridge: str, families: frozenset[str], rules: str) -> tuple[Finding, ...]:
    try:
        return foreign_forward_drops(rules, bridge, families)
    except ValueError:
        return ()  # doctor says that the listing cannot be read


def bridge_nf(knobs: Mapping[str, str]) -> tuple[Finding, ...]:
    """Sysctls by which frames between two guests of one bridge pass the host's IP firewall (br_netfilter).

    `knobs` must hold BRIDGE_NF where the kernel has them. Harmless by itself, the cause when guests on one bridge
    cannot reach each other and a forward chain drops. kvmd does not change them: others may rely on them.
    """
    hint = "frames between guests pass iptables' FORWARD; if nothing else needs that: sysctl net.bridge.{}=0"
    return tuple(
        Finding(path, "1", "br_netfilter", hint.format(path.rpartition("/")[2]))
        for path in BRIDGE_NF
        if knobs.get(path) == "1"
    )
