"""TAPs opened by ioctl(2): rtnetlink cannot make one (Documentation/networking/tuntap.rst). What is done to them
afterwards is netlink.py's."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct

from kvmd.errors import Conflict, HostFailed, KvmdError, NotSupported

TUN = "/dev/net/tun"
_TUNSETIFF, _TUNGETIFF = 0x400454CA, 0x800454D2  # these and the flags: linux/if_tun.h
_IFF_TAP = 0x0002
_IFF_MULTI_QUEUE = 0x0100
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFF_TUN_EXCL = 0x8000


def open_queues(name: str, queues: int, *, vnet_hdr: bool = True, join: bool = False) -> list[int]:
    """One descriptor for each queue of a new TAP; with `join` of one that is there and that nobody has open.

    Conflict if it exists (or cannot be joined), NotSupported without the driver, HostFailed.
    """
    flags = _IFF_TAP | _IFF_NO_PI | (_IFF_VNET_HDR if vnet_hdr else 0) | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    fds: list[int] = []
    try:
        for number in range(queues):
            # The first must make the TAP: without EXCL it would join a persistent one that somebody left.
            exclusive = 0 if number or join else _IFF_TUN_EXCL
            fds.append(_open_queue(name, flags | exclusive, join=join))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def name_of(fd: int) -> str:
    """The name of the TAP behind a descriptor. HostFailed when there is none."""
    try:
        raw, flags = struct.unpack("16sH22x", fcntl.ioctl(fd, _TUNGETIFF, bytes(40)))
    except OSError as error:
        raise HostFailed(f"what was handed over is no TAP: {error.strerror}") from None
    if not flags & _IFF_TAP:
        raise HostFailed("what was handed over is a TUN, and no TAP")
    return str(raw.rstrip(b"\0").decode())


def _open_queue(name: str, flags: int, *, join: bool) -> int:
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            hint = 'modprobe tun; to have it at each boot: load = ["tun"] under [modules] in host.toml'
            raise NotSupported(f"TAP {name}: this host has no {TUN}", hint=hint) from None
        raise HostFailed(f"cannot open {TUN} for TAP {name}: {error.strerror}", errno=error.errno) from None
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError as error:
        os.close(fd)
        raise _refused(name, error, join=join) from None
    return fd


def _refused(name: str, error: OSError, *, join: bool) -> KvmdError:
    exists = False
    with contextlib.suppress(OSError):
        exists = socket.if_nametoindex(name) > 0
    hint = f"`ip -d link show {name}` says what it is; a QEMU that still runs may hold it"
    if exists and error.errno in (errno.EBUSY, errno.EINVAL, errno.EEXIST):
        what = "is there, and it is in use" if error.errno == errno.EBUSY else "is there, and no TAP of that kind"
        if not join:
            what = "a link of that name exists already; it is left alone"
        return Conflict(f"TAP {name}: {what}", hint=hint, link=name)
    privilege = "kvmd needs CAP_NET_ADMIN" if error.errno in (errno.EPERM, errno.EACCES) else None
    return HostFailed(f"cannot make TAP {name}: {error.strerror}", hint=privilege, errno=error.errno)
