"""The methods about networks: the declared ones against what is plugged in, and what their servers gave out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from kvmd.actions import vlans_text
from kvmd.config.network import Network, bridge_name
from kvmd.errors import NotFound
from kvmd.facts import Facts, Link
from kvmd.manager import Manager
from kvmd.plan.dnsmasq import pool6
from kvmd.plan.links import tap_alias
from kvmd.rpc import network_results as shapes
from kvmd.rpc.registry import Call, Handler, NoParams, Registry


class NetworkMethods:
    """Answers network.*."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def add_to(self, registry: Registry) -> None:
        """Register all of them."""
        table: tuple[tuple[str, str, type[BaseModel], type[BaseModel], Handler[Any]], ...] = (
            ("network.list", "viewer", NoParams, shapes.NetworkList, self.network_list),
            ("network.show", "viewer", shapes.NetworkParams, shapes.NetworkDetail, self.network_show),
            ("network.leases", "viewer", shapes.LeasesParams, shapes.LeaseList, self.network_leases),
            ("network.confirm", "admin", shapes.NetworkParams, shapes.Confirmed, self.network_confirm),
        )
        for name, role, params, result, handler in table:
            registry.method(name, role=role, params=params, result=result)(handler)

    async def network_list(self, _params: NoParams, _call: Call) -> shapes.NetworkList:
        """All declared networks and whether they are there"""
        facts, problems = await self._look()
        return shapes.NetworkList(
            networks=tuple(
                self._summary(name, network, facts, problems.get(name, ()))
                for name, network in sorted(self._networks().items())
            )
        )

    async def network_show(self, params: shapes.NetworkParams, _call: Call) -> shapes.NetworkDetail:
        """All about one network: who is on it, what it gives out, what is wrong with it"""
        network = self._known(params.name)
        facts, problems = await self._look()
        name, about = params.name, network.network
        summary = self._summary(name, network, facts, problems.get(name, ()))
        return shapes.NetworkDetail(
            **summary.model_dump(),
            description=about.description or None,
            mtu=about.mtu,
            stp=about.stp,
            vlan_filtering=about.vlan_filtering,
            guests_isolated=about.guests_isolated,
            uplink=network.uplink.interface if network.uplink else None,
            dhcp=_pools(network),
            domain=network.dns.domain,
            routes=_routes(network),
            ports_declared=tuple(self._ports(name, facts)),
            reservations=tuple(
                shapes.NetworkReservation(name=key, mac=one.mac, ipv4=_text(one.ipv4), ipv6=_text(one.ipv6))
                for key, one in sorted(network.reservation.items())
            ),
            problems=problems.get(name, ()),
        )

    async def network_leases(self, params: shapes.LeasesParams, _call: Call) -> shapes.LeaseList:
        """The addresses that DHCP servers have given out and that are still held"""
        names = [params.name] if params.name else sorted(self._networks())
        if params.name:
            self._known(params.name)
        now = self._manager.services.now()
        owners = {mac: guest for (guest, _), mac in self._manager.services.macs().items()}
        return shapes.LeaseList(
            leases=tuple(
                shapes.Lease(
                    network=name,
                    address=lease.address,
                    mac=lease.mac,
                    name=lease.name,
                    guest=owners.get(lease.mac or ""),
                    expires=lease.expires or None,
                )
                for name in names
                for lease in self._manager.leases(name)
                if not lease.expires or lease.expires > now
            )
        )

    async def network_confirm(self, params: shapes.NetworkParams, call: Call) -> shapes.Confirmed:
        """All is well with the NIC in this network's bridge: it stays"""
        self._known(params.name)
        changed = self._manager.confirm_uplink(params.name, call.actor)
        return shapes.Confirmed(network=params.name, changed=changed)

    # ---- what is behind them

    def _networks(self) -> Mapping[str, Network]:
        return self._manager.services.loaded.desired.networks

    def _known(self, name: str) -> Network:
        network = self._networks().get(name)
        if network is None:
            raise NotFound(f"no network is called {name}", hint="kvmd-cli network list")
        return network

    async def _look(self) -> tuple[Facts, dict[str, tuple[str, ...]]]:
        """The host, and the problems of each network as a plan has them."""
        facts, plan = await self._manager.look()
        found: dict[str, tuple[str, ...]] = {}
        for problem in plan.problems:
            kind, _, name = problem.subject.partition(" ")
            if kind == "network":
                text = problem.message + (f" ({problem.hint})" if problem.hint else "")
                found[name] = (*found.get(name, ()), text)
        return facts, found

    def _summary(self, name: str, network: Network, facts: Facts, problems: tuple[str, ...]) -> shapes.NetworkSummary:
        bridge = bridge_name(name, network)
        there = any(link.name == bridge and link.kind == "bridge" for link in facts.links)
        addresses = [str(config.address) for config in (network.ipv4, network.ipv6) if config]
        trial = next((one for one in facts.uplinks if one.network == name), None) if network.uplink else None
        return shapes.NetworkSummary(
            name=name,
            mode=network.network.mode,
            bridge=bridge,
            state="absent" if not there else "degraded" if problems else "up",
            addresses=tuple(addresses),
            ports=sum(1 for link in facts.links if (link.alias or "").startswith(tap_alias(name, "", "")[:-1])),
            uplink_state=trial.state if trial else None,
        )

    def _ports(self, name: str, facts: Facts) -> list[shapes.NetworkPort]:
        by_alias: dict[str | None, Link] = {link.alias: link for link in facts.links}
        macs = self._manager.services.macs()
        found = []
        for guest, config in sorted(self._manager.services.loaded.desired.guests.items()):
            for nic, table in sorted(config.nic.items()):
                if table.network != name:
                    continue
                link = by_alias.get(tap_alias(name, guest, nic))
                found.append(
                    shapes.NetworkPort(
                        guest=guest,
                        nic=nic,
                        mac=table.mac or macs.get((guest, nic)),
                        link=link.name if link else None,
                        vlans=vlans_text(link.vlans) if link and link.vlans else None,
                        ipv4=_text(table.ipv4),
                        ipv6=_text(table.ipv6),
                    )
                )
        return found


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _pools(network: Network) -> tuple[str, ...]:
    pools = []
    if network.ipv4 and network.ipv4.dhcp:
        pools.append("-".join(map(str, network.ipv4.dhcp.range)))
    if network.ipv6 and network.ipv6.mode == "dhcp":
        pools.append("-".join(map(str, pool6(network.ipv6.address))))
    return tuple(pools)


def _routes(network: Network) -> tuple[str, ...]:
    if network.network.mode != "routed":
        return ()
    return tuple(str(config.address.network) for config in (network.ipv4, network.ipv6) if config)
