"""Who else drops a network's packets, in listings shaped as nft 1.0.6 prints them."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv4Interface, IPv6Interface
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.config.network import Network
from kvmd.facts import Facts
from kvmd.plan.firewall import BRIDGE_NF, bridge_nf, foreign_forward_drops, forwarding_tables, plan_firewall


def chain(name: str, table: str = "filter", family: str = "ip", **base: Any) -> dict[str, Any]:
    return {"chain": {"family": family, "table": table, "name": name, "handle": 1, **base}}


def forward(table: str = "filter", family: str = "ip", policy: str = "drop", name: str = "FORWARD") -> dict[str, Any]:
    return chain(name, table, family, type="filter", hook="forward", prio=0, policy=policy)


def rule(*expr: dict[str, Any], at: str = "FORWARD", table: str = "filter", family: str = "ip") -> dict[str, Any]:
    return {"rule": {"family": family, "table": table, "chain": at, "handle": 2, "expr": list(expr)}}


def interface(name: str, key: str = "iifname", op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": {"meta": {"key": key}}, "right": name}}


ACCEPT, DROP, COUNTER = {"accept": None}, {"drop": None}, {"counter": {"packets": 0, "bytes": 0}}
REJECT = {"reject": {"type": "icmpx", "expr": "admin-prohibited"}}
OTHER = {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "10.0.0.1"}}


def jump(target: str) -> dict[str, Any]:
    return {"jump": {"target": target}}


def found(*items: dict[str, Any]) -> list[tuple[str, str, str | None]]:
    listing = json.dumps({"nftables": [{"metainfo": {"version": "1.0.6"}}, *items]})
    return [(finding.where, finding.what, finding.owner) for finding in foreign_forward_drops(listing, "kvlan")]


DOCKER = (forward(), chain("DOCKER-USER"), chain("DOCKER-FORWARD"), rule(COUNTER, jump("DOCKER-USER")))


def test_docker_is_named_with_its_policy() -> None:
    assert found(*DOCKER) == [("table ip filter, chain FORWARD", "policy drop", "Docker")]


def test_the_way_docker_offers_ends_the_finding() -> None:
    assert found(*DOCKER, rule(interface("kvlan"), COUNTER, ACCEPT, at="DOCKER-USER")) == []
    assert found(*DOCKER, rule(interface("docker0"), COUNTER, ACCEPT, at="DOCKER-USER")) != []


def test_firewalld_rejects_all_that_no_zone_lets_pass() -> None:
    here = {"table": "firewalld", "family": "inet"}
    base = (
        {"table": {"family": "inet", "name": "firewalld"}},
        forward(name="filter_FORWARD", policy="accept", **here),
        chain("filter_FORWARD_ZONES", **here),
        chain("filter_FWD_trusted", **here),
        rule(jump("filter_FORWARD_ZONES"), at="filter_FORWARD", **here),
        rule(REJECT, at="filter_FORWARD", **here),
        rule(ACCEPT, at="filter_FWD_trusted", **here),
    )
    assert found(*base) == [("table inet firewalld, chain filter_FORWARD", "reject", "firewalld")]
    zone = rule(interface("kvlan"), {"goto": {"target": "filter_FWD_trusted"}}, at="filter_FORWARD_ZONES", **here)
    assert found(*base, zone) == []


def test_an_accept_towards_one_uplink_is_a_way_out() -> None:
    assert found(*DOCKER, rule(interface("kvlan"), interface("eth0", "oifname"), ACCEPT, at="DOCKER-USER")) == []
    assert found(*DOCKER, rule(interface("kvlan", "oifname"), ACCEPT, at="DOCKER-USER")) != []


def test_ufw_and_a_hand_made_policy() -> None:
    assert found(forward(), chain("ufw-before-forward"))[0][2] == "ufw"
    assert found(forward("mine", "inet")) == [("table inet mine, chain FORWARD", "policy drop", None)]


@pytest.mark.parametrize(
    ("items", "count"),
    [
        ((forward(policy="accept"),), 0),
        ((forward("kvmd", "inet"),), 0),
        ((forward(family="ip6"),), 0),
        ((chain("INPUT", hook="input", policy="drop"),), 0),
        ((forward(policy="accept"), rule(interface("kvlan"), DROP)), 1),
        ((forward(policy="accept"), rule(interface("kvlan", "oifname"), DROP)), 1),
        ((forward(policy="accept"), rule(interface("kv*"), DROP)), 1),
        ((forward(policy="accept"), rule(interface("eth0"), DROP)), 0),
        ((forward(policy="accept"), rule(interface("kvlan"), OTHER, DROP)), 0),
        ((forward(policy="accept"), rule({"xt": None}, DROP)), 0),
        ((forward(), rule(OTHER, ACCEPT)), 1),
        ((forward(), rule(interface("kvlan", op="!="), ACCEPT)), 1),
        ((forward(), rule({"xt": None}, ACCEPT)), 1),
        ((forward(), rule(jump("FORWARD"))), 1),
    ],
)
def test_only_what_drops_this_bridge_counts(items: tuple[dict[str, Any], ...], count: int) -> None:
    assert len(found(*items)) == count


def test_each_finding_says_what_to_do_with_this_bridge() -> None:
    listing = json.dumps({"nftables": list(DOCKER)})
    assert all("kvlan" in finding.hint for finding in foreign_forward_drops(listing, "kvlan"))


@given(
    st.text()
    | st.recursive(st.none() | st.text(), lambda x: st.dictionaries(st.text(), x) | st.lists(x)).map(json.dumps)
)
def test_any_other_text_is_a_value_error_or_nothing(text: str) -> None:
    try:
        assert foreign_forward_drops(text, "kvlan") == ()
    except ValueError:
        return


def test_bridge_nf_names_the_sysctl() -> None:
    (finding,) = bridge_nf({BRIDGE_NF[0]: "1", BRIDGE_NF[1]: "0"})
    assert finding.where == BRIDGE_NF[0] and "net.bridge.bridge-nf-call-iptables=0" in finding.hint
    assert bridge_nf({}) == ()


def networks() -> dict[str, Network]:
    lan = {"network": {"mode": "nat"}, "ipv4": {"address": IPv4Interface("192.168.50.1/24")}}
    office = {"network": {"mode": "bridge", "bridge": "br0"}}
    return {"lan": Network.model_validate(lan), "office": Network.model_validate(office)}


def test_the_plan_names_who_drops_and_stops_no_guest() -> None:
    facts = Facts(foreign_rules=json.dumps({"nftables": list(DOCKER)}))
    (problem,) = plan_firewall(networks(), facts)
    assert problem.subject == "network lan" and problem.guests == frozenset()
    assert problem.message == "table ip filter, chain FORWARD (Docker) has policy drop: guests cannot get out"
    assert "DOCKER-USER" in str(problem.hint) and "kvlan" in str(problem.hint)
    crossing = plan_firewall(networks(), replace(facts, knobs={BRIDGE_NF[0]: "1"}))
    assert [problem.subject for problem in crossing] == ["network lan", "network office"]
    assert "br_netfilter" in crossing[1].message


@pytest.mark.parametrize("rules", [None, "no listing", json.dumps({"nftables": [forward(policy="accept")]})])
def test_without_a_drop_or_a_listing_the_plan_says_nothing(rules: str | None) -> None:
    assert plan_firewall(networks(), Facts(foreign_rules=rules)) == ()


def test_ipv6_packets_are_dropped_in_their_own_table() -> None:
    six = {"network": {"mode": "nat"}, "ipv6": {"address": IPv6Interface("fd50::1/64")}}
    facts = Facts(foreign_rules=json.dumps({"nftables": [forward(family="ip6")]}))
    assert plan_firewall(networks(), facts) == ()
    (problem,) = plan_firewall({"six": Network.model_validate(six)}, facts)
    assert "table ip6 filter" in problem.message


def test_only_tables_on_the_forward_hook_are_listed() -> None:
    chains = [
        forward(),
        forward("mine", "inet"),
        chain("prerouting", "nat", hook="prerouting"),
        forward("kvmd", "inet"),
    ]
    chains += [forward("x", "bridge"), chain("DOCKER-USER")]
    assert forwarding_tables(json.dumps({"nftables": chains})) == ("inet mine", "ip filter")
    with pytest.raises(ValueError, match="not a listing"):
        forwarding_tables('{"nftables": 7}')
