"""kvmd/rpc/client.py against a real server, and against things that are no server."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmd import errors
from kvmd.errors import KvmdError, TimedOut, Unreachable
from kvmd.rpc.auth import Access, Peer, Role
from kvmd.rpc.client import Client, RemoteError, exit_code_of
from kvmd.rpc.events import EventHub
from tests.rig.rpcserver import Happening, serving


async def in_thread(work: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(work)


async def test_calls_on_one_connection(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        with Client(rig.path) as client:
            assert await in_thread(lambda: client.call("daemon.ping")) == {"time": 1.0}
            result = await in_thread(lambda: client.call("guest.kill", {"name": "web"}))
            assert result == {"name": "web", "state": "stopped", "changed": True}
            assert len(await in_thread(lambda: client.call("test.blob", {"size": 3 << 20}))) == 3 << 20
            assert rig.server.connections == 1


async def test_an_error_of_the_daemon_is_raised_with_all_it_says(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        with Client(rig.path) as client:
            with pytest.raises(RemoteError) as caught:
                await in_thread(lambda: client.call("guest.kill", {"name": "gone"}))
            error = caught.value
            assert (error.slug, error.message, error.hint) == ("conflict", "guest gone: is stopped", "nothing to do")
            assert (error.details, error.exit_code, error.rpc_code) == ({"state": "stopped"}, 4, -32005)
            assert error.to_data() == {"slug": "conflict", "hint": "nothing to do", "details": {"state": "stopped"}}
            with pytest.raises(RemoteError, match=r"no method guest\.kil") as caught:
                await in_thread(lambda: client.call("guest.kil"))
            assert (caught.value.hint, caught.value.exit_code) == ("did you mean guest.kill?", 2)
            assert await in_thread(lambda: client.call("daemon.ping")) == {"time": 1.0}


async def test_turned_away_means_denied(tmp_path: Path) -> None:
    for peer_uid, requests in ((4711, 3), (0, 1)):
        async with serving(tmp_path, peer_of=lambda _sock, uid=peer_uid: Peer(uid)) as rig:
            with Client(rig.path) as client:
                for _ in range(requests):
                    if peer_uid == 0:
                        assert await in_thread(lambda: client.call("daemon.ping")) == {"time": 1.0}
                        continue
                    with pytest.raises(RemoteError, match="may not use this socket") as caught:
                        await in_thread(lambda: client.call("daemon.ping", {"x": "y" * 100_000}))
                    assert caught.value.exit_code == 5


async def test_a_call_that_takes_too_long(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        with Client(rig.path, timeout_s=0.1) as client:
            with pytest.raises(TimedOut, match=r"guest\.stop: no answer within 0\.1 s"):
                await in_thread(lambda: client.call("guest.stop", {"name": "web"}))
            rig.gate.set()
            assert await in_thread(lambda: client.call("daemon.ping")) == {"time": 1.0}


async def test_a_daemon_that_stops_in_the_middle(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        client = Client(rig.path, timeout_s=None)
        call = asyncio.create_task(in_thread(lambda: client.call("guest.stop", {"name": "web"})))
        await rig.until(lambda: rig.running == 1)
        rig.task.cancel()
        with pytest.raises(RemoteError, match="kvmd is stopping") as caught:
            await call
        assert (caught.value.slug, caught.value.exit_code) == ("unreachable", 6)
        await rig.until(rig.task.done)
        with pytest.raises(Unreachable, match="closed the connection"):
            await in_thread(lambda: client.call("daemon.ping"))
        client.close()


async def test_events_from_a_cursor_on(tmp_path: Path) -> None:
    kept = [Happening(cursor) for cursor in range(1, 11)]
    hub = EventHub(lambda since, limit: kept[since : since + limit], cursor=10)
    async with serving(tmp_path, hub=hub) as rig:
        stream = Client(rig.path).events(since=7, types=["guest.*"])
        seen = [await in_thread(lambda: next(stream)) for _ in range(3)]
        assert [event["cursor"] for event in seen] == [8, 9, 10]
        assert set(seen[0]) == {"subscription", "cursor", "time", "type", "guest", "actor", "data"}
        hub.publish(Happening(11, "host.applied"))
        hub.publish(Happening(12))
        assert (await in_thread(lambda: next(stream)))["cursor"] == 12
        stream.close()  # type: ignore[attr-defined]
        await rig.until(lambda: rig.server.connections == 0)
        assert hub.subscribers == 0


async def test_events_that_come_too_fast(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        stream = Client(rig.path).events()
        first = asyncio.create_task(in_thread(lambda: next(stream)))
        await rig.until(lambda: rig.hub.subscribers == 1)
        cursor = 0
        large = json.dumps({"x": "y" * 4000})
        while rig.hub.subscribers:
            cursor += 1
            rig.hub.publish(Happening(cursor, data=large))
        seen = [(await first)["cursor"]]
        with pytest.raises(RemoteError) as caught:
            while True:
                seen.append((await in_thread(lambda: next(stream)))["cursor"])
        assert caught.value.slug == "lagged"
        assert caught.value.details["cursor"] == seen[-1]
        assert caught.value.hint == f"subscribe again with since = {seen[-1]}"


async def test_events_of_a_daemon_that_leaves(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        stream = Client(rig.path).events()
        waiting = asyncio.create_task(in_thread(lambda: next(stream)))
        await rig.until(lambda: rig.hub.subscribers == 1)
        rig.task.cancel()
        with pytest.raises(Unreachable):
            await waiting


async def test_a_role_lost_ends_the_events(tmp_path: Path) -> None:
    access = Access(uids={5: Role.VIEWER})
    async with serving(tmp_path, access=access, peer_of=lambda _sock: Peer(5)) as rig:
        stream = Client(rig.path).events()
        waiting = asyncio.create_task(in_thread(lambda: next(stream)))
        await rig.until(lambda: rig.hub.subscribers == 1)
        rig.server.set_access(Access())
        with pytest.raises(RemoteError) as caught:
            await waiting
        assert caught.value.slug == "denied"


# -- no daemon there


def test_no_socket(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="No such file") as caught:
        Client(tmp_path / "none").call("daemon.ping")
    assert caught.value.hint == "systemctl start kvmd"
    assert caught.value.exit_code == 6


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    with pytest.raises(Unreachable, match="refused") as caught:
        Client(tmp_path / "s").call("daemon.ping")
    assert caught.value.hint == "systemctl start kvmd"


def test_a_directory_that_does_not_exist_and_a_long_path(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="No such file"):
        Client(tmp_path / ("d" * 150) / "s").call("daemon.ping")


async def test_a_long_path(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 150)
    directory.mkdir()
    async with serving(directory) as rig:
        before = descriptors()
        with Client(os.fspath(rig.path)) as client:
            assert await in_thread(lambda: client.call("daemon.ping")) == {"time": 1.0}
        await rig.until(lambda: rig.server.connections == 0)
        assert descriptors() == before


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_daemon_too_busy_to_accept(tmp_path: Path) -> None:
    """A full backlog is waited for, up to the timeout."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        waiting.connect(str(tmp_path / "s"))
        with pytest.raises(TimedOut):
            Client(tmp_path / "s", timeout_s=0.1).call("daemon.ping")


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Callable[[bytes], Path]]:
    """A server that answers anything with the given bytes and closes."""
    path = tmp_path / "odd"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    threads: list[threading.Thread] = []

    def begin(reply: bytes) -> Path:
        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(reply)

        threads.append(threading.Thread(target=answer))
        threads[-1].start()
        return path

    yield begin
    for thread in threads:
        thread.join(timeout=5)
    listener.close()


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"[]\n",
        b"\xff\xff\n",
        b'{"id":1,"error":5}\n',
        b'{"id":1,"error":{}}\n',
        b'{"id":1,"error":{"code":"x","message":"m"}}\n',
    ],
)
def test_something_else_answers(answering: Callable[[bytes], Path], reply: bytes) -> None:
    with pytest.raises(Unreachable, match="not kvmd") as caught:
        Client(answering(reply)).call("daemon.ping")
    assert caught.value.hint == "check --socket"


@pytest.mark.parametrize("reply", [b"", b'{"jsonrpc":"2.0","id":1,"resu', b'{"id":77,"result":1}\n'])
def test_the_answer_does_not_come(answering: Callable[[bytes], Path], reply: bytes) -> None:
    with pytest.raises(Unreachable, match="closed the connection"):
        Client(answering(reply)).call("daemon.ping")


def test_an_error_without_data_is_still_one(answering: Callable[[bytes], Path]) -> None:
    path = answering(b'{"id":1,"error":{"code":-1,"message":"m"}}\n')
    with Client(path) as client, pytest.raises(RemoteError, match="m") as caught:
        client.call("daemon.ping")
    assert (caught.value.slug, caught.value.exit_code, caught.value.hint) == ("failed", 1, None)


# -- what it costs and maps


def test_exit_codes_follow_the_slug() -> None:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, KvmdError):
            assert exit_code_of(kind.slug) == kind.exit_code
    assert exit_code_of("of a newer daemon") == 1


def test_importing_the_client_is_cheap() -> None:
    script = "import sys, kvmd.rpc.client; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"asyncio", "pydantic", "argparse", "logging", "subprocess", "threading", "psutil", "pyroute2", "rich"}
    assert not heavy & set(modules)
    assert [name for name in modules if name.partition(".")[0] == "kvmd"] == [
        "kvmd",
        "kvmd.errors",
        "kvmd.rpc",
        "kvmd.rpc.client",
        "kvmd.unixpath",
    ]
