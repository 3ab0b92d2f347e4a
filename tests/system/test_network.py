"""Networks on the real kernel: bridges, rules, DHCP and TAPs inside namespaces that each test makes and removes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from ipaddress import IPv4Interface
from pathlib import Path

import pytest

from kvmd.actions import (
    Disruption,
    EnsureBridge,
    RemoveBridge,
    StartDnsmasq,
)
from kvmd.effects import nft
from kvmd.effects.dnsmasq import Dnsmasqs
from kvmd.effects.linkwatch import watch_links
from kvmd.effects.proc import observe_process
from kvmd.effects.tree import Tree
from kvmd.errors import Conflict, HostFailed
from kvmd.plan.firewall import foreign_forward_drops
from kvmd.plan.links import bridge_mac, tap_alias, tap_mac, tap_name
from kvmd.plan.network import FORWARDING
from kvmd.plan.vlans import NO_KERNEL
from tests.rig import golden_network
from tests.rig.netns import private_namespace
from tests.rig.networkrig import (
    WEB_MAC,
    Rig,
    fetch,
    guest,
    internet,
    isolated,
    lease,
    nat,
    network_rig,
    open_fds,
    ping,
    plugged_in,
    web_server,
)

pytestmark = pytest.mark.system


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with network_rig(tmp_path) as made:
        yield made


async def test_networks_are_made_and_a_second_plan_is_empty(rig: Rig) -> None:
    rig.networks = {"lan": nat(), "lab": isolated()}
    assert await rig.converge() == [
        "+ bridge kvlab 192.168.60.1/24",
        "+ bridge kvlan 192.168.50.1/24",
        "+ nft table inet kvmd",
        f"~ {FORWARDING}: 0 -> 1",
        "+ dnsmasq for network lab",
        "+ dnsmasq for network lan",
    ]
    link = await rig.link("kvlan")
    assert link is not None
    assert (link.kind, link.up, link.mac, link.alias) == ("bridge", True, bridge_mac("kvlan"), "kvmd:lan")
    assert link.addresses == ("192.168.50.1/24",)


async def test_networks_no_longer_declared_are_removed_whole(rig: Rig) -> None:
    rig.networks = {"lan": nat(), "lab": isolated()}
    await rig.reconcile()
    rig.networks = {}
    assert await rig.converge() == [
        "- nft table inet kvmd",
        "- dnsmasq for network lab",
        "- dnsmasq for network lan",
        "- bridge kvlab",
        "- bridge kvlan",
    ]
    assert [link.name for link in await rig.netlink.observe_links()] == ["lo"]
    assert rig.dnsmasqs.observe() == ()


@pytest.mark.parametrize(
    ("drift", "line"),
    [
        ("ip link set kvlan down", "~ bridge kvlan: down -> up"),
        ("ip link set kvlan mtu 1400", "~ bridge kvlan: mtu 1400 -> 1500"),
        ("ip link set kvlan type bridge stp_state 1", "~ bridge kvlan: stp on -> off"),
        (
            "ip link set kvlan address 02:00:00:00:00:77",
            f"~ bridge kvlan: mac 02:00:00:00:00:77 -> {bridge_mac('kvlan')}",
        ),
        ("ip link set kvlan alias kvmd:old", "~ bridge kvlan: alias kvmd:old -> kvmd:lan"),
        ("ip addr add 10.9.9.9/24 dev kvlan", "~ bridge kvlan: address -10.9.9.9/24"),
        ("ip addr del 192.168.50.1/24 dev kvlan", "~ bridge kvlan: address +192.168.50.1/24"),
        ("nft delete table inet kvmd", "+ nft table inet kvmd"),
        ("nft flush chain inet kvmd postrouting", "~ nft table inet kvmd: as declared again"),
        ("nft add rule inet kvmd forward accept", "~ nft table inet kvmd: as declared again"),
        ("nft insert rule inet kvmd about accept", "~ nft table inet kvmd: rules differ"),
        ("nft add set inet kvmd mine { type ipv4_addr; }", "~ nft table inet kvmd: as declared again"),
        ("nft chain inet kvmd forward { policy drop; }", "~ nft table inet kvmd: as declared again"),
        ("sysctl -qw net.ipv4.ip_forward=0", f"~ {FORWARDING}: 0 -> 1"),
    ],
)
async def test_each_drift_is_planned_as_one_line_and_mended(rig: Rig, drift: str, line: str) -> None:
    rig.networks = {"lan": nat()}
    await rig.converge()
    rig.host.run(*drift.split())
    assert await rig.converge() == [line]


async def test_a_new_address_of_the_network_replaces_the_old_one(rig: Rig) -> None:
    rig.networks = {"lan": nat()}
    await rig.converge()
    ipv4 = rig.networks["lan"].ipv4
    assert ipv4 is not None
    moved = ipv4.model_copy(update={"address": IPv4Interface("192.168.51.1/24"), "dhcp": None})
    rig.networks = {"lan": rig.networks["lan"].model_copy(update={"ipv4": moved})}
    assert await rig.converge() == [
        "~ bridge kvlan: address +192.168.51.1/24, address -192.168.50.1/24",
        "~ nft table inet kvmd: rules differ",
        "~ dnsmasq for network lan: new configuration",
    ]
    link = await rig.link("kvlan")
    assert link is not None and link.addresses == ("192.168.51.1/24",)


async def test_a_foreign_link_of_that_name_is_left_alone(rig: Rig) -> None:
    rig.host.ip("link add kvlan type bridge")
    before = await rig.link("kvlan")
    make = EnsureBridge(network="lan", bridge="kvlan", addresses=("192.168.50.1/24",), mtu=1400, why="test")
    with pytest.raises(Conflict, match='"kvlan" exists'):
        await rig.netlink.ensure_bridge(make)
    with pytest.raises(Conflict, match='"kvlan" is not a bridge that kvmd made'):
        await rig.netlink.remove_bridge(RemoveBridge(bridge="kvlan", why="test"))
    assert await rig.link("kvlan") == before


async def test_a_bridge_made_by_a_kvmd_that_died_before_marking_it_is_adopted(rig: Rig) -> None:
    rig.host.ip(f"link add kvlan address {bridge_mac('kvlan')} type bridge")
    rig.networks = {"lan": nat()}
    assert (await rig.converge())[0].startswith("~ bridge kvlan: address +192.168.50.1/24")


async def test_removing_twice_is_removing_once_and_a_bridge_with_ports_stays(rig: Rig) -> None:
    rig.networks = {"lan": nat()}
    await rig.reconcile()
    remove = RemoveBridge(bridge="kvlan", why="test")
    fds = await rig.netlink.open_tap("kvt0", bridge="kvlan", mtu=1500, alias="kvmd:lan:web:lan")
    try:
        rig.networks = {}
        plan = await rig.plan()
        assert plan[-1].line() == "- bridge kvlan" and "kvt0" in plan[-1].why
        assert {action.disruption for action in plan} == {Disruption.NETWORK}
        with pytest.raises(Conflict, match="still has ports: kvt0"):
            await rig.netlink.remove_bridge(remove)
    finally:
        for fd in fds:
            os.close(fd)
    await rig.netlink.remove_bridge(remove)
    await rig.netlink.remove_bridge(remove)
    assert await rig.link("kvlan") is None


async def test_what_the_kernel_refuses_names_bridge_and_value(rig: Rig) -> None:
    with pytest.raises(HostFailed) as caught:
        await rig.netlink.ensure_bridge(EnsureBridge(network="lan", bridge="kvlan", mtu=70000, why="test"))
    assert "kvlan" in caught.value.message and "mtu 70000" in caught.value.message
    assert "Invalid argument" in caught.value.message and caught.value.hint is not None


async def test_a_guest_gets_its_reservation_a_page_through_nat_and_nobody_comes_in(rig: Rig, tmp_path: Path) -> None:
    rig.networks, rig.guests = {"lan": nat()}, {"web": guest("lan", "192.168.50.20"), "db": guest("lan")}
    rig.macs = {("web", "lan"): WEB_MAC}
    with internet(rig) as outside:
        await rig.converge()
        with plugged_in(rig, "kvlan", WEB_MAC) as web, plugged_in(rig, "kvlan") as other:
            assert lease(web, tmp_path) == "192.168.50.20"
            pooled = lease(other, tmp_path)
            assert pooled.startswith("192.168.50.1") and int(pooled.rpartition(".")[2]) in range(100, 201)

            with web_server(outside, tmp_path / "page", "hello from outside", "203.0.113.9"):
                assert "hello from outside" in fetch(web, "203.0.113.9")
            with web_server(web, tmp_path / "private", "guests only", "192.168.50.20"):
                assert "guests only" in fetch(other, "192.168.50.20"), "guests of one network see each other"
                outside.ip("route add 192.168.50.0/24 via 203.0.113.1")
                assert "guests only" not in fetch(outside, "192.168.50.20", timeout_s=2)
                rig.host.run("nft", "delete", "table", "inet", "kvmd")
                assert "guests only" in fetch(outside, "192.168.50.20"), "it was not the rules that kept it out"
                await rig.converge()

            answer = other.run("busybox", "nslookup", "web.lan.example", "192.168.50.1")
            assert "192.168.50.20" in answer
            leases = {found.address: found for found in rig.dnsmasqs.leases("lan")}
            assert leases["192.168.50.20"].name == "web" and leases["192.168.50.20"].mac == WEB_MAC
            assert leases[pooled].expires > time.time() + 11 * 3600


async def test_the_gateway_of_a_network_answers_from_inside_only(rig: Rig, tmp_path: Path) -> None:
    rig.networks = {"lan": nat()}
    with internet(rig) as outside:
        await rig.converge()
        outside.ip("route add 192.168.50.0/24 via 203.0.113.1")
        assert not ping(outside, "192.168.50.1")
        with plugged_in(rig, "kvlan") as web:
            lease(web, tmp_path)
            assert ping(web, "192.168.50.1")


async def test_an_isolated_network_has_leases_but_no_way_out(rig: Rig, tmp_path: Path) -> None:
    rig.networks = {"lan": nat(), "lab": isolated()}
    with internet(rig) as outside:
        await rig.converge()
        with plugged_in(rig, "kvlab") as fake, plugged_in(rig, "kvlan", WEB_MAC) as web:
            address = lease(fake, tmp_path)
            assert address.startswith("192.168.60.")
            assert "default" not in fake.ip("route")
            fake.ip("route add default via 192.168.60.1")  # a guest can always try
            web_address = lease(web, tmp_path)
            with web_server(outside, tmp_path / "page", "hello from outside", "203.0.113.9"):
                assert "hello" in fetch(web, "203.0.113.9")
                assert "hello" not in fetch(fake, "203.0.113.9", timeout_s=2)
            with web_server(web, tmp_path / "private", "lan only", web_address):
                assert "lan only" not in fetch(fake, web_address, timeout_s=2)


async def test_without_host_access_only_dhcp_dns_and_ping_reach_the_host(rig: Rig, tmp_path: Path) -> None:
    firewall = nat().firewall.model_copy(update={"host_access": False})
    rig.networks = {"lan": nat().model_copy(update={"firewall": firewall})}
    await rig.converge()
    with plugged_in(rig, "kvlan") as fake:
        lease(fake, tmp_path)
        with web_server(rig.host, tmp_path / "page", "host page", "192.168.50.1"):
            assert "host page" not in fetch(fake, "192.168.50.1", timeout_s=2)
            assert ping(fake, "192.168.50.1")
            fake.run("busybox", "nslookup", "nobody.lan.example", "192.168.50.1", check=False)
            rig.networks = {"lan": nat()}
            await rig.converge()
            assert "host page" in fetch(fake, "192.168.50.1")


async def test_a_killed_dnsmasq_is_seen_and_started_again(rig: Rig) -> None:
    rig.networks = {"lan": nat()}
    await rig.converge()
    ended: asyncio.Queue[tuple[str, float]] = asyncio.Queue()
    watching = asyncio.create_task(rig.dnsmasqs.watch(lambda network, wait: ended.put_nowait((network, wait))))
    try:
        waits = []
        for _ in range(3):
            await asyncio.sleep(0.05)  # the watcher's turn to see the new process
            (server,) = rig.dnsmasqs.observe()
            os.kill(server.pid, signal.SIGKILL)
            network, wait = await asyncio.wait_for(ended.get(), 5)
            assert network == "lan" and rig.dnsmasqs.observe() == ()
            assert [action.line() for action in await rig.plan()] == ["+ dnsmasq for network lan"]
            waits.append(wait)
            if not wait:
                await rig.reconcile()
            else:
                with pytest.raises(HostFailed, match="keeps ending"):
                    await rig.reconcile()
                break
        assert waits == [0.0, pytest.approx(1.0, abs=0.1)]
        await asyncio.sleep(waits[-1] + 0.1)
        await rig.converge()
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def test_a_stop_is_not_reported_as_an_end(rig: Rig) -> None:
    rig.networks = {"lan": nat()}
    await rig.converge()
    ended: list[str] = []
    watching = asyncio.create_task(rig.dnsmasqs.watch(lambda network, _: ended.append(network)))
    await asyncio.sleep(0.05)
    rig.networks = {}
    await rig.converge()
    await asyncio.sleep(0.1)
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    assert ended == []


async def test_a_second_daemon_adopts_the_running_server(rig: Rig, tmp_path: Path) -> None:
    rig.networks = {"lan": nat()}
    await rig.converge()
    (before,) = rig.dnsmasqs.observe()
    rig.dnsmasqs = Dnsmasqs(tmp_path / "run", tmp_path / "state")
    assert rig.dnsmasqs.observe() == (before,)
    assert await rig.reconcile() == []
    rig.guests, rig.macs = {"web": guest("lan", "192.168.50.20")}, {("web", "lan"): WEB_MAC}
    assert await rig.converge() == ["~ dnsmasq for network lan: new configuration"]
    (after,) = rig.dnsmasqs.observe()
    assert after.pid != before.pid and observe_process(Tree(), before.pid) is None


async def test_a_server_whose_record_was_never_written_is_found_and_replaced(rig: Rig, tmp_path: Path) -> None:
    rig.networks = {"lan": nat()}
    await rig.converge()
    (before,) = rig.dnsmasqs.observe()
    (tmp_path / "run/networks/lan/dnsmasq.json").unlink()
    rig.dnsmasqs = Dnsmasqs(tmp_path / "run", tmp_path / "state")
    assert await rig.converge() == ["~ dnsmasq for network lan: restart"]
    assert observe_process(Tree(), before.pid) is None and len(rig.dnsmasqs.observe()) == 1


async def test_a_recycled_pid_is_never_taken_for_the_server(rig: Rig, tmp_path: Path) -> None:
    rig.networks = {"lan": nat()}
    await rig.converge()
    (server,) = rig.dnsmasqs.observe()
    record, pid_file = (tmp_path / f"run/networks/lan/dnsmasq.{kind}" for kind in ("json", "pid"))
    record.write_text(record.read_text().replace(str(server.pid), str(os.getpid())))
    again = Dnsmasqs(tmp_path / "run", tmp_path / "state")
    assert [found.pid for found in again.observe()] == [server.pid]  # by its own pid file
    pid_file.write_text(f"{os.getpid()}\n")
    assert again.observe() == ()
    for file in (record, pid_file):  # for the clean-up
        file.write_text(file.read_text().replace(str(os.getpid()), str(server.pid)))


async def test_dnsmasq_that_cannot_start_says_why(rig: Rig, tmp_path: Path) -> None:
    action = StartDnsmasq(network="lan", config="interface=kvlan\nno-such-option\n", why="test")
    with pytest.raises(HostFailed, match="bad option at line 2"):
        await rig.dnsmasqs.start(action)
    assert rig.dnsmasqs.observe() == ()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("0.0.0.0", 53))
        rig.networks = {"lan": nat()}
        with pytest.raises(HostFailed, match="in use") as caught:
            await rig.reconcile()
        assert caught.value.hint is not None and "ss -lnp" in caught.value.hint


async def test_a_bridge_made_anew_has_its_dhcp_again(rig: Rig, tmp_path: Path) -> None:
    rig.networks = {"lan": nat()}
    await rig.converge()
    rig.host.ip("link del kvlan")
    assert await rig.converge() == ["+ bridge kvlan 192.168.50.1/24", "~ dnsmasq for network lan: restart"]
    with plugged_in(rig, "kvlan") as fake:
        assert lease(fake, tmp_path).startswith("192.168.50.")
    rig.host.ip("link del kvlan")
    await rig.apply((await rig.plan())[0])  # kvmd is killed here
    assert await rig.converge() == ["~ dnsmasq for network lan: restart"]


async def test_a_tap_is_up_marked_in_its_bridge_and_gone_with_its_descriptor(rig: Rig) -> None:
    rig.networks = {"lan": nat(mtu=1400)}
    await rig.converge()
    name = tap_name("6f0d2c6e-9a0f-4a57-8a0c-3b3f7b6f7a11", "lan")
    for isolated_port, queues in ((False, 1), (True, 2)):
        fds = await rig.netlink.open_tap(
            name,
            bridge="kvlan",
            mtu=1400,
            alias=tap_alias("lan", "web", "lan"),
            port_isolated=isolated_port,
            queues=queues,
        )
        try:
            assert len(fds) == queues and not any(os.get_inheritable(fd) for fd in fds)
            link = await rig.link(name)
            assert link is not None
            assert (link.kind, link.up, link.master, link.mtu) == ("tun", True, "kvlan", 1400)
            assert (link.alias, link.mac, link.port_isolated) == ("kvmd:lan:web:lan", tap_mac(name), isolated_port)
            assert "inet6" not in rig.host.ip(f"addr show {name}")
            bridge = await rig.link("kvlan")
            assert bridge is not None and bridge.mac == bridge_mac("kvlan") and bridge.mtu == 1400
            with pytest.raises(Conflict, match="exists already"):
                await rig.netlink.open_tap(name, bridge="kvlan", mtu=1400, alias="kvmd:lan:db:lan")
        finally:
            for fd in fds:
                os.close(fd)
        assert await rig.link(name) is None


async def test_a_port_with_a_lower_mtu_does_not_lower_our_bridge(rig: Rig) -> None:
    for mtu in (1500, 9000):
        rig.networks = {"lan": nat(mtu=mtu)}
        await rig.converge()
        fds = await rig.netlink.open_tap("kvt0", bridge="kvlan", mtu=1400, alias="kvmd:lan:web:lan")
        try:
            link = await rig.link("kvlan")
            assert link is not None and link.mtu == mtu
            assert await rig.plan() == []
        finally:
            os.close(fds[0])


async def test_this_kernel_says_whether_it_keeps_vlans_apart(rig: Rig) -> None:
    """Either it can, and the bridge filters, or the plan names what is missing and makes nothing."""
    rig.networks = {"lan": nat(vlan_filtering=True)}
    actions, problems = await rig.look()
    known = await rig.netlink.can_filter_vlans(())
    rig.host.ip("link add probe type bridge")
    assert await rig.netlink.can_filter_vlans(await rig.netlink.observe_links()) is known
    if known is False:
        assert [problem.message for problem in problems] == [NO_KERNEL]
        assert not any(isinstance(action, EnsureBridge) for action in actions)
    else:
        await rig.converge()
        link = await rig.link("kvlan")
        assert link is not None and link.vlan_filtering


async def test_a_tap_without_its_bridge_leaves_nothing(rig: Rig) -> None:
    assert await rig.link("kvt0") is None
    before = open_fds()
    with pytest.raises(HostFailed, match='bridge "kvlan" does not exist'):
        await rig.netlink.open_tap("kvt0", bridge="kvlan", mtu=1500, alias="kvmd:lan:web:lan")
    with pytest.raises(HostFailed, match="put TAP kvt0 into lo"):
        await rig.netlink.open_tap("kvt0", bridge="lo", mtu=1500, alias="kvmd:lan:web:lan")
    assert await rig.link("kvt0") is None
    assert open_fds() == before


async def test_a_persistent_tap_of_somebody_else_is_not_joined(rig: Rig) -> None:
    rig.networks = {"lan": nat()}
    await rig.converge()
    rig.host.ip("tuntap add kvt0 mode tap")
    with pytest.raises(Conflict, match="exists already"):
        await rig.netlink.open_tap("kvt0", bridge="kvlan", mtu=1500, alias="kvmd:lan:web:lan")
    link = await rig.link("kvt0")
    assert link is not None and link.master is None and not link.up


async def test_a_port_does_not_change_a_foreign_bridges_address(rig: Rig) -> None:
    rig.host.ip("link add br0 type bridge")
    rig.host.ip("link add nic address fc:ff:ff:ff:ff:fe type veth peer name other")
    rig.host.ip("link set nic master br0")
    before = await rig.link("br0")
    assert before is not None and before.mac == "fc:ff:ff:ff:ff:fe"
    (fd,) = await rig.netlink.open_tap("kvt0", bridge="br0", mtu=1500, alias="kvmd:dmz:web:lan")
    try:
        after = await rig.link("br0")
        assert after is not None and after.mac == before.mac
    finally:
        os.close(fd)


async def test_twenty_taps_at_once(rig: Rig) -> None:
    rig.networks = {"lan": nat()}
    await rig.converge()
    names = [tap_name(f"guest-{number}", "lan") for number in range(20)]
    opened = await asyncio.gather(
        *(
            rig.netlink.open_tap(name, bridge="kvlan", mtu=1500, alias=f"kvmd:lan:g{n}:lan")
            for n, name in enumerate(names)
        )
    )
    try:
        links = {link.name: link for link in await rig.netlink.observe_links()}
        assert all(links[name].master == "kvlan" and links[name].up for name in names)
        assert len({links[name].alias for name in names}) == 20
        assert await rig.plan() == []
    finally:
        for fds in opened:
            for fd in fds:
                os.close(fd)
    assert {link.name for link in await rig.netlink.observe_links()} == {"lo", "kvlan"}


async def test_guests_isolated_from_each_other_still_reach_the_host(rig: Rig, tmp_path: Path) -> None:
    rig.networks = {"lan": nat(guests_isolated=True)}
    await rig.converge()
    with plugged_in(rig, "kvlan") as one, plugged_in(rig, "kvlan") as two:
        for port in (f"kvt{one.name[-4:]}", f"kvt{two.name[-4:]}"):
            rig.host.run("bridge", "link", "set", "dev", port, "isolated", "on")
        lease(one, tmp_path)
        address = lease(two, tmp_path)
        assert ping(one, "192.168.50.1")
        one.ip(f"route add {address}/32 via 192.168.50.1")  # by way of the host's own forwarding
        assert not ping(one, address)


def test_the_golden_texts_are_what_nft_and_dnsmasq_take(tmp_path: Path) -> None:
    texts = golden_network.texts()
    assert "ruleset.nft" in texts and len(texts) > 3
    with private_namespace("golden") as namespace:
        for name, text in texts.items():
            file = tmp_path / name
            file.write_text(text)
            if name.endswith(".nft"):
                namespace.run("nft", "-c", "-f", str(file))
            else:
                assert "syntax check OK" in namespace.run("dnsmasq", "--test", f"--conf-file={file}")


async def test_doctor_sees_a_forward_policy_and_what_mends_it(rig: Rig, tmp_path: Path) -> None:
    rig.networks = {"lan": nat()}
    await rig.converge()
    assert foreign_forward_drops(await nft.list_ruleset(), "kvlan") == ()
    rig.host.run("nft", "add table ip filter")
    rig.host.run("nft", "add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }")
    (finding,) = foreign_forward_drops(await nft.list_ruleset(), "kvlan")
    assert (finding.where, finding.what) == ("table ip filter, chain FORWARD", "policy drop")
    with internet(rig) as outside, plugged_in(rig, "kvlan") as web:
        lease(web, tmp_path)
        with web_server(outside, tmp_path / "page", "hello", "203.0.113.9"):
            assert "hello" not in fetch(web, "203.0.113.9", timeout_s=2), "the finding is not the cause"
            rig.host.run("nft", "add rule ip filter FORWARD iifname kvlan accept")
            rig.host.run("nft", "add rule ip filter FORWARD oifname kvlan accept")
            assert "hello" in fetch(web, "203.0.113.9")
            assert foreign_forward_drops(await nft.list_ruleset(), "kvlan") == ()


@pytest.mark.parametrize("buffer_bytes", [1 << 20, 1])
async def test_links_that_change_are_told_even_when_messages_are_lost(rig: Rig, buffer_bytes: int) -> None:
    changes: asyncio.Queue[None] = asyncio.Queue()
    watching = asyncio.create_task(
        watch_links(lambda: changes.put_nowait(None), settle_s=0.2, buffer_bytes=buffer_bytes)
    )
    try:
        await asyncio.sleep(0.3)
        assert changes.empty()
        for number in range(30):
            rig.host.ip(f"link add kvt{number} type bridge")
        await asyncio.wait_for(changes.get(), 5)
        await asyncio.sleep(0.5)
        assert changes.empty(), "a burst is one change"
        rig.host.ip("link del kvt7")
        await asyncio.wait_for(changes.get(), 5)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
