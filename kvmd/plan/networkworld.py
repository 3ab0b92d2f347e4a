"""What the planners of networks look at, gathered once, and where they put what they find. Data only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kvmd.actions import Action, Problem
from kvmd.config.guest import Guest
from kvmd.config.network import Network
from kvmd.facts import Facts, Link

Macs = Mapping[tuple[str, str], str]


@dataclass(frozen=True, slots=True)
class World:
    """The inputs, with what several steps look up."""

    networks: Mapping[str, Network]
    guests: Mapping[str, Guest]
    macs: Macs
    facts: Facts
    links: Mapping[str, Link]
    ports: Mapping[str, tuple[str, ...]]  # bridge -> names of its ports
    on: Mapping[str, frozenset[str]]  # network -> guests with a NIC on it
    actions: list[Action] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, network: str, message: str, hint: str | None, *, blocks: bool = True) -> None:
        guests = self.on.get(network, frozenset()) if blocks else frozenset()
        self.problems.append(Problem(f"network {network}", message, hint, guests))

    def nics(self) -> Iterator[tuple[str, str, str, str]]:
        """(guest, nic, network, mac) of every NIC on a network whose address is known."""
        for guest, config in sorted(self.guests.items()):
            for nic, table in sorted(config.nic.items()):
                mac = table.mac or self.macs.get((guest, nic))
                if table.network and mac:
                    yield guest, nic, table.network, mac.lower()


def look(networks: Mapping[str, Network], guests: Mapping[str, Guest], macs: Macs, facts: Facts) -> World:
    """The world of these inputs, with nothing planned yet."""
    ports: defaultdict[str, list[str]] = defaultdict(list)
    for link in facts.links:
        if link.master:
            ports[link.master].append(link.name)
    on: defaultdict[str, set[str]] = defaultdict(set)
    for name, guest in guests.items():
        for nic in guest.nic.values():
            if nic.network:
                on[nic.network].add(name)
    return World(
        networks=networks,
        guests=guests,
        macs=macs,
        facts=facts,
        links={link.name: link for link in facts.links},
        ports={bridge: tuple(sorted(names)) for bridge, names in ports.items()},
        on={network: frozenset(names) for network, names in on.items()},
    )
