"""Networks: what is declared against the links, rules and servers that are there. Pure.

kvmd makes the bridge of `nat`, `routed` and `isolated` networks and marks it with the alias `kvmd:NETWORK`; with mode
"bridge" it joins one that exists and never changes it. A link without the mark is somebody else's and stays as it is.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Mapping

from kvmd.actions import (
    Action,
    Disruption,
    EnsureBridge,
    Problem,
    RemoveBridge,
    ReplaceRuleset,
    StartDnsmasq,
    StopDnsmasq,
    WriteKnob,
)
from kvmd.config.devices import Nic
from kvmd.config.guest import Guest
from kvmd.config.network import Network, Reservation, bridge_name, is_forwarding, makes_bridge
from kvmd.facts import Facts, Link
from kvmd.plan.dnsmasq import Host, build_config, config_sha256, wants_dnsmasq
from kvmd.plan.firewall import BRIDGE_NF, plan_firewall
from kvmd.plan.forwards import plan_forwards
from kvmd.plan.links import bridge_alias, bridge_mac, is_our_bridge
from kvmd.plan.networkworld import Macs, World, look
from kvmd.plan.nft import build_ruleset
from kvmd.plan.nfttable import difference
from kvmd.plan.uplink import plan_detach, plan_uplink
from kvmd.plan.vlans import check_filtering, plan_ports

FORWARDING = "/proc/sys/net/ipv4/ip_forward"
FORWARDING6 = "/proc/sys/net/ipv6/conf/all/forwarding"  # absent: a kernel without IPv6
KNOBS = (FORWARDING, FORWARDING6, *BRIDGE_NF)  # what facts.knobs must hold for this planner

_AnyNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


def plan_network(
    networks: Mapping[str, Network], guests: Mapping[str, Guest], macs: Macs, facts: Facts
) -> tuple[tuple[Action, ...], tuple[Problem, ...]]:
    """What to do so that the declared networks are there, and what cannot be had as asked.

    `macs` holds the address of each (guest, nic) from the identity files. New things come before old ones go, the
    rules before forwarding is switched on.
    """
    world = look(networks, guests, macs, facts)
    _plan_guests(world)
    blocked = {name for name, network in sorted(networks.items()) if not _plan_bridge(world, name, network)}
    plan_ports(world, blocked)
    _plan_ruleset(world)
    _plan_forwarding(world)
    _plan_servers(world, blocked)
    _plan_removal(world)
    world.problems.extend(plan_firewall(networks, facts))
    return tuple(world.actions), tuple(world.problems)


def _plan_guests(world: World) -> None:
    """Faults that only show when all guests are seen together with their remembered addresses."""
    for network in sorted(world.on.keys() - world.networks.keys()):
        hint = f"mend or make networks.d/{network}.toml"
        world.problem(network, "is asked for by a guest but is not declared, or its file is not in order", hint)
    holders: defaultdict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for guest, nic, network, mac in world.nics():
        holders[network, mac].append((guest, nic))
    for (network, mac), nics in sorted(holders.items()):
        if len(nics) > 1:
            who = " and ".join(f"{guest} (nic.{nic})" for guest, nic in sorted(nics))
            world.problems.append(
                Problem(
                    f"network {network}",
                    f"MAC address {mac} belongs to {who}",
                    "give one of them another `mac`, or another `guest.uuid` if its files were copied",
                    frozenset(guest for guest, _ in nics),
                )
            )


def _plan_bridge(world: World, name: str, network: Network) -> bool:
    """Plans the bridge; False if guests cannot be plugged in."""
    bridge = bridge_name(name, network)
    link = world.links.get(bridge)
    if not check_filtering(world, name, network, link):
        return False
    if not makes_bridge(network):
        return _check_joined(world, name, network, link)
    if link is not None and not is_our_bridge(link):
        what = f"a {link.kind or 'network interface'}" + (f" marked {link.alias!r}" if link.alias else "")
        world.problem(
            name,
            f'"{bridge}" exists and is {what} that kvmd did not make; it is left alone',
            f"give networks.d/{name}.toml another network.bridge, or remove that link",
        )
        return False
    if network.ipv6 and FORWARDING6 not in world.facts.knobs:
        hint = f"a kernel with CONFIG_IPV6 and without ipv6.disable=1, or take [ipv6] out of networks.d/{name}.toml"
        world.problem(name, "this kernel has no IPv6", hint)
        return False
    clash = _subnet_in_use(world, bridge, network)
    if clash:
        key, message = clash
        world.problem(name, message, f"choose another {key}.address in networks.d/{name}.toml", blocks=link is None)
        if link is None:
            return False
    change = "create" if link is None else _bridge_change(name, network, link)
    if change:
        world.actions.append(_ensure(world, name, bridge, network, change))
    return plan_uplink(world, name, network)


def _ensure(world: World, name: str, bridge: str, network: Network, change: str) -> EnsureBridge:
    # Filtering is a fence: to put it up again is no disturbance, to take it down is.
    words = ("mtu", "address", "vlan_filtering on -> off")
    disturbing = bool(world.ports.get(bridge)) and any(word in change for word in words)
    return EnsureBridge(
        network=name,
        bridge=bridge,
        mtu=network.network.mtu,
        stp=network.network.stp,
        vlan_filtering=network.network.vlan_filtering,
        host=network.uplink is None,
        addresses=_addresses(network),
        change=change,
        why=f"networks.d/{name}.toml declares a network of mode {network.network.mode}",
        disruption=Disruption.NETWORK if disturbing else Disruption.NONE,
    )


def _check_joined(world: World, name: str, network: Network, link: Link | None) -> bool:
    bridge, mtu = bridge_name(name, network), network.network.mtu
    if link is not None and link.kind == "bridge":
        if not link.up:
            world.problem(name, f'bridge "{bridge}" is down', f"ip link set {bridge} up", blocks=False)
        if link.mtu != mtu:
            # A bridge nobody gave an MTU takes that of its lowest port (net/bridge/br_if.c, br_mtu_auto_adjust).
            effect = "a port of it would lower the whole bridge" if mtu < link.mtu else "larger frames would be lost"
            message = f'bridge "{bridge}" has mtu {link.mtu} and the network {mtu}: {effect}'
            world.problem(name, message, f"mtu = {link.mtu} in networks.d/{name}.toml")
            return False
        return True
    what = f'bridge "{bridge}" does not exist' if link is None else f'"{bridge}" exists but is no bridge'
    world.problem(
        name,
        f'{what}; mode = "bridge" joins one that the distribution makes',
        f"networks.d/{name}.toml: name an existing bridge, let ifupdown, systemd-networkd, netplan or NetworkManager"
        f' make "{bridge}", or use mode = "nat" and kvmd makes one',
    )
    return False


def _addresses(network: Network) -> tuple[str, ...]:
    return tuple(str(config.address) for config in (network.ipv4, network.ipv6) if config)


def _bridge_change(name: str, network: Network, link: Link) -> str:
    """What of the bridge is not as declared, for people; "" if all is."""
    wanted, present = set(_addresses(network)), set(link.addresses)
    changes = [
        *(f"address +{address}" for address in sorted(wanted - present)),
        *(f"address -{address}" for address in sorted(present - wanted)),
    ]
    if link.mtu != network.network.mtu:
        changes.append(f"mtu {link.mtu} -> {network.network.mtu}")
    if link.stp is not None and link.stp != network.network.stp:
        changes.append(f"stp {'on -> off' if link.stp else 'off -> on'}")
    filtering = network.network.vlan_filtering
    if link.vlan_filtering is not None and link.vlan_filtering != filtering:
        changes.append(f"vlan_filtering {'off -> on' if filtering else 'on -> off'}")
    if not link.up:
        changes.append("down -> up")
    if link.alias != bridge_alias(name):
        changes.append(f"alias {link.alias or 'none'} -> {bridge_alias(name)}")
    if link.mac != bridge_mac(link.name):
        changes.append(f"mac {link.mac} -> {bridge_mac(link.name)}")
    return ", ".join(changes)


def _subnet_in_use(world: World, bridge: str, network: Network) -> tuple[str, str] | None:
    """The table whose subnet some other link has already, and what to say."""
    for key, config in (("ipv4", network.ipv4), ("ipv6", network.ipv6)):
        if config is None:
            continue
        subnet = config.address.network
        for link in sorted(world.facts.links, key=lambda link: link.name):
            if link.name == bridge or is_our_bridge(link):
                continue
            for text in link.addresses:
                other = ipaddress.ip_interface(text).network
                if other.prefixlen and other.version == subnet.version and _overlap(other, subnet):
                    return key, f"{subnet} overlaps {text} on {link.name}: the host could not tell which way to send"
    return None


def _overlap(one: _AnyNetwork, other: _AnyNetwork) -> bool:
    first = max(int(one.network_address), int(other.network_address))
    return first <= min(int(one.broadcast_address), int(other.broadcast_address))


def _leftover(world: World) -> tuple[Link, ...]:
    """Bridges of ours that no file asks for any more."""
    wanted = {bridge_name(name, net) for name, net in world.networks.items() if makes_bridge(net)}
    return tuple(
        link
        for link in sorted(world.facts.links, key=lambda link: link.name)
        if link.alias and is_our_bridge(link) and link.name not in wanted
    )


def _removal_disruption(world: World, bridges: tuple[Link, ...]) -> Disruption:
    in_use = any(world.ports.get(link.name) for link in bridges)
    return Disruption.NETWORK if in_use else Disruption.NONE


def _plan_ruleset(world: World) -> None:
    openings, problems = plan_forwards(world.networks, world.guests, world.facts)
    world.problems.extend(problems)
    text = build_ruleset(world.networks, openings)
    change = difference(text, world.facts.nft)
    if change is None:
        return
    if change == "remove":
        why = "no network needs rules any more"
    elif change == "as declared again":
        why = "somebody changed it by hand"
    else:
        why = f"rules of {_plural(world)}"
    # Without its rules a bridge that still has guests would lose its way out and its fence.
    disruption = _removal_disruption(world, _leftover(world))
    world.actions.append(ReplaceRuleset(text=text, change=change, why=why, disruption=disruption))


def _plural(world: World) -> str:
    names = sorted(name for name, network in world.networks.items() if network.network.mode != "bridge")
    return f"network{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _plan_forwarding(world: World) -> None:
    """The host routes for networks of mode nat and routed (Documentation/networking/ip-sysctl.rst)."""
    wanting = {name: network for name, network in sorted(world.networks.items()) if is_forwarding(network)}
    first4 = next((name for name, network in wanting.items() if network.ipv4), None)
    first6 = next((name for name, network in wanting.items() if network.ipv6), None)
    if first4:
        value = world.facts.knobs.get(FORWARDING)
        if value is None:
            hint = "is /proc/sys mounted?"
            world.problem(first4, f"cannot read {FORWARDING}: it needs forwarding", hint, blocks=False)
        elif value != "1":
            why = f"network {first4} is of mode {wanting[first4].network.mode}"
            world.actions.append(WriteKnob(path=FORWARDING, old=value, new="1", why=why))
    value6 = world.facts.knobs.get(FORWARDING6)
    if first6 and value6 not in (None, "1"):
        _plan_forwarding6(world, first6, str(value6))


def _plan_forwarding6(world: World, network: str, value: str) -> None:
    """A host that forwards IPv6 forgets the default routes it was told by routers, unless accept_ra is 2 there."""
    lost = world.facts.ra_uplinks
    if lost:
        world.problem(
            network,
            f"IPv6 is not forwarded: the host itself has its IPv6 way out from router advertisements on"
            f" {', '.join(lost)}, and would lose it",
            "; ".join(f"sysctl -w net.ipv6.conf.{link.replace('.', '/')}.accept_ra=2" for link in lost)
            + " (and a file in /etc/sysctl.d), then kvmd-cli apply",
            blocks=False,
        )
        return
    mode = world.networks[network].network.mode
    why = f"network {network} is of mode {mode} and has IPv6"
    world.actions.append(WriteKnob(path=FORWARDING6, old=value, new="1", why=why))


def _plan_servers(world: World, blocked: set[str]) -> None:
    running = {server.network: server for server in world.facts.dnsmasq}
    for name, network in sorted(world.networks.items()):
        if name in blocked or not wants_dnsmasq(network):
            continue
        config = build_config(name, network, _hosts(world, name, network))
        server = running.get(name)
        if server is None:
            what = "DHCP and DNS" if network.ipv4 and network.ipv4.dhcp and network.dns.enabled else "DHCP, DNS or IPv6"
            why = f"networks.d/{name}.toml asks for {what}"
            world.actions.append(StartDnsmasq(network=name, config=config, why=why))
        elif not server.config_sha256:
            why = "its bridge was made anew, or kvmd ended while starting it; leases are kept"
            world.actions.append(StartDnsmasq(network=name, config=config, change="restart", why=why))
        elif server.config_sha256 != config_sha256(config):
            why = "the network or its guests' addresses changed; leases are kept"
            world.actions.append(StartDnsmasq(network=name, config=config, change="new configuration", why=why))


def _hosts(world: World, name: str, network: Network) -> list[Host]:
    """Who is known by name: each guest by its own, then second NICs by name-nic, then the file's reservations."""
    taken: set[str] = set()
    first: list[tuple[str, str, str]] = []
    more: list[tuple[str, str, str]] = []
    for guest, nic, on, mac in world.nics():
        if on == name:
            (more if any(guest == other for other, _, _ in first) else first).append((guest, nic, mac))
    labels = [(guest, nic, mac, guest) for guest, nic, mac in first]
    labels += [(guest, nic, mac, f"{guest}-{nic}") for guest, nic, mac in more]
    hosts = []
    for guest, nic, mac, label in labels:
        hosts.append(_host(_label(label, taken), mac, world.guests[guest].nic[nic]))
    for key, entry in sorted(network.reservation.items()):
        hosts.append(_host(_label(key, taken), entry.mac.lower(), entry))
    return hosts


def _host(name: str, mac: str, wish: Nic | Reservation) -> Host:
    return Host(name, mac, str(wish.ipv4) if wish.ipv4 else None, str(wish.ipv6) if wish.ipv6 else None)


def _label(text: str, taken: set[str]) -> str:
    """A host name label nobody else has: "_" is none, and a name twice would answer with two addresses."""
    base = text.replace("_", "-")
    label, number = base, 1
    while label in taken:
        number += 1
        label = f"{base}-{number}"
    taken.add(label)
    return label


def _plan_removal(world: World) -> None:
    leaving = plan_detach(world)
    leftover = _leftover(world)
    for server in sorted(world.facts.dnsmasq, key=lambda server: server.network):
        network = world.networks.get(server.network)
        if network is None or not wants_dnsmasq(network):
            bridges = tuple(link for link in leftover if link.alias == bridge_alias(server.network))
            why = f"networks.d/{server.network}.toml " + ("is gone" if network is None else "asks for none")
            disruption = _removal_disruption(world, bridges)
            world.actions.append(StopDnsmasq(network=server.network, why=why, disruption=disruption))
    for link in leftover:
        ports = [port for port in world.ports.get(link.name, ()) if port not in leaving]
        why = "no network is declared for it" + (f"; still plugged in: {', '.join(ports)}" if ports else "")
        disruption = Disruption.NETWORK if ports else Disruption.NONE
        world.actions.append(RemoveBridge(bridge=link.name, why=why, disruption=disruption))
