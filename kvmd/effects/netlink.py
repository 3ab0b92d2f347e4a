"""Links by rtnetlink: what is there, bridges made and corrected, TAPs opened for a guest. The only user of pyroute2.

A bridge or TAP of ours carries an alias that begins with `kvmd:`; nothing without it is changed or removed. This
module decides nothing: it does one action and translates the kernel's refusal once.

Figures (2-core machine, pyroute2 0.9.7): importing pyroute2 0.2 s and 14 MiB, so in a thread at first use; a TAP up
and in its bridge 2 ms; reading all links of a host with 40 of them 20 to 50 ms.
"""

from __future__ import annotations

import asyncio
import errno
import importlib
import os
import re
import socket
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import replace
from ipaddress import ip_interface
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from kvmd.actions import EnsureBridge, RemoveBridge, SetPortVlans, VfPort
from kvmd.effects.taps import open_queues
from kvmd.errors import Conflict, HostFailed, NotSupported
from kvmd.facts import Link, Tbf, VlanRange
from kvmd.plan.links import ALIAS, bridge_alias, bridge_mac, is_our_bridge, tap_mac
from kvmd.plan.vlans import NO_KERNEL, VlanWish, entries_of, ranges_of, wanted_vlans, without
from kvmd.units import Rate

T = TypeVar("T")

_DEADLINE_S = 5.0  # for one request; the kernel answers in microseconds unless the RTNL lock is held elsewhere
_PAUSES_S = (0.05, 0.1, 0.25, 0.5, 1.0)  # five more tries of what the kernel calls temporary
_TEMPORARY = frozenset({errno.EBUSY, errno.EAGAIN, errno.ENOBUFS, errno.EINTR})
_GONE = frozenset({errno.ENODEV, errno.ESRCH, errno.ENXIO, errno.EADDRNOTAVAIL})

_IFF_UP = 0x1  # linux/if.h
_MAX_MTU = 65535
_STACKED = frozenset({"vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "macsec"})
_MODULES = "/proc/modules"  # absent: a kernel that loads none, so what is not there now never is
_RTEXT_FILTER_BRVLAN_COMPRESSED = 4  # linux/rtnetlink.h
_IFA_F_NODAD = 0x02  # linux/if_addr.h
_ADDR_GEN_NONE = 1  # IN6_ADDR_GEN_MODE_NONE, linux/if_link.h: no fe80 address of the host on a guest's TAP
TC_H_ROOT = 0xFFFFFFFF  # linux/pkt_sched.h
_VF_INFO = 1  # RTEXT_FILTER_VF, linux/rtnetlink.h
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,15}")  # the kernel itself would expand "%d" and take a comma

_HINTS = {
    errno.EPERM: "kvmd needs CAP_NET_ADMIN",
    errno.EACCES: "kvmd needs CAP_NET_ADMIN",
    errno.EINVAL: "the kernel does not take this value; look at mtu and address in the network's file",
    errno.ELOOP: "a bridge cannot be a port of a bridge",
    errno.EOPNOTSUPP: "this kernel lacks it (is the module `bridge` there?)",
    errno.ENODEV: "somebody removed it meanwhile; `kvmd-cli apply` makes it again if it is kvmd's",
    errno.EBUSY: "something else holds it; tried for two seconds",
}


def _code(error: Exception) -> int:
    """errno of an OSError or of pyroute2's NetlinkError, which gives -1 for a dump that a change interrupted."""
    code: int = getattr(error, "code", None) or getattr(error, "errno", None) or 0
    return errno.EINTR if code == -1 else abs(code)


def refused(what: str, error: Exception) -> HostFailed:
    code = _code(error)
    reason = os.strerror(code) if code else str(error)
    return HostFailed(f"cannot {what}: {reason}", hint=_HINTS.get(code), errno=code)


class Netlink:
    """One rtnetlink socket in the network namespace of the thread that uses it first; opened at first use.

    `pauses_s` are the waits between tries of what the kernel calls temporary.
    """

    def __init__(self, *, pauses_s: tuple[float, ...] = _PAUSES_S) -> None:
        self._pauses_s = pauses_s
        self._route: Any = None
        self._errors: tuple[type[Exception], ...] = (OSError,)
        self._opening = asyncio.Lock()

    async def __aenter__(self) -> Netlink:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._route is not None:
            await self._route.__aexit__(kind, value, trace)
            self._route = None

    async def _open(self) -> Any:
        async with self._opening:
            if self._route is None:
                linux = await asyncio.to_thread(importlib.import_module, "pyroute2.iproute.linux")
                exceptions = importlib.import_module("pyroute2.netlink.exceptions")
                self._errors = (OSError, exceptions.NetlinkError)
                route = linux.AsyncIPRoute()
                try:
                    await route.__aenter__()
                except self._errors as error:
                    raise refused("open a netlink socket", error) from None
                self._route = route
        return self._route

    async def _request(self, what: str, send: Callable[[Any], Awaitable[T]], *, gone_ok: bool = False) -> T | None:
        """One request with deadline and retries; `send` gets the AsyncIPRoute.

        None if the object was gone and that is fine. Raises HostFailed.
        """
        route = self._route or await self._open()
        for pause in (*self._pauses_s, None):
            try:
                async with asyncio.timeout(_DEADLINE_S):
                    return await send(route)
            except TimeoutError:
                hint = "something holds the kernel's RTNL lock; look at `journalctl -k`"
                raise HostFailed(f"cannot {what}: no answer within {_DEADLINE_S:g} s", hint=hint) from None
            except self._errors as error:
                if gone_ok and _code(error) in _GONE:
                    return None
                if pause is None or _code(error) not in _TEMPORARY:
                    raise refused(what, error) from None
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def change(self, what: str, command: str, *, gone_ok: bool = False, **values: Any) -> None:
        """One `ip link COMMAND` with these values; `what` is for the message. HostFailed."""
        await self._request(what, lambda route: route.link(command, **values), gone_ok=gone_ok)

    async def _dump(self, kind: str, what: str, **match: Any) -> list[Any]:
        """All messages of `kind` ("link", "addr"). One that a change interrupted is made anew."""

        async def collect(route: Any) -> list[Any]:
            return [message async for message in await getattr(route, kind)("dump", **match)]

        return await self._request(f"read {what}", collect) or []

    async def observe_links(self, *, vlans: bool = False) -> tuple[Link, ...]:
        """Every link of the namespace with its addresses (without fe80 ones), in index order. Raises HostFailed.

        `vlans`: those of bridge ports too; that is one more dump.
        """
        messages = await self._dump("link", "the links")
        addresses: defaultdict[int, list[str]] = defaultdict(list)
        for message in await self._dump("addr", "the addresses"):
            address = _address(message)
            if address:
                addresses[message["index"]].append(address)
        names = {message["index"]: message.get("ifname") for message in messages}
        queues = await self._queues() if any(message.get("qdisc") == "tbf" for message in messages) else {}
        links = [
            _link_fact(message, names, tuple(addresses[message["index"]]), queues.get(message["index"]))
            for message in messages
        ]
        if vlans:
            carried = await self._port_vlans()
            links = [replace(link, vlans=carried.get(link.index, ())) if link.master else link for link in links]
        return tuple(sorted(links, key=lambda link: link.index))

    async def _port_vlans(self) -> dict[int, tuple[VlanRange, ...]]:
        """VLANs by index of the port, or of the bridge itself."""
        asked = {"family": socket.AF_BRIDGE, "ext_mask": _RTEXT_FILTER_BRVLAN_COMPRESSED}
        return {
            message["index"]: ranges_of(
                (entry["vid"], entry["flags"]) for entry in spec.get_attrs("IFLA_BRIDGE_VLAN_INFO")
            )
            for message in await self._dump("link", "the VLANs of bridge ports", **asked)
            if (spec := message.get("af_spec")) is not None
        }

    async def can_filter_vlans(self, links: Iterable[Link]) -> bool | None:
        """Whether bridges of this kernel filter VLANs; None: not known before the module `bridge` is loaded."""
        bridges = [link for link in links if link.kind == "bridge"]
        if bridges:
            return bridges[0].default_pvid is not None

        async def ask(route: Any) -> None:
            async for _ in await route.vlandb("dump", dump_flags=1):
                pass

        try:
            await self._request("ask for VLAN filtering", ask)
        except HostFailed as error:
            if error.details.get("errno") == errno.EOPNOTSUPP:
                return None if os.access(_MODULES, os.F_OK) else False
            raise
        return True

    async def set_port_vlans(self, action: SetPortVlans) -> None:
        """Give a port exactly these VLANs: new ones before old ones go. NotSupported, HostFailed."""
        link = next((link for link in await self.observe_links(vlans=True) if link.name == action.port), None)
        if link is None or link.vlans is None:
            what = f"port {action.port} of bridge {action.bridge} is gone"
            raise HostFailed(what, hint="its guest stopped meanwhile; the next plan does not name it")
        await self._change_vlans(link.name, link.index, link.vlans, action.vlans)

    async def _change_vlans(
        self, name: str, index: int, old: tuple[VlanRange, ...], new: tuple[VlanRange, ...]
    ) -> None:
        kept = {vid for each in new for vid in range(each.first, each.last + 1)}
        wanted = [("add", each) for each in new if each not in old]
        extra = [("del", each) for part in old for each in without(part, kept)]
        for command, each in (*wanted, *extra):
            vid = str(each.first) if each.first == each.last else f"{each.first}-{each.last}"
            what = f"{'give' if command == 'add' else 'take'} {name} VLAN {vid}"
            await self._vlan(what, command, index, each)

    async def _vlan(self, what: str, command: str, index: int, each: VlanRange) -> None:
        info = [{"vid": vid, "flags": flags} for vid, flags in entries_of(each)]
        spec = {"attrs": [("IFLA_BRIDGE_VLAN_INFO", part) for part in info]}
        try:
            await self._request(what, lambda route: route.vlan_filter(command, index=index, IFLA_AF_SPEC=spec))
        except HostFailed as error:
            if error.details.get("errno") == errno.EOPNOTSUPP:
                raise NotSupported(f"cannot {what}: {NO_KERNEL}") from None
            raise

    async def _queues(self) -> dict[int, Tbf]:
        """Token bucket queues at the root, by index of their link."""
        found = {}
        for message in await self._dump("tc", "the queues of the links"):
            options = message.get("options")
            parameters = options.get("TCA_TBF_PARMS") if options and message.get("kind") == "tbf" else None
            if parameters and message["parent"] == TC_H_ROOT:
                found[message["index"]] = Tbf(parameters["rate"], parameters["limit"])
        return found

    async def find(self, name: str) -> Link | None:
        """One link by name, with its addresses; None if there is none. HostFailed."""
        messages = await self._request(
            f"look at link {name}", lambda route: route.link("get", ifname=name), gone_ok=True
        )
        if not messages:
            return None
        index = messages[0]["index"]
        found = map(_address, await self._dump("addr", f"the addresses of {name}", index=index))
        return _link_fact(messages[0], {}, tuple(filter(None, found)))

    async def ensure_bridge(self, action: EnsureBridge) -> None:
        """Make the bridge, or correct ours, to what the action says. Conflict if the name is somebody else's."""
        name = _checked(action.bridge)
        link = await self.find(name)
        if link is None:
            link = await self._make_bridge(action)
        if not is_our_bridge(link):
            raise Conflict(
                f'"{name}" exists and is not a bridge that kvmd made; it is left alone',
                hint=f"give network {action.network} another network.bridge, or remove that link",
                link=name,
            )
        what = f"set up bridge {name} (mtu {action.mtu}, stp {'on' if action.stp else 'off'})"
        filtering: dict[str, Any] = (
            {"br_vlan_filtering": int(action.vlan_filtering)} if link.default_pvid is not None else {}
        )
        if action.vlan_filtering and not filtering:
            raise NotSupported(f"cannot set up bridge {name}: {NO_KERNEL}")
        await self.change(
            what,
            "set",
            index=link.index,
            kind="bridge",
            br_stp_state=int(action.stp),
            address=bridge_mac(name),
            mtu=action.mtu,
            ifalias=bridge_alias(action.network),
            **filtering,
        )
        if any(":" in address for address in action.addresses) or not action.host:
            await asyncio.to_thread(_switch_ipv6, name, on=action.host)
        await self._set_addresses(link, action.addresses)
        await self.change(f"set bridge {name} up", "set", index=link.index, state="up")

    async def _make_bridge(self, action: EnsureBridge) -> Link:
        name = action.bridge
        # The address is there from the first moment: it is how a bridge without its alias yet is known as ours.
        try:
            await self.change(f"make bridge {name}", "add", ifname=name, kind="bridge", address=bridge_mac(name))
        except HostFailed as error:
            if error.details.get("errno") != errno.EEXIST:
                raise
        # Only an MTU that was once changed is kept when a port has a lower one (br_if.c, BROPT_MTU_SET_BY_USER).
        other = action.mtu + 1 if action.mtu < _MAX_MTU else action.mtu - 1
        await self.change(f"give bridge {name} an MTU of its own (mtu {action.mtu})", "set", ifname=name, mtu=other)
        link = await self.find(name)
        if link is None:
            raise HostFailed(f"bridge {name} vanished while it was being made", hint="does something else remove it?")
        return link

    async def _set_addresses(self, link: Link, wanted: tuple[str, ...]) -> None:
        for text in sorted(set(wanted) - set(link.addresses)):
            await self._address("add", link, text)
        for text in sorted(set(link.addresses) - set(wanted)):
            await self._address("del", link, text)

    async def _address(self, command: str, link: Link, text: str) -> None:
        interface = ip_interface(text)
        values = {"index": link.index, "address": str(interface.ip), "prefixlen": interface.network.prefixlen}
        if command == "add" and interface.version == 4:
            values["broadcast"] = str(interface.network.broadcast_address)
        elif command == "add":
            # Without ports a bridge has no carrier, and an address that is still being asked about serves nobody.
            values["flags"] = _IFA_F_NODAD
        what = f"{'give' if command == 'add' else 'take'} {link.name} the address {text}"
        try:
            await self._request(what, lambda route: route.addr(command, **values), gone_ok=command == "del")
        except HostFailed as error:
            if error.details.get("errno") != errno.EEXIST:
                raise

    async def remove_bridge(self, action: RemoveBridge) -> None:
        """Remove a bridge of ours that has no port; one that is not there is removed. Conflict otherwise."""
        name = _checked(action.bridge)
        link = await self.find(name)
        if link is None:
            return
        if not is_our_bridge(link):
            raise Conflict(f'"{name}" is not a bridge that kvmd made; it is left alone', link=name)
        ports = [other.name for other in await self.observe_links() if other.master == name]
        if ports:
            raise Conflict(
                f"bridge {name} still has ports: {', '.join(ports)}",
                hint="stop the guests on that network first",
                link=name,
                ports=ports,
            )
        await self.change(f"remove bridge {name}", "del", index=link.index, gone_ok=True)

    async def vf(self, link: str, index: int) -> VfPort | None:
        """How a physical function treats its virtual one; None when its driver does not say. HostFailed."""
        what = f"read virtual function {index} of {link}"
        messages = await self._request(what, lambda route: route.link("get", ifname=_checked(link), ext_mask=_VF_INFO))
        return next((found for found in vf_ports(link, (messages or [{}])[0]) if found.index == index), None)

    async def set_vf(self, port: VfPort) -> None:
        """MAC, VLAN and spoof check of a virtual function, set on its physical one, which the guest cannot change.

        HostFailed; a driver that has no spoof check is left without.
        """
        try:
            index = socket.if_nametoindex(_checked(port.link))
        except OSError:
            raise HostFailed(f"there is no interface {port.link}, whose virtual function was to be set") from None
        what = f"set virtual function {port.index} of {port.link}"
        wanted: dict[str, Any] = {"vf": port.index, "mac": port.mac}
        await self.change(f"{what}: MAC {port.mac}", "set", index=index, vf=dict(wanted))
        await self.change(f"{what}: VLAN {port.vlan}", "set", index=index, vf={"vf": port.index, "vlan": port.vlan})
        if port.spoofchk is None:
            return
        check = {"vf": port.index, "spoofchk": int(port.spoofchk)}
        try:
            await self.change(f"{what}: spoof check", "set", index=index, vf=check)
        except HostFailed as error:
            if error.details.get("errno") != errno.EOPNOTSUPP:
                raise

    async def open_tap(
        self,
        name: str,
        *,
        bridge: str,
        mtu: int | None,
        alias: str,
        port_isolated: bool = False,
        queues: int = 1,
        vlans: VlanWish | None = None,
        tbf: Tbf | None = None,
    ) -> list[int]:
        """A new TAP, up and in `bridge`; one descriptor per queue, owned by the caller. It vanishes with the last one.

        Without `mtu` it has the bridge's: a bridge takes its lowest port's, unless it was told its own.
        `vlans` on a bridge that filters: what the port carries.
        Conflict if a link of that name exists; HostFailed if there is no TUN driver or no such bridge.
        """
        _checked(name)
        if not alias.startswith(ALIAS):
            raise ValueError(f"alias {alias!r} does not mark the TAP as kvmd's")
        try:
            master = socket.if_nametoindex(bridge)
        except OSError:
            hint = "`kvmd-cli plan` says why it is not there"
            raise HostFailed(f'TAP {name}: bridge "{bridge}" does not exist', hint=hint, bridge=bridge) from None
        if mtu is None:
            there = await self.find(bridge)
            mtu = there.mtu if there else 1500
        fds = open_queues(name, queues)
        try:
            index = await self._plug(name, bridge=bridge, master=master, mtu=mtu, alias=alias, isolated=port_isolated)
            if vlans:
                await self._fence(name, index, bridge, vlans)
            if tbf:
                await self.shape(name, tbf)
            # Up at last: no frame passes before the address mode, the isolation, the VLANs and the limit are set.
            await self.change(f"set TAP {name} up", "set", index=index, state="up")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    async def _fence(self, name: str, index: int, bridge: str, vlans: VlanWish) -> None:
        """A port that is still down: its bridge gave it the default VLAN, it gets its own."""
        there = await self.find(bridge)
        if there is None or there.default_pvid is None:
            raise NotSupported(f"TAP {name}: {NO_KERNEL}")
        if not there.vlan_filtering:
            hint = f"ip link set {bridge} type bridge vlan_filtering 1"
            raise Conflict(f'TAP {name}: bridge "{bridge}" does not filter VLANs', hint=hint)
        given = (await self._port_vlans()).get(index, ())
        await self._change_vlans(name, index, given, wanted_vlans(vlans, there.default_pvid))

    async def open_loose_tap(self, name: str, *, mtu: int | None, alias: str, queues: int, vnet_hdr: bool) -> list[int]:
        """A TAP that others plug in: the free one of that name as it is, or a new one, marked and still down."""
        _checked(name)
        made = _index(name) is None
        fds = open_queues(name, queues, vnet_hdr=vnet_hdr, join=not made)
        if made:
            try:
                await self.mark_tap(name, alias, mtu=mtu)
            except BaseException:
                for fd in fds:
                    os.close(fd)
                raise
        return fds

    async def mark_tap(self, name: str, alias: str, *, mtu: int | None = None, up: bool = False) -> None:
        """Put our mark on a TAP that was made for us. HostFailed."""
        values: dict[str, Any] = {"ifalias": alias} | ({"mtu": mtu} if mtu else {}) | ({"state": "up"} if up else {})
        await self.change(f"mark TAP {name}", "set", index=_index(name), **values)

    async def shape(self, tap: str, tbf: Tbf | None) -> None:
        """Let a TAP's queue to the guest be this one, or the kernel's own for None. Of a link that is gone: nothing."""
        index = _index(tap)
        if index is None:
            return
        if tbf is None:
            what = f"take the limit off TAP {tap}"
            await self._request(what, lambda route: route.tc("del", index=index, parent=TC_H_ROOT), gone_ok=True)
            return
        what = f"limit TAP {tap} to {Rate(tbf.rate_bytes * 8)}"
        rate, burst, limit = tbf.rate_bytes, tbf.burst_bytes, tbf.limit_bytes
        try:
            await self._request(
                what,
                lambda route: route.tc("replace", "tbf", index=index, rate=rate, burst=burst, limit=limit),
                gone_ok=True,
            )
        except HostFailed as error:
            if error.details.get("errno") != errno.ENOENT:
                raise
            hint = "a kernel with CONFIG_NET_SCH_TBF (module sch_tbf), or take rate_in out"
            raise NotSupported(f"cannot {what}: this kernel has no token bucket queue", hint=hint) from None

    async def _plug(self, name: str, *, bridge: str, master: int, mtu: int, alias: str, isolated: bool) -> int:
        what = f"put TAP {name} into {bridge} (mtu {mtu})"
        try:
            index = socket.if_nametoindex(name)
        except OSError as error:
            raise refused(what, error) from None
        values: dict[str, Any] = {"index": index, "master": master, "mtu": mtu, "address": tap_mac(name)}
        values["ifalias"] = alias
        no_address = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _ADDR_GEN_NONE)]})]}
        try:
            await self.change(what, "set", IFLA_AF_SPEC=no_address, **values)
        except HostFailed as error:
            if error.details.get("errno") not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
                raise
            await self.change(what, "set", **values)  # a kernel without IPv6
        if isolated:
            await self._request(
                f"isolate TAP {name} from other ports of {bridge}",
                lambda route: route.brport("set", index=index, isolated=1),
            )
        return index


def _switch_ipv6(bridge: str, *, on: bool) -> None:
    """On where the host has an address, also if new links have it off; off where it has no part in the bridge."""
    try:
        Path(f"/proc/sys/net/ipv6/conf/{bridge}/disable_ipv6").write_text("0" if on else "1")
    except FileNotFoundError:
        if on:
            raise HostFailed(f"bridge {bridge}: this kernel has no IPv6", hint="take [ipv6] out of its file") from None
    except OSError as error:
        raise refused(f"switch IPv6 {'on' if on else 'off'} on bridge {bridge}", error) from None


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise Conflict(f"{name!r} is not an interface name: 1 to 15 of letters, digits, _ . and -")
    return name


def vf_ports(link: str, message: Any) -> Iterator[VfPort]:
    """The virtual functions a link message tells of (IFLA_VFINFO_LIST, linux/if_link.h)."""
    listed = message.get("IFLA_VFINFO_LIST") or message.get("vfinfo_list")
    for _, info in listed["attrs"] if listed else ():
        found = dict(info["attrs"])
        if "IFLA_VF_MAC" not in found:
            continue
        vlan, check = found.get("IFLA_VF_VLAN"), found.get("IFLA_VF_SPOOFCHK")
        yield VfPort(
            link=link,
            index=found["IFLA_VF_MAC"]["vf"],
            mac=found["IFLA_VF_MAC"]["mac"],
            vlan=vlan["vlan"] if vlan else 0,
            # a driver that cannot say shows all ones (net/core/rtnetlink.c, rtnl_fill_vfinfo)
            spoofchk=bool(check["spoofchk"]) if check and check["spoofchk"] in (0, 1) else None,
        )


def _address(message: Any) -> str | None:
    """ "192.168.50.1/24" of an address message; None for link-local IPv6, which every link has."""
    text = message.get("local") or message.get("address")
    if not text or text.lower().startswith("fe80:"):
        return None
    return f"{text}/{message['prefixlen']}"


def _index(name: str) -> int | None:
    try:
        return socket.if_nametoindex(_checked(name))
    except OSError:
        return None


def _link_fact(message: Any, names: dict[int, str], addresses: tuple[str, ...], tbf: Tbf | None = None) -> Link:
    info = message.get("linkinfo")
    kind = info.get("kind") if info else None
    data = info.get("data") if info and kind == "bridge" else None
    slave = info.get("slave_data") if info and info.get("slave_kind") == "bridge" else None
    master = message.get("master")
    # The other end of a veth is given here too, and may lie in another namespace: only what is stacked has a parent.
    below = message.get("link") if kind in _STACKED and message.get("link_netnsid") is None else None
    return Link(
        name=message.get("ifname"),
        index=message["index"],
        kind=kind,
        mac=message.get("address") or "",
        mtu=message.get("mtu"),
        up=bool(message["flags"] & _IFF_UP),
        master=names.get(master, str(master)) if master else None,
        alias=message.get("ifalias"),
        addresses=tuple(sorted(addresses)),
        stp=bool(data.get("br_stp_state")) if data else None,
        vlan_filtering=bool(data.get("br_vlan_filtering")) if data else None,
        default_pvid=data.get("br_vlan_default_pvid") if data else None,
        parent=names.get(below, str(below)) if below else None,
        port_isolated=bool(slave.get("IFLA_BRPORT_ISOLATED")) if slave else None,
        tbf=tbf,
    )
