"""A Linux guest's card from both sides: its place, queues and vectors, its cable, its limits and its guard."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.rig.guestconsole import GuestConsole
from tests.rig.guestfiles import LAN, linux
from tests.rig.kvmdhost import KvmdHost, kvmd_host
from tests.rig.qmpsession import QmpSession

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

FIXED = "192.168.50.20"
NIC = f"""
[nic.lan]
network = "lan"
ipv4 = "{FIXED}"
queues = 2
vectors = 8
pci_address = "0a"
{{more}}
"""


def web(more: str) -> str:
    extra = "[cpu]\nvcpus = 2\nallow_overcommit = true\n" + NIC.format(more=more)
    return linux("web", size="160MiB", network=None, extra=extra)


class Booted:
    """The host, the guest's console, and what a pass says and does of an edit."""

    def __init__(self, host: KvmdHost) -> None:
        self.host = host
        self.console = GuestConsole(host.run / "guests/web/serial-console.sock")

    def edit(self, more: str) -> list[str]:
        """What was done of it, whoever's pass came first: kvmd makes one of its own when links change."""
        cursor = self._events()["cursor"]
        self.host.guest("web", web(more))
        self.host.call("host.apply")
        assert self.host.call("host.plan")["actions"] == []
        done = self._events("--since", str(cursor))["events"]
        return [event["data"]["line"] for event in done if event["type"] == "action.done"]

    def _events(self, *words: str) -> Any:
        return json.loads(self.host.cli("events", "--json", *words).stdout)

    def tap(self) -> str:
        links = json.loads(self.host.inside("ip", "-j", "link", "show", "master", "kvlan").stdout)
        return next(str(link["ifname"]) for link in links)

    def drops(self) -> dict[str, int]:
        listing = json.loads(self.host.inside("nft", "-j", "list", "table", "bridge", "kvmd").stdout)
        rules = [item["rule"] for item in listing["nftables"] if "rule" in item]
        return {
            rule["comment"].partition(": ")[2]: part["counter"]["packets"]
            for rule in rules
            for part in rule["expr"]
            if "counter" in part
        }

    def carrier(self) -> str:
        return self.console.check("cat /sys/class/net/eth0/carrier")


@pytest.fixture(scope="module")
def booted() -> Iterator[Booted]:
    with kvmd_host() as host:
        host.network("lan", LAN)
        host.guest("web", web("link = false\nguard = true\n"))
        host.start()
        host.call("host.apply")
        host.call("guest.start", name="web")
        found = Booted(host)
        found.console.wait_ready(timeout_s=120)
        yield found
        found.console.close()


def wait_until(reached: Callable[[], Any], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_guest_sees_its_card_where_it_was_put_with_its_queues_and_vectors(booted: Booted) -> None:
    assert booted.carrier() == "0", "the cable was pulled before the guest's first look"
    console = booted.console
    assert "0000:00:0a.0" in console.check("readlink -f /sys/class/net/eth0/device")
    assert console.check("ls -d /sys/class/net/eth0/queues/rx-*").split() == [
        f"/sys/class/net/eth0/queues/rx-{n}" for n in (0, 1)
    ]
    with QmpSession(booted.host.run / "guests/web/rescue.sock") as qmp:
        card = {"path": "/machine/peripheral/nic-lan", "property": "vectors"}
        assert qmp.execute("qom-get", **card) == 8
    assert booted.host.call("host.plan")["actions"] == []


def test_the_cable_is_plugged_in_and_pulled_under_the_guest(booted: Booted, life: str) -> None:
    if life == "adopted":
        booted.host.restart()
    assert booted.edit("guard = true\n") == ["~ guest web: nic.lan.link pulled -> plugged in"]
    wait_until(lambda: booted.carrier() == "1")
    assert booted.edit("link = false\nguard = true\n") == ["~ guest web: nic.lan.link plugged in -> pulled"]
    wait_until(lambda: booted.carrier() == "0")


def test_rules_are_there_before_a_guest_that_is_started_without_a_pass(host: KvmdHost) -> None:
    """`guest.start` makes no plan: what would let an unguarded frame out is made sure of by the start itself."""
    host.network("lan", LAN)
    host.start()
    host.call("host.apply")
    host.guest("web", web("guard = true\n"))
    host.call("guest.start", name="web")
    listing = host.inside("nft", "list", "table", "bridge", "kvmd").stdout
    assert "web/lan: another MAC" in listing
    assert not any("bridge kvmd" in action["line"] for action in host.call("host.plan")["actions"])
    host.call("guest.kill", name="web")


def test_a_guarded_guest_is_itself_and_nobody_else(booted: Booted) -> None:
    booted.edit("guard = true\n")
    console = booted.console
    wait_until(lambda: FIXED in console.run("ip address show eth0").output, 60.0)
    console.check("ping -c 1 -W 5 192.168.50.1")
    before = booted.drops()
    console.check("ip address add 192.168.50.77/24 dev eth0")
    assert console.run("ping -c 1 -W 2 -I 192.168.50.77 192.168.50.1").status != 0
    console.check("ip address del 192.168.50.77/24 dev eth0")
    after = booted.drops()
    named = ("another IPv4 address", "ARP with another address")
    assert sum(after[name] for name in named) > sum(before[name] for name in named)
    console.check("ping -c 1 -W 5 192.168.50.1")


def test_limits_come_and_go_under_the_guest(booted: Booted) -> None:
    lines = booted.edit('guard = true\nrate_in = "20Mbit"\nrate_out = "10Mbit"\n')
    assert lines == ["~ nft table bridge kvmd: rules differ", "~ guest web: nic.lan.rate_in none -> 20Mbit"]
    assert "rate 20Mbit" in booted.host.inside("tc", "qdisc", "show", "dev", booted.tap()).stdout
    booted.console.check("ping -c 1 -W 5 192.168.50.1")
    assert booted.edit("guard = true\n") == [
        "~ nft table bridge kvmd: rules differ",
        "~ guest web: nic.lan.rate_in 20Mbit -> none",
    ]


def test_nothing_of_the_port_is_left_when_the_guest_is_off(booted: Booted) -> None:
    booted.edit('rate_in = "20Mbit"\n')
    tap = booted.tap()
    booted.host.call("guest.kill", name="web")
    assert tap not in booted.host.inside("ip", "link").stdout
    assert booted.host.inside("nft", "list", "table", "bridge", "kvmd").returncode != 0
