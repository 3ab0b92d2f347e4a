"""A daemon that answers by script, on a real socket: for the client's own tests.

It is not free to invent an API: methods, parameters and results are checked against the models of the real one.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmd.errors import KvmdError
from kvmd.rpc.registry import Registry
from tests.rig.golden_openrpc import registry as api

SILENT = object()  # a call that is never answered
Answer = Any  # a JSON value, a KvmdError, SILENT, or a function of the params that gives one of these


@dataclass
class ScriptedDaemon:
    """What it answers by method, and what it was asked."""

    socket: Path
    answers: dict[str, Answer]
    events: list[dict[str, Any]] = field(default_factory=list)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def asked(self, method: str) -> list[dict[str, Any]]:
        """The params of every call of that method."""
        return [params for name, params in self.calls if name == method]


@contextlib.contextmanager
def scripted(directory: Path, answers: Mapping[str, Answer]) -> Iterator[ScriptedDaemon]:
    """Serve until the block ends; a fault of the script itself is raised then."""
    daemon = ScriptedDaemon(directory / "kvmd.sock", dict(answers))
    registry, faults = api(), list[BaseException]()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(daemon.socket))
    listener.listen()
    clients: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(client: socket.socket) -> None:
        try:
            with client.makefile("rwb") as stream:
                for line in stream:
                    for reply in _replies(daemon, registry, json.loads(line)):
                        stream.write(json.dumps(reply).encode() + b"\n")
                    stream.flush()
        except OSError:
            pass  # the client has gone
        except BaseException as fault:
            faults.append(fault)
            client.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            clients.append(client)
            threads.append(threading.Thread(target=serve, args=(client,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield daemon
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for client in clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for client in clients:
            client.close()
    for fault in faults:
        raise fault


def _replies(daemon: ScriptedDaemon, registry: Registry, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    name, params = request["method"], request["params"]
    daemon.calls.append((name, params))
    head = {"jsonrpc": "2.0", "id": request["id"]}
    try:
        method = registry.find(name)
        method.parse(params)
        answer: Answer = daemon.answers.get(name) if name != "events.subscribe" else _subscribed(daemon)
        if callable(answer):
            answer = answer(params)
        if isinstance(answer, KvmdError):
            raise answer
    except KvmdError as error:
        yield head | {"error": {"code": error.rpc_code, "message": error.message, "data": error.to_data()}}
        return
    if answer is SILENT:
        return
    assert answer is not None, f"the script has no answer to {name}"
    method.result.model_validate_json(json.dumps(answer))
    yield head | {"result": answer}
    if name == "events.subscribe" and "since" in params:
        for event in daemon.events:
            if event["cursor"] > params["since"]:
                yield {"jsonrpc": "2.0", "method": "event", "params": {"subscription": "s1", **event}}


def _subscribed(daemon: ScriptedDaemon) -> Answer:
    wanted = daemon.answers.get("events.subscribe")
    newest = daemon.events[-1]["cursor"] if daemon.events else 0
    return wanted if wanted is not None else {"subscription": "s1", "cursor": newest}
