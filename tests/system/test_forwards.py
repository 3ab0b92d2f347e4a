"""Port forwards on the real kernel: from outside, from a neighbour, from the host itself, and what stays shut.

The guest is a namespace with a veth in the bridge and its reservation's address.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kvmd.config.network import Network
from tests.rig.netns import Namespace
from tests.rig.networkrig import Rig, guest, internet, isolated, nat, network_rig, plugged_in, web_server

pytestmark = pytest.mark.system

GUEST_ADDRESS, HOST_ADDRESS = "192.168.50.20", "203.0.113.1"
FETCH = """
import sys, urllib.request as u
u.install_opener(u.build_opener(u.ProxyHandler({})))
try:
    print(u.urlopen(sys.argv[1], timeout=float(sys.argv[2])).read().decode())
except OSError as error:
    print(error)
"""
ECHO = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("0.0.0.0", 53))
while True:
    data, peer = s.recvfrom(99)
    s.sendto(peer[0].encode(), peer)
"""
ASK = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(float(sys.argv[3]))
s.sendto(b"?", (sys.argv[1], int(sys.argv[2])))
try:
    print(s.recv(99).decode())
except OSError as error:
    print("no answer", error)
"""


def fetch(namespace: Namespace, port: int, address: str = HOST_ADDRESS, timeout_s: float = 5) -> str:
    url = f"http://{address}:{port}/"
    return namespace.run(sys.executable, "-I", "-c", FETCH, url, str(timeout_s), check=False)


def ask(namespace: Namespace, port: int, address: str = HOST_ADDRESS) -> str:
    return namespace.run(sys.executable, "-I", "-c", ASK, address, str(port), "5", check=False).strip()


def forwarding(**forwards: dict[str, str]) -> Network:
    tables = Network.model_validate({"network": {"mode": "nat"}, "forward": forwards})
    return nat().model_copy(update={"forward": tables.forward})


WEB = forwarding(
    web={"listen": f"{HOST_ADDRESS}:8080", "to": "web:80"},
    anywhere={"listen": ":8081", "to": "web:80"},
    echo={"listen": ":5353", "to": "web:53", "protocol": "udp"},
)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with network_rig(tmp_path) as made:
        yield made


@contextlib.contextmanager
def served(rig: Rig, tmp_path: Path) -> Iterator[tuple[Namespace, Namespace]]:
    """The internet, and the guest `web` with a page on port 80 and an echo of who asked on UDP port 53."""
    with internet(rig) as outside, plugged_in(rig, "kvlan") as web:
        web.ip(f"addr add {GUEST_ADDRESS}/24 dev eth0")
        web.ip("route add default via 192.168.50.1")
        page = web_server(web, tmp_path / "page", "the guest's page", GUEST_ADDRESS)
        with page, web.running(sys.executable, "-I", "-c", ECHO):
            yield outside, web


async def test_a_forward_is_reached_from_outside_from_inside_and_from_the_host(rig: Rig, tmp_path: Path) -> None:
    rig.networks, rig.guests = {"lan": nat()}, {"web": guest("lan", GUEST_ADDRESS)}
    await rig.converge()
    with served(rig, tmp_path) as (outside, web), plugged_in(rig, "kvlan") as neighbour:
        neighbour.ip("addr add 192.168.50.30/24 dev eth0")
        neighbour.ip("route add default via 192.168.50.1")
        assert "the guest's page" not in fetch(outside, 8080, timeout_s=2)
        rig.networks = {"lan": WEB}
        assert await rig.converge() == ["~ nft table inet kvmd: rules differ"]

        # With br_netfilter a frame that comes back to the port it came from is dropped: no guest reaches itself then.
        rig.host.run("sh", "-c", "echo 0 > /proc/sys/net/bridge/bridge-nf-call-iptables || true")
        for client in (outside, neighbour, web, rig.host):
            for port in (8080, 8081):
                assert "the guest's page" in fetch(client, port), (client.name, port)
        assert "the guest's page" in fetch(neighbour, 8081, "192.168.50.1"), "the gateway is an address of the host"
        assert ask(outside, 5353) == "203.0.113.9", "the guest sees who asks"
        assert ask(neighbour, 5353) == "192.168.50.1", "but a neighbour only by way of the host"
        assert ask(rig.host, 5353) == HOST_ADDRESS

        outside.ip(f"route add 192.168.50.0/24 via {HOST_ADDRESS}")
        assert "the guest's page" not in fetch(outside, 80, GUEST_ADDRESS, 2), "the guest itself stays shut"
        rig.networks = {"lan": nat()}
        await rig.converge()
        assert "the guest's page" not in fetch(outside, 8080, timeout_s=2)


async def test_another_network_reaches_a_forward_and_an_isolated_one_does_not(rig: Rig, tmp_path: Path) -> None:
    rig.networks, rig.guests = {"lan": WEB, "lab": isolated()}, {"web": guest("lan", GUEST_ADDRESS)}
    with internet(rig):
        await rig.converge()
        with plugged_in(rig, "kvlab") as prisoner, plugged_in(rig, "kvlan") as web:
            web.ip(f"addr add {GUEST_ADDRESS}/24 dev eth0")
            web.ip("route add default via 192.168.50.1")
            prisoner.ip("addr add 192.168.60.30/24 dev eth0")
            prisoner.ip("route add default via 192.168.60.1")
            with web_server(web, tmp_path / "page", "the guest's page", GUEST_ADDRESS):
                assert "the guest's page" in fetch(rig.host, 8081)
                for address in (HOST_ADDRESS, "192.168.60.1"):
                    assert "the guest's page" not in fetch(prisoner, 8081, address, 2)


async def test_a_way_out_that_is_bound_to_an_uplink_does_not_hold_answers_back(rig: Rig, tmp_path: Path) -> None:
    bound = WEB.model_copy(update={"nat": WEB.nat.model_copy(update={"uplink": "elsewhere"})})
    rig.networks, rig.guests = {"lan": bound}, {"web": guest("lan", GUEST_ADDRESS)}
    with internet(rig) as outside:
        await rig.converge()
        with plugged_in(rig, "kvlan") as web:
            web.ip(f"addr add {GUEST_ADDRESS}/24 dev eth0")
            web.ip("route add default via 192.168.50.1")
            with web_server(web, tmp_path / "page", "the guest's page", GUEST_ADDRESS):
                assert "the guest's page" in fetch(outside, 8080)


@pytest.mark.parametrize(
    "drift",
    [
        "nft flush chain inet kvmd prerouting",
        "nft delete chain inet kvmd output",
        "nft add rule inet kvmd prerouting tcp dport 22 dnat ip to 192.168.50.20:22",
    ],
)
async def test_a_forward_somebody_changed_by_hand_is_mended(rig: Rig, drift: str) -> None:
    rig.networks, rig.guests = {"lan": WEB}, {"web": guest("lan", GUEST_ADDRESS)}
    with internet(rig):
        await rig.converge()
        rig.host.run(*drift.split())
        assert await rig.converge() == ["~ nft table inet kvmd: as declared again"]
