"""VLANs of ports: what a file means, what the kernel says, and what has to be changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import Action, Disruption, EnsureBridge, Problem, SetPortVlans, vlans_text
from kvmd.config.devices import Nic
from kvmd.config.guest import Guest
from kvmd.config.network import Network
from kvmd.facts import Facts, Link, VlanRange
from kvmd.plan.links import bridge_alias, bridge_mac, tap_alias
from kvmd.plan.network import FORWARDING, FORWARDING6, plan_network
from kvmd.plan.vlans import entries_of, merged, ranges_of, trunk, wanted_vlans, without

LO = Link("lo", 1, up=True)
KVSRV = Link("kvsrv", 2, kind="bridge", mac=bridge_mac("kvsrv"), up=True, alias=bridge_alias("srv"), default_pvid=1)
KVSRV = replace(KVSRV, vlan_filtering=True, stp=False)
BR0 = Link("br0", 3, kind="bridge", mac="fc:00:00:00:00:01", up=True, default_pvid=1, vlan_filtering=True)
NIC0 = Link("enp3s0", 4, master="br0", up=True, vlans=(VlanRange(1, 1, pvid=True, untagged=True), VlanRange(10, 20)))
DEFAULT = (VlanRange(1, 1, pvid=True, untagged=True),)


def access(vid: int) -> tuple[VlanRange, ...]:
    return (VlanRange(vid, vid, pvid=True, untagged=True),)


def nic(**keys: Any) -> Nic:
    return Nic.model_validate({"network": "srv", **keys})


def tap(bridge: str, vlans: tuple[VlanRange, ...] | None, guest: str = "web") -> Link:
    return Link(f"kv-{guest}", 9, kind="tun", master=bridge, up=True, alias=tap_alias("srv", guest, "a"), vlans=vlans)


def plan(keys: dict[str, Any], *links: Link, joined: bool = False, can: bool | None = True) -> tuple[Any, Any]:
    about = {"mode": "bridge", "bridge": "br0"} if joined else {"mode": "isolated"}
    networks = {"srv": Network.model_validate({"network": {**about, "vlan_filtering": True}})}
    guests = {"web": Guest.model_validate({"memory": {"size": "64MiB"}, "nic": {"a": {"network": "srv", **keys}}})}
    facts = Facts(links=(LO, *links), knobs={FORWARDING: "1", FORWARDING6: "0"}, vlan_filtering=can)
    actions, problems = plan_network(networks, guests, {}, facts)
    ports: tuple[tuple[Action, ...], tuple[Problem, ...]] = (
        tuple(action for action in actions if isinstance(action, SetPortVlans | EnsureBridge)),
        problems,
    )
    return ports


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({}, "1 untagged"),
        ({"vlan": 10}, "10 untagged"),
        ({"vlans": (10, 20, 21, 22)}, "10, 20-22"),
        ({"vlans": (10, 20), "native_vlan": 11}, "10, 11 untagged, 20"),
    ],
)
def test_keys_become_vlans(keys: dict[str, Any], text: str) -> None:
    assert vlans_text(wanted_vlans(nic(**keys), 1)) == text


def test_a_bridge_without_a_default_vlan_gives_none() -> None:
    assert wanted_vlans(nic(), 0) == () and vlans_text(()) == "none"


def test_the_way_out_carries_all() -> None:
    assert vlans_text(trunk(1)) == "1 untagged, 2-4094" and vlans_text(trunk(0)) == "1-4094"
    assert vlans_text(trunk(7)) == "1-6, 7 untagged, 8-4094"


RANGES = st.builds(
    lambda first, length, pvid, untagged: VlanRange(first, min(first + length, 4094), pvid=pvid, untagged=untagged),
    st.integers(1, 4094), st.integers(0, 40), st.booleans(), st.booleans(),
)  # fmt: skip


def vids(ranges: tuple[VlanRange, ...]) -> dict[tuple[bool, bool], set[int]]:
    found: dict[tuple[bool, bool], set[int]] = {}
    for each in ranges:
        found.setdefault((each.pvid, each.untagged), set()).update(range(each.first, each.last + 1))
    return found


@given(st.lists(RANGES, max_size=8))
def test_merging_keeps_every_vlan_and_what_the_kernel_takes_it_gives_back(ranges: list[VlanRange]) -> None:
    one = merged(ranges)
    assert vids(one) == vids(tuple(ranges)) and merged(reversed(one)) == one
    assert ranges_of(entry for each in one for entry in entries_of(each)) == one


@given(RANGES, st.sets(st.integers(1, 4094), max_size=30))
def test_what_is_kept_is_cut_out_of_a_range(part: VlanRange, kept: set[int]) -> None:
    left = {vid for each in without(part, kept) for vid in range(each.first, each.last + 1)}
    assert left == set(range(part.first, part.last + 1)) - kept


def test_a_port_that_drifted_is_one_line() -> None:
    (action,), problems = plan({"vlan": 10}, KVSRV, tap("kvsrv", DEFAULT))
    assert action.line() == "~ port kv-web of kvsrv: VLANs 1 untagged -> 10 untagged" and problems == ()
    assert "guests.d/web.toml: vlan = 10" in action.why
    assert plan({"vlan": 10}, KVSRV, tap("kvsrv", access(10))) == ((), ())
    (action,), _ = plan({"vlan": 10}, KVSRV, tap("kvsrv", (*access(10), VlanRange(20, 20))))
    assert action.line().endswith("VLANs 10 untagged, 20 -> 10 untagged"), "one VLAN too many is a hole in the fence"
    assert plan({}, KVSRV, tap("kvsrv", DEFAULT)) == ((), ())


def test_ports_of_others_and_of_guests_that_are_gone_stay_as_they_are() -> None:
    foreign = replace(tap("kvsrv", DEFAULT), alias=None)
    assert plan({"vlan": 10}, KVSRV, foreign, tap("kvsrv", DEFAULT, "gone")) == ((), ())


def test_a_kernel_without_it_is_named_and_nothing_is_made() -> None:
    for links in ((), (replace(KVSRV, default_pvid=None, vlan_filtering=False),)):
        actions, (problem,) = plan({"vlan": 10}, *links, can=False)
        assert actions == () and problem.guests == {"web"} and "CONFIG_BRIDGE_VLAN_FILTERING" in problem.message


def test_where_it_is_not_known_yet_the_bridge_is_made() -> None:
    (action,), problems = plan({"vlan": 10}, can=None)
    assert isinstance(action, EnsureBridge) and action.vlan_filtering and problems == ()


def test_filtering_is_switched_on_on_our_bridge_and_never_on_anothers() -> None:
    (action,), _ = plan({"vlan": 10}, replace(KVSRV, vlan_filtering=False), tap("kvsrv", access(10)))
    assert action.line() == "~ bridge kvsrv: vlan_filtering off -> on" and action.disruption is Disruption.NONE
    actions, (problem,) = plan({"vlan": 10}, replace(BR0, vlan_filtering=False), NIC0, joined=True)
    assert actions == () and problem.guests == {"web"}
    assert problem.hint is not None and problem.hint.startswith("ip link set br0 type bridge vlan_filtering 1")


def test_a_vlan_that_leads_nowhere_is_told_and_stops_nobody() -> None:
    assert plan({"vlan": 10}, BR0, NIC0, tap("br0", access(10)), joined=True) == ((), ())
    _, (problem,) = plan({"vlan": 30}, BR0, NIC0, tap("br0", access(30)), joined=True)
    assert "VLAN 30 of guest web" in problem.message and not problem.guests
    assert problem.hint == "bridge vlan add dev enp3s0 vid 30"


def test_a_bridge_with_another_mtu_is_not_lowered_by_a_port_of_ours() -> None:
    actions, (problem,) = plan({}, replace(BR0, mtu=9000), NIC0, joined=True)
    assert problem.guests == {"web"} and problem.hint == "mtu = 9000 in networks.d/srv.toml" and actions == ()
