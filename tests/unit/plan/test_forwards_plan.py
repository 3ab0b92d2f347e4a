"""Port forwards: what is let in, and why something is not."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.config.guest import Guest
from kvmd.config.network import Network
from kvmd.facts import Facts, Link, Listener
from kvmd.plan.forwards import plan_forwards
from kvmd.plan.network import FORWARDING, plan_network
from kvmd.plan.nft import build_ruleset

UPLINK = Link("eth0", 2, up=True, addresses=("203.0.113.7/24",))
FACTS = Facts(links=(UPLINK,), knobs={FORWARDING: "1"})


def network(third: int = 50, **forwards: dict[str, str]) -> Network:
    ipv4 = {"address": IPv4Interface(f"192.168.{third}.1/24")}
    return Network.model_validate({"network": {"mode": "nat"}, "ipv4": ipv4, "forward": forwards})


def guest(**nics: str) -> Guest:
    tables = {net: {"network": net, "ipv4": IPv4Address(address)} for net, address in nics.items()}
    return Guest.model_validate({"memory": {"size": "64MiB"}, "nic": tables})


NETWORKS = {
    "lan": network(
        https={"listen": "203.0.113.7:443", "to": "web:8443"},
        names={"listen": ":5353", "to": "web:53", "protocol": "udp"},
    )
}
GUESTS = {"web": guest(lan="192.168.50.20")}


def test_a_forward_leads_to_the_guests_fixed_address() -> None:
    openings, problems = plan_forwards(NETWORKS, GUESTS, FACTS)
    assert problems == ()
    assert [(way.name, way.address, way.port, way.guest_address, way.guest_port) for way in openings] == [
        ("https", "203.0.113.7", 443, "192.168.50.20", 8443),
        ("names", None, 5353, "192.168.50.20", 53),
    ]


@pytest.mark.parametrize(
    ("guests", "reason"),
    [
        ({}, "guest web is not declared"),
        ({"web": guest()}, "guest web has no fixed address on this network"),
        ({"web": guest(other="10.0.0.9")}, "guest web has no fixed address on this network"),
    ],
)
def test_a_forward_without_its_guest_is_told_and_left_out(guests: dict[str, Guest], reason: str) -> None:
    openings, problems = plan_forwards(NETWORKS, guests, FACTS)
    assert openings == () and len(problems) == 2
    assert reason in problems[0].message and problems[0].guests == frozenset()


@pytest.mark.parametrize(
    ("listener", "lost"),
    [
        (Listener("tcp", "0.0.0.0", 443), {"https"}),
        (Listener("tcp", "::", 443), {"https"}),
        (Listener("tcp", "203.0.113.7", 443), {"https"}),
        (Listener("tcp", "192.0.2.1", 443), set()),
        (Listener("tcp", "127.0.0.1", 443), set()),
        (Listener("udp", "0.0.0.0", 443), set()),
        (Listener("udp", "192.0.2.1", 5353), {"names"}),
        (Listener("udp", "127.0.0.53", 5353), set()),
        (Listener("tcp", "0.0.0.0", 8443), set()),
    ],
)
def test_a_port_a_program_of_the_host_listens_on_stays_its_own(listener: Listener, lost: set[str]) -> None:
    openings, problems = plan_forwards(NETWORKS, GUESTS, replace(FACTS, listeners=(listener,)))
    assert {way.name for way in openings} == {"https", "names"} - lost
    assert [problem.message.partition(":")[0] for problem in problems] == [f"forward {name}" for name in sorted(lost)]
    assert all(str(listener.port) in problem.message and "ss -lnp" in str(problem.hint) for problem in problems)


def test_a_client_waiting_for_an_answer_by_udp_is_no_server() -> None:
    networks = {"lan": network(game={"listen": ":40000", "to": "web:40000", "protocol": "udp"})}
    facts = replace(FACTS, listeners=(Listener("udp", "0.0.0.0", 40000),))
    assert [way.name for way in plan_forwards(networks, GUESTS, facts)[0]] == ["game"]


def test_an_address_the_host_does_not_have_is_told_but_a_floating_one_may_come() -> None:
    openings, (problem,) = plan_forwards(NETWORKS, GUESTS, Facts())
    assert len(openings) == 2 and "no interface of this host has 203.0.113.7" in problem.message


def test_a_forward_is_one_line_of_the_plan_and_stops_nobody() -> None:
    actions, _ = plan_network({"lan": network()}, GUESTS, {}, FACTS)
    rules = next(action for action in actions if "nft" in action.line())
    bare = replace(FACTS, nft=_fingerprint(rules.text))
    actions, _ = plan_network(NETWORKS, GUESTS, {}, bare)
    lines = [(action.line(), action.disruption.value) for action in actions if "nft" in action.line()]
    assert lines == [("~ nft table inet kvmd: rules differ", "none")]


def _fingerprint(text: str) -> str | None:
    from kvmd.plan.nfttable import fingerprint

    return fingerprint(text)


def test_a_guest_of_an_isolated_network_is_stopped_before_any_forward_lets_it_in() -> None:
    networks: dict[str, Any] = NETWORKS | {"lab": Network.model_validate({"network": {"mode": "isolated"}})}
    lines = build_ruleset(networks, plan_forwards(networks, GUESTS, FACTS)[0]).splitlines()
    let_in = [number for number, line in enumerate(lines) if "ct status dnat accept" in line]
    stopped = next(number for number, line in enumerate(lines) if 'iifname "kvlab" drop' in line)
    assert len(let_in) == 2 and stopped < min(let_in)


@given(st.permutations(["lan", "dmz"]), st.permutations(["https", "names"]))
def test_the_order_of_files_and_tables_is_irrelevant(networks: list[str], forwards: list[str]) -> None:
    declared = {"lan": NETWORKS["lan"], "dmz": network(60, ssh={"listen": ":2222", "to": "web:22"})}
    shuffled = {}
    for name in networks:
        wishes = declared[name].forward
        order = [key for key in forwards if key in wishes] or list(wishes)
        shuffled[name] = declared[name].model_copy(update={"forward": {key: wishes[key] for key in order}})
    guests = {"web": guest(lan="192.168.50.20", dmz="192.168.60.20")}
    openings, problems = plan_forwards(shuffled, guests, FACTS)
    assert problems == () and len(openings) == 3
    assert build_ruleset(shuffled, openings[::-1]) == build_ruleset(declared, plan_forwards(declared, guests, FACTS)[0])
