"""What files mean for each other: two guests with one image, a NIC on a network that is not there, a cycle.

Guests and networks are admitted one after the other, the settled ones first (the caller's order); one that
clashes with what was admitted before is refused, and the message names both files. So a new copy of a guest
never puts the guest it was copied from in the wrong. Pure.
"""

from __future__ import annotations

import difflib
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from kvmd.config.daemon import Daemon
from kvmd.config.devices import Nic
from kvmd.config.faults import Complaint
from kvmd.config.guest import Guest
from kvmd.config.lines import KeyPath
from kvmd.config.network import Network, bridge_name, makes_bridge, overlap
from kvmd.config.network_rules import Address, address_fault, unserved
from kvmd.units import Size


@dataclass(frozen=True, slots=True)
class _Claim:
    """Something only one may have, and where it says so."""

    what: str
    value: object
    path: KeyPath
    shared: bool = False  # several may share it as long as all of them do


@dataclass(slots=True)
class Networks:
    """The networks admitted so far."""

    admitted: dict[str, Network] = field(default_factory=dict)

    def refuse(self, name: str, network: Network) -> list[Complaint]:
        """Why it cannot be beside those admitted; empty if it can."""
        return [
            complaint
            for other, there in self.admitted.items()
            for complaint in _networks_clash(name, network, other, there)
        ]


def _networks_clash(name: str, network: Network, other: str, there: Network) -> Iterator[Complaint]:
    bridge = bridge_name(name, network)
    if bridge == bridge_name(other, there):
        yield Complaint(("network", "bridge"), f'"{bridge}" is the bridge of networks.d/{other}.toml too')
    if network.uplink and there.uplink and network.uplink.interface == there.uplink.interface:
        text = f'"{network.uplink.interface}" is the uplink of networks.d/{other}.toml too'
        yield Complaint(("uplink", "interface"), text)
    if network.ipv4 is not None and there.ipv4 is not None:
        mine, theirs = network.ipv4.address.network, there.ipv4.address.network
        if mine.overlaps(theirs):
            yield Complaint(("ipv4", "address"), f"{mine} overlaps {theirs} of networks.d/{other}.toml")
    if network.ipv6 is not None and there.ipv6 is not None:
        own, others = network.ipv6.address.network, there.ipv6.address.network
        if own.overlaps(others):
            yield Complaint(("ipv6", "address"), f"{own} overlaps {others} of networks.d/{other}.toml")
    for key, wish in network.forward.items():
        for taken, theirs_too in there.forward.items():
            if overlap(wish, theirs_too):
                where = f"networks.d/{other}.toml (forward.{taken})"
                yield Complaint(
                    ("forward", key, "listen"), f"{wish.protocol} port {wish.listen.port} belongs to {where}"
                )


def forwards_astray(
    network: str, config: Network, guests: Mapping[str, Guest], known: frozenset[str]
) -> Iterator[Complaint]:
    """Forwards that lead to no guest, or to one without a fixed address. `known`: names that have a file."""
    for name, wish in config.forward.items():
        path = ("forward", name, "to")
        guest = guests.get(wish.to.guest)
        if wish.to.guest not in known:
            yield _unknown(path, "guest", wish.to.guest, known, "guests.d")
        elif guest is not None and not any(nic.network == network for nic in guest.nic.values()):
            yield Complaint(path, f"guest {wish.to.guest} has no NIC on network {network}")
        elif guest is not None and not any(nic.network == network and nic.ipv4 for nic in guest.nic.values()):
            text = f"guest {wish.to.guest} has no fixed address on network {network}"
            yield Complaint(path, text, f"give its NIC an ipv4 in guests.d/{wish.to.guest}.toml")


@dataclass(slots=True)
class Guests:
    """The guests admitted so far, and what they were admitted among.

    `known_networks` and `known_guests` are the names that have a file, whether or not it is in order.
    """

    networks: Mapping[str, Network]
    known_networks: frozenset[str]
    known_guests: frozenset[str]
    _claims: dict[tuple[str, object], tuple[str, _Claim]] = field(default_factory=dict)
    _after: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _memory_paths: dict[str, tuple[str, int | None]] = field(default_factory=dict)  # of what pages it is, by whom

    def refuse(self, name: str, guest: Guest) -> list[Complaint]:
        """Why it cannot be beside those admitted; empty if it can."""
        return [*self._clashes(guest), *self._memory_path(guest), *self._networks_of(guest), *self._order(name, guest)]

    def admit(self, name: str, guest: Guest) -> None:
        """Counts its claims from now on."""
        for claim in _claims(guest):
            self._claims.setdefault((claim.what, claim.value), (name, claim))
        memory = guest.memory
        if memory.path is not None:
            self._memory_paths.setdefault(posixpath.normpath(memory.path), (name, memory.hugepage_size))
        self._after[name] = guest.start.after

    def _clashes(self, guest: Guest) -> Iterator[Complaint]:
        for claim in _claims(guest):
            holder = self._claims.get((claim.what, claim.value))
            if holder is not None and not (claim.shared and holder[1].shared):
                shown = claim.value[1] if isinstance(claim.value, tuple) else claim.value
                where = f"guests.d/{holder[0]}.toml ({'.'.join(holder[1].path)})"
                yield Complaint(claim.path, f"{claim.what} {shown} belongs to {where}")

    def _memory_path(self, guest: Guest) -> Iterator[Complaint]:
        """One path is one file system: a hugetlbfs of one page size, or none."""
        memory = guest.memory
        holder = self._memory_paths.get(posixpath.normpath(memory.path)) if memory.path else None
        if holder is not None and holder[1] != memory.hugepage_size:
            shown = Size(holder[1]) if holder[1] else "no hugepages"
            text = f'"{memory.path}" is of {shown} in guests.d/{holder[0]}.toml (memory.path)'
            yield Complaint(("memory", "path"), text, "choose another directory")

    def _networks_of(self, guest: Guest) -> Iterator[Complaint]:
        for name, nic in guest.nic.items():
            path = ("nic", name, "network")
            if nic.network is None:
                continue
            if nic.network not in self.known_networks:
                yield _unknown(path, "network", nic.network, self.known_networks, "networks.d")
            elif (network := self.networks.get(nic.network)) is not None:
                yield from _vlans(("nic", name), nic, nic.network, network)
                for key, address in (("ipv4", nic.ipv4), ("ipv6", nic.ipv6)):
                    if address is not None:
                        yield from _address(("nic", name, key), address, nic.network, network)
            if nic.mac is not None and nic.network in self.networks:
                yield from _reserved_mac(("nic", name, "mac"), nic.mac, nic.network, self.networks[nic.network])

    def _order(self, name: str, guest: Guest) -> Iterator[Complaint]:
        for other in guest.start.after:
            if other not in self.known_guests:
                yield _unknown(("start", "after"), "guest", other, self.known_guests, "guests.d")
            elif (way := self._way(other, name)) is not None:
                circle = " -> ".join((name, *way))
                files = ", ".join(f"guests.d/{step}.toml" for step in dict.fromkeys(way) if step != name)
                text = f"a circle: {circle}" if files else "a guest cannot start after itself"
                yield Complaint(("start", "after"), text, f"see {files}" if files else None)
                return

    def _way(self, start: str, goal: str) -> tuple[str, ...] | None:
        """The shortest chain of `after` from `start` to `goal` among those admitted."""
        ways: list[tuple[str, ...]] = [(start,)]
        seen = {start}
        for way in ways:
            if way[-1] == goal:
                return way
            for following in self._after.get(way[-1], ()):
                if following not in seen:
                    seen.add(following)
                    ways.append((*way, following))
        return None


def _claims(guest: Guest) -> Iterator[_Claim]:
    if guest.guest.uuid is not None:
        yield _Claim("uuid", guest.guest.uuid, ("guest", "uuid"))
    for name, disk in guest.disk.items():
        file = posixpath.normpath(disk.file)
        yield _Claim("image", file, ("disk", name, "file"), shared=not disk.writable or disk.shared)
    for name, nic in guest.nic.items():
        if nic.mac is not None:
            yield _Claim("MAC address", nic.mac, ("nic", name, "mac"))
        if nic.ifname is not None:
            yield _Claim("TAP", nic.ifname, ("nic", name, "ifname"))
        for key, address in (("ipv4", nic.ipv4), ("ipv6", nic.ipv6)):
            if address is not None and nic.network is not None:
                yield _Claim("address", (nic.network, address), ("nic", name, key))
        for forwarding in nic.hostfwd:
            yield _Claim("host port", forwarding.partition("-")[0], ("nic", name, "hostfwd"))


def _unknown(path: KeyPath, what: str, name: str, known: Iterable[str], directory: str) -> Complaint:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"there is no {directory}/{name}.toml"
    return Complaint(path, f'unknown {what} "{name}"', hint)


def _vlans(path: KeyPath, nic: Nic, name: str, network: Network) -> Iterator[Complaint]:
    key = "vlan" if nic.vlan is not None else "vlans"
    if nic.vlan is None and not nic.vlans:
        return
    where = f"networks.d/{name}.toml"
    if not network.network.vlan_filtering:
        text = "nothing would keep the VLAN apart: the network has vlan_filtering = false"
        yield Complaint((*path, key), text, f"vlan_filtering = true in {where}")
    elif makes_bridge(network) and (network.ipv4 or network.ipv6) and nic.vlan != 1 and nic.native_vlan != 1:
        text = "the network's gateway, DHCP and DNS are in VLAN 1, untagged: this port does not reach them"
        yield Complaint((*path, key), text, f"see {where}", severity="warning")


def _address(path: KeyPath, address: Address, name: str, network: Network) -> Iterator[Complaint]:
    where = f"networks.d/{name}.toml"
    if (text := address_fault(network, address)) is not None:
        yield Complaint(path, text, f"see {where}")
    if unserved(network, address) is not None:
        table = "[ipv4.dhcp]" if address.version == 4 else '[ipv6] with mode = "dhcp"'
        text = f"nobody hands the address out: the network has no {table}"
        yield Complaint(path, text, f"see {where}", severity="warning")
    for reserved, entry in network.reservation.items():
        if address in (entry.ipv4, entry.ipv6):
            yield Complaint(path, f"address {address} belongs to {where} (reservation.{reserved})")


def _reserved_mac(path: KeyPath, mac: str, name: str, network: Network) -> Iterator[Complaint]:
    for reserved, entry in network.reservation.items():
        if entry.mac == mac:
            yield Complaint(path, f"MAC address {mac} belongs to networks.d/{name}.toml (reservation.{reserved})")


def outside_roots(daemon: Daemon, guest: Guest) -> Iterator[Complaint]:
    """Warnings for images that lie under no declared root: kvmd will not open them."""
    roots = [posixpath.normpath(root) for root in (*daemon.storage.roots, daemon.storage.images)]
    for name, disk in guest.disk.items():
        file = posixpath.normpath(disk.file)
        if not any(file == root or file.startswith(root.rstrip("/") + "/") for root in roots):
            text = f'"{disk.file}" lies under none of storage.roots and will not be opened'
            yield Complaint(("disk", name, "file"), text, "add its directory in kvmd.toml", severity="warning")
