"""What the keys of one network's file mean for each other. Pure, as `rules.py`."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

from kvmd.config.dhcpoptions import option_number
from kvmd.config.faults import Complaint, twice
from kvmd.config.network import Dhcp, Network, bridge_name, is_forwarding, is_translated, makes_bridge, overlap
from kvmd.units import Duration

Address = IPv4Address | IPv6Address

_IFNAME_MAX = 15  # IFNAMSIZ without the NUL
_SHORTEST_LEASE = Duration(120)  # dnsmasq(8), --dhcp-range: the minimum lease time is two minutes
_IPV6_MTU = 1280


def network_rules(name: str, network: Network) -> Iterator[Complaint]:
    """All that is wrong in one network's file."""
    mode = network.network.mode
    if mode == "bridge":
        yield from _joined_bridge(network)
    elif network.uplink is not None:
        text = f'only with mode = "bridge"; it is "{mode}"'
        yield Complaint(("uplink",), text, "nat.uplink says which way out guests take")
    if makes_bridge(network) and len(bridge_name(name, network)) > _IFNAME_MAX:
        text = f'"{bridge_name(name, network)}" is longer than the {_IFNAME_MAX} characters of an interface name'
        yield Complaint(("network", "bridge"), text, 'give a shorter one, for example bridge = "kv0"', given=False)
    if is_forwarding(network) and network.ipv4 is None and network.ipv6 is None:
        text = f'mode = "{mode}" needs [ipv4] or [ipv6]'
        yield Complaint(("ipv4",), text, 'for example address = "192.168.50.1/24"', given=False)
    if mode == "isolated" and network.nat.uplink != "auto":
        yield Complaint(("nat", "uplink"), f'only with mode = "nat" or "routed"; it is "{mode}"')
    if network.ipv4 is not None and network.ipv4.dhcp is not None:
        host = network.ipv4.address
        yield from _dhcp(network.ipv4.dhcp, host.ip, host.network.network_address, host.network.broadcast_address)
    yield from _ipv6(network)
    yield from _reservations(network)
    yield from _forwards(network)


def _forwards(network: Network) -> Iterator[Complaint]:
    mode = network.network.mode
    for number, (name, wish) in enumerate(network.forward.items()):
        path = ("forward", name)
        if mode == "isolated":
            text = 'mode = "isolated" lets nothing in or out'
            yield Complaint(path, text, 'mode = "nat", with guests_isolated = true if they must not see each other')
        elif not is_forwarding(network):
            yield Complaint(path, f'mode = "{mode}": kvmd routes nothing there; guests have addresses of their own')
        for other, there in list(network.forward.items())[:number]:
            if overlap(wish, there):
                text = f"{wish.protocol} port {wish.listen.port} is taken by forward.{other} already"
                yield Complaint((*path, "listen"), text, "one port leads to one guest")


def _joined_bridge(network: Network) -> Iterator[Complaint]:
    reason = 'only where kvmd makes the bridge; with mode = "bridge" it only adds ports'
    if network.uplink is not None:
        reason = "the host has no part in the bridge of an [uplink]: its address would be cut off with it"
    elif network.network.bridge is None:
        yield Complaint(("network", "bridge"), 'mode = "bridge" needs the name of an existing bridge', given=False)
    elif network.network.stp:
        yield Complaint(("network", "stp"), reason)
    if network.ipv4 is not None:
        yield Complaint(("ipv4",), reason)
    if network.ipv6 is not None:
        yield Complaint(("ipv6",), reason)
    if network.nat.uplink != "auto":
        yield Complaint(("nat", "uplink"), reason)


def _dhcp(dhcp: Dhcp, host: IPv4Address, low: IPv4Address, high: IPv4Address) -> Iterator[Complaint]:
    first, last = dhcp.range
    path = ("ipv4", "dhcp", "range")
    outside = [address for address in dhcp.range if not low < address < high]
    if outside:
        yield Complaint(path, f"{outside[0]} is outside the network's addresses {low + 1} to {high - 1}")
    elif first > last:
        yield Complaint(path, f"{first} is above {last}; write the lower one first")
    elif first <= host <= last:
        yield Complaint(path, f"{first} to {last} contains the host's own address {host}")
    for name, other, number in twice((name, option_number(name)) for name in dhcp.options):
        yield Complaint(("ipv4", "dhcp", "options", name), f'"{other}" is option {number} too')
    if dhcp.lease < _SHORTEST_LEASE:
        yield Complaint(("ipv4", "dhcp", "lease"), f'"{dhcp.lease}" is too short: at least "{_SHORTEST_LEASE}"')


def _ipv6(network: Network) -> Iterator[Complaint]:
    if network.ipv6 is None:
        return
    address, mode = network.ipv6.address, network.ipv6.mode
    prefix = address.network.prefixlen
    path = ("ipv6", "address")
    if mode == "slaac" and prefix != 64:
        text = f'"{address}": guests can make their own addresses in a /64 only (RFC 4862, 5.5.3)'
        yield Complaint(path, text, 'a /64, or ipv6.mode = "dhcp" or "none"')
    elif mode == "dhcp" and not 64 <= prefix <= 120:
        yield Complaint(path, f'"{address}": DHCPv6 wants a prefix between /64 and /120')
    if network.network.mode == "nat" and not is_translated(address):
        text = f'"{address}" is a public address and is not translated: the upstream router needs a route to it'
        yield Complaint(path, text, "take one of fd00::/8 to have it translated", severity="warning")
    if network.network.mtu < _IPV6_MTU:
        text = f"{network.network.mtu} is too small for IPv6: at least {_IPV6_MTU} (RFC 8200, 5)"
        yield Complaint(("network", "mtu"), text, "a larger mtu, or no [ipv6]")


def _reservations(network: Network) -> Iterator[Complaint]:
    items = network.reservation.items()
    for name, other, mac in twice((name, entry.mac) for name, entry in items):
        yield Complaint(("reservation", name, "mac"), f'"{mac}" is the address of reservation.{other} too')
    for key in ("ipv4", "ipv6"):
        for name, other, address in twice((name, getattr(entry, key)) for name, entry in items):
            yield Complaint(("reservation", name, key), f"{address} is the address of reservation.{other} too")
    for name, entry in items:
        if entry.ipv4 is None and entry.ipv6 is None:
            yield Complaint(("reservation", name), "needs an ipv4 or an ipv6 address")
        for key, wanted in (("ipv4", entry.ipv4), ("ipv6", entry.ipv6)):
            if wanted is None:
                continue
            fault = address_fault(network, wanted) or unserved(network, wanted)
            if fault is not None:
                yield Complaint(("reservation", name, key), fault)


def unserved(network: Network, address: Address) -> str | None:
    """Why nobody hands the address out on this network; None if its DHCP server does."""
    if isinstance(address, IPv4Address):
        served = network.ipv4 is not None and network.ipv4.dhcp is not None
        return None if served else "needs [ipv4.dhcp]: nobody hands the address out"
    served = network.ipv6 is not None and network.ipv6.mode == "dhcp"
    return None if served else 'needs [ipv6] with mode = "dhcp": nobody hands the address out'


def address_fault(network: Network, address: Address) -> str | None:
    """Why a machine on this network cannot have the address; None if it can, or if the network has no subnet."""
    config = network.ipv4 if isinstance(address, IPv4Address) else network.ipv6
    if config is None:
        return None
    host, subnet = config.address.ip, config.address.network
    low, high = int(subnet.network_address), int(subnet.broadcast_address)
    if not low < int(address) < high + (address.version == 6):
        last = subnet[-1] if address.version == 6 else subnet[-2]
        return f"{address} is outside the network's addresses {subnet[1]} to {last}"
    return f"{address} is the host's own address" if address == host else None
