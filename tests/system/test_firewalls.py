"""Rulesets of other programs, as `nft list ruleset` prints them on hosts that run them: who drops, and what mends it.

Each is loaded for real. A finding must be true (a guest's packet does not get out), no finding too, and the hint must
end both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rig.networkrig import Rig, exists, internet, nat, network_rig, ping, plugged_in

pytestmark = pytest.mark.system

# Docker 28 with iptables-nft: FORWARD drops what none of its chains accepts.
DOCKER = """
table ip filter {
    chain DOCKER { iifname != "docker0" oifname "docker0" counter drop; }
    chain DOCKER-BRIDGE { oifname "docker0" counter jump DOCKER; }
    chain DOCKER-CT { oifname "docker0" ct state related,established counter accept; }
    chain DOCKER-ISOLATION-STAGE-2 { oifname "docker0" counter drop; }
    chain DOCKER-ISOLATION-STAGE-1 { iifname "docker0" oifname != "docker0" counter jump DOCKER-ISOLATION-STAGE-2; }
    chain DOCKER-FORWARD {
        counter jump DOCKER-CT
        counter jump DOCKER-ISOLATION-STAGE-1
        counter jump DOCKER-BRIDGE
        iifname "docker0" counter accept
    }
    chain DOCKER-USER { }
    chain FORWARD {
        type filter hook forward priority 0; policy drop;
        counter jump DOCKER-USER
        counter jump DOCKER-FORWARD
    }
}
"""
# Docker 29 with its nftables backend: drops what is its own, and nothing else.
DOCKER_NFTABLES = """
table ip docker-bridges {
    chain filter-forward-in__docker0 { ct state established,related counter accept; counter drop; }
    chain filter-FORWARD {
        type filter hook forward priority 0; policy accept;
        oifname vmap { "docker0" : jump filter-forward-in__docker0 }
    }
}
"""
FIREWALLD = """
table inet firewalld {
    chain filter_FWD_public_allow { }
    chain filter_FWD_trusted { accept; }
    chain filter_FWD_public { jump filter_FWD_public_allow; meta l4proto { icmp } ip ttl 0 accept; }
    chain filter_FORWARD_ZONES { iifname "eth9" goto filter_FWD_public; goto filter_FWD_public; }
    chain filter_FORWARD {
        type filter hook forward priority 10; policy accept;
        ct state { established, related } accept
        ct status dnat accept
        iifname "lo" accept
        ct state invalid drop
        jump filter_FORWARD_ZONES
        reject with icmpx admin-prohibited
    }
}
"""
UFW = """
table ip filter {
    chain ufw-before-forward { ct state related,established counter accept; icmp type time-exceeded counter accept; }
    chain ufw-user-forward { }
    chain ufw-reject-forward { }
    chain FORWARD {
        type filter hook forward priority 0; policy drop;
        counter jump ufw-before-forward
        counter jump ufw-user-forward
        counter jump ufw-reject-forward
    }
}
"""
LIBVIRT = """
table ip filter {
    chain LIBVIRT_FWX { iifname "virbr0" oifname "virbr0" counter accept; }
    chain LIBVIRT_FWI { oifname "virbr0" ip daddr 192.168.122.0/24 ct state related,established counter accept
        oifname "virbr0" counter reject; }
    chain LIBVIRT_FWO { iifname "virbr0" ip saddr 192.168.122.0/24 counter accept; iifname "virbr0" counter reject; }
    chain FORWARD {
        type filter hook forward priority 0; policy accept;
        counter jump LIBVIRT_FWX
        counter jump LIBVIRT_FWI
        counter jump LIBVIRT_FWO
    }
}
"""
HAND_MADE = """
table inet mine {
    chain forward { type filter hook forward priority 5; policy accept; iifname "kv*" counter drop; }
}
"""


@dataclass(frozen=True)
class Shape:
    ruleset: str
    owner: str | None  # None with `drops`: nobody known
    drops: bool
    mend: tuple[str, ...] = ()  # what the hint's tool does, in nft's words


SHAPES = {
    "docker": Shape(
        DOCKER,
        "Docker",
        drops=True,
        mend=(
            "insert rule ip filter DOCKER-USER iifname kvlan accept",
            "insert rule ip filter DOCKER-USER oifname kvlan accept",
        ),
    ),
    "docker with nftables": Shape(DOCKER_NFTABLES, None, drops=False),
    "firewalld": Shape(
        FIREWALLD,
        "firewalld",
        drops=True,
        mend=(
            "insert rule inet firewalld filter_FORWARD_ZONES iifname kvlan goto filter_FWD_trusted",
            "insert rule inet firewalld filter_FORWARD_ZONES oifname kvlan goto filter_FWD_trusted",
        ),
    ),
    "ufw": Shape(
        UFW,
        "ufw",
        drops=True,
        mend=(
            "add rule ip filter ufw-user-forward iifname kvlan counter accept",
            "add rule ip filter ufw-user-forward oifname kvlan counter accept",
        ),
    ),
    "libvirt": Shape(LIBVIRT, None, drops=False),
    "by hand": Shape(HAND_MADE, None, drops=True, mend=("flush chain inet mine forward",)),
}


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with network_rig(tmp_path) as made:
        yield made


async def findings(rig: Rig) -> list[tuple[str, str]]:
    actions, problems = await rig.look()
    assert actions == (), "nothing of others is changed"
    return [(problem.message, str(problem.hint)) for problem in problems]


@pytest.mark.parametrize("name", SHAPES)
async def test_who_drops_is_named_truly_and_what_mends_it_mends_it(rig: Rig, tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    rig.networks = {"lan": nat()}
    with internet(rig):
        await rig.converge()
        with plugged_in(rig, "kvlan") as web:
            web.ip("addr add 192.168.50.20/24 dev eth0")
            web.ip("route add default via 192.168.50.1")
            assert ping(web, "203.0.113.9")
            file = tmp_path / "theirs.nft"
            file.write_text(shape.ruleset)
            rig.host.run("nft", "-f", str(file))
            before = rig.host.run("nft", "list", "ruleset")
            found = await findings(rig)
            assert ping(web, "203.0.113.9") is not shape.drops
            assert bool(found) is shape.drops
            for message, hint in found:
                assert (f"({shape.owner})" in message if shape.owner else "(" not in message) and "kvlan" in hint
            assert len(rig.host.run("nft", "list", "ruleset").splitlines()) == len(before.splitlines())
            for command in shape.mend:
                rig.host.run("nft", command)
            assert await findings(rig) == []
            assert ping(web, "203.0.113.9")


async def test_br_netfilter_is_named_and_left_as_it_is(rig: Rig, tmp_path: Path) -> None:
    """Docker's drop reaches frames between two guests of a bridge that is not even routed."""
    knob = "/proc/sys/net/bridge/bridge-nf-call-iptables"
    assert exists(knob), "this kernel has no br_netfilter"
    rig.host.ip("link add br0 type bridge")
    rig.host.ip("link set br0 up")
    rig.networks = {"office": nat("br0", mode="bridge").model_copy(update={"ipv4": None})}
    file = tmp_path / "docker.nft"
    file.write_text(DOCKER)
    with plugged_in(rig, "br0") as one, plugged_in(rig, "br0") as two:
        one.ip("addr add 10.9.0.1/24 dev eth0")
        two.ip("addr add 10.9.0.2/24 dev eth0")
        rig.host.run("sh", "-c", f"echo 1 > {knob}")
        assert ping(one, "10.9.0.2")
        rig.host.run("nft", "-f", str(file))
        ((message, hint),) = await findings(rig)
        assert "br_netfilter" in message and "(Docker)" in message and "br0" in hint
        assert not ping(one, "10.9.0.2"), "the finding is not the cause"
        assert rig.host.run("cat", knob).strip() == "1", "kvmd does not switch it"
        rig.host.run("sh", "-c", f"echo 0 > {knob}")
        assert await findings(rig) == []
        assert ping(one, "10.9.0.2")
