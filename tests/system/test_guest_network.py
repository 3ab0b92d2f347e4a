"""Linux guests on kvmd's networks: leases and names, a reservation, the way out of one and out of none of the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.rig.guestconsole import GuestConsole
from tests.rig.guestfiles import LAN, linux
from tests.rig.internet import HOST_ADDRESS, PAGE, SERVER_ADDRESS, internet
from tests.rig.kvmdhost import KvmdHost, kvmd_host
from tests.rig.netns import Namespace

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

RESERVED = "192.168.50.20"
LAB = """
[network]
mode = "isolated"
[ipv4]
address = "10.77.0.1/24"
[ipv4.dhcp]
range = ["10.77.0.50", "10.77.0.99"]
[dns]
domain = "lab.test"
"""
# web and db are neighbours on the NAT network, db also has a leg in the isolated one, where cell has nothing else.
LEGS = {"web": ("lan",), "db": ("lan", "lab"), "cell": ("lab",)}
FETCH = f"timeout 10 wget -q -O - http://{SERVER_ADDRESS}/"


class Guests:
    """Booted guests, their consoles, and the addresses their leases gave them, by network."""

    def __init__(self, host: KvmdHost, outside: Namespace) -> None:
        self.host, self.outside = host, outside
        self.consoles: dict[str, GuestConsole] = {}
        self.address: dict[tuple[str, str], str] = {}

    def attach(self) -> None:
        """Boot all of LEGS and wait for every lease."""
        for name in LEGS:
            self.host.call("guest.start", name=name)
            self.consoles[name] = GuestConsole(self.host.run / f"guests/{name}/serial-console.sock")
        for name, legs in LEGS.items():
            self.consoles[name].wait_ready(timeout_s=120)
            for _ in legs:
                lease = self.consoles[name].wait_lease()
                network = "lan" if lease[2].startswith("192.168.50.") else "lab"
                self.address[name, network] = lease[2]

    def pings(self, source: str, target: str) -> bool:
        return self.consoles[source].run(f"ping -c 1 -W 5 {target}").status == 0


def _nic(name: str, network: str) -> str:
    reserved = f'ipv4 = "{RESERVED}"\n' if (name, network) == ("web", "lan") else ""
    return f'[nic.{network}]\nnetwork = "{network}"\n{reserved}'


@pytest.fixture(scope="module")
def booted() -> Iterator[Guests]:
    """Three guests, two networks, and an internet behind the host's uplink."""
    with kvmd_host() as host:
        assert host.namespace
        with internet(Namespace(host.namespace)) as outside:
            host.network("lan", LAN)
            host.network("lab", LAB)
            for name, legs in LEGS.items():
                nics = "".join(_nic(name, network) for network in legs)
                host.guest(name, linux(name, size="160MiB", network=None, extra=nics))
            host.start()
            host.call("host.apply")
            guests = Guests(host, outside)
            guests.attach()
            yield guests
            for console in guests.consoles.values():
                console.close()


@pytest.fixture
def guests(booted: Guests, life: str) -> Guests:
    """The same guests, fresh, then adopted by another kvmd after SIGKILL."""
    if life == "adopted":
        booted.host.restart()
    return booted


def test_leases_are_from_the_pool_or_reserved(guests: Guests) -> None:
    address = guests.address
    assert set(address) == {(name, network) for name, legs in LEGS.items() for network in legs}
    assert address["web", "lan"] == RESERVED
    assert 100 <= int(address["db", "lan"].rpartition(".")[2]) <= 200
    assert 50 <= int(address["cell", "lab"].rpartition(".")[2]) <= 99
    nics = {nic["name"]: nic for nic in guests.host.show("web")["nics"]}
    assert nics["lan"]["mac"] in guests.consoles["web"].check("ip link show eth0")
    assert guests.host.call("host.plan")["actions"] == []


def test_neighbours_ping_each_other_by_name(guests: Guests) -> None:
    for source, target in (("web", "db"), ("db", "web")):
        assert guests.pings(source, guests.address[target, "lan"])
        assert guests.pings(source, f"{target}.lan.test")
    assert guests.pings("cell", "db.lab.test")


def test_a_page_through_nat_and_nothing_comes_in(guests: Guests) -> None:
    assert guests.consoles["web"].check(FETCH) == PAGE.format(client=HOST_ADDRESS)
    # The other direction: a neighbour on the uplink that knows the guests' subnet does not get in.
    guests.outside.ip(f"route replace 192.168.50.0/24 via {HOST_ADDRESS}")
    said = guests.outside.run("busybox", "ping", "-c1", "-W3", RESERVED, check=False)
    assert "bytes from" not in said
    assert "bytes from" in guests.outside.run("busybox", "ping", "-c1", "-W3", HOST_ADDRESS)


def test_an_isolated_network_has_no_way_out(guests: Guests) -> None:
    """No default route; and with one set by hand still nothing passes, neither to the internet nor to the other net."""
    cell = guests.consoles["cell"]
    assert guests.pings("cell", "10.77.0.1")
    assert "default" not in cell.check("ip route")
    cell.check("ip route add default via 10.77.0.1")
    try:
        assert cell.run(FETCH).status != 0
        assert cell.run(f"ping -c 1 -W 3 {SERVER_ADDRESS}").status != 0
        assert cell.run(f"ping -c 1 -W 3 {guests.address['db', 'lan']}").status != 0
        assert cell.run(f"ping -c 1 -W 3 {RESERVED}").status != 0
    finally:
        cell.check("ip route del default")
