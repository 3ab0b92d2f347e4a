"""kvmd/rpc/registry.py and dispatch.py: finding, allowing, checking, running, and the OpenRPC document."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from kvmd.errors import Conflict, Denied, ProtocolFault
from kvmd.rpc import dispatch
from kvmd.rpc.auth import Peer, Role
from kvmd.rpc.builtin import add_builtin
from kvmd.rpc.dispatch import answer
from kvmd.rpc.events import EventHub
from kvmd.rpc.protocol import Batch, Limits, Message, RawJson, Refusal, Request, parse_line
from kvmd.rpc.registry import Call, NoParams, Registry
from kvmd.rpc.results import GuestParams, GuestVerbParams, GuestVerbResult, Pong
from tests.rig.rolematrix import NoOutlet, check_roles, error_of


class Loose(BaseModel):
    """Params that would take anything."""


def call_as(role: Role = Role.ADMIN) -> Call:
    return Call(Peer(1000), role, "uid 1000", NoOutlet())


@pytest.fixture
def registry() -> Registry:
    made = Registry()

    @made.method("guest.start", role="operator", params=GuestVerbParams, result=GuestVerbResult)
    async def start(params: GuestVerbParams, call: Call) -> GuestVerbResult:
        """Start a guest

        More about it.
        """
        if params.name == "busy":
            raise Conflict("guest busy: paused", hint="resume it", guest="busy")
        if params.name == "broken":
            raise RuntimeError("secret internals")
        return GuestVerbResult(name=params.name, state="running", changed=True)

    @made.method("daemon.ping", role="viewer", params=NoParams, result=Pong, summary="Whether it answers")
    async def ping(_params: NoParams, _call: Call) -> RawJson:
        return RawJson(b'{"time":1.5}')

    add_builtin(made, EventHub(cursor=41), version="1.2.3")
    return made


async def ask(registry: Registry, message: Message, role: Role = Role.ADMIN) -> Any:
    reply = await answer(registry, message, call_as(role))
    if reply is None:
        return None
    assert b"\n" not in reply
    return json.loads(reply)


# -- registering


def test_names_are_given_once(registry: Registry) -> None:
    with pytest.raises(ValueError, match="twice"):
        registry.method("guest.start", role="admin", params=NoParams, result=Pong, summary="x")(_nothing)


async def _nothing(_params: Any, _call: Call) -> RawJson:
    return RawJson(b"null")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"role": "none"}, "a role above none"),
        ({"role": "owner"}, "not a valid Role"),
        ({"params": Loose}, "extra='forbid'"),
        ({"summary": ""}, "a summary"),
    ],
)
def test_rows_that_would_be_a_mistake(wrong: dict[str, Any], says: str) -> None:
    row: dict[str, Any] = {"role": "viewer", "params": NoParams, "result": Pong, "summary": "x"}
    with pytest.raises(ValueError, match=says):
        Registry().method("a.b", **(row | wrong))(_nothing)


def test_the_summary_is_the_first_line_of_the_docstring(registry: Registry) -> None:
    assert registry.methods["guest.start"].summary == "Start a guest"
    assert list(registry.methods) == sorted(registry.methods)


# -- finding, allowing, checking


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("guest.stat", "did you mean guest.start?"),
        ("geust.start", "did you mean guest.start?"),
        ("x" * 128, "rpc.discover lists all methods"),
        ("a\x1b[31m", "rpc.discover lists all methods"),
    ],
)
def test_unknown_methods(registry: Registry, name: str, hint: str) -> None:
    with pytest.raises(ProtocolFault) as caught:
        registry.find(name)
    assert caught.value.rpc_code == -32601
    assert caught.value.hint == hint
    assert caught.value.message.isprintable()


def test_denied_names_method_role_and_actor(registry: Registry) -> None:
    with pytest.raises(Denied) as caught:
        registry.find("guest.start").authorise(Role.VIEWER, "alice")
    assert caught.value.message == "guest.start needs the role operator; alice has viewer"
    assert caught.value.details == {"method": "guest.start", "needed": "operator", "role": "viewer"}
    assert "access.operators" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("params", "message", "hint"),
    [
        ({}, "guest.start: params.name: missing", "names are name, force, timeout_s, wait"),
        (None, "guest.start: params.name: missing", "names are name, force, timeout_s, wait"),
        ({"nmae": "web"}, "guest.start: params.name: missing", "did you mean name?"),
        ({"name": "web", "forse": True}, "guest.start: params.forse: unknown name", "did you mean force?"),
        ({"name": "web", "zzzzzzz": 1}, "guest.start: params.zzzzzzz: unknown name", "names are"),
        ({"name": "web", "force": "yes"}, "params.force: Input should be a valid boolean", "names are"),
        ({"name": "web", "force": 1}, "params.force: Input should be a valid boolean", "names are"),
        ({"name": 5}, "params.name: Input should be a valid string", "names are"),
        ({"name": "web", "timeout_s": 0}, "params.timeout_s: Input should be greater than 0", "names are"),
        (["web"], "params: an object with names, not an array", "names are name, force, timeout_s, wait"),
        ([], "params: an object with names, not an array", "names are"),
    ],
)
def test_wrong_params_are_named_by_path(registry: Registry, params: Any, message: str, hint: str) -> None:
    with pytest.raises(ProtocolFault) as caught:
        registry.find("guest.start").parse(params)
    assert caught.value.rpc_code == -32602
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("name", ["", "Web", "web\n", "-web", "web-", "a/b", "a,b", "tap%d", "..", "w" * 48, "wéb"])
def test_names_that_no_guest_has(registry: Registry, name: str) -> None:
    with pytest.raises(ProtocolFault, match=r"params\.name"):
        registry.find("guest.start").parse({"name": name})


@pytest.mark.parametrize("name", ["w", "0", "web-1", "w" * 47])
def test_names_that_guests_have(name: str) -> None:
    assert GuestParams(name=name).name == name


def test_all_wrong_params_are_in_the_details(registry: Registry) -> None:
    with pytest.raises(ProtocolFault) as caught:
        registry.find("guest.start").parse({"name": "web", "force": 1, "wait": 2, "x" * 300: 3})
    assert [fault["path"] for fault in caught.value.details["faults"]] == ["params.force", "params.wait", "params[...]"]
    assert len(caught.value.message) < 200


def test_a_thousand_wrong_params_make_no_long_answer(registry: Registry) -> None:
    with pytest.raises(ProtocolFault) as caught:
        registry.find("guest.start").parse({"name": "web"} | {f"x{number}": 1 for number in range(1000)})
    assert len(json.dumps(caught.value.details)) < 2000


# -- running


async def test_a_result_and_a_ready_made_one(registry: Registry) -> None:
    assert await ask(registry, Request("guest.start", {"name": "web"}, 1)) == {
        "jsonrpc": "2.0",
        "id": 1,
        "result": {"name": "web", "state": "running", "changed": True},
    }
    assert (await ask(registry, Request("daemon.ping", None, "a")))["result"] == {"time": 1.5}


async def test_an_error_of_ours_is_told(registry: Registry) -> None:
    reply = await ask(registry, Request("guest.start", {"name": "busy"}, 1))
    assert reply["error"] == {
        "code": -32005,
        "message": "guest busy: paused",
        "data": {"slug": "conflict", "hint": "resume it", "details": {"guest": "busy"}},
    }


async def test_any_other_error_is_logged_and_tells_nothing(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    reply = await ask(registry, Request("guest.start", {"name": "broken"}, 1))
    assert reply["error"]["code"] == -32603
    assert "secret" not in json.dumps(reply)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert "secret internals" in caplog.text


@pytest.mark.parametrize("name", ["web", "busy", "broken"])
async def test_a_notification_is_carried_out_and_never_answered(
    registry: Registry, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert await ask(registry, Request("guest.start", {"name": name}, notification=True)) is None
    assert await ask(registry, Request("no.such", None, notification=True)) is None
    assert await ask(registry, Request("guest.start", {"x": 1}, notification=True)) is None
    assert await ask(registry, Request("guest.start", None, notification=True), Role.VIEWER) is None


async def test_a_batch_is_answered_in_order_by_one_line(registry: Registry) -> None:
    batch = Batch(
        (
            Request("daemon.ping", None, 1),
            Request("guest.start", {"name": "web"}, notification=True),
            Refusal(-32600, "no"),
            Request("guest.start", {"name": "web"}, 2),
        )
    )
    replies = await ask(registry, batch, Role.VIEWER)
    assert [(reply["id"], reply.get("error", {}).get("code")) for reply in replies] == [
        (1, None),
        (None, -32600),
        (2, -32003),
    ]
    assert await ask(registry, Batch((Request("daemon.ping", notification=True),))) is None


async def test_an_answer_too_large_is_refused(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "RESPONSE_BYTES", 11)
    reply = await ask(registry, Request("daemon.ping", None, 1))
    assert reply["error"]["data"]["slug"] == "refused"
    assert "12 bytes" in reply["error"]["message"]


async def test_roles_hold_for_every_method_and_come_before_params(registry: Registry) -> None:
    assert await check_roles(registry) == 4


async def test_the_role_check_finds_a_changing_method_open_to_viewers(registry: Registry) -> None:
    registry.method("guest.kill", role="viewer", params=GuestVerbParams, result=GuestVerbResult, summary="x")(_nothing)
    with pytest.raises(AssertionError, match=r"guest\.kill"):
        await check_roles(registry)


async def test_without_a_role_nothing_is_allowed(registry: Registry) -> None:
    assert (await error_of(registry, "daemon.ping", Role.NONE, {}))["code"] == -32003


_names = st.sampled_from(["guest.start", "daemon.ping", "rpc.discover", "no.such"]) | st.text(max_size=20)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
_params = st.dictionaries(st.sampled_from(["name", "force", "wait", "x", "timeout_s"]) | st.text(max_size=8), _values)


@given(_names, _params | _values, st.sampled_from(list(Role)))
async def test_any_request_gets_one_well_formed_answer(name: str, params: Any, role: Role) -> None:
    registry = Registry()
    registry.method("guest.start", role="operator", params=GuestVerbParams, result=GuestVerbResult, summary="x")(
        _nothing
    )
    registry.method("daemon.ping", role="viewer", params=NoParams, result=Pong, summary="x")(_nothing)
    line = json.dumps({"jsonrpc": "2.0", "id": 5, "method": name, "params": params})
    reply = await ask(registry, parse_line(line.encode(), Limits()), role)
    assert reply["jsonrpc"] == "2.0"
    assert reply["id"] == 5
    if "error" in reply:
        assert reply["error"]["code"] in (-32600, -32601, -32602, -32003)
    else:
        assert role is not Role.NONE


# -- the document


async def test_the_document_describes_the_table(registry: Registry) -> None:
    document = (await ask(registry, Request("rpc.discover", None, 1), Role.VIEWER))["result"]
    assert document == registry.discover(version="1.2.3")
    assert document["openrpc"] == "1.3.2"
    assert document["info"]["version"] == "1.2.3"
    methods = {method["name"]: method for method in document["methods"]}
    assert list(methods) == ["daemon.ping", "events.subscribe", "guest.start", "rpc.discover"]
    start = methods["guest.start"]
    assert (start["x-role"], start["x-readonly"], start["summary"]) == ("operator", False, "Start a guest")
    assert [(entry["name"], entry["required"]) for entry in start["params"]] == [
        ("name", True),
        ("force", False),
        ("timeout_s", False),
        ("wait", False),
    ]
    assert start["result"]["schema"] == {"$ref": "#/components/schemas/GuestVerbResult"}
    assert methods["daemon.ping"]["x-readonly"] is True


def test_every_reference_in_the_document_leads_somewhere(registry: Registry) -> None:
    document = registry.discover(version="1")
    known = document["components"]["schemas"]
    references = [part.partition('"')[0] for part in json.dumps(document).split('"#/components/schemas/')[1:]]
    assert references
    assert set(references) <= set(known)


def test_the_document_is_the_same_whatever_the_order_of_registering() -> None:
    rows = [("b.list", "viewer", NoParams, Pong), ("a.start", "admin", GuestParams, GuestParams)]
    texts = []
    for order in (rows, rows[::-1]):
        made = Registry()
        for name, role, params, result in order:
            made.method(name, role=role, params=params, result=result, summary=name)(_nothing)
        texts.append(json.dumps(made.discover(version="1")))
    assert texts[0] == texts[1]
