"""Tells when links of the namespace come, go or change, by the kernel's own messages (rtnetlink(7))."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable

from kvmd.effects.netlink import refused

_RTMGRP_LINK = 1  # linux/rtnetlink.h


async def watch_links(changed: Callable[[], None], *, settle_s: float = 0.5, buffer_bytes: int = 1 << 20) -> None:
    """For ever: call `changed()` once links of the namespace came, went or changed, and `settle_s` have passed.

    What changed is not said: the caller looks at everything again. So an overrun of the socket, when the kernel drops
    messages (ENOBUFS, netlink(7)), is a change like any other.
    """
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as route:
        route.setblocking(False)
        route.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        route.bind((0, _RTMGRP_LINK))
        while True:
            await _any_message(loop, route)
            await asyncio.sleep(settle_s)
            while _drained(route):
                pass
            changed()


async def _any_message(loop: asyncio.AbstractEventLoop, route: socket.socket) -> None:
    try:
        await loop.sock_recv(route, 1 << 16)
    except OSError as error:
        if error.errno != errno.ENOBUFS:
            raise refused("listen for changes of links", error) from None


def _drained(route: socket.socket) -> bool:
    """Take one more message; False when there is none."""
    try:
        route.recv(1 << 16)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno != errno.ENOBUFS:
            raise refused("listen for changes of links", error) from None
    return True
