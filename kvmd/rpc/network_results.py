"""What the API gives about networks, as `results.py` has it for the rest."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvmd.rpc.results import GuestName, Shape

NetworkState = Literal["up", "degraded", "absent"]


class NetworkParams(Shape):
    """One network."""

    name: GuestName


class LeasesParams(Shape):
    """One network, or all."""

    name: GuestName | None = Field(default=None, description="null: all networks")


class NetworkSummary(Shape):
    """One line of a list of networks."""

    name: str
    mode: str
    bridge: str
    state: NetworkState = Field(description="degraded: something asked for cannot be had, see problems of network.show")
    addresses: tuple[str, ...] = Field(description="of the host on it, as declared")
    ports: int = Field(description="guests' NICs that are plugged in now")
    uplink_state: Literal["trial", "kept", "undone"] | None = Field(description="of [uplink]; null: none, or not yet")


class NetworkList(Shape):
    """All declared networks, by name."""

    networks: tuple[NetworkSummary, ...]


class NetworkPort(Shape):
    """A guest's NIC on a network, plugged in or not."""

    guest: str
    nic: str
    mac: str | None = Field(description="null: the guest was never started")
    link: str | None = Field(description="the TAP; null: not plugged in")
    vlans: str | None = Field(description="what the port carries now; null: the bridge does not filter, or no port")
    ipv4: str | None
    ipv6: str | None


class NetworkReservation(Shape):
    """A machine that is not a guest."""

    name: str
    mac: str
    ipv4: str | None
    ipv6: str | None


class NetworkDetail(NetworkSummary):
    """All about one network."""

    description: str | None
    mtu: int
    stp: bool
    vlan_filtering: bool
    guests_isolated: bool
    uplink: str | None = Field(description="the NIC of [uplink]")
    dhcp: tuple[str, ...] = Field(description="the pools, FIRST-LAST")
    domain: str | None
    routes: tuple[str, ...] = Field(description="a routed network: what the upstream router has to send to this host")
    ports_declared: tuple[NetworkPort, ...]
    reservations: tuple[NetworkReservation, ...]
    problems: tuple[str, ...]


class Lease(Shape):
    """An address a DHCP server has given out."""

    network: str
    address: str
    mac: str | None = Field(description="null: an IPv6 client that does not tell")
    name: str | None
    guest: str | None = Field(description="whose NIC has that MAC")
    expires: int | None = Field(description="null: never")


class LeaseList(Shape):
    """Leases by network, IPv4 before IPv6, by address; expired ones are left out."""

    leases: tuple[Lease, ...]


class Confirmed(Shape):
    """Whether that needed doing."""

    network: str
    changed: bool
