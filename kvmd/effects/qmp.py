"""One guest's control monitor: qemu.qmp with deadlines, bounded memory and our own errors.

QMP's replies come from a process that a guest may have taken over: they are data, never trusted, and nothing here
retries or kills. A monitor that stops answering is told to its owner once (`on_lost`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError, Runstate

from kvmd.errors import QemuFailed, TimedOut, Unreachable
from kvmd.unixpath import ShortPath

GREETING_TIMEOUT_S = 5.0  # a second client of one monitor gets no greeting at all, and waits for ever
COMMAND_TIMEOUT_S = 5.0

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # a lost monitor is reported by its owner

Event = Mapping[str, Any]


class _Tap(EventListener):
    """Hands each event on at once. The stock listener keeps every event for as long as the client lives."""

    def __init__(self, deliver: Callable[[Event], None]) -> None:
        super().__init__()
        self._deliver = deliver

    async def put(self, event: Any) -> None:
        self._deliver(event)


class _Client(QMPClient):
    """The stock client without its debug log, which writes out every message whether anyone listens or not."""

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


def connect_unix(path: Path) -> socket.socket:
    """A connected non-blocking stream socket. OSError."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.setblocking(False)
        with ShortPath(path) as address:
            peer.connect(address)
    except BaseException:
        peer.close()
        raise
    return peer


class Monitor:
    """A QMP session with one QEMU."""

    def __init__(self, guest: str, on_event: Callable[[Event], None], on_lost: Callable[[], None]) -> None:
        self._guest = guest
        self._on_lost = on_lost
        self._client = _Client(guest)
        self._client.events.event_filter = lambda _event: False  # it would keep every event for ever
        self._client.register_listener(_Tap(on_event))
        self._watch: asyncio.Task[None] | None = None
        self._closing = False
        self._dropping = False

    @property
    def connected(self) -> bool:
        """Whether commands can be sent now."""
        return self._client.runstate is Runstate.RUNNING

    async def connect(self, path: Path, timeout_s: float = GREETING_TIMEOUT_S) -> None:
        """Open the session. Raises Unreachable (nobody listens, or another client holds the monitor)."""
        self._closing = False
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.connect(connect_unix(path))
        except TimeoutError:
            await self._drop()
            raise Unreachable(
                f"guest {self._guest}: no QMP greeting on {path} within {timeout_s:g} s",
                hint="QEMU hangs, or another program holds this monitor; use rescue.sock beside it for your own",
            ) from None
        except (OSError, QMPError) as error:
            await self._drop()
            raise Unreachable(f"guest {self._guest}: cannot reach QEMU's monitor {path}: {error}") from None
        self._watch = asyncio.create_task(self._watch_session(), name=f"qmp-{self._guest}")

    async def execute(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S, **arguments: Any) -> Any:
        """Run one command. Raises QemuFailed (QEMU says no), TimedOut, Unreachable (session lost)."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, named or None)
        except TimeoutError:
            raise TimedOut(f"guest {self._guest}: QEMU did not answer {command} within {timeout_s:g} s") from None
        except ExecuteError as error:
            raise QemuFailed(f"guest {self._guest}: {command}: {error}", qmp_class=error.error_class) from None
        except (QMPError, OSError, EOFError) as error:
            raise Unreachable(f"guest {self._guest}: the monitor was lost during {command}: {error}") from None

    async def send_fd(self, name: str, fd: int) -> None:
        """Give QEMU a file descriptor under a name (QMP `getfd`). Same errors as `execute`."""
        self._client.send_fd_scm(fd)
        await self.execute("getfd", fdname=name)

    async def close(self) -> None:
        """End the session; `on_lost` is not called any more."""
        self._closing = True
        if not self._dropping:
            await self._drop()
        if self._watch:
            await self._watch

    def abandon(self) -> None:
        """Forget the session at once, for this process ends."""
        if self._watch:
            self._watch.cancel()
            self._watch = None

    async def _watch_session(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        if not self._closing:
            self._dropping = True  # two callers of disconnect() would race for its one result
            await self._drop()
            self._dropping = False
        self._watch = None
        if not self._closing:
            self._on_lost()

    async def _drop(self) -> None:
        if self._client.runstate is Runstate.IDLE:
            return
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()
