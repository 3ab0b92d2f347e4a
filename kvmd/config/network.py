"""networks.d/NAME.toml: one network."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv6Interface, IPv6Network
from typing import Literal

from kvmd.config.dhcpoptions import DhcpOption, DhcpOptionValue
from kvmd.config.key import Table, key, named_tables, optional_table, table
from kvmd.config.scalars import (
    AutoInterface,
    Domain,
    DurationT,
    GuestPortT,
    Interface,
    Ip,
    Ipv4,
    Ipv4Interface,
    Ipv6,
    Ipv6InterfaceT,
    ListenT,
    Mac,
    TableName,
)
from kvmd.units import Duration

_BRIDGE_PREFIX = "kv"


class About(Table):
    """[network]"""

    mode: Literal["nat", "routed", "isolated", "bridge"] = key(
        ...,
        '"nat": out through the host; "routed": the same without address translation, and reachable from outside;'
        ' "isolated": guests and host only; "bridge": an existing bridge.',
        mark="~",
        example='"nat"',
        later_values=("macvtap",),
    )
    bridge: Interface | None = key(
        None,
        'The Linux bridge. kvmd makes it unless mode = "bridge" without [uplink].',
        mark="~",
        classic="-net bridge,br=",
        example='"kvlan"',
        default_text='"kv" and the network\'s name',
    )
    mtu: int = key(1500, "Of bridge and TAPs.", mark="~", unit="bytes", ge=68, le=65535)
    stp: bool = key(False, "Spanning tree.", mark="~")
    vlan_filtering: bool = key(
        False,
        'Ports carry VLANs, each only its own. With mode = "bridge" the bridge has to filter already.',
        mark="~",
        needs="CONFIG_BRIDGE_VLAN_FILTERING in the host's kernel",
    )
    guests_isolated: bool = key(False, "Guests of this network cannot talk to each other.", mark="~")
    description: str = key("", "For people.", max_length=1000, example='"office guests"')


class Uplink(Table):
    """[uplink]"""

    interface: Interface = key(
        ...,
        "NIC without a host address, to be put into the bridge that kvmd makes over it.",
        mark="~",
        example='"enp3s0"',
    )
    rollback: DurationT = key(
        Duration(60),
        'Taken out again unless `kvmd-cli network confirm` comes within this time; "0s": no trial.',
        mark="~",
        example='"60s"',
    )


class Dhcp(Table):
    """[ipv4.dhcp]"""

    range: tuple[Ipv4, Ipv4] = key(
        ..., "First and last address of the pool.", mark="~", example='["192.168.50.100", "192.168.50.200"]'
    )
    lease: DurationT = key(Duration(12 * 3600), "Lifetime of a lease.", mark="~", example='"12h"')
    options: Mapping[DhcpOption, DhcpOptionValue] = key(
        {},
        "More DHCP options, by dnsmasq's name or by number; an empty list sends none.",
        mark="~",
        example='{ ntp-server = "192.0.2.123" }',
    )


class Ipv4Config(Table):
    """[ipv4]"""

    address: Ipv4Interface = key(..., "The host's address on the bridge, with the prefix.", mark="~")
    dhcp: Dhcp | None = optional_table("DHCP server; absent: none.")


class Ipv6Config(Table):
    """[ipv6]"""

    address: Ipv6InterfaceT = key(..., "The host's address on the bridge, with the prefix.", mark="~")
    mode: Literal["none", "slaac", "dhcp"] = key(
        "slaac",
        'How guests get theirs. "slaac": router advertisements; "dhcp": DHCPv6 with reservations; "none": by hand.',
        mark="~",
    )


class Dns(Table):
    """[dns]"""

    enabled: bool = key(True, "Name server for the guests, with their names.", mark="~")
    domain: Domain | None = key(None, "Domain of the guests' names.", mark="~")
    upstream: tuple[Ip, ...] = key(
        (), "Servers to ask; empty: the host's resolvers.", mark="~", example='["192.0.2.53"]'
    )


class Nat(Table):
    """[nat]"""

    uplink: AutoInterface = key("auto", "The way out.", mark="~")


class Forward(Table):
    """[forward.NAME]"""

    listen: ListenT = key(
        ..., "Where the host takes it in; without address: any of the host's, loopback excepted.", mark="~"
    )
    to: GuestPortT = key(..., "The guest, by its fixed `ipv4` on this network, and its port.", mark="~")
    protocol: Literal["tcp", "udp"] = key("tcp", "Of the port.", mark="~")


class Reservation(Table):
    """[reservation.NAME]: a machine that is not a guest of kvmd."""

    mac: Mac = key(..., "Its MAC address.", mark="~")
    ipv4: Ipv4 | None = key(None, "The address it gets.", mark="~", example='"192.168.50.9"')
    ipv6: Ipv6 | None = key(None, "The IPv6 address it gets.", mark="~", example='"fd50::9"')


class Firewall(Table):
    """[firewall]"""

    host_access: bool = key(True, "Guests may reach the host beyond DHCP and DNS.", mark="~")


class Network(Table):
    """A whole file."""

    schema_: Literal[1] = key(1, "Version of the keys; absent: 1.", alias="schema")
    network: About
    uplink: Uplink | None = optional_table('mode = "bridge": kvmd makes the bridge itself, over this NIC.')
    ipv4: Ipv4Config | None = optional_table("IPv4 on the bridge; absent: none.")
    ipv6: Ipv6Config | None = optional_table("IPv6 on the bridge.")
    dns: Dns = table(Dns)
    nat: Nat = table(Nat)
    forward: Mapping[TableName, Forward] = named_tables("A port of the host that leads to a guest.")
    reservation: Mapping[TableName, Reservation] = named_tables("A fixed address.")
    firewall: Firewall = table(Firewall)


UNIQUE_LOCAL = IPv6Network("fc00::/7")  # RFC 4193: routed nowhere, so a network of them is translated


def makes_bridge(network: Network) -> bool:
    """Whether the bridge is kvmd's own, made and removed with the file."""
    return network.network.mode != "bridge" or network.uplink is not None


def is_forwarding(network: Network) -> bool:
    """Whether guests reach beyond the host through it, so that the host has to route."""
    return network.network.mode in ("nat", "routed")


def is_translated(address: IPv6Interface) -> bool:
    """Whether a network of mode "nat" hides this IPv6 prefix behind the host's address."""
    return address.ip in UNIQUE_LOCAL


def bridge_name(name: str, network: Network) -> str:
    """The bridge of network `name`: what the file says, else "kv" and the name.

    `rules.py` refuses files where that would pass the 15 bytes of an interface name.
    """
    return network.network.bridge or _BRIDGE_PREFIX + name


def overlap(one: Forward, other: Forward) -> bool:
    """Whether two forwards would take the same packets."""
    if (one.protocol, one.listen.port) != (other.protocol, other.listen.port):
        return False
    return None in (one.listen.address, other.listen.address) or one.listen.address == other.listen.address
