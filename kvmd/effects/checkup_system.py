"""Processes, sockets, links, kernel settings and the clock for `doctor`, below a root path. Reads only."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from kvmd.effects.listeners import rows as waiting
from kvmd.effects.tree import Tree
from kvmd.plan.checks_network import PORTS
from kvmd.plan.hostreport import Clock, HostLink, Listener, Unseen
from kvmd.unixpath import ShortPath

_IFF_TAP = 0x0002  # linux/if_tun.h
_TIMEKEEPERS = ("chronyd", "systemd-timesyn", "ntpd", "ntpsec", "openntpd", "ptp4l")  # 15 bytes of the name
_STA_UNSYNC = 0x0040  # linux/timex.h
_TIME_ERROR = 5
_CONNECT_S = 1.0


def processes(tree: Tree) -> Mapping[str, int]:
    """Lowest pid by command name (15 bytes, proc(5) comm)."""
    found: dict[str, int] = {}
    for pid in tree.numbered("/proc", ""):
        name = tree.read(f"/proc/{pid}/comm")
        if name:
            found.setdefault(name, pid)
    return found


# ---- the network --------------------------------------------------------------------------------------------------


def links(tree: Tree) -> tuple[HostLink, ...]:
    """All interfaces with their alias (Documentation/ABI/testing/sysfs-class-net)."""
    return tuple(
        _link(tree, name) for name in tree.names("/sys/class/net") if tree.exists(f"/sys/class/net/{name}/mtu")
    )


def _link(tree: Tree, name: str) -> HostLink:
    here = f"/sys/class/net/{name}"
    kind: Literal["bridge", "tap", "other"] = "other"
    if tree.exists(f"{here}/bridge"):
        kind = "bridge"
    elif int(tree.read(f"{here}/tun_flags") or "0", 16) & _IFF_TAP:
        kind = "tap"
    return HostLink(name, tree.read(f"{here}/ifalias") or "", kind)


def listeners(tree: Tree, networks_dir: Path) -> tuple[Listener, ...]:
    """Who waits on the ports kvmd's servers want; those whose configuration lies in `networks_dir` are ours."""
    rows = [row for row in waiting(tree) if row[2] in PORTS]
    owners = _owners(tree, {inode for *_, inode in rows})
    found = []
    for protocol, address, port, inode in rows:
        pid = owners.get(inode)
        name = tree.read(f"/proc/{pid}/comm") if pid else None
        command = (tree.read(f"/proc/{pid}/cmdline") or "") if pid else ""
        found.append(Listener(protocol, address, port, pid, name, f"--conf-file={networks_dir}/" in command))
    return tuple(found)


def _owners(tree: Tree, inodes: set[str]) -> Mapping[str, int]:
    """Pid by socket inode; those of other users stay unknown without root."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[str, int] = {}
    for pid in tree.numbered("/proc", "") if wanted else []:
        for fd in tree.names(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(tree.path(f"/proc/{pid}/fd/{fd}"))  # noqa: PTH115 - a text, no path
            except OSError:
                continue
            if target in wanted:
                found.setdefault(wanted[target], pid)
    return found


def uplink(tree: Tree) -> str | None:
    """The interface of the IPv4 default route with the lowest metric, None when there is none."""
    rows = [line.split() for line in (tree.read("/proc/net/route") or "").splitlines()[1:]]
    routes = [(int(row[6]), row[0]) for row in rows if len(row) > 7 and row[1] == row[7] == "00000000"]
    return min(routes)[1] if routes else None


def network_setup(
    tree: Tree, running: Mapping[str, int]
) -> Literal["NetworkManager", "netplan", "networkd", "ifupdown"]:
    """What the distribution sets its interfaces up with."""
    if any(name.endswith(".yaml") for name in tree.names("/etc/netplan")):
        return "netplan"
    if "NetworkManager" in running:
        return "NetworkManager"
    return "networkd" if "systemd-network" in running else "ifupdown"


def legacy_tables(tree: Tree) -> frozenset[str]:
    """Tables of the old iptables, IPv4; root alone may read them."""
    return frozenset((tree.read("/proc/net/ip_tables_names") or "").split())


# ---- the kernel ---------------------------------------------------------------------------------------------------


def under_hypervisor(tree: Tree) -> bool:
    """The CPU says that a hypervisor runs below (x86: flag `hypervisor`)."""
    for line in (tree.read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("flags"):
            return "hypervisor" in line.split()
    return False


def cgroup(tree: Tree) -> Literal["v2", "v1", "hybrid"]:
    """Which hierarchy is in charge: of /sys/fs/cgroup itself, or below it."""
    mounts = [line.split() for line in (tree.read("/proc/self/mounts") or "").splitlines()]
    kinds = {row[1]: row[2] for row in mounts if len(row) > 2}
    if kinds.get("/sys/fs/cgroup") == "cgroup2":
        return "v2"
    return "hybrid" if "cgroup2" in kinds.values() else "v1"


def memlock_bytes(tree: Tree, running: Mapping[str, int]) -> int | None:
    """Soft RLIMIT_MEMLOCK of kvmd, or of this process where none runs; None is no limit."""
    limits = tree.read(f"/proc/{running['kvmd']}/limits") if "kvmd" in running else None
    for line in (limits or tree.read("/proc/self/limits") or "").splitlines():
        if line.startswith("Max locked memory"):
            soft = line.removeprefix("Max locked memory").split()[0]
            return int(soft) if soft.isdigit() else None
    return None


class _Timex(ctypes.Structure):
    """struct timex of adjtimex(2) up to `status`, and room for the rest (208 bytes on 64-bit)."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def is_synchronized() -> bool | Unseen:
    """Whether the kernel holds the clock for synchronized; with modes = 0 adjtimex(2) only reads."""
    timex = _Timex()
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
    if state < 0:
        return Unseen(f"adjtimex: {os.strerror(ctypes.get_errno())}")
    return state != _TIME_ERROR and not timex.status & _STA_UNSYNC


def clock(running: Mapping[str, int], synchronized: bool | Unseen) -> Clock | Unseen:
    """The clock and its keeper."""
    if isinstance(synchronized, Unseen):
        return synchronized
    keeper = next((name for name in _TIMEKEEPERS if name in running), None)
    return Clock(synchronized, "systemd-timesyncd" if keeper == "systemd-timesyn" else keeper)


def answers(path: Path) -> bool:
    """Whether somebody accepts connections on this Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(_CONNECT_S)
        try:
            with ShortPath(path) as address:
                client.connect(address)
        except OSError:
            return False
    return True
