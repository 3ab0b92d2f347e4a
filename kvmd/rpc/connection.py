"""One client on the stream: reads no faster than it answers, and gives up on a peer that does not keep its side.

The transport's callbacks feed a `protocol.Reader`; each message becomes a task of the server. Backpressure is the
socket's own: with enough calls in flight, or too much unread output, the client's bytes stay in the kernel.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from kvmd.errors import Conflict, KvmdError, ProtocolFault, Unreachable
from kvmd.rpc.auth import Peer, Role
from kvmd.rpc.dispatch import answer
from kvmd.rpc.protocol import INVALID_REQUEST, Limits, Message, Reader, Refusal, Request, encode_error
from kvmd.rpc.registry import Call, Follower, Registry

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What the server grants. A client over a limit is told so in one error line and disconnected."""

    connections: int = 256
    connections_per_uid: int = 16  # for every uid but root
    root_reserve: int = 32  # of `connections`, kept free of everyone but root
    in_flight: int = 8  # calls of one connection at a time
    output_bytes: int = 1 << 20  # unread by the client: beyond this it is not listened to
    stall_s: float = 10.0  # with unread output, a client has to take `stall_bytes` in this time
    stall_bytes: int = 64 << 10
    partial_s: float = 10.0  # from the first byte of a request to its newline
    idle_s: float = 600.0  # without a request and without a subscription
    tick_s: float = 1.0  # how often the times above are looked at
    accept_retry_s: float = 1.0  # after running out of descriptors
    peer: Limits = field(default_factory=Limits)


class Connection(asyncio.Protocol):
    """A client with a role. Its tasks belong to the server and outlive it."""

    def __init__(
        self,
        registry: Registry,
        limits: ServerLimits,
        *,
        peer: Peer,
        role: Role,
        actor: str,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        forget: Callable[[Connection], None],
    ) -> None:
        self.peer = peer
        self.role = role
        self._registry = registry
        self._limits = limits
        self._actor = actor
        self._spawn = spawn
        self._forget = forget
        self._reader = Reader(limits.peer)
        self._transport: asyncio.Transport | None = None
        self._follower: Follower | None = None
        self._loop = asyncio.get_running_loop()
        self._writable = asyncio.Event()
        self._writable.set()
        self._in_flight = 0
        self._closing = False
        self._eof = False
        self._active_at = self._loop.time()  # the last message or answer
        self._partial_since: float | None = None
        self._stalled_since: float | None = None
        self._written = 0  # bytes given to the transport so far
        self._taken = 0  # of those, by the client when _stalled_since was set

    # -- callbacks of the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=self._limits.output_bytes)
        if self._closing:  # the server stopped while the connection was being made
            transport.close()

    def data_received(self, data: bytes) -> None:
        self._reader.receive(data)
        self._pump()

    def eof_received(self) -> bool:
        """The client sends no more but may still read: it gets its answers, then the connection is closed."""
        self._eof = True
        self._reader.receive_eof()
        self._pump()
        return True

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()
        if self._follower:
            self._follower.resume()
        self._pump()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._transport = None
        self._writable.set()  # tasks that wait to answer find out
        if self._follower:
            self._follower.close()
            self._follower = None
        self._forget(self)

    # -- Outlet, as handlers and subscriptions see it

    @property
    def ready(self) -> bool:
        return self._writable.is_set() and not self._closing

    def send(self, line: bytes) -> None:
        if self._transport and not self._closing:
            self._written += len(line) + 1
            self._transport.write(line + b"\n")

    def hang_up(self, last_line: bytes) -> None:
        self.send(last_line)
        self.close()

    def later(self, callback: Callable[[], None]) -> None:
        self._loop.call_soon(callback)

    def attach(self, follower: Follower) -> None:
        if self._follower:
            raise Conflict("this connection has a subscription", hint="open another connection for another one")
        self._follower = follower

    # -- the server's side

    def close(self) -> None:
        """Take nothing more; what was written still goes out."""
        self._closing = True
        if self._transport:
            self._transport.close()

    def abort(self, reason: str) -> None:
        """Drop the client and what it did not read."""
        _log.info("client of %s dropped: %s", self._actor, reason)
        self._closing = True
        if self._transport:
            self._transport.abort()

    def check(self, now: float) -> None:
        """Enforce the limits on time; `now` is the loop's clock."""
        if not self._transport:
            return
        limits = self._limits
        unread = self._transport.get_write_buffer_size()
        taken = self._written - unread
        if not unread:
            self._stalled_since = None
        elif self._stalled_since is None or taken - self._taken >= limits.stall_bytes:
            self._stalled_since, self._taken = now, taken
        elif now - self._stalled_since >= limits.stall_s:
            self.abort(f"{unread} bytes unread for {limits.stall_s:g} s")
        if self._closing:
            return
        if self._partial_since is not None and now - self._partial_since >= limits.partial_s:
            self._part(ProtocolFault(INVALID_REQUEST, f"no complete request within {limits.partial_s:g} s"))
        elif self._in_flight or unread or self._follower:
            self._active_at = now
        elif now - self._active_at >= limits.idle_s:
            self.close()

    def _part(self, fault: KvmdError) -> None:
        _log.info("client of %s dropped: %s", self._actor, fault.message)
        self.hang_up(encode_error(None, fault))

    def _pump(self) -> None:
        """Start what may start, and read on only as far as that goes."""
        reader = self._reader
        while self.ready and self._in_flight < self._limits.in_flight:
            message = reader.next_message()
            if message is None:
                break
            self._partial_since = None
            self._active_at = self._loop.time()
            if isinstance(message, Refusal) and message.final:
                self._part(message.fault())
                return
            self._in_flight += 1
            self._spawn(self._serve(message))
        if self._closing or self._transport is None:
            return
        if self._eof:
            if not self._in_flight and not reader.waiting:
                self.close()
        elif reader.waiting:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()
        if not reader.partial:
            self._partial_since = None
        elif self._partial_since is None:
            self._partial_since = self._loop.time()

    async def _serve(self, message: Message) -> None:
        """One message from call to answer; a task of the server's."""
        call = Call(self.peer, self.role, self._actor, self)
        try:
            reply = await answer(self._registry, message, call)
            await self._writable.wait()
            if reply is not None:
                self.send(reply)
            for callback in call.after_reply:
                self.later(callback)  # not here: what fails in it is no failure of the server's
        except asyncio.CancelledError:
            if isinstance(message, Request) and not message.notification:
                stopping = Unreachable("kvmd is stopping; the call may have been carried out", hint="ask again later")
                self.send(encode_error(message.id, stopping))
            raise
        finally:
            self._in_flight -= 1
            self._pump()
