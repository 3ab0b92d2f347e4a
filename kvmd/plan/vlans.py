"""VLANs of bridge ports: which each guest's port shall carry, and what stands against it. Pure.

Documentation/networking/bridge.rst, "VLAN"; bridge(8). A port's VLANs are a fence between guests, so they are
re-asserted like the rules. kvmd switches filtering on on bridges it makes; on others it says what to type.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

from kvmd.actions import SetPortVlans
from kvmd.config.devices import Nic
from kvmd.config.network import Network, bridge_name, makes_bridge
from kvmd.facts import Link, VlanRange
from kvmd.plan.links import ALIAS
from kvmd.plan.networkworld import World

_PVID, _UNTAGGED, _RANGE_BEGIN, _RANGE_END = 0x2, 0x4, 0x8, 0x10  # linux/if_bridge.h, BRIDGE_VLAN_INFO_*
MAX_VLAN = 4094  # IEEE 802.1Q, 9.6: 0 and 4095 are not VLANs
DEFAULT_PVID = 1  # of a bridge nobody told otherwise (net/bridge/br_vlan.c, br_vlan_init)
NO_KERNEL = "this kernel has no VLAN filtering on bridges (CONFIG_BRIDGE_VLAN_FILTERING)"


@dataclass(frozen=True, slots=True)
class VlanWish:
    """The VLAN keys of one NIC: data, for they are written down with a guest's start."""

    vlan: int | None
    vlans: tuple[int, ...]
    native_vlan: int | None

    @classmethod
    def of(cls, nic: Nic) -> VlanWish:
        """What its file says."""
        return cls(nic.vlan, nic.vlans, nic.native_vlan)


def wanted_vlans(nic: Nic | VlanWish, default_pvid: int) -> tuple[VlanRange, ...]:
    """What the port of this NIC shall carry; without keys what the bridge gives to any port."""
    if nic.vlan is not None:
        return (VlanRange(nic.vlan, nic.vlan, pvid=True, untagged=True),)
    if not nic.vlans:
        return (VlanRange(default_pvid, default_pvid, pvid=True, untagged=True),) if default_pvid else ()
    native = nic.native_vlan
    tagged = [VlanRange(vid, vid) for vid in nic.vlans if vid != native]
    return merged([*tagged, *([VlanRange(native, native, pvid=True, untagged=True)] if native else [])])


def trunk(default_pvid: int) -> tuple[VlanRange, ...]:
    """All VLANs, for the NIC that leads out: the bridge's default one without a tag."""
    tagged = [VlanRange(vid, vid) for vid in range(1, MAX_VLAN + 1) if vid != default_pvid]
    native = [VlanRange(default_pvid, default_pvid, pvid=True, untagged=True)] if default_pvid else []
    return merged([*tagged, *native])


def merged(ranges: Iterable[VlanRange]) -> tuple[VlanRange, ...]:
    """Sorted, with neighbours that are alike in one: two sets are the same exactly when these are."""
    found: list[VlanRange] = []
    for each in sorted(ranges):
        last = found[-1] if found else None
        if last and last.last + 1 >= each.first and (last.pvid, last.untagged) == (each.pvid, each.untagged):
            found[-1] = VlanRange(last.first, max(last.last, each.last), pvid=last.pvid, untagged=last.untagged)
        else:
            found.append(each)
    return tuple(found)


def without(part: VlanRange, kept: Set[int]) -> tuple[VlanRange, ...]:
    """What of a range is not among `kept`."""
    return merged(VlanRange(vid, vid) for vid in range(part.first, part.last + 1) if vid not in kept)


def ranges_of(entries: Iterable[tuple[int, int]]) -> tuple[VlanRange, ...]:
    """The kernel's (vid, flags) entries, of which two may stand for a range; sorted and merged."""
    found, first = [], 0
    for vid, flags in entries:
        if flags & _RANGE_BEGIN:
            first = vid
            continue
        begin = first if flags & _RANGE_END else vid
        found.append(VlanRange(begin, vid, pvid=bool(flags & _PVID), untagged=bool(flags & _UNTAGGED)))
    return merged(found)


def entries_of(each: VlanRange) -> tuple[tuple[int, int], ...]:
    """A range as the kernel takes it."""
    flags = _PVID * each.pvid | _UNTAGGED * each.untagged
    if each.first == each.last:
        return ((each.first, flags),)
    return (each.first, flags | _RANGE_BEGIN), (each.last, flags | _RANGE_END)


def check_filtering(world: World, name: str, network: Network, link: Link | None) -> bool:
    """Whether the network's bridge keeps VLANs apart, or will; otherwise a problem that stops its guests."""
    if not network.network.vlan_filtering:
        return True
    if world.facts.vlan_filtering is False:
        hint = f"another kernel, or vlan_filtering = false in networks.d/{name}.toml and no VLANs"
        world.problem(name, NO_KERNEL, hint)
        return False
    if not makes_bridge(network) and link is not None and link.vlan_filtering is False:
        bridge = bridge_name(name, network)
        message = f'bridge "{bridge}" does not filter VLANs; kvmd does not change a bridge it did not make'
        hint = f"ip link set {bridge} type bridge vlan_filtering 1 (and in what makes it; what has no tag is in VLAN 1)"
        world.problem(name, message, hint)
        return False
    return True


def plan_ports(world: World, blocked: set[str]) -> None:
    """Every guest's TAP that is plugged in carries what its file says; a VLAN that leads nowhere is told."""
    for name, network in sorted(world.networks.items()):
        if not network.network.vlan_filtering or name in blocked:
            continue
        bridge = world.links.get(bridge_name(name, network))
        if bridge is None or bridge.default_pvid is None:
            continue
        for port, guest, nic in _ports(world, name, bridge.name):
            wanted = wanted_vlans(nic, bridge.default_pvid)
            if port.vlans is not None and port.vlans != wanted:
                why = f"guests.d/{guest}.toml: {_why(nic)}"
                world.actions.append(
                    SetPortVlans(port=port.name, bridge=bridge.name, vlans=wanted, old=port.vlans, why=why)
                )
        if not makes_bridge(network):
            _dead_ends(world, name, bridge)


def _ports(world: World, network: str, bridge: str) -> Iterator[tuple[Link, str, Nic]]:
    """TAPs of ours in that bridge, with the guest and the NIC they belong to as its file has it."""
    for port in world.ports.get(bridge, ()):
        link = world.links[port]
        mark, of, guest, nic = ((link.alias or "").split(":") + [""] * 4)[:4]
        config = world.guests.get(guest)
        if f"{mark}:" == ALIAS and of == network and config and nic in config.nic and link.kind == "tun":
            yield link, guest, config.nic[nic]


def _why(nic: Nic) -> str:
    if nic.vlan is not None:
        return f"vlan = {nic.vlan}"
    return f"vlans = {list(nic.vlans)}" if nic.vlans else "no VLAN of its own"


def _dead_ends(world: World, name: str, bridge: Link) -> None:
    """VLANs of guests that no other port of a foreign bridge carries: frames would go nowhere."""
    others = [
        port
        for port in (world.links[port] for port in world.ports.get(bridge.name, ()))
        if not (port.alias or "").startswith(ALIAS) and port.vlans is not None
    ]
    if not others:
        return
    carried = {vid for port in others for each in port.vlans or () for vid in range(each.first, each.last + 1)}
    wanted: dict[int, str] = {}
    for guest in sorted(world.on.get(name, ())):
        for nic in world.guests[guest].nic.values():
            if nic.network == name:
                for each in wanted_vlans(nic, bridge.default_pvid or 0):
                    wanted.setdefault(each.first, guest)
    for vid, guest in sorted(wanted.items()):
        if vid not in carried:
            port = others[0].name
            message = f"no other port of {bridge.name} carries VLAN {vid} of guest {guest}: it reaches only guests here"
            world.problem(name, message, f"bridge vlan add dev {port} vid {vid}", blocks=False)
