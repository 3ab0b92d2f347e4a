"""[uplink]: what is taken, what is refused and why, what a trial, a confirmation and an undoing mean for the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvmd.actions import AttachUplink, DetachUplink, Disruption, EnsureBridge, RemoveBridge, SetPortVlans
from kvmd.config.guest import Guest
from kvmd.config.network import Network
from kvmd.effects.records import uplink_key
from kvmd.facts import Facts, JournalEntry, Link, UplinkTrial, VlanRange
from kvmd.plan.links import bridge_alias, bridge_mac
from kvmd.plan.network import FORWARDING, FORWARDING6, plan_network
from kvmd.plan.release import plan_release
from kvmd.units import Duration

LO = Link("lo", 1, up=True)
NIC = Link("enp3s0", 2, mac="fc:00:00:00:00:01", up=False)
BRIDGE = Link("kvdmz", 3, kind="bridge", mac=bridge_mac("kvdmz"), up=True, alias=bridge_alias("dmz"), stp=False)
BRIDGE = replace(BRIDGE, default_pvid=1, vlan_filtering=False)
WEB = {"web": Guest.model_validate({"memory": {"size": "64MiB"}, "nic": {"a": {"network": "dmz"}}})}
JOURNAL = (JournalEntry(uplink_key("enp3s0"), "down", "kvdmz", "boot", "test"),)


def dmz(**about: Any) -> Network:
    return Network.model_validate(
        {"network": {"mode": "bridge", **about}, "uplink": {"interface": "enp3s0", "rollback": Duration(45)}}
    )


def trial(state: Any) -> UplinkTrial:
    return UplinkTrial("dmz", "enp3s0", "kvdmz", state, "boot", 100.0)


def plan(*links: Link, networks: dict[str, Network] | None = None, **facts: Any) -> tuple[Any, Any]:
    there = Facts(links=(LO, *links), knobs={FORWARDING: "0", FORWARDING6: "0"}, boot_id="boot", **facts)
    return plan_network({"dmz": dmz()} if networks is None else networks, WEB, {}, there)


def test_the_bridge_is_made_over_the_nic_and_the_host_has_no_part_in_it() -> None:
    (ensure, attach), problems = plan(NIC)
    assert isinstance(ensure, EnsureBridge) and not ensure.host and ensure.addresses == () and problems == ()
    assert attach.line() == "+ uplink enp3s0 into kvdmz, taken out again in 45 s unless confirmed"
    assert (attach.disruption, attach.was_up) == (Disruption.NETWORK, False)
    assert ensure.disruption is Disruption.NONE


@pytest.mark.parametrize(
    ("nic", "others", "facts", "reason"),
    [
        (replace(NIC, addresses=("10.0.0.5/24",)), (), {}, "host's address 10.0.0.5/24"),
        (replace(NIC, master="br0"), (), {}, "port of br0"),
        (replace(NIC, kind="bridge"), (), {}, "cannot be a port of a bridge"),
        (replace(NIC, alias="kvmd:lan:web:a", kind="tun"), (), {}, "port of a guest"),
        (NIC, (Link("enp3s0.7", 9, kind="vlan", parent="enp3s0"),), {}, "enp3s0.7 stands on it"),
        (NIC, (), {"default_links": frozenset({"enp3s0"})}, "default route goes through it"),
    ],
)
def test_what_would_cut_the_host_off_is_refused(
    nic: Link, others: tuple[Link, ...], facts: dict[str, Any], reason: str
) -> None:
    actions, (problem,) = plan(BRIDGE, nic, *others, **facts)
    assert actions == () and problem.guests == {"web"} and reason in problem.message


def test_a_nic_that_is_not_there_stops_its_guests() -> None:
    actions, (problem,) = plan(BRIDGE)
    assert actions == () and problem.guests == {"web"} and '"enp3s0" does not exist' in problem.message


def test_on_trial_it_is_told_confirmed_it_is_quiet() -> None:
    attached = replace(NIC, master="kvdmz", up=True)
    actions, (problem,) = plan(BRIDGE, attached, uplinks=(trial("trial"),), journal=JOURNAL)
    assert actions == () and problem.hint == "kvmd-cli network confirm dmz" and not problem.guests
    assert plan(BRIDGE, attached, uplinks=(trial("kept"),), journal=JOURNAL) == ((), ())


def test_what_was_kept_is_put_back_without_asking_and_what_was_undone_is_not() -> None:
    (again,), problems = plan(BRIDGE, NIC, uplinks=(trial("kept"),))
    assert isinstance(again, AttachUplink) and (again.disruption, again.rollback_s) == (Disruption.NONE, 0)
    assert again.line() == "+ uplink enp3s0 into kvdmz" and problems == ()
    actions, (problem,) = plan(BRIDGE, NIC, uplinks=(trial("undone"),))
    assert actions == () and "nobody confirmed it within 45s" in problem.message and not problem.guests
    other = replace(trial("kept"), interface="enp4s0")
    (fresh,), _ = plan(BRIDGE, NIC, uplinks=(other,))
    assert fresh.disruption is Disruption.NETWORK, "another NIC is another trial"


def test_a_port_that_went_down_comes_up() -> None:
    attached = replace(NIC, master="kvdmz")
    (action,), _ = plan(BRIDGE, attached, uplinks=(trial("kept"),))
    assert isinstance(action, AttachUplink) and action.disruption is Disruption.NONE


def test_without_its_file_the_nic_leaves_before_the_bridge() -> None:
    attached = replace(NIC, master="kvdmz", up=True)
    actions, _ = plan(BRIDGE, attached, networks={}, journal=JOURNAL)
    detach, remove = actions
    assert isinstance(detach, DetachUplink) and isinstance(remove, RemoveBridge) and not detach.was_up
    assert detach.line() == "- uplink enp3s0 out of kvdmz" and remove.disruption is Disruption.NONE
    assert plan(BRIDGE, NIC, networks={}, journal=JOURNAL)[0] == (remove,), "somebody took it out before"


def test_a_port_that_kvmd_did_not_attach_stays() -> None:
    attached = replace(NIC, master="kvdmz", up=True)
    actions, _ = plan(BRIDGE, attached, networks={})
    assert not any(isinstance(action, DetachUplink) for action in actions)


def test_the_uplink_of_a_trunk_carries_all_vlans() -> None:
    bridge = replace(BRIDGE, vlan_filtering=True)
    attached = replace(NIC, master="kvdmz", up=True, vlans=(VlanRange(1, 1, pvid=True, untagged=True),))
    networks = {"dmz": dmz(vlan_filtering=True)}
    (action,), _ = plan(bridge, attached, networks=networks, uplinks=(trial("kept"),), vlan_filtering=True)
    assert isinstance(action, SetPortVlans)
    assert action.line() == "~ port enp3s0 of kvdmz: VLANs 1 untagged -> 1 untagged, 2-4094"


def test_a_nic_with_a_lower_mtu_is_told() -> None:
    _, (problem,) = plan(replace(BRIDGE, mtu=9000), NIC, networks={"dmz": dmz(mtu=9000)})
    assert "enp3s0 has mtu 1500" in problem.message and problem.hint == "ip link set enp3s0 mtu 9000"


def test_release_takes_the_nic_out_and_down_again() -> None:
    entries = [("bridge", "kvdmz", "", "dmz"), ("uplink", "enp3s0", "down", "kvdmz")]
    attached = Facts(links=(LO, BRIDGE, replace(NIC, master="kvdmz", up=True)))
    first, second = plan_release(entries, attached)
    assert first.action is not None and first.action.line() == "- uplink enp3s0 out of kvdmz"
    assert isinstance(second.action, RemoveBridge)
    first, _ = plan_release(entries, Facts(links=(LO, BRIDGE, NIC)))
    assert first.action is None
