"""Every method of a Registry against every role: who is let in, who is refused before params are parsed.

No handler runs: calls that are allowed get params no method has, and those must be refused as such.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from kvmd.rpc.auth import Peer, Role
from kvmd.rpc.dispatch import answer
from kvmd.rpc.protocol import Request
from kvmd.rpc.registry import Call, Follower, Registry

# A method a viewer may call has one of these verbs; a new one is added here by someone who thought about it.
LOOKING = frozenset(
    [
        "admission",
        "capabilities",
        "cpus",
        "discover",
        "explain",
        "facts",
        "kernel_args",
        "health",
        "hugepages",
        "leases",
        "list",
        "ping",
        "plan",
        "show",
        "stats",
    ]
) | {"status", "subscribe", "top", "version", "wait", "why"}


class NoOutlet:
    """An Outlet for calls that must not use it."""

    ready = False

    def send(self, line: bytes) -> None:
        raise AssertionError(line)

    def hang_up(self, last_line: bytes) -> None:
        raise AssertionError(last_line)

    def later(self, callback: Callable[[], None]) -> None:
        raise AssertionError(callback)

    def attach(self, follower: Follower) -> None:
        raise AssertionError(follower)


async def error_of(registry: Registry, method: str, role: Role, params: dict[str, Any]) -> dict[str, Any]:
    """The error object a peer with this role gets."""
    call = Call(Peer(1000), role, "uid 1000", NoOutlet())
    reply = await answer(registry, Request(method, params, 1), call)
    assert reply is not None
    error: dict[str, Any] = json.loads(reply)["error"]
    return error


async def check_roles(registry: Registry) -> int:
    """Assert the matrix; returns how many methods it has, so that a test can see that it was not empty."""
    methods = registry.discover(version="0")["methods"]
    for method in methods:
        name, needed = method["name"], Role(method["x-role"])
        for role in Role:
            error = await error_of(registry, name, role, {"no method has this": 1})
            expected = (-32602, "protocol") if role.includes(needed) else (-32003, "denied")
            assert (error["code"], error["data"]["slug"]) == expected, (name, role, error)
            if role is Role.VIEWER:
                assert method["x-readonly"] == (error["code"] == -32602), (name, error)
        verb = name.rpartition(".")[2]
        assert not method["x-readonly"] or verb in LOOKING, f"{name}: a viewer may call what does not only look"
    return len(methods)
