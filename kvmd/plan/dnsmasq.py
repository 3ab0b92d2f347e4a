"""The DHCP and DNS server of one network: the text of its configuration, and its lease file read. Pure.

Options are those of dnsmasq(8), 2.90. Nothing in the text depends on where kvmd keeps its files: paths, user and log
are given on the command line (`effects.dnsmasq.dnsmasq_argv`), so the text is what the plan compares.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvmd.config.network import Network, bridge_name

HOST_RESOLVERS = "/etc/resolv.conf"
_LEASE = re.compile(r"(\d+) ([0-9A-Fa-f:]{17}) (\d+\.\d+\.\d+\.\d+) (\S+)(?: (\S+))?")


@dataclass(frozen=True, slots=True)
class Host:
    """One NIC that is known by name: a guest's, or a [reservation.NAME]."""

    name: str
    mac: str
    ipv4: str | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """One line of dnsmasq's lease file."""

    expires: int  # seconds since 1970, 0 = never
    mac: str
    ipv4: str
    name: str | None
    client_id: str | None


def wants_dnsmasq(network: Network) -> bool:
    """Whether this network has a DHCP or DNS server at all."""
    if network.network.mode == "bridge" or network.ipv4 is None:
        return False
    return network.ipv4.dhcp is not None or network.dns.enabled


def config_sha256(config: str) -> str:
    """What facts.Dnsmasq.config_sha256 is compared with."""
    return hashlib.sha256(config.encode()).hexdigest()


def build_config(name: str, network: Network, hosts: Iterable[Host]) -> str:
    """The configuration of the server of network `name`; `hosts` in any order."""
    return "".join(f"{line}\n" for line in _lines(name, network, tuple(sorted(hosts, key=_host_order))))


def _host_order(host: Host) -> tuple[str, str, str]:
    return host.name, host.mac, host.ipv4 or ""


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
    if network.ipv4 is not None and network.ipv4.dhcp is not None:
        yield from _dhcp(network, hosts)


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
        if host.ipv4:
            full = f"{host.name}.{domain}," if domain else ""
            yield f"host-record={full}{host.name},{host.ipv4}"


def _dhcp(network: Network, hosts: tuple[Host, ...]) -> Iterator[str]:
    assert network.ipv4 is not None and network.ipv4.dhcp is not None
    dhcp, subnet = network.ipv4.dhcp, network.ipv4.address.network
    first, last = dhcp.range
    yield "dhcp-authoritative"
    # Names come from the files alone: a guest must not call itself by its neighbour's name.
    yield "dhcp-ignore-names"
    # An address is offered at once, not after 3 s of asking who has it: every MAC on the bridge is known here.
    yield "no-ping"
    yield "quiet-dhcp"
    yield f"dhcp-lease-max={int(last) - int(first) + 1 + sum(1 for host in hosts if host.ipv4)}"
    yield f"dhcp-range={first},{last},{subnet.netmask},{int(dhcp.lease)}"
    if network.network.mode == "isolated":
        yield "dhcp-option=option:router"  # without a value: none is sent
    if not network.dns.enabled:
        yield ",".join(("dhcp-option=option:dns-server", *map(str, network.dns.upstream)))
    if network.network.mtu != 1500:
        yield f"dhcp-option=option:mtu,{network.network.mtu}"
    for host in hosts:
        yield ",".join(filter(None, (f"dhcp-host={host.mac}", host.ipv4, host.name)))


def parse_leases(text: str) -> tuple[Lease, ...]:
    """The IPv4 leases of a dnsmasq lease file, by address. Lines of any other form are passed over."""
    found = []
    for line in text.splitlines():
        match = _LEASE.fullmatch(line)
        if match:
            name, client_id = (None if part in (None, "*") else part for part in match.group(4, 5))
            found.append(Lease(int(match[1]), match[2].lower(), match[3], name, client_id))
    return tuple(sorted(found, key=lambda lease: tuple(int(part) for part in lease.ipv4.split("."))))
