"""The API's server: takes connections from a listening Unix socket, decides each peer's role, and owns every task.

A peer without a role, and one over a limit, gets one error line and is closed before a byte of it is read. There is
no queue that calls of different connections share, so nobody waits behind anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from kvmd.errors import Denied, KvmdError, Refused
from kvmd.rpc.auth import ROOT_UID, Access, Peer, Role
from kvmd.rpc.connection import Connection, ServerLimits
from kvmd.rpc.peers import observe_peer
from kvmd.rpc.protocol import encode_error
from kvmd.rpc.registry import Registry

_log = logging.getLogger(__name__)

_ACCEPTS_PER_TURN = 16
_OUT_OF_RESOURCES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_FAREWELL_S = 1.0  # for the last answers to be read when the server stops


class Server:
    """One listening socket's worth of clients. `serve` runs until it is cancelled."""

    def __init__(
        self,
        registry: Registry,
        access: Access,
        *,
        limits: ServerLimits | None = None,
        peer_of: Callable[[socket.socket], Peer] = observe_peer,
    ) -> None:
        self._registry = registry
        self._access = access
        self._limits = limits or ServerLimits()
        self._peer_of = peer_of
        self._connections: set[Connection] = set()
        self._tasks: asyncio.TaskGroup | None = None
        self._connecting: dict[Connection, socket.socket] = {}  # accepted, not with a transport yet
        self._occupied = asyncio.Event()
        self._empty = asyncio.Event()
        self._starved = False

    @property
    def connections(self) -> int:
        """How many clients there are."""
        return len(self._connections)

    def set_access(self, access: Access) -> None:
        """New access lists: they hold for present clients too; one that has no role any more is disconnected."""
        self._access = access
        for connection in tuple(self._connections):
            connection.role = access.role_of(connection.peer)
            if connection.role is Role.NONE:
                connection.hang_up(encode_error(None, _no_role(access.actor(connection.peer))))

    async def serve(self, listener: socket.socket) -> None:
        """Serve until cancelled; then running calls are cancelled and told so. `listener` stays open."""
        listener.setblocking(False)
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                try:
                    self._listen(listener)
                    await self._watch()
                finally:
                    self._tasks = None
                    asyncio.get_running_loop().remove_reader(listener)
        finally:
            await self._farewell()

    async def _watch(self) -> None:
        """Hold clients to the limits on time; sleeps for good while there are none."""
        loop = asyncio.get_running_loop()
        while True:
            await self._occupied.wait()
            await asyncio.sleep(self._limits.tick_s)
            for connection in tuple(self._connections):
                connection.check(loop.time())

    async def _farewell(self) -> None:
        """Close all clients, with a moment for those who have not read their last answer."""
        for sock in self._connecting.values():
            sock.close()
        for connection in (*self._connecting, *self._connections):
            connection.close()
        self._connections -= self._connecting.keys()
        self._connecting.clear()
        if self._connections:
            self._empty.clear()
            with contextlib.suppress(TimeoutError):
                # Not asyncio.timeout: in a cancelled task, Python 3.11.2's turns its own end into another cancellation.
                await asyncio.wait_for(self._empty.wait(), _FAREWELL_S)
        for connection in tuple(self._connections):
            connection.abort("the server stops")
        await asyncio.sleep(0)

    def _listen(self, listener: socket.socket) -> None:
        if self._tasks:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Take some of the waiting connections; the rest next time, so that present clients get their turn."""
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, _address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    raise
                # The connection stays in the backlog and the socket readable: not listening is the only rest.
                if not self._starved:
                    _log.error("accept: %s; new clients wait", error.strerror)
                self._starved = True
                loop = asyncio.get_running_loop()
                loop.remove_reader(listener)
                loop.call_later(self._limits.accept_retry_s, self._listen, listener)
                return
            if self._starved:
                self._starved = False
                _log.info("accept works again")
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        """A client, or one line and goodbye."""
        peer = self._peer_of(sock)
        role = self._access.role_of(peer)
        actor = self._access.actor(peer)
        sock.setblocking(False)
        if fault := self._objection(peer, role, actor):
            with contextlib.suppress(OSError):
                sock.send(encode_error(None, fault) + b"\n")
            sock.close()
            return
        connection = Connection(
            self._registry,
            self._limits,
            peer=peer,
            role=role,
            actor=actor,
            spawn=self._spawn,
            forget=self._forget,
        )
        self._connections.add(connection)
        self._connecting[connection] = sock
        self._occupied.set()
        self._spawn(self._connect(connection, sock))

    async def _connect(self, connection: Connection, sock: socket.socket) -> None:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, sock)
        del self._connecting[connection]

    def _objection(self, peer: Peer, role: Role, actor: str) -> KvmdError | None:
        """Why this peer does not get in, if so."""
        limits = self._limits
        if role is Role.NONE:
            return _no_role(actor)
        total = limits.connections
        if peer.uid != ROOT_UID:
            total -= limits.root_reserve
            same = sum(other.peer.uid == peer.uid for other in self._connections)
            if same >= limits.connections_per_uid:
                return Refused(f"{actor} has {same} connections, the limit", hint="close some of them")
        if len(self._connections) >= total:
            return Refused(f"{len(self._connections)} connections, the limit", hint="try again later")
        return None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        if self._tasks:
            self._tasks.create_task(work)
        else:
            work.close()

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._occupied.clear()
            self._empty.set()


def _no_role(actor: str) -> Denied:
    return Denied(
        f"{actor} may not use this socket",
        hint="access.viewers, access.operators and access.admins in kvmd.toml list who may",
    )
