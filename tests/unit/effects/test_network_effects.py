"""netlink, nft and dnsmasq where the kernel or the program does not do its part: stubs, no root, no waiting."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvmd.actions import (
    AttachUplink,
    DetachUplink,
    EnsureBridge,
    RemoveBridge,
    ReplaceRuleset,
    SetPortVlans,
    StartDnsmasq,
    StopDnsmasq,
)
from kvmd.effects import dnsmasq, nft, uplink
from kvmd.effects.dnsmasq import Backoff, Dnsmasqs
from kvmd.effects.netlink import Netlink
from kvmd.errors import Conflict, HostFailed, NotSupported
from kvmd.facts import Link, VlanRange
from kvmd.plan.links import bridge_alias, bridge_mac
from kvmd.plan.nfttable import NETWORKS

ENSURE = EnsureBridge(network="lan", bridge="kvlan", addresses=("192.168.50.1/24",), why="test")


class Message(dict[str, Any]):
    """Answers `get` with NLA names and `[]` with header fields, as pyroute2's messages do."""


class Route:
    """One bridge of ours, and errors to be raised by the next calls."""

    def __init__(self, *errors: int, bridge: str | None = "kvlan", alias: str | None = None) -> None:
        self.errors = list(errors)
        self.calls: list[tuple[str, str]] = []
        self.link_message = bridge and Message(
            ifname=bridge,
            index=2,
            flags=1,
            mtu=1500,
            address=bridge_mac(bridge),
            ifalias=alias or bridge_alias("lan"),
            linkinfo=Message(kind="bridge", data=Message(br_stp_state=0)),
        )

    def _fail(self) -> None:
        if self.errors and (code := self.errors.pop(0)):
            raise OSError(code, os.strerror(code))

    async def link(self, command: str, **values: Any) -> Any:
        self.calls.append(("link", command))
        self._fail()
        if command == "dump":
            return self._each(self.link_message)
        if command == "get" and not self.link_message:
            raise OSError(errno.ENODEV, "")
        return [self.link_message]

    async def vlan_filter(self, command: str, **values: Any) -> Any:
        infos = values["IFLA_AF_SPEC"]["attrs"]
        self.calls.append((f"vlan {command}", " ".join(f"{info['vid']}/{info['flags']:x}" for _, info in infos)))
        self._fail()

    async def vlandb(self, command: str, **values: Any) -> Any:
        self._fail()
        return self._each(None)

    async def addr(self, command: str, **values: Any) -> Any:
        self.calls.append(("addr", command))
        self._fail()
        return self._each(None)

    async def _each(self, message: Any) -> AsyncIterator[Any]:
        if message:
            yield message


def netlink(route: Route) -> Netlink:
    made = Netlink(pauses_s=(0.0,) * 5)
    made._route = route
    return made


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EAGAIN, errno.ENOBUFS])
async def test_what_is_temporary_is_tried_six_times_and_then_told(code: int) -> None:
    route = Route(*[code] * 5)
    assert [link.name for link in await netlink(route).observe_links()] == ["kvlan"]
    assert route.calls.count(("link", "dump")) == 6
    route = Route(*[code] * 6)
    with pytest.raises(HostFailed, match="cannot read the links"):
        await netlink(route).observe_links()
    assert route.calls.count(("link", "dump")) == 6


async def test_what_is_final_is_not_tried_again() -> None:
    route = Route(0, 0, errno.EPERM)
    with pytest.raises(
        HostFailed, match=r"set up bridge kvlan \(mtu 1500, stp off\): Operation not permitted"
    ) as caught:
        await netlink(route).ensure_bridge(ENSURE)
    assert caught.value.hint == "kvmd needs CAP_NET_ADMIN"
    assert len(route.calls) == 3


@pytest.mark.parametrize("code", [errno.ENODEV, errno.ESRCH])
async def test_a_bridge_that_vanishes_while_it_is_removed_is_removed(code: int) -> None:
    await netlink(Route(0, 0, 0, 0, code)).remove_bridge(RemoveBridge(bridge="kvlan", why="test"))
    await netlink(Route(bridge=None)).remove_bridge(RemoveBridge(bridge="kvlan", why="test"))


async def test_a_link_of_another_owner_is_not_touched() -> None:
    route = Route(alias="somebody's")
    with pytest.raises(Conflict):
        await netlink(route).ensure_bridge(ENSURE)
    assert ("link", "set") not in route.calls


async def test_new_vlans_come_before_old_ones_go() -> None:
    route = Route()
    old = (VlanRange(1, 1, pvid=True, untagged=True), VlanRange(10, 12), VlanRange(30, 39))
    new = (VlanRange(10, 11), VlanRange(20, 20, pvid=True, untagged=True), VlanRange(35, 39))
    await netlink(route)._change_vlans("kvt0", 7, old, new)
    assert route.calls == [
        ("vlan add", "10/8 11/10"),
        ("vlan add", "20/6"),
        ("vlan add", "35/8 39/10"),
        ("vlan del", "1/0"),
        ("vlan del", "12/0"),
        ("vlan del", "30/8 34/10"),
    ]


async def test_a_kernel_without_vlan_filtering_is_named() -> None:
    with pytest.raises(NotSupported, match="CONFIG_BRIDGE_VLAN_FILTERING"):
        await netlink(Route(errno.EOPNOTSUPP))._change_vlans("kvt0", 7, (), (VlanRange(10, 10),))
    with pytest.raises(NotSupported, match="CONFIG_BRIDGE_VLAN_FILTERING"):
        await netlink(Route()).ensure_bridge(replace(ENSURE, vlan_filtering=True))
    gone = SetPortVlans(port="kvt0", bridge="kvlan", vlans=(), why="test")
    with pytest.raises(HostFailed, match="port kvt0 of bridge kvlan is gone"):
        await netlink(Route()).set_port_vlans(gone)


@pytest.mark.parametrize(("code", "modules", "known"), [(95, True, None), (95, False, False), (0, True, True)])
async def test_before_there_is_a_bridge_the_kernel_is_asked(
    code: int, modules: bool, known: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmd.effects.netlink._MODULES", str(tmp_path if modules else tmp_path / "none"))
    assert await netlink(Route(code)).can_filter_vlans(()) is known
    bridge = Link("br0", 2, kind="bridge", default_pvid=0)
    assert await netlink(Route(errno.EPERM)).can_filter_vlans((bridge,)) is True
    assert await netlink(Route()).can_filter_vlans((replace(bridge, default_pvid=None),)) is False


@pytest.mark.parametrize("name", ["a" * 16, "tap%d", "x,y", "a/b", "", "..", "web\n"])
async def test_a_name_the_kernel_would_misread_never_reaches_it(name: str) -> None:
    route = Route()
    with pytest.raises(Conflict, match="interface name"):
        await netlink(route).open_tap(name, bridge="lo", mtu=1500, alias="kvmd:lan:web:lan")
    with pytest.raises(Conflict, match="interface name"):
        await netlink(route).ensure_bridge(EnsureBridge(network="lan", bridge=name, why="test"))
    assert route.calls == []


async def test_without_the_tun_driver_the_answer_is_modprobe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmd.effects.taps.TUN", str(tmp_path / "tun"))
    with pytest.raises(NotSupported) as caught:
        await netlink(Route()).open_tap("kvt0", bridge="lo", mtu=1500, alias="kvmd:lan:web:lan")
    assert caught.value.hint is not None and caught.value.hint.startswith("modprobe tun")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory where nft and dnsmasq are looked for."""
    found = tmp_path / "bin"
    found.mkdir()
    monkeypatch.setattr(nft, "_PATH", str(found))
    monkeypatch.setattr(dnsmasq, "_PATH", str(found))
    return found


def program(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


async def test_without_nft_there_is_no_table_and_making_one_says_what_to_install(programs: Path) -> None:
    assert await nft.observe(NETWORKS) is None
    with pytest.raises(HostFailed) as caught:
        await nft.replace(ReplaceRuleset(text="x", change="create", why="test"))
    assert caught.value.hint == "apt-get install nftables"


async def test_what_nft_refuses_is_quoted(programs: Path) -> None:
    program(programs, "nft", "echo 'Error: Could not process rule: Operation not supported' >&2; exit 1")
    with pytest.raises(HostFailed, match="Operation not supported"):
        await nft.replace(ReplaceRuleset(text="x", change="create", why="test"))
    with pytest.raises(HostFailed, match="Operation not supported"):
        await nft.observe(NETWORKS)


async def test_an_nft_that_talks_nonsense_is_an_error_and_not_an_absent_table(programs: Path) -> None:
    program(programs, "nft", "echo '{\"nftables\": 7}'")
    with pytest.raises(HostFailed, match="cannot read what nft says"):
        await nft.observe(NETWORKS)


START = StartDnsmasq(network="lan", config="interface=lo\n", why="test")


async def test_without_dnsmasq_the_answer_is_what_to_install(programs: Path, tmp_path: Path) -> None:
    servers = Dnsmasqs(tmp_path / "run", tmp_path / "state")
    with pytest.raises(HostFailed) as caught:
        await servers.start(START)
    assert caught.value.hint == "apt-get install dnsmasq-base"
    await servers.stop(StopDnsmasq(network="lan", why="test"))
    await servers.stop(StopDnsmasq(network="never-was", why="test"))
    assert servers.observe() == () and servers.leases("lan") == ()


async def test_a_server_that_keeps_failing_waits_but_a_new_configuration_is_tried_at_once(
    programs: Path, tmp_path: Path
) -> None:
    program(programs, "dnsmasq", f"echo 'dnsmasq: no such thing' >&2; echo x >> {tmp_path}/tries; exit 3")
    servers = Dnsmasqs(tmp_path / "run", tmp_path / "state")
    for _ in range(4):
        with pytest.raises(HostFailed):
            await servers.start(START)
    assert (tmp_path / "tries").read_text().count("x") == 2
    with pytest.raises(HostFailed, match="keeps ending") as caught:
        await servers.start(START)
    assert 0 < caught.value.details["retry_in_s"] <= 1
    other = StartDnsmasq(network="lan", config="interface=lo\nno-resolv\n", why="test")
    with pytest.raises(HostFailed, match="no such thing"):
        await servers.start(other)


@given(
    st.binary(max_size=60)
    | st.dictionaries(st.sampled_from(["pid", "start_time", "boot_id"]), st.integers()).map(
        lambda found: json.dumps(found).encode()
    )
)
def test_a_damaged_record_is_no_server(tmp_path_factory: pytest.TempPathFactory, record: bytes) -> None:
    run = tmp_path_factory.mktemp("run")
    (run / "networks/lan").mkdir(parents=True)
    (run / "networks/lan/dnsmasq.json").write_bytes(record)
    (run / "networks/lan/dnsmasq.pid").write_text("1\n")
    assert Dnsmasqs(run, run).observe() == ()


def test_backoff_is_at_once_then_doubles_up_to_a_minute_and_forgets() -> None:
    backoff, now, waits = Backoff(), 1000.0, []
    for _ in range(10):
        waits.append(backoff.failed(now))
        now += waits[-1]
        assert backoff.wait(now) == 0.0
    assert waits == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert backoff.failed(now + 301) == 0.0


@example([0.0, 0.0, 0.0, 0.0, 66.0, 299.5339766459658, 299.94008571841664, 299.09246228666905])
@given(st.lists(st.floats(0, 1000), max_size=30))
def test_backoff_never_waits_longer_than_its_ceiling(steps: list[float]) -> None:
    backoff, now = Backoff(), 0.0
    for step in steps:
        now += step
        assert 0.0 <= backoff.failed(now) <= backoff.ceiling_s
        assert backoff.wait(now + backoff.ceiling_s) == pytest.approx(0.0, abs=1e-9)


async def test_a_watcher_without_servers_waits() -> None:
    servers = Dnsmasqs(Path("/nonexistent/run"), Path("/nonexistent/state"))
    watching = asyncio.create_task(servers.watch(lambda *_: pytest.fail("nothing can have ended")))
    await asyncio.sleep(0)
    assert not watching.done()
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


class Scripted(Route):
    """Links by name that appear once they were asked for, and one error for one kind of request."""

    def __init__(self, links: dict[str, Message], command: str, code: int) -> None:
        super().__init__()
        self.links, self.command, self.code = links, command, code

    async def link(self, command: str, **values: Any) -> Any:
        self.calls.append((command, str(values.get("ifname", values.get("index")))))
        if command == self.command:
            self.command = ""
            raise OSError(self.code, os.strerror(self.code))
        if command == "get":
            if values["ifname"] not in self.links:
                raise OSError(errno.ENODEV, "")
            return [self.links[values["ifname"]]]
        return self._each(None) if command == "dump" else []


def card(name: str, index: int, **attributes: Any) -> Message:
    return Message(ifname=name, index=index, flags=0, mtu=1500, address="fc:00:00:00:00:01", **attributes)


def ours(name: str, index: int) -> Message:
    about = Message(kind="bridge", data=Message(br_stp_state=0))
    return Message(
        ifname=name,
        index=index,
        flags=1,
        mtu=1500,
        address=bridge_mac(name),
        ifalias=bridge_alias("dmz"),
        linkinfo=about,
    )


ATTACH = AttachUplink(network="dmz", bridge="kvdmz", interface="card0", rollback_s=60.0, why="test")


@pytest.mark.parametrize("code", [errno.EBUSY, errno.ENOBUFS])
async def test_a_busy_card_is_tried_again(code: int) -> None:
    route = Scripted({"card0": card("card0", 7), "kvdmz": ours("kvdmz", 3)}, "set", code)
    await uplink.attach(netlink(route), ATTACH)
    assert [call for call in route.calls if call[0] == "set"] == [("set", "7")] * 3  # refused, in, up


@pytest.mark.parametrize(
    ("links", "command", "code", "error", "says"),
    [
        ({}, "", 0, Conflict, '"kvdmz" is not a bridge that kvmd made'),
        ({"kvdmz": card("kvdmz", 3)}, "", 0, Conflict, '"kvdmz" is not a bridge that kvmd made'),
        ({"kvdmz": ours("kvdmz", 3)}, "", 0, HostFailed, '"card0" does not exist'),
        ({"kvdmz": ours("kvdmz", 3), "card0": card("card0", 7)}, "set", errno.ENODEV, HostFailed, "No such device"),
        ({"kvdmz": ours("kvdmz", 3), "card0": card("card0", 7)}, "set", errno.EPERM, HostFailed, "not permitted"),
    ],
)
async def test_what_stands_against_an_uplink_is_named(
    links: dict[str, Message], command: str, code: int, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        await uplink.attach(netlink(Scripted(links, command, code)), ATTACH)


async def test_a_card_that_is_gone_or_elsewhere_is_out_already() -> None:
    detach = DetachUplink(bridge="kvdmz", interface="card0", why="test")
    for links in ({}, {"card0": card("card0", 7, master=9), "kvdmz": ours("kvdmz", 3)}):
        route = Scripted(links, "", 0)
        await uplink.detach(netlink(route), detach)
        assert not [call for call in route.calls if call[0] == "set"]
    route = Scripted({"card0": card("card0", 7, master=3), "kvdmz": ours("kvdmz", 3)}, "set", errno.ENODEV)
    await uplink.detach(netlink(route), detach)


async def test_a_bridge_somebody_makes_at_the_same_moment_is_taken_if_it_is_ours() -> None:
    links: dict[str, Message] = {}
    route = Scripted(links, "add", errno.EEXIST)
    ask = route.link

    async def appear(command: str, **values: Any) -> Any:
        try:
            return await ask(command, **values)
        finally:
            if command == "add":
                links["kvdmz"] = ours("kvdmz", 3)

    route.link = appear  # type: ignore[method-assign]
    await netlink(route).ensure_bridge(EnsureBridge(network="dmz", bridge="kvdmz", why="test"))
    assert ("set", "3") in route.calls
