"""[uplink]: a NIC that carries no address of the host becomes a port of the bridge kvmd makes over it. Pure.

The management NIC stays the distribution's: what would cut the host off is refused with the reason. A first time is on
trial, and is undone unless somebody says within `uplink.rollback` that all is well; what was kept once is a
requirement from then on and is put back whenever it is missing.
"""

from __future__ import annotations

from kvmd.actions import AttachUplink, DetachUplink, Disruption, SetPortVlans
from kvmd.config.network import Network, bridge_name
from kvmd.facts import Facts, Link, UplinkTrial
from kvmd.plan.links import ALIAS
from kvmd.plan.networkworld import World
from kvmd.plan.vlans import trunk


def plan_uplink(world: World, name: str, network: Network) -> bool:
    """Plans the NIC of a network; False if guests must not start on it. Without [uplink] there is nothing to do."""
    if network.uplink is None:
        return True
    bridge, interface = bridge_name(name, network), network.uplink.interface
    link = world.links.get(interface)
    if link is None:
        world.problem(name, f'uplink "{interface}" does not exist', f"name a NIC in networks.d/{name}.toml")
        return False
    if link.mtu < network.network.mtu:
        message = f"uplink {interface} has mtu {link.mtu}, the network {network.network.mtu}: larger frames are lost"
        world.problem(name, message, f"ip link set {interface} mtu {network.network.mtu}", blocks=False)
    trial = next((one for one in world.facts.uplinks if _same(one, name, interface, bridge)), None)
    if link.master == bridge:
        return _attached(world, name, network, link, trial)
    reason = unfit(link, world.facts)
    if reason:
        hint = "take a NIC that carries nothing of the host's, or join a bridge the distribution makes over this one"
        world.problem(name, f'"{interface}" stays as it is: {reason}', hint)
        return False
    if trial and trial.state == "undone":
        message = f"{interface} was taken out of {bridge} again: nobody confirmed it within {network.uplink.rollback}"
        world.problem(name, message, f"kvmd-cli apply, then kvmd-cli network confirm {name}", blocks=False)
        return True
    _attach(world, name, network, link, kept=trial is not None and trial.state == "kept")
    return True


def _same(trial: UplinkTrial, name: str, interface: str, bridge: str) -> bool:
    return (trial.network, trial.interface, trial.bridge) == (name, interface, bridge)


def _attach(world: World, name: str, network: Network, link: Link, *, kept: bool) -> None:
    assert network.uplink is not None
    world.actions.append(
        AttachUplink(
            network=name,
            bridge=bridge_name(name, network),
            interface=link.name,
            was_up=link.up,
            rollback_s=0.0 if kept else float(network.uplink.rollback),
            why=f"networks.d/{name}.toml: uplink.interface" + (", confirmed before" if kept else ""),
            disruption=Disruption.NONE if kept else Disruption.NETWORK,
        )
    )


def _attached(world: World, name: str, network: Network, link: Link, trial: UplinkTrial | None) -> bool:
    bridge = bridge_name(name, network)
    if not link.up:
        _attach(world, name, network, link, kept=True)
    if trial and trial.state == "trial":
        message = f"{link.name} is in {bridge} on trial and is taken out again unless it is confirmed"
        world.problem(name, message, f"kvmd-cli network confirm {name}", blocks=False)
    there = world.links.get(bridge)
    if network.network.vlan_filtering and there and there.default_pvid is not None and link.vlans is not None:
        wanted = trunk(there.default_pvid)
        if link.vlans != wanted:
            why = f"networks.d/{name}.toml: the uplink carries all VLANs"
            world.actions.append(SetPortVlans(port=link.name, bridge=bridge, vlans=wanted, old=link.vlans, why=why))
    return True


def unfit(link: Link, facts: Facts) -> str | None:
    """Why a NIC cannot be taken: what of the host would be cut off. None if nothing would."""
    if link.name == "lo" or link.kind == "bridge":
        return "a bridge cannot be a port of a bridge" if link.kind == "bridge" else "it is the loopback"
    if (link.alias or "").startswith(ALIAS):
        return "it is a port of a guest"
    if link.master:
        return f"it is a port of {link.master}"
    if link.addresses:
        return f"it carries the host's address {link.addresses[0]}, which would go deaf"
    if link.name in facts.default_links:
        return "the host's default route goes through it"
    above = sorted(other.name for other in facts.links if other.parent == link.name)
    if above:
        return f"{', '.join(above)} stands on it and would go deaf"
    return None


def plan_detach(world: World) -> frozenset[str]:
    """NICs kvmd attached in this boot to a bridge that no file puts them into any more; returns those that leave."""
    leaving = set()
    wanted = {
        (network.uplink.interface, bridge_name(name, network))
        for name, network in world.networks.items()
        if network.uplink is not None
    }
    for entry in world.facts.journal:
        if entry.kind != "uplink" or (entry.subject, entry.new) in wanted:
            continue
        link = world.links.get(entry.subject)
        if link is not None and link.master == entry.new:
            others = [port for port in world.ports.get(entry.new, ()) if port != entry.subject]
            why = "no network has it as its uplink any more"
            leaving.add(link.name)
            world.actions.append(
                DetachUplink(
                    bridge=entry.new,
                    interface=entry.subject,
                    was_up=entry.original == "up",
                    why=why,
                    disruption=Disruption.NETWORK if others else Disruption.NONE,
                )
            )
    return frozenset(leaving)
