"""plan_network: declared networks against a world that is a value, carried out by a world that is a value."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import (
    Action,
    Disruption,
    EnsureBridge,
    Problem,
    RemoveBridge,
    ReplaceRuleset,
    StartDnsmasq,
    StopDnsmasq,
    WriteKnob,
)
from kvmd.config.guest import Guest
from kvmd.config.network import Network
from kvmd.facts import Dnsmasq, Facts, Link
from kvmd.plan.dnsmasq import config_sha256
from kvmd.plan.links import bridge_alias, bridge_mac, is_our_bridge, tap_name
from kvmd.plan.network import FORWARDING, FORWARDING6, plan_network
from kvmd.plan.nfttable import fingerprint

LO = Link("lo", 1, up=True, addresses=("127.0.0.1/8",))
FRESH = Facts(links=(LO,), knobs={FORWARDING: "0", FORWARDING6: "0"})
MAC = "02:00:00:00:00:01"


def network(mode: str = "nat", third: int = 50, *, dhcp: bool = True, ipv6: str = "", **about: Any) -> Network:
    tables: dict[str, Any] = {"network": {"mode": mode, **about}}
    if mode != "bridge":
        ipv4: dict[str, Any] = {"address": IPv4Interface(f"192.168.{third}.1/24")}
        if dhcp:
            ipv4["dhcp"] = {"range": (IPv4Address(f"192.168.{third}.100"), IPv4Address(f"192.168.{third}.200"))}
        tables["ipv4"] = ipv4
        if ipv6:
            tables["ipv6"] = {"address": IPv6Interface(f"fd{third}::1/64"), "mode": ipv6}
    return Network.model_validate(tables)


def guest(**nics: dict[str, Any]) -> Guest:
    return Guest.model_validate({"memory": {"size": "64MiB"}, "nic": nics})


def carry_out(actions: tuple[Action, ...], facts: Facts) -> Facts:
    """The world after these actions."""
    for action in actions:
        match action:
            case EnsureBridge():
                old = next((link for link in facts.links if link.name == action.bridge), None)
                made = Link(
                    action.bridge,
                    old.index if old else max(link.index for link in facts.links) + 1,
                    kind="bridge",
                    mac=bridge_mac(action.bridge),
                    mtu=action.mtu,
                    up=True,
                    alias=bridge_alias(action.network),
                    addresses=action.addresses,
                    stp=action.stp,
                )
                facts = replace(facts, links=(*(link for link in facts.links if link is not old), made))
            case RemoveBridge():
                if not any(link.master == action.bridge for link in facts.links):
                    facts = replace(facts, links=tuple(link for link in facts.links if link.name != action.bridge))
            case ReplaceRuleset():
                facts = replace(facts, nft=fingerprint(action.text))
            case WriteKnob():
                facts = replace(facts, knobs={**facts.knobs, action.path: action.new})
            case StartDnsmasq():
                rest = tuple(server for server in facts.dnsmasq if server.network != action.network)
                facts = replace(facts, dnsmasq=(*rest, Dnsmasq(action.network, 7, 7, config_sha256(action.config))))
            case StopDnsmasq():
                rest = tuple(server for server in facts.dnsmasq if server.network != action.network)
                facts = replace(facts, dnsmasq=rest)
            case _:
                raise AssertionError(action)
    return facts


def lines(actions: tuple[Action, ...]) -> list[str]:
    return [action.line() for action in actions]


def settled(networks: dict[str, Network], facts: Facts = FRESH) -> Facts:
    actions, problems = plan_network(networks, {}, {}, facts)
    assert not problems
    return carry_out(actions, facts)


def test_rules_are_there_before_forwarding_is_switched_on() -> None:
    actions, problems = plan_network({"lan": network()}, {}, {}, FRESH)
    assert lines(actions) == [
        "+ bridge kvlan 192.168.50.1/24",
        "+ nft table inet kvmd",
        f"~ {FORWARDING}: 0 -> 1",
        "+ dnsmasq for network lan",
    ]
    assert problems == () and all(action.why for action in actions)
    assert all(action.disruption is Disruption.NONE for action in actions)


def test_an_isolated_network_does_not_switch_forwarding_on() -> None:
    actions, _ = plan_network({"lab": network("isolated")}, {}, {}, FRESH)
    assert not any(isinstance(action, WriteKnob) for action in actions)


def test_forwarding_that_cannot_be_read_is_a_problem_and_no_write() -> None:
    actions, (problem,) = plan_network({"lan": network()}, {}, {}, replace(FRESH, knobs={}))
    assert FORWARDING in problem.message
    assert not any(isinstance(action, WriteKnob) for action in actions)


def test_both_families_are_forwarded_where_a_network_has_both() -> None:
    for mode in ("nat", "routed"):
        actions, problems = plan_network({"lan": network(mode, ipv6="slaac")}, {}, {}, FRESH)
        assert lines(actions) == [
            "+ bridge kvlan 192.168.50.1/24 fd50::1/64",
            "+ nft table inet kvmd",
            f"~ {FORWARDING}: 0 -> 1",
            f"~ {FORWARDING6}: 0 -> 1",
            "+ dnsmasq for network lan",
        ]
        assert problems == () and f"mode {mode}" in actions[2].why
    actions, _ = plan_network({"lan": network(ipv6="slaac")}, {}, {}, carry_out(actions, FRESH))
    assert not any(isinstance(action, WriteKnob) for action in actions)


def test_the_hosts_own_way_out_is_not_forgotten_for_forwarding() -> None:
    facts = replace(FRESH, ra_uplinks=("eth0.7",))
    actions, (problem,) = plan_network({"lan": network(ipv6="slaac")}, {}, {}, facts)
    assert [action.path for action in actions if isinstance(action, WriteKnob)] == [FORWARDING]
    assert "eth0.7" in problem.message and not problem.guests
    assert problem.hint is not None and "net.ipv6.conf.eth0/7.accept_ra=2" in problem.hint
    assert plan_network({"lan": network("isolated", ipv6="slaac")}, {}, {}, facts)[1] == ()
    forwarding = replace(facts, knobs={**facts.knobs, FORWARDING6: "1"})
    assert plan_network({"lan": network(ipv6="slaac")}, {}, {}, forwarding)[1] == ()


def test_a_kernel_without_ipv6_is_named_and_nothing_is_made() -> None:
    guests = {"web": guest(lan={"network": "lan"})}
    facts = replace(FRESH, knobs={FORWARDING: "0"})
    actions, (problem,) = plan_network({"lan": network(ipv6="slaac")}, guests, {}, facts)
    assert problem.guests == {"web"} and "this kernel has no IPv6" in problem.message
    assert not any(isinstance(action, EnsureBridge | StartDnsmasq) for action in actions)


def test_an_ipv6_reservation_reaches_the_server() -> None:
    wish = {"network": "lan", "ipv4": IPv4Address("192.168.50.20"), "ipv6": IPv6Address("fd50::20")}
    actions, _ = plan_network({"lan": network(ipv6="dhcp")}, {"web": guest(lan=wish)}, {("web", "lan"): MAC}, FRESH)
    config = next(action.config for action in actions if isinstance(action, StartDnsmasq))
    assert f"dhcp-host={MAC},192.168.50.20,[fd50::20],web\n" in config
    assert "host-record=web,192.168.50.20,fd50::20\n" in config


NETWORKS = st.dictionaries(
    st.sampled_from(["lan", "lab", "dmz", "office"]),
    st.tuples(
        st.sampled_from(["nat", "routed", "isolated", "bridge"]),
        st.booleans(),
        st.booleans(),
        st.sampled_from([1500, 9000]),
        st.sampled_from(["", "none", "slaac", "dhcp"]),
    ),
).map(
    lambda chosen: {
        name: network(mode, 50 + number, dhcp=dhcp, stp=stp, mtu=mtu, ipv6=ipv6)
        if mode != "bridge"
        else network("bridge", bridge="br0")
        for number, (name, (mode, dhcp, stp, mtu, ipv6)) in enumerate(sorted(chosen.items()))
    }
)
GUESTS = st.dictionaries(
    st.sampled_from(["web", "db", "mail"]),
    st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(["lan", "lab", "dmz", "office"]), max_size=2),
).map(lambda all_: {name: guest(**{nic: {"network": net} for nic, net in nics.items()}) for name, nics in all_.items()})
BR0 = Link("br0", 2, kind="bridge", mac="fc:00:00:00:00:01", up=True)
MACS = {(g, n): f"02:00:00:00:0{i}:0{j}" for i, g in enumerate(["web", "db", "mail"]) for j, n in enumerate("ab")}


@given(NETWORKS, NETWORKS, GUESTS, st.randoms(use_true_random=False))
def test_from_any_wish_to_any_other_in_one_pass_whatever_the_order(
    before: dict[str, Network], after: dict[str, Network], guests: dict[str, Guest], random: Any
) -> None:
    facts = replace(FRESH, links=(LO, BR0))
    for wish in (before, after):
        names, links, servers = list(wish), list(facts.links), list(facts.dnsmasq)
        for items in (names, links, servers):
            random.shuffle(items)
        plan = plan_network(wish, guests, MACS, facts)
        shuffled = replace(facts, links=tuple(links), dnsmasq=tuple(servers))
        assert (
            plan_network({name: wish[name] for name in names}, dict(reversed(guests.items())), MACS, shuffled) == plan
        )
        facts = carry_out(plan[0], facts)
        assert plan_network(wish, guests, MACS, facts)[0] == ()
    ours = {f"kv{name}" for name, wanted in after.items() if wanted.network.mode != "bridge"}
    assert {link.name for link in facts.links} == {"lo", "br0"} | ours
    assert BR0 in facts.links


@pytest.mark.parametrize(
    ("drift", "line"),
    [
        ({"up": False}, "~ bridge kvlan: down -> up"),
        ({"mtu": 1400}, "~ bridge kvlan: mtu 1400 -> 1500"),
        ({"stp": True}, "~ bridge kvlan: stp on -> off"),
        ({"alias": "kvmd:old"}, "~ bridge kvlan: alias kvmd:old -> kvmd:lan"),
        ({"alias": None}, "~ bridge kvlan: alias none -> kvmd:lan"),
        ({"addresses": ("192.168.50.1/24", "10.0.0.1/8")}, "~ bridge kvlan: address -10.0.0.1/8"),
        ({"addresses": ()}, "~ bridge kvlan: address +192.168.50.1/24"),
    ],
)
def test_each_drift_is_one_line_and_disturbs_only_guests_that_are_plugged_in(drift: dict[str, Any], line: str) -> None:
    networks = {"lan": network()}
    facts = settled(networks)
    changed = tuple(replace(link, **drift) if link.name == "kvlan" else link for link in facts.links)
    actions, problems = plan_network(networks, {}, {}, replace(facts, links=changed))
    assert lines(actions) == [line] and problems == ()
    assert actions[0].disruption is Disruption.NONE
    port = Link("kvt0", 9, kind="tun", master="kvlan", up=True)
    actions, _ = plan_network(networks, {}, {}, replace(facts, links=(*changed, port)))
    disturbing = "mtu" in line or "address" in line
    assert actions[0].disruption is (Disruption.NETWORK if disturbing else Disruption.NONE)


def test_a_table_somebody_edited_is_replaced_and_says_so() -> None:
    networks = {"lan": network()}
    facts = settled(networks)
    (action,), _ = plan_network(networks, {}, {}, replace(facts, nft=f"{facts.nft} edited"))
    assert action.line() == "~ nft table inet kvmd: as declared again"
    (action,), _ = plan_network(networks, {}, {}, replace(facts, nft="unmarked"))
    assert action.line() == "~ nft table inet kvmd: rules differ"


def test_a_new_reservation_restarts_the_server_alone() -> None:
    networks = {"lan": network()}
    facts = settled(networks)
    guests = {"web": guest(lan={"network": "lan", "ipv4": IPv4Address("192.168.50.20")})}
    assert plan_network(networks, guests, {}, facts)[0] == (), "without an address there is nothing to reserve"
    (action,), _ = plan_network(networks, guests, {("web", "lan"): MAC}, facts)
    assert isinstance(action, StartDnsmasq) and action.disruption is Disruption.NONE
    assert f"dhcp-host={MAC},192.168.50.20,web\n" in action.config and "host-record=web,192.168.50.20" in action.config


def test_the_address_in_the_file_wins_over_the_remembered_one() -> None:
    guests = {"web": guest(lan={"network": "lan", "mac": "02:AA:00:00:00:09"})}
    actions, _ = plan_network({"lan": network()}, guests, {("web", "lan"): MAC}, FRESH)
    config = next(action.config for action in actions if isinstance(action, StartDnsmasq))
    assert "dhcp-host=02:aa:00:00:00:09,web\n" in config and MAC not in config


def test_a_server_on_a_bridge_made_anew_is_restarted() -> None:
    networks = {"lan": network()}
    facts = settled(networks)
    stale = tuple(replace(server, config_sha256="") for server in facts.dnsmasq)
    (action,), _ = plan_network(networks, {}, {}, replace(facts, dnsmasq=stale))
    assert action.line() == "~ dnsmasq for network lan: restart"


def test_what_is_still_in_use_goes_only_with_permission() -> None:
    facts = settled({"lan": network(), "lab": network("isolated", 60)})
    port = Link("kvt0", 9, kind="tun", master="kvlan", up=True)
    actions, _ = plan_network({}, {}, {}, replace(facts, links=(*facts.links, port)))
    assert {action.line(): action.disruption.value for action in actions} == {
        "- nft table inet kvmd": "network",
        "- dnsmasq for network lab": "none",
        "- dnsmasq for network lan": "network",
        "- bridge kvlab": "none",
        "- bridge kvlan": "network",
    }
    assert "kvt0" in actions[-1].why


FOREIGN = [
    Link("kvlan", 5, kind="bridge", mac="fc:00:00:00:00:02", up=True),
    Link("kvlan", 5, kind="bridge", mac=bridge_mac("kvlan"), alias="the office's", up=True),
    Link("kvlan", 5, kind="tun", alias="kvmd:lan", up=True),
    Link("kvlan", 5, kind="tun", alias="kvmd:lan:web:lan", up=True),
    Link("kvlan", 5, up=True),
]


@pytest.mark.parametrize("link", FOREIGN)
def test_a_foreign_link_of_that_name_is_a_problem_of_its_guests_and_stays(link: Link) -> None:
    guests = {"web": guest(lan={"network": "lan"}), "db": guest(lan={"network": "lab"})}
    networks = {"lan": network(), "lab": network("isolated", 60)}
    actions, (problem,) = plan_network(networks, guests, {}, replace(FRESH, links=(LO, link)))
    assert problem.guests == {"web"} and '"kvlan" exists' in problem.message
    assert problem.hint is not None and "networks.d/lan.toml" in problem.hint
    assert not any("kvlan" in line or "network lan" in line for line in lines(actions))
    assert "+ bridge kvlab 192.168.60.1/24" in lines(actions)


@pytest.mark.parametrize("link", [FOREIGN[0], FOREIGN[1], FOREIGN[4]])
def test_a_foreign_link_is_never_removed(link: Link) -> None:
    assert plan_network({}, {}, {}, replace(FRESH, links=(LO, link)))[0] == ()


def test_a_bridge_without_mark_is_ours_by_its_address_but_is_not_removed_for_it() -> None:
    link = Link("kvlan", 5, kind="bridge", mac=bridge_mac("kvlan"))
    assert is_our_bridge(link)
    assert plan_network({}, {}, {}, replace(FRESH, links=(LO, link)))[0] == ()


def problems_of(networks: dict[str, Network], *links: Link) -> tuple[Problem, ...]:
    guests = {"web": guest(lan={"network": next(iter(networks))})}
    return plan_network(networks, guests, {}, replace(FRESH, links=(LO, *links)))[1]


def test_joining_a_bridge_changes_nothing() -> None:
    assert plan_network({"servers": network("bridge", bridge="br0")}, {}, {}, replace(FRESH, links=(LO, BR0))) == (
        (),
        (),
    )


def test_a_bridge_to_be_joined_that_is_not_there_stops_its_guests() -> None:
    (problem,) = problems_of({"servers": network("bridge", bridge="br0")})
    assert problem.guests == {"web"} and 'bridge "br0" does not exist' in problem.message
    assert problem.hint is not None and "networks.d/servers.toml" in problem.hint and "netplan" in problem.hint


def test_a_nic_is_no_bridge_and_a_bridge_that_is_down_is_told() -> None:
    (problem,) = problems_of({"servers": network("bridge", bridge="br0")}, Link("br0", 3, up=True))
    assert "no bridge" in problem.message and problem.guests == {"web"}
    (problem,) = problems_of({"servers": network("bridge", bridge="br0")}, replace(BR0, up=False))
    assert "is down" in problem.message and not problem.guests


def test_a_subnet_the_host_already_has_elsewhere_is_not_made() -> None:
    six = Link("enp4s0", 3, up=True, addresses=("10.0.0.1/8", "fd50::7/48"))
    _, (problem,) = plan_network({"lan": network(ipv6="slaac")}, {}, {}, replace(FRESH, links=(LO, six)))
    assert "fd50::7/48 on enp4s0" in problem.message and problem.hint is not None and "ipv6.address" in problem.hint
    uplink = Link("enp3s0", 2, up=True, addresses=("192.168.50.77/16", "fd00::1/64"))
    networks = {"lan": network()}
    actions, (problem,) = plan_network(networks, {}, {}, replace(FRESH, links=(LO, uplink)))
    assert "192.168.50.77/16 on enp3s0" in problem.message
    assert not any(isinstance(action, EnsureBridge | StartDnsmasq) for action in actions)
    late = settled(networks)
    actions, (problem,) = plan_network(networks, {}, {}, replace(late, links=(*late.links, uplink)))
    assert actions == () and problem.guests == frozenset(), "guests that run already are not stopped for it"


def test_a_network_without_a_file_stops_its_guests() -> None:
    guests = {"web": guest(lan={"network": "lan"})}
    _, (problem,) = plan_network({}, guests, {}, FRESH)
    assert problem.guests == {"web"} and problem.subject == "network lan"


def test_two_guests_with_one_remembered_address_are_refused() -> None:
    guests = {
        "web": guest(lan={"network": "lan"}),
        "copy": guest(lan={"network": "lan"}),
        "db": guest(a={"network": "lan"}),
    }
    macs = {("web", "lan"): MAC, ("copy", "lan"): MAC, ("db", "a"): "02:00:00:00:00:05"}
    _, (problem,) = plan_network({"lan": network()}, guests, macs, FRESH)
    assert problem.guests == {"web", "copy"} and MAC in problem.message


def test_names_in_dns_are_unique() -> None:
    guests = {
        "web": guest(a={"network": "lan"}, b={"network": "lan"}),
        "web-b": guest(a={"network": "lan"}),
    }
    actions, _ = plan_network({"lan": network()}, guests, MACS | {("web-b", "a"): MAC[:-1] + "9"}, FRESH)
    config = next(action.config for action in actions if isinstance(action, StartDnsmasq))
    names = [line.rpartition(",")[2] for line in config.splitlines() if line.startswith("dhcp-host=")]
    assert sorted(names) == ["web", "web-b", "web-b-2"]


@given(st.text(max_size=40), st.text(max_size=20))
def test_a_taps_name_fits_the_kernel_and_is_the_same_each_time(uuid: str, nic: str) -> None:
    name = tap_name(uuid, nic)
    assert len(name.encode()) <= 15 and name.isalnum() and name == tap_name(uuid, nic)


def test_two_nics_have_two_taps() -> None:
    assert len({tap_name("u", "a"), tap_name("u", "b"), tap_name("v", "a")}) == 3
