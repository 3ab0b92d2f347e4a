"""A real Server on a real socket with methods that tests can hold up, and a client that can misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from kvmd.errors import Conflict
from kvmd.rpc.auth import Access, Peer
from kvmd.rpc.builtin import add_builtin
from kvmd.rpc.connection import ServerLimits
from kvmd.rpc.events import EventHub
from kvmd.rpc.listen import listen_unix
from kvmd.rpc.peers import observe_peer
from kvmd.rpc.protocol import RawJson
from kvmd.rpc.registry import Call, NoParams, Registry
from kvmd.rpc.results import GuestVerbParams, GuestVerbResult, Pong
from kvmd.rpc.server import Server

PATIENCE_S = 10.0  # for what should come at once, on a busy machine


class BlobParams(BaseModel):
    """How much to answer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    size: int = Field(ge=0)


@dataclass(frozen=True, slots=True)
class Happening:
    """An event as a store would keep it."""

    cursor: int
    type: str = "guest.started"
    time: float = 1.5
    guest: str | None = "web"
    actor: str | None = None
    data: str = "{}"


@dataclass
class Rig:
    """The server, and what its handlers did."""

    path: Path
    server: Server
    hub: EventHub
    gate: asyncio.Event  # guest.stop waits for it
    task: asyncio.Task[None]
    running: int = 0
    most: int = 0  # guest.stop calls that ran at one time
    finished: int = 0
    actors: list[str] = field(default_factory=list)

    async def connect(self, name: str | None = None) -> Wire:
        """A client; `name` is its own address, by which `uid_by_name` knows it."""
        return await Wire.connect(self.path, name)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that is due."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)


def uid_by_name(connection: socket.socket) -> Peer:
    """The uid a client claims in its abstract address "\\0NAME-UID-..."; root without one."""
    name = connection.getpeername()
    parts = name.decode().split("-") if isinstance(name, bytes) else []
    return Peer(int(parts[1]) if len(parts) > 1 else 0)


def _registry(rig: Callable[[], Rig], hub: EventHub) -> Registry:
    registry = Registry()

    @registry.method("daemon.ping", role="viewer", params=NoParams, result=Pong, summary="answers at once")
    async def ping(_params: NoParams, call: Call) -> Pong:
        rig().actors.append(call.actor)
        return Pong(time=1.0)

    @registry.method("guest.stop", role="operator", params=GuestVerbParams, result=GuestVerbResult, summary="waits")
    async def stop(params: GuestVerbParams, _call: Call) -> GuestVerbResult:
        now = rig()
        now.running += 1
        now.most = max(now.most, now.running)
        try:
            await now.gate.wait()
            now.finished += 1
        finally:
            now.running -= 1
        return GuestVerbResult(name=params.name, state="stopped", changed=True)

    @registry.method("guest.kill", role="operator", params=GuestVerbParams, result=GuestVerbResult, summary="at once")
    async def kill(params: GuestVerbParams, _call: Call) -> GuestVerbResult:
        if params.name == "gone":
            raise Conflict("guest gone: is stopped", hint="nothing to do", state="stopped")
        return GuestVerbResult(name=params.name, state="stopped", changed=True)

    @registry.method("test.blob", role="viewer", params=BlobParams, result=Pong, summary="a large answer")
    async def blob(params: BlobParams, _call: Call) -> RawJson:
        return RawJson(b'"%b"' % (b"x" * params.size))

    add_builtin(registry, hub, version="1.2.3")
    return registry


@contextlib.asynccontextmanager
async def serving(
    directory: Path,
    *,
    limits: ServerLimits | None = None,
    access: Access | None = None,
    peer_of: Callable[[socket.socket], Peer] = observe_peer,
    wrap: Callable[[socket.socket], Any] = lambda listener: listener,
    hub: EventHub | None = None,
) -> AsyncIterator[Rig]:
    """A server in this event loop; when it is left, everything it had is gone."""
    listener = listen_unix(directory / "kvmd.sock")
    hub = hub or EventHub()
    made: list[Rig] = []
    registry = _registry(lambda: made[0], hub)
    server = Server(registry, access or Access(), limits=limits, peer_of=peer_of)
    task = asyncio.create_task(server.serve(wrap(listener.sock)))
    made.append(Rig(directory / "kvmd.sock", server, hub, asyncio.Event(), task))
    before = asyncio.all_tasks()
    try:
        yield made[0]
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        listener.close()
        assert server.connections == 0
        assert asyncio.all_tasks() <= before


class Wire:
    """A client that sends exactly the bytes it is told to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""

    @classmethod
    async def connect(cls, path: Path, name: str | None = None) -> Wire:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        if name is not None:
            sock.bind(f"\0{name}")
        await asyncio.get_running_loop().sock_connect(sock, str(path))
        return cls(sock)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.sock.close()

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def request(self, method: str, ident: Any = 1, **params: Any) -> None:
        body = {"jsonrpc": "2.0", "id": ident, "method": method, "params": params}
        await self.send(json.dumps(body).encode() + b"\n")

    async def line(self) -> Any:
        """The next line as JSON; EOFError when there is none any more."""
        async with asyncio.timeout(PATIENCE_S):
            while b"\n" not in self.received:
                try:
                    data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 20)
                except ConnectionResetError:
                    data = b""
                if not data:
                    raise EOFError
                self.received += data
        line, _, self.received = self.received.partition(b"\n")
        return json.loads(line)

    async def ask(self, method: str, **params: Any) -> Any:
        await self.request(method, **params)
        return await self.line()

    async def closed(self) -> bool:
        """Whether nothing more comes, once it is known."""
        try:
            await self.line()
        except EOFError:
            return True
        return False
