"""The guests' ports: what leaves and reaches each TAP, planned from the files and the identities. Pure.

`rate_in` is a token bucket queue on the TAP (tc-tbf(8)), which goes with it; `rate_out` and `guard` are rules in the
table `bridge kvmd` (guard.py), which are there before the TAP is. All of it changes under a running guest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvmd.actions import Action, Problem, ReplaceRuleset, SetLink, ShapePort
from kvmd.config.devices import Nic
from kvmd.config.guest import Guest
from kvmd.config.network import Network, bridge_name, makes_bridge
from kvmd.facts import Facts, Tbf
from kvmd.plan.guard import Allowed, Fence, build_port_rules, link_local
from kvmd.plan.links import ALIAS, bridge_mac, tap_name
from kvmd.plan.networkworld import Macs
from kvmd.plan.nfttable import difference
from kvmd.units import Rate

Uuids = Mapping[str, str]  # guest -> uuid of its identity
Addresses = Mapping[str, frozenset[tuple[str, str]]]  # network -> (who, address) of all that have a fixed one

_HELD_S = 0.1  # so much of the rate waits in the queue before packets are dropped
_BURST_S = 0.01
_BURST_BYTES = 128 << 10  # two unsegmented sends of 64 KiB


def plan_ports(
    networks: Mapping[str, Network], guests: Mapping[str, Guest], macs: Macs, uuids: Uuids, facts: Facts
) -> tuple[tuple[Action, ...], tuple[Problem, ...]]:
    """The table of ports, then the queue of each TAP that is there, then the cables of running guests."""
    actions: list[Action] = []
    text = port_rules(networks, guests, macs, uuids)
    change = difference(text, facts.nft_ports)
    if change is not None:
        why = {
            "remove": "no port needs rules any more",
            "as declared again": "somebody changed it by hand",
        }.get(change, "guard and rate_out of the guests' NICs")
        actions.append(ReplaceRuleset(text=text, change=change, table="bridge kvmd", why=why))
    actions += _queues(guests, facts)
    actions += _links(guests, facts)
    return tuple(actions), tuple(_own_taps(guests, facts))


def port_rules(networks: Mapping[str, Network], guests: Mapping[str, Guest], macs: Macs, uuids: Uuids) -> str:
    """The text of the table of ports: of every declared guest with an identity, running or not."""
    return build_port_rules(_fences(networks, guests, macs, uuids))


def has_fence(nic: Nic) -> bool:
    """Whether a port has rules of its own."""
    return nic.guard or nic.rate_out is not None


def tbf_of(rate: Rate | None) -> Tbf | None:
    """The queue of a port that is limited to `rate` bits a second towards the guest."""
    if rate is None:
        return None
    rate_bytes = rate // 8
    burst = max(_BURST_BYTES, int(rate_bytes * _BURST_S))
    return Tbf(rate_bytes, burst + max(_BURST_BYTES, int(rate_bytes * _HELD_S)), burst)


def _fences(networks: Mapping[str, Network], guests: Mapping[str, Guest], macs: Macs, uuids: Uuids) -> Iterator[Fence]:
    fixed = _fixed(networks, guests)
    for name, guest in sorted(guests.items()):
        for key, nic in sorted(guest.nic.items()):
            network = networks.get(nic.network) if nic.network else None
            if not has_fence(nic) or name not in uuids or nic.network is None or network is None:
                continue
            mac = nic.mac or macs.get((name, key))
            if nic.guard and mac is None:
                continue
            who = f"{name}/{key}"
            allowed = _allowed(who, nic, str(mac).lower(), nic.network, network, fixed)
            yield Fence(tap_name(uuids[name], key), who, allowed if nic.guard else None, nic.rate_out)


def _fixed(networks: Mapping[str, Network], guests: Mapping[str, Guest]) -> Addresses:
    found: dict[str, set[tuple[str, str]]] = {name: set() for name in networks}
    for name, guest in guests.items():
        for key, nic in guest.nic.items():
            if nic.network in found:
                found[nic.network] |= {(f"{name}/{key}", str(one)) for one in (nic.ipv4, nic.ipv6) if one}
    for name, network in networks.items():
        for entry in network.reservation.values():
            found[name] |= {("", str(one)) for one in (entry.ipv4, entry.ipv6) if one}
        for table in (network.ipv4, network.ipv6):
            if table is not None:
                found[name].add(("", str(table.address.ip)))
    return {name: frozenset(each) for name, each in found.items()}


def _allowed(who: str, nic: Nic, mac: str, name: str, network: Network, fixed: Addresses) -> Allowed:
    """A NIC's own addresses; without, any address of kvmd's network that belongs to nobody else.

    With router advertisements a guest makes itself further addresses (RFC 8981) beside the declared one.
    """
    others = sorted(address for holder, address in fixed[name] if holder != who)
    v4, v6 = network.ipv4, network.ipv6
    ipv4 = (str(nic.ipv4),) if nic.ipv4 else (str(v4.address.network),) if v4 else ()
    exact6 = nic.ipv6 and (v6 is None or v6.mode != "slaac")
    ipv6 = (str(nic.ipv6),) if exact6 else (str(v6.address.network),) if v6 else ()
    hosts_own = [link_local(bridge_mac(bridge_name(name, network)))] if makes_bridge(network) else []
    return Allowed(
        mac=mac,
        ipv4=ipv4,
        not_ipv4=() if nic.ipv4 else tuple(address for address in others if "." in address),
        ipv6=ipv6,
        not_ipv6=(*hosts_own, *(address for address in others if ":" in address)),
        tagged=network.network.vlan_filtering,
        trunk=bool(nic.vlans),
    )


def _own_taps(guests: Mapping[str, Guest], facts: Facts) -> Iterator[Problem]:
    """NICs on no network of kvmd's, whose bridge is not there or whose name is somebody's."""
    links = {link.name: link for link in facts.links}
    for name, guest in sorted(guests.items()):
        for key, nic in sorted(guest.nic.items()):
            subject, hint, message = f"guest {name}", "", ""
            bridge = links.get(nic.br or "br0")
            named = links.get(nic.ifname or "")
            if nic.type == "bridge" and nic.helper is None and (bridge is None or bridge.kind != "bridge"):
                message = f'nic.{key}: there is no bridge "{nic.br or "br0"}" to be plugged into'
                hint = "kvmd-cli doctor says how to make one; or name another as br"
            elif named is not None and named.kind != "tun":
                message = f'nic.{key}: ifname = "{nic.ifname}" is {named.kind or "a NIC"}, and no TAP'
                hint = "give it another name"
            if message:
                yield Problem(subject, message, hint, frozenset({name}))


def _links(guests: Mapping[str, Guest], facts: Facts) -> Iterator[Action]:
    """Cables of cards that a running guest has."""
    for running in sorted(facts.guests, key=lambda guest: guest.name):
        guest = guests.get(running.name)
        for name in running.nics if guest else ():
            nic = guest.nic.get(name) if guest else None
            if nic is not None and nic.link == (name in running.unplugged):
                why = f"nic.{name}.link = {str(nic.link).lower()}"
                yield SetLink(guest=running.name, nic=name, up=nic.link, why=why)


def _queues(guests: Mapping[str, Guest], facts: Facts) -> Iterator[Action]:
    """TAPs are known by their mark; those of guests without a file are left as they are."""
    for link in sorted(facts.links, key=lambda link: link.name):
        mark = (link.alias or "").removeprefix(ALIAS).split(":")
        if link.kind != "tun" or not (link.alias or "").startswith(ALIAS) or len(mark) != 3:
            continue
        guest = guests.get(mark[1])
        nic = guest.nic.get(mark[2]) if guest else None
        if nic is None or link.tbf == tbf_of(nic.rate_in):
            continue
        yield ShapePort(
            guest=mark[1],
            nic=mark[2],
            tap=link.name,
            rate=nic.rate_in,
            old=str(Rate(link.tbf.rate_bytes * 8)) if link.tbf else "none",
            why=f"nic.{mark[2]}.rate_in" if nic.rate_in else f"nic.{mark[2]} has no rate_in",
        )
