"""The texts kvmd makes for nft and dnsmasq, and what it reads back from both."""

from __future__ import annotations

import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.plan.dnsmasq import Host, Lease, bridge_of, build_config, parse_leases
from kvmd.plan.nft import build_ruleset
from kvmd.plan.nfttable import EDITED, fingerprint, read_fingerprint
from tests.rig import golden_network

NETWORKS = dict(golden_network.desired().networks)
RULESET = build_ruleset(NETWORKS)

LEASES = """\
1795430279 02:00:00:00:00:01 192.168.50.120 web 01:02:00:00:00:00:01
0 CE:8A:A4:AC:A8:04 192.168.50.20 * *
duid 00:01:00:01:2f:d2:6b:f5:02:00:00:00:00:01
1795430280 T9 fd50::1:b * 00:03:00:01:02:00:00:00:00:02
1795430279 123456 fd50::1:a * 00:01:00:01:2f:d2:6b:f5:02:00:00:00:00:01
1795430279 123456 fd50::5 web 00:01
1795430279 123456 fd50:::5 web 00:01
"""


@pytest.mark.parametrize("name", sorted(path.name for path in golden_network.DATA.glob("*.*") if path.is_file()))
def test_golden(name: str) -> None:
    text = golden_network.texts()[name]
    assert text == (golden_network.DATA / name).read_text(), "read the diff of scripts/regen"


def test_every_text_has_its_golden_file() -> None:
    assert all((golden_network.DATA / name).is_file() for name in golden_network.texts())


def listing(text: str) -> dict[str, Any]:
    """What `nft -j list table` says of a text of ours: enough of nft's grammar for what we write."""
    items: list[dict[str, Any]] = [{"metainfo": {"json_schema_version": 1}}, {"table": {"family": "inet"}}]
    rules: list[dict[str, Any]] = []
    chain = ""
    for line in map(str.strip, text.splitlines()[3:]):
        words = line.split()
        if line.startswith("chain "):
            chain = words[1]
            items.append({"chain": {"name": chain}})
        elif line.startswith("type "):
            head = {"hook": words[3], "prio": int(words[5].rstrip(";")), "policy": words[7].rstrip(";")}
            items[-1]["chain"].update(head)
        elif ' comment "' in line:
            rules.append({"rule": {"chain": chain, "comment": line.split('"')[-2], "expr": []}})
    return {"nftables": [*items, *rules]}


def test_the_fingerprint_is_read_back() -> None:
    assert read_fingerprint(json.dumps(listing(RULESET))) == fingerprint(RULESET)


@pytest.mark.parametrize("number", range(3))
def test_a_rule_that_is_gone_strange_or_in_another_place_is_seen(number: int) -> None:
    there = listing(RULESET)
    rules = [item for item in there["nftables"] if "rule" in item and item["rule"]["chain"] == "forward"]
    at = there["nftables"].index(rules[1])
    match number:
        case 0:
            del there["nftables"][at]
        case 1:
            there["nftables"].insert(at, {"rule": {"chain": "forward", "expr": []}})
        case _:
            there["nftables"][at], there["nftables"][at + 1] = there["nftables"][at + 1], there["nftables"][at]
    assert read_fingerprint(json.dumps(there)) == f"{fingerprint(RULESET)}{EDITED}"


@pytest.mark.parametrize("kind", ["set", "map", "chain"])
def test_a_strange_object_in_the_table_is_seen(kind: str) -> None:
    there = listing(RULESET)
    there["nftables"].append({kind: {"name": "mine"}})
    assert read_fingerprint(json.dumps(there)) == f"{fingerprint(RULESET)}{EDITED}"


def test_a_table_without_our_mark_is_not_as_declared() -> None:
    empty = {"nftables": [{"table": {"family": "inet", "name": "kvmd"}}]}
    assert read_fingerprint(json.dumps(empty)) == "unmarked"


@given(
    st.text()
    | st.recursive(st.none() | st.text(), lambda x: st.dictionaries(st.text(), x) | st.lists(x)).map(json.dumps)
)
def test_whatever_nft_says_is_a_fingerprint_or_a_value_error(text: str) -> None:
    try:
        read_fingerprint(text)
    except ValueError:
        return


@pytest.mark.parametrize("change", ["mode", "subnet", "uplink", "isolated", "access", "gone"])
def test_another_wish_is_another_fingerprint(change: str) -> None:
    networks = dict(NETWORKS)
    lan = networks["lan"]
    assert lan.ipv4 is not None
    match change:
        case "mode":
            networks["lan"] = lan.model_copy(update={"network": lan.network.model_copy(update={"mode": "isolated"})})
        case "subnet":
            office = networks["office"].ipv4
            networks["lan"] = lan.model_copy(update={"ipv4": office})
        case "uplink":
            networks["lan"] = lan.model_copy(update={"nat": networks["office"].nat})
        case "isolated":
            about = lan.network.model_copy(update={"guests_isolated": True})
            networks["lan"] = lan.model_copy(update={"network": about})
        case "access":
            networks["lan"] = lan.model_copy(update={"firewall": networks["lab"].firewall})
        case _:
            del networks["lan"]
    assert fingerprint(build_ruleset(networks)) != fingerprint(RULESET)


def test_without_a_network_of_kvmds_there_is_no_table() -> None:
    assert build_ruleset({}) == build_ruleset({"servers": NETWORKS["servers"]}) == ""
    assert fingerprint("") is None


@given(st.permutations(sorted(NETWORKS)))
def test_the_order_of_networks_does_not_matter(order: list[str]) -> None:
    assert build_ruleset({name: NETWORKS[name] for name in order}) == RULESET


def test_a_packet_is_let_out_then_in_then_through() -> None:
    """Whatever way in comes before a way out, or the other way round, would be a way round the other's fence."""
    forward = RULESET[RULESET.index("chain forward") : RULESET.index("chain input")].splitlines()[2:-2]
    stages = [
        ("guest to guest", "isolated from each other"),
        ("no way out", "no other way out", "its own addresses only"),
        ("answers", "routed in", "nothing reaches in"),
        ("guests out",),
    ]
    found = [next(n for n, words in enumerate(stages) if any(word in line for word in words)) for line in forward]
    assert found == sorted(found) and set(found) == {0, 1, 2, 3}


def test_nobody_forwards_with_a_foreign_address_of_either_family() -> None:
    for family in ("ip saddr != 192.168.50.0/24", "ip6 saddr != fd50::/64"):
        assert f'iifname "kvlan" {family} drop' in RULESET
    assert 'iifname "kv-office0" meta nfproto ipv6 drop' in RULESET
    assert "ip6 saddr 2001:db8:50::/64" not in RULESET, "what is routed is not translated"
    assert "ip6 saddr fd50::/64 ip6 daddr != fd50::/64" in RULESET


HOSTS = st.builds(
    Host,
    name=st.text(string.ascii_lowercase, min_size=1, max_size=8),
    mac=st.sampled_from(["02:00:00:00:00:01", "02:00:00:00:00:02"]),
    ipv4=st.none() | st.sampled_from(["192.168.50.7", "192.168.50.8"]),
    ipv6=st.none() | st.sampled_from(["fd50::7", "fd50::8"]),
)


@given(st.lists(HOSTS, max_size=6).flatmap(lambda hosts: st.tuples(st.just(hosts), st.permutations(hosts))))
def test_the_order_of_hosts_does_not_matter(both: tuple[list[Host], list[Host]]) -> None:
    one, other = (build_config("lan", NETWORKS["lan"], hosts) for hosts in both)
    assert one == other
    assert sum(line.startswith("dhcp-host=") for line in one.splitlines()) == len(both[0])


def test_an_isolated_networks_server_asks_nobody_and_names_no_router() -> None:
    text = build_config("lab", NETWORKS["lab"], ())
    assert "no-resolv" in text and "server=" not in text and "resolv-file" not in text
    assert "dhcp-option=option:router\n" in text


def test_the_bridge_is_found_again_in_a_configuration() -> None:
    assert bridge_of(build_config("office", NETWORKS["office"], ())) == "kv-office0"
    assert bridge_of("no-resolv\n") is None


def test_leases_are_read_in_order_of_address_and_the_rest_is_passed_over() -> None:
    assert parse_leases(LEASES) == (
        Lease(0, "ce:8a:a4:ac:a8:04", "192.168.50.20", None, None),
        Lease(1795430279, "02:00:00:00:00:01", "192.168.50.120", "web", "01:02:00:00:00:00:01"),
        Lease(1795430279, None, "fd50::5", "web", "00:01"),
        Lease(1795430279, "02:00:00:00:00:01", "fd50::1:a", None, "00:01:00:01:2f:d2:6b:f5:02:00:00:00:00:01"),
        Lease(1795430280, "02:00:00:00:00:02", "fd50::1:b", None, "00:03:00:01:02:00:00:00:00:02"),
    )


@given(st.text())
def test_no_text_breaks_the_lease_reader(text: str) -> None:
    assert isinstance(parse_leases(text), tuple)
