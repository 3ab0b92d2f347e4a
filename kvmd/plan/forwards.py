"""Port forwards: which of the declared ones can be had, against the guests and the host's own servers. Pure.

A forward whose guest, address or port is not there is left out of the rules and told as a problem: it must never take
a port away from a program of the host, nor lead to whoever happens to have an address.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_interface

from kvmd.actions import Problem
from kvmd.config.guest import Guest
from kvmd.config.network import Forward, Network
from kvmd.facts import Facts, Listener

# Unconnected UDP sockets above this are mostly clients waiting for answers (ip(7), ip_local_port_range).
_EPHEMERAL = 32768
_WILDCARDS = frozenset({"0.0.0.0", "::"})


@dataclass(frozen=True, slots=True)
class Opening:
    """One forward that is to be: from the host's address (None: any of its own) and port to a guest's."""

    network: str
    name: str
    protocol: str
    address: str | None
    port: int
    guest: str
    guest_address: str
    guest_port: int


def guest_address(guest: Guest, network: str) -> IPv4Address | None:
    """The fixed address of a guest on this network, its first NIC's that has one."""
    return next((nic.ipv4 for nic in guest.nic.values() if nic.network == network and nic.ipv4), None)


def plan_forwards(
    networks: Mapping[str, Network], guests: Mapping[str, Guest], facts: Facts
) -> tuple[tuple[Opening, ...], tuple[Problem, ...]]:
    """Forwards that can be had, and why others cannot. No guest is kept from starting for one."""
    openings: list[Opening] = []
    problems: list[Problem] = []
    local = {str(ip_interface(text).ip) for link in facts.links for text in link.addresses}
    for network, config in sorted(networks.items()):
        for name, wish in sorted(config.forward.items()):
            subject = f"network {network}"
            opening = _opening(network, name, wish, guests)
            if isinstance(opening, str):
                problems.append(Problem(subject, f"forward {name}: {opening}", f"see networks.d/{network}.toml"))
                continue
            taken = next((each for each in facts.listeners if _takes(each, opening)), None)
            if taken is not None:
                where = f"{taken.protocol} port {taken.port} of {taken.address}"
                hint = f"ss -lnp 'sport = :{taken.port}'; stop that program, or choose another port"
                problems.append(
                    Problem(subject, f"forward {name}: a program of the host listens on {where}; it keeps it", hint)
                )
                continue
            openings.append(opening)
            if opening.address and opening.address not in local:
                message = f"forward {name}: no interface of this host has {opening.address}; nothing will arrive"
                problems.append(Problem(subject, message, f"see forward.{name}.listen in networks.d/{network}.toml"))
    return tuple(openings), tuple(problems)


def _opening(network: str, name: str, wish: Forward, guests: Mapping[str, Guest]) -> Opening | str:
    guest = guests.get(wish.to.guest)
    if guest is None:
        return f"guest {wish.to.guest} is not declared, or its file is not in order"
    address = guest_address(guest, network)
    if address is None:
        return f"guest {wish.to.guest} has no fixed address on this network (ipv4 in its [nic.NAME])"
    return Opening(
        network=network,
        name=name,
        protocol=wish.protocol,
        address=str(wish.listen.address) if wish.listen.address else None,
        port=wish.listen.port,
        guest=wish.to.guest,
        guest_address=str(address),
        guest_port=wish.to.port,
    )


def _takes(listener: Listener, way: Opening) -> bool:
    """Whether the forward would take packets away from the listener."""
    if (listener.protocol, listener.port) != (way.protocol, way.port):
        return False
    if way.protocol == "udp" and way.port >= _EPHEMERAL:
        return False
    if listener.address.startswith(("127.", "::1")):
        return False
    return way.address is None or listener.address in _WILDCARDS or listener.address == way.address
