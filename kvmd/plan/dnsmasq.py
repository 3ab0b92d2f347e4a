"""The DHCP and DNS server of one network: the text of its configuration, and its lease file read. Pure.

Options are those of dnsmasq(8), 2.90. Nothing in the text depends on where kvmd keeps its files: paths, user and log
are given on the command line (`effects.dnsmasq.dnsmasq_argv`), so the text is what the plan compares.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Interface, ip_address

from kvmd.config.dhcpoptions import option_number
from kvmd.config.network import Dhcp, Ipv6Config, Network, bridge_name, makes_bridge

HOST_RESOLVERS = "/etc/resolv.conf"
_LEASE = re.compile(r"(\d+) ([0-9A-Fa-f:]{17}) (\d+\.\d+\.\d+\.\d+) (\S+)(?: (\S+))?")
_LEASE6 = re.compile(r"(\d+) T?\d+ ([0-9A-Fa-f:]*:[0-9A-Fa-f:]*) (\S+)(?: (\S+))?")  # the number is the IAID
_DUID_MAC = re.compile(r"00:0(?:1:00:01(?::[0-9a-f]{2}){4}|3:00:01)((?::[0-9a-f]{2}){6})")  # RFC 8415, 11.2 and 11.4
_POOL6 = 1 << 16  # addresses of a DHCPv6 pool, where the prefix has room for them
_LEASES6 = 1000  # dnsmasq's own cap: a guest that makes up names for itself fills that and not the memory
_RA_INTERVAL_S = 600  # dnsmasq's own default (--ra-param); a guest that boots asks and is answered at once
_LEASE6_S = 12 * 3600  # where there is no ipv4.dhcp.lease to go by
_ROUTER, _DNS_SERVER = 3, 6  # RFC 2132, 3.5 and 3.8


@dataclass(frozen=True, slots=True)
class Host:
    """One NIC that is known by name: a guest's, or a [reservation.NAME]."""

    name: str
    mac: str
    ipv4: str | None = None
    ipv6: str | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """One line of dnsmasq's lease file. Of an IPv6 lease the MAC is known if the client's DUID holds it."""

    expires: int  # seconds since 1970, 0 = never
    mac: str | None
    address: str
    name: str | None
    client_id: str | None


def wants_dnsmasq(network: Network) -> bool:
    """Whether this network has a DHCP or DNS server at all."""
    if not makes_bridge(network):
        return False
    serves = (network.ipv4 and network.ipv4.dhcp) or (network.ipv6 and network.ipv6.mode != "none")
    addressed = network.ipv4 is not None or network.ipv6 is not None
    return bool(serves) or (addressed and network.dns.enabled)


def config_sha256(config: str) -> str:
    """What facts.Dnsmasq.config_sha256 is compared with."""
    return hashlib.sha256(config.encode()).hexdigest()


def build_config(name: str, network: Network, hosts: Iterable[Host]) -> str:
    """The configuration of the server of network `name`; `hosts` in any order."""
    return "".join(f"{line}\n" for line in _lines(name, network, tuple(sorted(hosts, key=_host_order))))


def _host_order(host: Host) -> tuple[str, str, str, str]:
    return host.name, host.mac, host.ipv4 or "", host.ipv6 or ""


def bridge_of(config: str) -> str | None:
    """The interface a configuration made here serves."""
    found = re.search(r"^interface=(\S+)$", config, re.MULTILINE)
    return found[1] if found else None


def _lines(name: str, network: Network, hosts: tuple[Host, ...]) -> Iterator[str]:
    yield f"# Network {name}. Made by kvmd from networks.d/{name}.toml: what is changed here is lost."
    yield f"interface={bridge_name(name, network)}"
    yield "except-interface=lo"
    # Only here does dnsmasq check which link a query came in by, and pick the bridge up when it is made anew.
    yield "bind-dynamic"
    yield "no-hosts"
    yield from _dns(network, hosts)
    dhcp = network.ipv4.dhcp if network.ipv4 else None
    ipv6 = network.ipv6 if network.ipv6 and network.ipv6.mode != "none" else None
    if dhcp or ipv6:
        # Names come from the files alone: a guest must not call itself by its neighbour's name.
        yield "dhcp-ignore-names"
        yield from ("quiet-dhcp", "quiet-dhcp6", "quiet-ra")
        yield f"dhcp-lease-max={_most_leases(network, hosts)}"
    if dhcp:
        yield from _dhcp(network, dhcp)
    if ipv6:
        yield from _ipv6(name, network, ipv6)
    yield from _reservations(network, hosts)


def _dns(network: Network, hosts: tuple[Host, ...]) -> Iterator[str]:
    domain = network.dns.domain
    if domain:
        yield f"domain={domain}"
    if not network.dns.enabled:
        yield "port=0"
        return
    yield "cache-size=1000"
    yield "domain-needed"
    yield "bogus-priv"
    if domain:
        yield f"local=/{domain}/"
    if network.dns.upstream or network.network.mode == "isolated":
        yield "no-resolv"
        yield from (f"server={address}" for address in network.dns.upstream)
    else:
        yield f"resolv-file={HOST_RESOLVERS}"
    for host in hosts:
        if host.ipv4 or host.ipv6:
            full = f"{host.name}.{domain}," if domain else ""
            yield f"host-record={full}{host.name},{','.join(filter(None, (host.ipv4, host.ipv6)))}"


def _dhcp(network: Network, dhcp: Dhcp) -> Iterator[str]:
    assert network.ipv4 is not None
    first, last = dhcp.range
    yield "dhcp-authoritative"
    # An address is offered at once, not after 3 s of asking who has it: every MAC on the bridge is known here.
    yield "no-ping"
    yield f"dhcp-range={first},{last},{network.ipv4.address.network.netmask},{int(dhcp.lease)}"
    own = {option_number(name) for name in dhcp.options}
    if network.network.mode == "isolated" and _ROUTER not in own:
        yield "dhcp-option=option:router"  # without a value: none is sent
    if not network.dns.enabled and _DNS_SERVER not in own:
        yield ",".join(("dhcp-option=option:dns-server", *_upstream(network, 4)))
    if network.network.mtu != 1500:
        yield f"dhcp-option=option:mtu,{network.network.mtu}"
    for name, values in sorted(dhcp.options.items()):
        yield ",".join((f"dhcp-option={name if name.isdecimal() else f'option:{name}'}", *values))


def _most_leases(network: Network, hosts: tuple[Host, ...]) -> int:
    """Both families together: the whole IPv4 pool, _LEASES6 and all reservations."""
    count = sum(bool(host.ipv4) + bool(host.ipv6) for host in hosts)
    if network.ipv4 and network.ipv4.dhcp:
        first, last = network.ipv4.dhcp.range
        count += int(last) - int(first) + 1
    return count + (_LEASES6 if network.ipv6 and network.ipv6.mode == "dhcp" else 0)


def _upstream(network: Network, version: int) -> list[str]:
    return [str(address) for address in network.dns.upstream if address.version == version]


def _ipv6(name: str, network: Network, ipv6: Ipv6Config) -> Iterator[str]:
    """Router advertisements, with the pool of DHCPv6 where that is wanted (dnsmasq(8), --dhcp-range)."""
    address, isolated = ipv6.address, network.network.mode == "isolated"
    lease = int(network.ipv4.dhcp.lease) if network.ipv4 and network.ipv4.dhcp else _LEASE6_S
    yield "enable-ra"
    if isolated:
        # A lifetime of 0: the prefix is announced, a way out is not (RFC 4861, 4.2).
        yield f"ra-param={bridge_name(name, network)},{_RA_INTERVAL_S},0"
    prefix = address.network.prefixlen
    if ipv6.mode == "slaac":
        yield f"dhcp-range={address.network.network_address},ra-stateless,{prefix},{lease}"
    else:
        first, last = pool6(address)
        yield f"dhcp-range={first},{last},{prefix},{lease}"
    if not network.dns.enabled:
        yield ",".join(("dhcp-option=option6:dns-server", *(f"[{server}]" for server in _upstream(network, 6))))


def pool6(address: IPv6Interface) -> tuple[IPv6Address, IPv6Address]:
    """First and last address of the DHCPv6 pool: out of the way of those that people choose, which are low.

    fd50::1:0 to fd50::1:ffff of a /64; of a prefix with fewer than 2^17 addresses the upper half.
    """
    subnet = address.network
    size = min(_POOL6, subnet.num_addresses // 2)
    first = subnet.network_address + size
    return first, first + (size - 1)


def _reservations(network: Network, hosts: tuple[Host, ...]) -> Iterator[str]:
    v4 = network.ipv4 is not None and network.ipv4.dhcp is not None
    v6 = network.ipv6 is not None and network.ipv6.mode == "dhcp"
    if not v4 and not v6:
        return
    for host in hosts:
        addresses = (host.ipv4 if v4 else None, f"[{host.ipv6}]" if v6 and host.ipv6 else None)
        yield ",".join(filter(None, (f"dhcp-host={host.mac}", *addresses, host.name)))


def parse_leases(text: str) -> tuple[Lease, ...]:
    """The leases of a dnsmasq lease file, IPv4 first, by address. Lines of any other form are passed over."""
    found: list[tuple[tuple[int, int], Lease]] = []
    for line in text.splitlines():
        match = _LEASE.fullmatch(line)
        match6 = None if match else _LEASE6.fullmatch(line)
        expires, address, name, client_id = match.group(1, 3, 4, 5) if match else ("0", "", "*", None)
        mac = match[2].lower() if match else None
        if match6:
            expires, address, name, client_id = match6.group(1, 2, 3, 4)
            duid = _DUID_MAC.fullmatch((client_id or "").lower())
            mac = duid[1][1:] if duid else None
        try:
            order = ip_address(address)
        except ValueError:
            continue
        known = (None if part in (None, "*") else part for part in (name, client_id))
        found.append(((order.version, int(order)), Lease(int(expires), mac, str(order), *known)))
    return tuple(lease for _, lease in sorted(found, key=lambda each: each[0]))
