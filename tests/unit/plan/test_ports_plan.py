"""Rules and queues of the guests' ports: what is planned, and that nothing is twice."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import Action, Disruption, ReplaceRuleset, ShapePort
from kvmd.config.guest import Guest
from kvmd.config.network import Network
from kvmd.facts import Facts, Link, Process, RunningGuest
from kvmd.plan.guard import link_local
from kvmd.plan.links import bridge_mac, tap_alias, tap_name
from kvmd.plan.nfttable import fingerprint
from kvmd.plan.ports import plan_ports, port_rules, tbf_of
from kvmd.units import Rate

UUIDS = {"web": "6f0d2c6e-9a0f-4a57-8a0c-3b3f7b6f7a11", "db": "6f0d2c6e-9a0f-4a57-8a0c-3b3f7b6f7a12"}
MACS = {("web", "lan"): "52:54:00:00:00:01", ("db", "lan"): "52:54:00:00:00:02"}
TAP = tap_name(UUIDS["web"], "lan")


def network(mode: str = "nat", **tables: Any) -> Network:
    if mode == "bridge":
        return Network.model_validate({"network": {"mode": mode, "bridge": "br0"}})
    ipv4 = {"ipv4": {"address": IPv4Interface("192.168.50.1/24")}}
    return Network.model_validate({"network": {"mode": mode}} | ipv4 | tables)


def guest(**nic: Any) -> Guest:
    return Guest.model_validate({"memory": {"size": "64MiB"}, "nic": {"lan": {"network": "lan", **nic}}})


def rules(networks: dict[str, Network], guests: dict[str, Guest]) -> list[str]:
    """The rules of the port of web, without counters."""
    lines = [line.strip().replace(" counter", "") for line in port_rules(networks, guests, MACS, UUIDS).splitlines()]
    start = lines.index(f"chain {TAP} {{") + 1
    return lines[start : lines.index("}", start)]


def carry_out(actions: tuple[Action, ...], facts: Facts) -> Facts:
    for action in actions:
        match action:
            case ReplaceRuleset():
                facts = replace(facts, nft_ports=fingerprint(action.text))
            case ShapePort():
                links = (replace(x, tbf=tbf_of(action.rate)) if x.name == action.tap else x for x in facts.links)
                facts = replace(facts, links=tuple(links))
            case _:
                raise AssertionError(action)
    return facts


def tap(guest_name: str = "web") -> Link:
    name = tap_name(UUIDS[guest_name], "lan")
    return Link(name, 9, kind="tun", master="kvlan", alias=tap_alias("lan", guest_name, "lan"), up=True)


def test_without_guard_or_limit_there_is_no_table() -> None:
    assert plan_ports({"lan": network()}, {"web": guest()}, MACS, UUIDS, Facts(links=(tap(),))) == ((), ())


def test_a_guarded_port_with_a_fixed_address_is_that_address_and_no_other() -> None:
    found = rules({"lan": network()}, {"web": guest(guard=True, ipv4=IPv4Address("192.168.50.20"))})
    assert found[0] == 'ether saddr != 52:54:00:00:00:01 drop comment "web/lan: another MAC"'
    assert 'ip saddr != { 192.168.50.20, 0.0.0.0 } drop comment "web/lan: another IPv4 address"' in found
    assert 'arp saddr ip != { 192.168.50.20, 0.0.0.0 } drop comment "web/lan: ARP with another address"' in found
    assert 'ip6 saddr != { fe80::/10, :: } drop comment "web/lan: another IPv6 address"' in found
    assert 'udp sport { 67, 547 } drop comment "web/lan: answers of a DHCP server"' in found
    assert all("neighbour's IPv4" not in rule for rule in found)


def test_without_a_fixed_address_it_may_have_any_free_one_of_the_network() -> None:
    reserved = {"printer": {"mac": "3c:2a:f4:00:00:01", "ipv4": IPv4Address("192.168.50.9")}}
    guests = {"web": guest(guard=True), "db": guest(ipv4=IPv4Address("192.168.50.21"))}
    found = rules({"lan": network(reservation=reserved)}, guests)
    assert 'ip saddr != { 192.168.50.0/24, 0.0.0.0 } drop comment "web/lan: another IPv4 address"' in found
    taken = "{ 192.168.50.1, 192.168.50.21, 192.168.50.9 }"
    assert f'ip saddr {taken} drop comment "web/lan: a neighbour\'s IPv4 address"' in found
    assert f'arp saddr ip {taken} drop comment "web/lan: ARP with a neighbour\'s address"' in found


@pytest.mark.parametrize(
    ("mode", "own", "seen"),
    [
        ("slaac", None, "fd50::/64"),
        ("slaac", "fd50::20", "fd50::/64"),
        ("dhcp", "fd50::20", "fd50::20"),
        ("dhcp", None, "fd50::/64"),
    ],
)
def test_ipv6_of_its_network_or_the_one_reserved_where_guests_make_none_themselves(
    mode: str, own: str | None, seen: str
) -> None:
    net = network(ipv6={"address": IPv6Interface("fd50::1/64"), "mode": mode})
    found = rules({"lan": net}, {"web": guest(guard=True, **({"ipv6": IPv6Address(own)} if own else {}))})
    assert f'ip6 saddr != {{ fe80::/10, ::, {seen} }} drop comment "web/lan: another IPv6 address"' in found
    announced = next(rule for rule in found if "nd-neighbor-advert" in rule)
    assert f"{int(IPv6Address('fd50::1')):#034x}" in announced
    assert f"{int(IPv6Address(link_local(bridge_mac('kvlan')))):#034x}" in announced


def test_on_a_bridge_of_the_distribution_only_declared_addresses_leave() -> None:
    found = rules({"lan": network("bridge")}, {"web": guest(guard=True, ipv4=IPv4Address("10.1.2.3"))})
    assert 'ip saddr != { 10.1.2.3, 0.0.0.0 } drop comment "web/lan: another IPv4 address"' in found
    found = rules({"lan": network("bridge")}, {"web": guest(guard=True)})
    assert 'ip saddr != { 0.0.0.0 } drop comment "web/lan: another IPv4 address"' in found


def test_a_limit_alone_is_one_rule() -> None:
    found = rules({"lan": network()}, {"web": guest(rate_out=Rate.parse("100Mbit"))})
    assert found == ['limit rate over 12500000 bytes/second burst 65536 bytes drop comment "web/lan: rate_out"']


def test_every_comment_fits_into_what_nft_takes() -> None:
    name = "g" * 47
    guests = {
        name: Guest.model_validate({"memory": {"size": "64MiB"}, "nic": {"n" * 20: {"network": "lan", "guard": True}}})
    }
    text = port_rules({"lan": network()}, guests, {(name, "n" * 20): "52:54:00:00:00:01"}, {name: UUIDS["web"]})
    assert max(len(line.split('"')[-2]) for line in text.splitlines() if ' comment "' in line) <= 128


def test_a_guest_without_identity_has_no_tap_and_no_rules_yet() -> None:
    assert port_rules({"lan": network()}, {"new": guest(guard=True)}, MACS, UUIDS) == ""
    assert port_rules({}, {"web": guest(guard=True)}, MACS, UUIDS) == ""


@pytest.mark.parametrize("change", ["guard", "rate_out", "rate_in"])
def test_each_key_changes_under_a_running_guest_and_is_one_line(change: str) -> None:
    value = {"guard": True}.get(change, Rate.parse("10Mbit"))
    networks, facts = {"lan": network()}, Facts(links=(tap(),))
    (action,), problems = plan_ports(networks, {"web": guest(**{change: value})}, MACS, UUIDS, facts)
    assert problems == () and action.disruption is Disruption.NONE
    line = "~ guest web: nic.lan.rate_in none -> 10Mbit" if change == "rate_in" else "+ nft table bridge kvmd"
    assert action.line() == line and action.why
    facts = carry_out((action,), facts)
    (back,), _ = plan_ports(networks, {"web": guest()}, MACS, UUIDS, facts)
    assert back.line() == (line.replace("none -> 10Mbit", "10Mbit -> none") if change == "rate_in" else "- " + line[2:])


def test_a_cable_is_pulled_and_plugged_in_of_running_guests_that_have_the_card() -> None:
    running = RunningGuest("web", UUIDS["web"], Process(1, 1), 64 << 20, nics=("lan",))
    facts = Facts(guests=(running,))
    wish = {"web": guest(link=False), "db": guest(link=False)}
    (action,), _ = plan_ports({"lan": network()}, wish, MACS, UUIDS, facts)
    assert action.line() == "~ guest web: nic.lan.link plugged in -> pulled" and action.disruption is Disruption.NONE
    pulled = replace(facts, guests=(replace(running, unplugged=frozenset({"lan"})),))
    assert plan_ports({"lan": network()}, wish, MACS, UUIDS, pulled)[0] == ()
    (action,), _ = plan_ports({"lan": network()}, {"web": guest()}, MACS, UUIDS, pulled)
    assert action.line() == "~ guest web: nic.lan.link pulled -> plugged in"
    without = replace(facts, guests=(replace(running, nics=()),))
    assert plan_ports({"lan": network()}, wish, MACS, UUIDS, without)[0] == (), "a card that waits for a restart"


def test_a_queue_somebody_changed_is_put_right_and_other_links_are_left() -> None:
    networks, guests = {"lan": network()}, {"web": guest(rate_in=Rate.parse("10Mbit"))}
    other = Link("eth0", 2, up=True)
    strange = replace(tap("db"), alias="kvmd:lan:gone:lan")
    facts = carry_out(
        plan_ports(networks, guests, MACS, UUIDS, Facts(links=(tap(), other)))[0], Facts(links=(tap(), other))
    )
    assert plan_ports(networks, guests, MACS, UUIDS, replace(facts, links=(*facts.links, strange)))[0] == ()
    drifted = tuple(replace(link, tbf=tbf_of(Rate.parse("99Mbit"))) if link.tbf else link for link in facts.links)
    (action,), _ = plan_ports(networks, guests, MACS, UUIDS, replace(facts, links=drifted))
    assert action.line() == "~ guest web: nic.lan.rate_in 99Mbit -> 10Mbit"


NICS = st.fixed_dictionaries(
    {"guard": st.booleans()},
    optional={
        "rate_in": st.sampled_from([Rate(10**6), Rate(10**9)]),
        "rate_out": st.sampled_from([Rate(10**6), Rate(10**9)]),
    },
)


@given(st.dictionaries(st.sampled_from(["web", "db"]), NICS), st.dictionaries(st.sampled_from(["web", "db"]), NICS))
def test_from_any_wish_to_any_other_in_one_pass_whatever_the_order(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    networks, facts = {"lan": network()}, Facts(links=(tap(), tap("db")))
    for wish in (before, after):
        guests = {name: guest(**wish.get(name, {})) for name in UUIDS}
        planned = plan_ports(networks, guests, MACS, UUIDS, facts)
        shuffled = replace(facts, links=facts.links[::-1])
        assert plan_ports(networks, dict(reversed(guests.items())), MACS, UUIDS, shuffled) == planned
        facts = carry_out(planned[0], facts)
        assert plan_ports(networks, guests, MACS, UUIDS, facts) == ((), ())


def test_a_trunk_keeps_its_mac_but_its_addresses_are_not_judged() -> None:
    net = Network.model_validate({"network": {"mode": "bridge", "bridge": "br0", "vlan_filtering": True}})
    found = rules({"lan": net}, {"web": guest(guard=True, vlans=(10, 20))})
    assert found[0].startswith("ether saddr != 52:54:00:00:00:01") and any("DHCP" in rule for rule in found)
    assert not any("8021q" in rule or "ip saddr" in rule.replace("arp saddr", "") for rule in found)
