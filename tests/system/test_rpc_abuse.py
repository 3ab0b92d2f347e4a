"""The server against clients that misbehave: a real socket, real clients, limits made small enough to be reached."""

from __future__ import annotations

import array
import asyncio
import errno
import json
import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from kvmd.rpc.auth import Access, Role
from kvmd.rpc.connection import ServerLimits
from kvmd.rpc.events import EventHub
from kvmd.rpc.protocol import Limits
from tests.rig.rpcserver import Happening, serving, uid_by_name

VIEWER_UID = 1001
ACCESS = Access(uids={1000: Role.OPERATOR, VIEWER_UID: Role.VIEWER, 1002: Role.ADMIN}, names={1000: "alice"})
PING = b'{"jsonrpc":"2.0","id":1,"method":"daemon.ping"}\n'


def quick(**values: Any) -> ServerLimits:
    """The limits on time, a hundred times tighter."""
    times = {"partial_s": 0.2, "stall_s": 0.2, "tick_s": 0.02, "idle_s": 60.0, "accept_retry_s": 0.1}
    return ServerLimits(**(times | values))


def descriptors() -> int:
    """How many this process has, client and server together."""
    return len(list(Path("/proc/self/fd").iterdir()))


# -- who gets in (rows 101 to 104)


async def test_a_stranger_gets_one_line_and_is_not_read(tmp_path: Path) -> None:
    async with serving(tmp_path, access=ACCESS, peer_of=uid_by_name) as rig:
        with await rig.connect("stranger-4711") as wire:
            reply = await wire.line()
            assert reply["id"] is None
            assert reply["error"]["code"] == -32003
            assert reply["error"]["data"]["slug"] == "denied"
            assert "uid 4711" in reply["error"]["message"]
            assert await wire.closed()
        assert rig.server.connections == 0
        assert rig.actors == []


async def test_a_stranger_who_speaks_first_still_reads_the_line(tmp_path: Path) -> None:
    async with serving(tmp_path, access=ACCESS, peer_of=uid_by_name) as rig:
        with await rig.connect("stranger-4711") as wire:
            wire.sock.send(PING)
            assert (await wire.line())["error"]["data"]["slug"] == "denied"
            assert await wire.closed()
        assert rig.actors == []


async def test_roles_and_actors_come_from_the_socket(tmp_path: Path) -> None:
    async with serving(tmp_path, access=ACCESS, peer_of=uid_by_name) as rig:
        for name, slug in (("v-1001", "denied"), ("o-1000", None), ("a-1002", None), ("r-0", None)):
            with await rig.connect(name) as wire:
                reply = await wire.ask("guest.kill", name="web")
                assert reply.get("error", {}).get("data", {}).get("slug") == slug
                await wire.ask("daemon.ping")
        assert rig.actors == ["uid 1001", "alice", "uid 1002", "root"]


async def test_new_access_lists_hold_for_present_clients(tmp_path: Path) -> None:
    async with serving(tmp_path, access=ACCESS, peer_of=uid_by_name) as rig:
        with await rig.connect("a-1000") as alice, await rig.connect("b-1001") as viewer:
            assert "result" in await alice.ask("guest.kill", name="web")
            assert "result" in await viewer.ask("daemon.ping")
            rig.server.set_access(Access(uids={1000: Role.VIEWER}))
            assert (await alice.ask("guest.kill", name="web"))["error"]["data"]["slug"] == "denied"
            assert "result" in await alice.ask("daemon.ping")
            assert (await viewer.line())["error"]["data"]["slug"] == "denied"
            assert await viewer.closed()


async def test_the_cap_on_connections_holds_and_root_is_still_served(tmp_path: Path) -> None:
    limits = quick(connections=20, connections_per_uid=4, root_reserve=8)
    access = Access(uids=dict.fromkeys(range(1000, 1010), Role.VIEWER))
    async with serving(tmp_path, access=access, peer_of=uid_by_name, limits=limits) as rig:
        wires, served, refused = [], 0, []
        for number in range(60):
            wires.append(await rig.connect(f"n-{1000 + number // 6}-{number}"))
            reply = await wires[-1].ask("daemon.ping")
            served += "result" in reply
            if "error" in reply:
                assert await wires[-1].closed()
                refused.append(reply["error"]["message"])
        assert served == rig.server.connections == 12
        assert refused.count("uid 1000 has 4 connections, the limit") == 2
        assert refused.count("12 connections, the limit") > 30
        for number in range(10):
            wires.append(await rig.connect(f"r-0-{number}"))
            assert ("result" in await wires[-1].ask("daemon.ping")) == (number < 8)
        wires.pop(0).sock.close()  # a place is free again
        await rig.until(lambda: rig.server.connections < 20)
        with await rig.connect("r-0-again") as wire:
            assert "result" in await wire.ask("daemon.ping")
        for wire in wires:
            wire.sock.close()


async def test_running_out_of_descriptors_is_no_busy_loop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Starved:
        """A listener that cannot accept while there are no descriptors."""

        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock
            self.tries = 0
            self.empty = True

        def fileno(self) -> int:
            return self.sock.fileno()

        def setblocking(self, flag: bool) -> None:
            self.sock.setblocking(flag)

        def accept(self) -> Any:
            if self.empty:
                self.tries += 1
                raise OSError(errno.EMFILE, "Too many open files")
            return self.sock.accept()

    made: list[Starved] = []

    def wrap(sock: socket.socket) -> Starved:
        made.append(Starved(sock))
        return made[0]

    async with serving(tmp_path, limits=quick(), wrap=wrap) as rig:
        with await rig.connect() as wire:
            await wire.send(PING)
            await rig.until(lambda: made[0].tries >= 3)
            started = asyncio.get_running_loop().time()
            tries = made[0].tries
            await rig.until(lambda: made[0].tries >= tries + 2)
            assert asyncio.get_running_loop().time() - started > 0.1
            made[0].empty = False
            assert "result" in await wire.line()
    assert len([record for record in caplog.records if "Too many open files" in record.message]) == 1


# -- slow and silent ones (rows 105 to 107)


async def test_a_byte_at_a_time_is_cut_off(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=quick()) as rig:
        with await rig.connect() as wire:
            sent = 0
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                for byte in PING * 100:
                    await wire.send(bytes([byte]))
                    sent += 1
                    await asyncio.sleep(0.02)
            assert 2 <= sent < len(PING)
            assert "no complete request" in (await wire.line())["error"]["message"]
            assert await wire.closed()


async def test_half_a_line_and_silence_is_cut_off_and_a_slow_answer_is_not(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=quick()) as rig:
        with await rig.connect() as half, await rig.connect() as patient:
            await half.send(PING[:20])
            await patient.request("guest.stop", name="web")
            assert "no complete request" in (await half.line())["error"]["message"]
            assert await half.closed()
            await asyncio.sleep(0.3)
            rig.gate.set()
            assert "result" in await patient.line()


async def test_idle_clients_go_and_subscribers_stay(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=quick(idle_s=0.15)) as rig:
        with await rig.connect() as idle, await rig.connect() as subscriber, await rig.connect() as blanks:
            await subscriber.ask("events.subscribe")
            await blanks.send(b"\n" * 100)
            assert await idle.closed()
            assert await blanks.closed()
            assert rig.server.connections == 1
            rig.hub.publish(Happening(1))
            assert (await subscriber.line())["params"]["cursor"] == 1


async def test_who_does_not_read_is_dropped(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=quick()) as rig:
        with await rig.connect() as wire:
            for ident in range(20):
                await wire.request("test.blob", ident, size=3 << 20)
            await rig.until(lambda: rig.server.connections == 0)


async def test_who_reads_slowly_is_not(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=quick(stall_s=0.4)) as rig:
        with await rig.connect() as wire:
            await wire.request("test.blob", size=6 << 20)
            got = 0
            while got <= 6 << 20:
                got += len(await asyncio.get_running_loop().sock_recv(wire.sock, 256 << 10))
                await asyncio.sleep(0.04)
            assert got == len(b'{"jsonrpc":"2.0","id":1,"result":""}\n') + (6 << 20)
            assert "result" in await wire.ask("daemon.ping")


async def test_unread_answers_stop_further_calls(tmp_path: Path) -> None:
    """Beyond the backlog allowed, no call is begun: what a client can make the server hold is bounded."""
    async with serving(tmp_path, limits=quick(stall_s=60.0)) as rig:
        with await rig.connect() as wire:
            await wire.request("test.blob", size=4 << 20)
            await asyncio.sleep(0.1)
            await wire.send(PING)
            await asyncio.sleep(0.1)
            assert rig.actors == []
            assert len((await wire.line())["result"]) == 4 << 20
            assert "result" in await wire.line()


async def test_bytes_without_a_newline_end_at_the_limit(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        with await rig.connect() as wire:
            sent = 0
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                while sent < 64 << 20:
                    await wire.send(b"x" * (64 << 10))
                    sent += 64 << 10
            assert sent < 3 << 20  # the limit and what the socket itself holds
            reply = await wire.line()
            assert reply["error"]["code"] == -32600
            assert "1048576 bytes" in reply["error"]["message"]
            assert await wire.closed()


# -- wrong content (rows 108 to 112)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"[" * 100_000, -32700),
        (b'{"a":' * 100_000, -32700),
        (b"GET / HTTP/1.1\r", -32700),
        (b"\xff\xfe\x00", -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"daemon.ping","params":{"a":NaN}}', -32700),
        (b'{"jsonrpc":"2.0","id":1,"id":2,"method":"daemon.ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":"\\ud800","method":"daemon.ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":' + b"9" * 5000 + b',"method":"daemon.ping"}', -32600),
        (b"[" + b",".join([PING[:-1]] * 10_000) + b"]", -32600),
        (b"[]", -32600),
        (b'{"jsonrpc":"2.0","id":1.5,"method":"daemon.ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":{},"method":"daemon.ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":"' + b"x" * 200_000 + b'","method":"daemon.ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":"daemon.pong"}', -32601),
        (b'{"jsonrpc":"2.0","id":1,"method":"daemon.ping","params":{"x":1}}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"daemon.ping","params":[1]}', -32602),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else str(value),
)
async def test_wrong_lines_are_answered_and_the_next_one_is_heard(tmp_path: Path, line: bytes, code: int) -> None:
    async with serving(tmp_path) as rig:
        with await rig.connect() as wire:
            await wire.send(line + b"\n" + PING)
            replies = [await wire.line(), await wire.line()]
            wrong = next(reply for reply in replies if "error" in reply)
            assert wrong["error"]["code"] == code
            assert any("result" in reply for reply in replies)


async def test_a_notification_is_done_and_not_answered(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        rig.gate.set()
        with await rig.connect() as wire:
            await wire.send(b'{"jsonrpc":"2.0","method":"guest.stop","params":{"name":"web"}}\n')
            await wire.send(b'{"jsonrpc":"2.0","method":"no.such"}\n')
            await rig.until(lambda: rig.finished == 1)
            assert (await wire.ask("daemon.ping", ident="next"))["id"] == "next"


async def test_a_null_id_is_answered_and_a_batch_gets_one_line(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        with await rig.connect() as wire:
            assert (await wire.ask("daemon.ping", ident=None))["result"] == {"time": 1.0}
            await wire.send(b"[" + PING[:-1] + b',{"jsonrpc":"2.0","method":"daemon.ping"},[],' + PING[:-1] + b"]\n")
            replies = await wire.line()
            assert [("result" in reply, reply["id"]) for reply in replies] == [(True, 1), (False, None), (True, 1)]
            await wire.send(b'[{"jsonrpc":"2.0","method":"daemon.ping"}]\n')
            assert (await wire.ask("daemon.ping", ident=9))["id"] == 9


# -- many at once (rows 113 and 114, the priority lane)


async def test_pipelined_requests_wait_in_the_socket(tmp_path: Path) -> None:
    line = b'{"jsonrpc":"2.0","id":1,"method":"guest.stop","params":{"name":"web"}}' + b" " * 4000 + b"\n"
    async with serving(tmp_path) as rig:
        with await rig.connect() as wire:
            total, sent = line * 1000, 0
            await rig.until(lambda: rig.server.connections == 1)
            stuck = 0
            while stuck < 20:
                try:
                    sent += wire.sock.send(total[sent : sent + 65536])
                    stuck = 0
                except BlockingIOError:
                    stuck += 1
                await asyncio.sleep(0.005)
            assert rig.running == rig.most == 8
            assert sent < len(total) // 4
            rig.gate.set()
            sender = asyncio.create_task(wire.send(total[sent:]))
            for _ in range(1000):
                assert "result" in await wire.line()
            await sender
            assert rig.most <= 8
            assert rig.finished == 1000


async def test_nobody_waits_behind_anybody(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        busy = [await rig.connect() for _ in range(30)]
        for wire in busy:
            for ident in range(12):
                await wire.request("guest.stop", ident, name="web")
        await rig.until(lambda: rig.running == 240)
        with await rig.connect() as wire:
            for _ in range(20):
                assert "result" in await wire.ask("guest.kill", name="web")
                assert "result" in await wire.ask("daemon.ping")
        assert rig.finished == 0
        rig.gate.set()
        for wire in busy:
            assert sorted([(await wire.line())["id"] for _ in range(12)]) == list(range(12))
            wire.sock.close()


async def test_a_flood_of_garbage_does_not_keep_others_waiting(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        with await rig.connect() as flood, await rig.connect() as wire:

            async def pour() -> None:
                while True:
                    await asyncio.get_running_loop().sock_sendall(flood.sock, b"{\n" * 4000)

            async def drain() -> None:
                while True:
                    await asyncio.get_running_loop().sock_recv(flood.sock, 1 << 20)

            tasks = [asyncio.create_task(pour()), asyncio.create_task(drain())]
            for _ in range(20):
                assert "result" in await wire.ask("daemon.ping")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_leaves_cancels_nothing(tmp_path: Path, how: str) -> None:
    async with serving(tmp_path) as rig:
        wire = await rig.connect()
        await wire.request("guest.stop", name="web")
        await rig.until(lambda: rig.running == 1)
        if how == "reset":
            await wire.send(PING)
            await wire.request("test.blob", size=1 << 20)
            await asyncio.sleep(0.05)  # answers lie unread: closing resets
        wire.sock.close()
        await asyncio.sleep(0.05)
        assert rig.running == 1
        rig.gate.set()
        await rig.until(lambda: rig.finished == 1 and rig.server.connections == 0)


# -- subscribers (row 115)


async def test_a_subscriber_too_slow_is_told_where_to_go_on(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        with await rig.connect() as slow, await rig.connect() as quick_one:
            for wire in (slow, quick_one):
                assert (await wire.ask("events.subscribe"))["result"]["cursor"] == 0
            large = json.dumps({"x": "y" * 4000})
            published = 0
            while rig.hub.subscribers == 2:
                published += 1
                assert published < 5000
                rig.hub.publish(Happening(published, data=large))
                assert (await quick_one.line())["params"]["cursor"] == published
            cursors: list[int] = []
            while (message := await slow.line())["method"] == "event":
                cursors.append(message["params"]["cursor"])
            assert message["method"] == "events.end"
            assert message["params"]["code"] == "lagged"
            assert message["params"]["cursor"] == cursors[-1]
            assert cursors == list(range(1, len(cursors) + 1))
            assert len(cursors) < published
            assert await slow.closed()


async def test_replay_over_the_wire_then_live(tmp_path: Path) -> None:
    kept = [Happening(cursor, "guest.started" if cursor % 2 else "guest.stopped") for cursor in range(1, 2001)]
    hub = EventHub(lambda since, limit: kept[since : since + limit], cursor=2000)
    async with serving(tmp_path, hub=hub) as rig:
        with await rig.connect() as wire:
            reply = await wire.ask("events.subscribe", since=10, types=["guest.started"])
            assert reply["result"]["cursor"] == 2000
            hub.publish(Happening(2001))
            cursors = [(await wire.line())["params"]["cursor"] for _ in range(996)]
            assert cursors == list(range(11, 2002, 2))
            assert "result" in await wire.ask("daemon.ping")
            second = await wire.ask("events.subscribe")
            assert second["error"]["data"]["slug"] == "conflict"
        with await rig.connect() as wire:
            assert (await wire.ask("events.subscribe", since=9999))["error"]["data"]["slug"] == "conflict"


# -- descriptors and half-close (rows 116 and 117)


async def test_descriptors_sent_along_are_closed(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        with await rig.connect() as wire:
            await wire.ask("daemon.ping")
            before = descriptors()
            for _ in range(20):
                reading, writing = os.pipe()
                rights = array.array("i", [reading] * 50)
                wire.sock.sendmsg([PING], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                os.close(reading)
                assert "result" in await wire.line()
                with pytest.raises(BrokenPipeError):  # nobody holds the reading end any more
                    os.write(writing, b"x")
                os.close(writing)
            assert descriptors() == before


async def test_answers_are_delivered_after_half_close(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        with await rig.connect() as wire:
            for ident in range(20):
                await wire.request("guest.stop", ident, name="web")
            await wire.send(PING[:-1])  # the last line without its newline
            wire.sock.shutdown(socket.SHUT_WR)
            await asyncio.sleep(0.05)
            rig.gate.set()
            answers = [await wire.line() for _ in range(21)]
            assert all("result" in answer for answer in answers)
            assert await wire.closed()
        assert rig.server.connections == 0


async def test_half_close_with_nothing_said_is_goodbye(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        with await rig.connect() as wire:
            wire.sock.shutdown(socket.SHUT_WR)
            assert await wire.closed()


async def test_a_subscriber_that_half_closes_is_done(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        with await rig.connect() as wire:
            await wire.request("events.subscribe")
            wire.sock.shutdown(socket.SHUT_WR)
            assert "result" in await wire.line()
            assert await wire.closed()


# -- the end


async def test_when_the_server_stops_callers_are_told(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        with await rig.connect() as wire, await rig.connect() as unread:
            await wire.request("guest.stop", 5, name="web")
            await unread.request("test.blob", size=4 << 20)
            await rig.until(lambda: rig.running == 1)
            rig.task.cancel()
            reply = await wire.line()
            assert reply["id"] == 5
            assert reply["error"]["data"]["slug"] == "unreachable"
            assert await wire.closed()
            await rig.until(rig.task.done)
            assert rig.server.connections == 0


async def test_random_bytes_on_the_wire_end_in_answers_or_a_close(tmp_path: Path) -> None:
    limits = quick(peer=Limits(request_bytes=4096))
    async with serving(tmp_path, limits=limits) as rig:
        for seed in range(40):
            with await rig.connect() as wire:
                noise = random.Random(seed).randbytes(seed * 120)
                await wire.send(noise + b"\n" + PING)
                wire.sock.shutdown(socket.SHUT_WR)
                replies = []
                while True:
                    try:
                        replies.append(await wire.line())
                    except EOFError:
                        break
                assert ("result" in replies[-1]) != ("4096 bytes" in str(replies[-1]))
                assert all(reply["error"]["code"] in (-32700, -32600) for reply in replies if "error" in reply)
        with await rig.connect() as wire:
            assert "result" in await wire.ask("daemon.ping")
