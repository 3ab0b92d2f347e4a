"""kvmd/rpc/protocol.py: JSON-RPC 2.0's rules, every limit at and past its edge, and what fuzzing must never find."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.errors import Conflict, KvmdError, ProtocolFault
from kvmd.rpc.protocol import (
    Batch,
    Limits,
    Message,
    RawJson,
    Reader,
    Refusal,
    Request,
    encode_batch,
    encode_error,
    encode_notification,
    encode_result,
    parse_line,
)

LIMITS = Limits()
SMALL = Limits(request_bytes=120, string_bytes=40, nesting=4, items=12, batch=3, id_chars=5, method_chars=20)


def parse(text: str | bytes, limits: Limits = LIMITS) -> Message:
    return parse_line(text.encode() if isinstance(text, str) else text, limits)


def refused(text: str | bytes, code: int, says: str, limits: Limits = LIMITS) -> Refusal:
    message = parse(text, limits)
    assert isinstance(message, Refusal), message
    assert message.code == code
    assert says in message.message
    assert not message.final
    return message


def call(**members: Any) -> str:
    return json.dumps({"jsonrpc": "2.0", "method": "guest.list"} | members)


def read_all(chunks: list[bytes], limits: Limits, *, eof: bool = False) -> list[Message]:
    """All messages of a stream, taken as they become available."""
    reader = Reader(limits)
    found: list[Message] = []
    for chunk in chunks:
        reader.receive(chunk)
        while message := reader.next_message():
            found.append(message)
    if eof:
        reader.receive_eof()
        while message := reader.next_message():
            found.append(message)
    return found


# -- requests


def test_a_request() -> None:
    assert parse(call(id=7, params={"name": "web"})) == Request("guest.list", {"name": "web"}, 7)


@pytest.mark.parametrize("ident", ["", "a" * 128, 0, -5, 2**64 - 1, -(2**63), None])
def test_ids_that_are_allowed_come_back(ident: Any) -> None:
    request = parse(call(id=ident))
    assert request == Request("guest.list", None, ident)
    assert json.loads(encode_result(ident, b"{}")) == {"jsonrpc": "2.0", "id": ident, "result": {}}


def test_no_id_is_a_notification_and_a_null_id_is_not() -> None:
    assert parse(call()) == Request("guest.list", None, None, notification=True)
    assert parse(call(id=None)) == Request("guest.list", None, None, notification=False)


@pytest.mark.parametrize("ident", [1.5, 1.0, True, False, [], {}, "a" * 129])
def test_ids_that_are_not_allowed(ident: Any) -> None:
    assert refused(call(id=ident), -32600, "id:").id is None


def test_positional_params_reach_the_method_which_refuses_them_by_name() -> None:
    assert parse(call(id=1, params=[1])) == Request("guest.list", [1], 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1", "not a number"),
        ('"x"', "not a string"),
        ("null", "not null"),
        ("true", "not a boolean"),
        ('{"id":4,"method":"a.b"}', "jsonrpc: not 2.0"),
        ('{"jsonrpc":"1.0","id":4,"method":"a.b"}', "jsonrpc: not 2.0"),
        ('{"jsonrpc":2.0,"id":4,"method":"a.b"}', "jsonrpc: not 2.0"),
        ('{"jsonrpc":"2.0","id":4}', "method: a string, not null"),
        ('{"jsonrpc":"2.0","id":4,"method":1}', "method: a string, not a number"),
        ('{"jsonrpc":"2.0","id":4,"method":""}', "method: 0 characters"),
        ('{"jsonrpc":"2.0","id":4,"method":"' + "m" * 129 + '"}', "method: 129 characters"),
        ('{"jsonrpc":"2.0","id":4,"method":"a.b","params":null}', "params: an object, not null"),
        ('{"jsonrpc":"2.0","id":4,"method":"a.b","params":"x"}', "params: an object, not a string"),
        ('{"jsonrpc":"2.0","id":4,"method":"a.b","parms":{}}', "parms: not a member"),
        ('{"jsonrpc":"2.0","id":4,"result":{}}', "result: not a member"),
        ('{"jsonrpc":"2.0","id":4,"method":"a.b","\\u0007' + "x" * 50 + '":{}}', "\\x07xxx"),
    ],
)
def test_what_is_no_request(text: str, says: str) -> None:
    """An id that could be told comes back (section 5), so that the client knows what failed."""
    assert refused(text, -32600, says).id == (4 if '"id":4' in text else None)


# -- JSON that Python would take and others would not


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_no_numbers_that_json_does_not_have(text: str) -> None:
    refused(f'{{"jsonrpc":"2.0","id":1,"method":"a.b","params":{{"x":{text}}}}}', -32700, text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1e999", "beyond a double"),
        ("-1e999", "beyond a double"),
        ("0." + "1" * 500, "beyond a double"),
        ("9" * 5000, "more than 64 bits"),
        (str(2**64), "more than 64 bits"),
        (str(-(2**63) - 1), "more than 64 bits"),
    ],
)
def test_numbers_beyond_the_machine(text: str, says: str) -> None:
    refusal = refused(f'{{"jsonrpc":"2.0","id":{text},"method":"a.b"}}', -32600, says)
    assert len(refusal.message) < 100


def test_keys_given_twice() -> None:
    refused('{"jsonrpc":"2.0","id":1,"method":"a.b","method":"c.d"}', -32600, "method: given twice")
    refused(
        '{"jsonrpc":"2.0","id":1,"method":"a.b","params":{"p":{"x":1,"y":2,"\\u0078":3}}}', -32600, "x: given twice"
    )


@pytest.mark.parametrize("text", ['"\\ud800"', '"\\udfff\\ud800"', '{"a":{"\\uDC80":1}}'])
def test_half_surrogate_pairs(text: str) -> None:
    refused(text, -32600, "surrogate")


def test_whole_surrogate_pairs_and_other_escapes_are_fine() -> None:
    assert parse(call(id="\U0001f600\n\u00e9")) == Request("guest.list", None, "\U0001f600\n\u00e9")


@pytest.mark.parametrize(
    "line",
    [
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',  # a surrogate in UTF-8
        b"\xef\xbb\xbf{}",  # a byte order mark
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":"\x01"}',
        b'{"a":1} {"b":2}',
        b"GET / HTTP/1.1",
        b'{"jsonrpc":"2.0","method":"a.b"',
        b"\x00",
        '{"jsonrpc":"2.0"}'.encode("utf-16"),
    ],
)
def test_what_is_no_json(line: bytes) -> None:
    refused(line, -32700, "not ")


# -- batches


def test_a_batch_keeps_its_order_and_its_wrong_members() -> None:
    message = parse(f"[{call(id=1)},1,{call()},[{call(id=2)}]]")
    assert isinstance(message, Batch)
    first, second, third, fourth = message.members
    assert first == Request("guest.list", None, 1)
    assert third == Request("guest.list", notification=True)
    for wrong in (second, fourth):
        assert isinstance(wrong, Refusal)
        assert wrong.code == -32600


def test_sizes_of_batches() -> None:
    refused("[]", -32600, "empty")
    refused("[" + ",".join(["1"] * 33) + "]", -32600, "33")
    refused("[" + ",".join([call(id=1)] * 10_000) + "]", -32600, "10000")
    full = parse("[" + ",".join([call(id=1)] * 32) + "]")
    assert isinstance(full, Batch)
    assert len(full.members) == 32


# -- limits


def test_nesting_up_to_the_limit() -> None:
    inside = "[" * 61 + "]" * 61
    assert isinstance(parse(call(id=1)[:-1] + f',"params":{{"a":{inside}}}}}'), Request)


@pytest.mark.parametrize("opener", ["[", '{"a":'])
@pytest.mark.parametrize("levels", [65, 1_000, 100_000])
def test_nesting_beyond_the_limit(opener: str, levels: int) -> None:
    refused(opener * levels, -32700, "deeper than 64")


def test_brackets_in_strings_do_not_nest() -> None:
    text = '\\"[[[{{{\\\\' * 1000
    assert parse(call(id=1, params={"a": text})) == Request("guest.list", {"a": text}, 1)


def test_a_closing_bracket_first_is_no_way_round_the_limit() -> None:
    refused("]" * 100 + "[" * 150, -32700, "not JSON")


def test_items_up_to_the_limit_and_beyond() -> None:
    assert isinstance(parse("[" + "1," * 10 + "1]", SMALL), Refusal)  # eleven items: a batch too long, but parsed
    refused("[" + "1," * 10 + "1]", -32600, "batch of 11", SMALL)
    refused("[" + "1," * 12 + "1]", -32600, "more than 12 items", SMALL)
    refused("[" + "[]," * 6 + "1]", -32600, "more than 12 items", SMALL)
    refused("[" + "1," * 60_000 + "1]", -32600, "more than 50000 items")
    refused('"' * 300_001, -32600, "more than 50000 items")


def test_strings_up_to_the_limit_and_beyond() -> None:
    assert isinstance(parse(call(id=1, params={"a": "x" * (256 << 10)})), Request)
    refused(call(id=1, params={"a": "x" * ((256 << 10) + 1)}), -32600, "a string of 262145 bytes")
    refused(call(id=1, params={"x" * ((256 << 10) + 1): 1}), -32600, "a string of 262145 bytes")
    refused('{"a":"' + '\\"' * (200 << 10) + '"}', -32600, "a string of 409600 bytes")


# -- the stream


def test_lines_end_with_either_newline_and_blank_ones_do_not_count() -> None:
    one, two = call(id=1).encode(), call(id=2).encode()
    found = read_all([b"\n \r\n" + one + b"\r\n\r\n\t\n  " + two + b"\n"], LIMITS)
    assert found == [Request("guest.list", None, 1), Request("guest.list", None, 2)]


def test_half_a_line_waits_and_the_end_of_the_stream_ends_it() -> None:
    reader = Reader(LIMITS)
    text = call(id=1).encode()
    reader.receive(text[:10])
    assert reader.next_message() is None
    assert reader.partial
    assert not reader.waiting
    reader.receive(text[10:])
    assert reader.next_message() is None
    reader.receive_eof()
    assert reader.waiting
    assert not reader.partial
    assert reader.next_message() == Request("guest.list", None, 1)
    assert reader.next_message() is None
    assert not reader.waiting


def test_half_a_request_and_the_end() -> None:
    (message,) = read_all([call(id=1).encode()[:-3]], LIMITS, eof=True)
    assert isinstance(message, Refusal)
    assert message.code == -32700


def test_blanks_and_the_end_are_nothing() -> None:
    assert read_all([b" \r\n \t"], LIMITS, eof=True) == []


def test_lines_are_parsed_one_at_a_time() -> None:
    reader = Reader(LIMITS)
    reader.receive(b"{\n" * 3)
    assert reader.waiting
    assert isinstance(reader.next_message(), Refusal)
    assert reader.waiting


def test_a_line_at_the_limit_and_past_it() -> None:
    fits = b"x" * SMALL.request_bytes
    (message,) = read_all([fits + b"\n"], SMALL)
    assert isinstance(message, Refusal)
    assert not message.final
    (message,) = read_all([fits + b"x"], SMALL)  # no need to wait for its end
    assert isinstance(message, Refusal)
    assert message.final
    assert message.code == -32600
    assert "120 bytes" in message.message


def test_after_a_final_refusal_nothing_is_kept_or_read() -> None:
    reader = Reader(SMALL)
    reader.receive(b"x" * 200)
    assert reader.waiting
    assert isinstance(reader.next_message(), Refusal)
    reader.receive(call(id=1).encode() + b"\n")
    reader.receive_eof()
    assert not reader.waiting
    assert not reader.partial
    assert reader.next_message() is None


def test_a_refusal_is_its_error() -> None:
    fault = Refusal(-32600, "no", "do", id=1).fault()
    assert isinstance(fault, ProtocolFault)
    assert (fault.rpc_code, fault.message, fault.hint, fault.slug) == (-32600, "no", "do", "protocol")


# -- replies


def test_a_result_goes_out_as_it_is() -> None:
    assert encode_result('a"b', b'{"guests":[]}') == b'{"jsonrpc":"2.0","id":"a\\"b","result":{"guests":[]}}'


def test_an_error_carries_slug_hint_and_details() -> None:
    error = Conflict("web runs", hint="stop it", pid=5)
    assert json.loads(encode_error(3, error)) == {
        "jsonrpc": "2.0",
        "id": 3,
        "error": {
            "code": -32005,
            "message": "web runs",
            "data": {"slug": "conflict", "hint": "stop it", "details": {"pid": 5}},
        },
    }


@pytest.mark.parametrize("detail", [float("nan"), {1: {2}, (3,): 4}, "\udc80"])
def test_an_error_goes_out_whatever_its_details_are(detail: Any) -> None:
    line = encode_error(None, KvmdError("no", detail=detail))
    assert json.loads(line)["error"]["message"] == "no"
    assert b"NaN" not in line
    assert b"\n" not in line


def test_a_circle_in_the_details_is_left_out() -> None:
    circle: dict[str, Any] = {}
    circle["me"] = circle
    assert json.loads(encode_error(1, KvmdError("no", circle=circle)))["error"]["data"]["details"] == {}


def test_a_message_with_newlines_stays_on_its_line() -> None:
    assert b"\n" not in encode_error(None, KvmdError("one\ntwo", hint="three\nfour"))


def test_replies_of_a_batch() -> None:
    assert encode_batch([]) is None
    assert encode_batch([b"{}", b"[]"]) == b"[{},[]]"


def test_a_notification() -> None:
    assert json.loads(encode_notification("event", b'{"a":1}')) == {
        "jsonrpc": "2.0",
        "method": "event",
        "params": {"a": 1},
    }


def test_raw_json_is_one_line() -> None:
    assert RawJson(b"{}").data == b"{}"
    with pytest.raises(ValueError, match="newline"):
        RawJson(b"{\n}")


# -- properties

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=10), inner, max_size=6),
    max_leaves=12,
)
_requests = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | _json,
        "id": _json,
        "method": st.sampled_from(["guest.list", "guest.kill"]) | _json,
        "params": _json,
        "x": _json,
    },
)
_lines = st.one_of(
    _requests.map(lambda value: json.dumps(value).encode()),
    st.lists(_requests, max_size=5).map(lambda value: json.dumps(value).encode()),
    _json.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.binary(max_size=200),
    st.text(alphabet='[]{},":\\u0dD8 \n', max_size=150).map(str.encode),
)
_streams = st.lists(_lines, max_size=6).map(b"\n".join)


def _check_answerable(message: Message) -> None:
    """Whatever was read, a correct reply to it can be made."""
    match message:
        case Refusal():
            reply = json.loads(encode_error(message.id, message.fault()))
            assert reply["error"]["code"] in (-32700, -32600)
            reply["error"]["message"].encode()
        case Request():
            assert json.loads(encode_result(message.id, b"1").decode())["id"] == message.id
            json.dumps(message.params, allow_nan=False, ensure_ascii=False).encode()
        case Batch(members):
            assert 1 <= len(members) <= 32
            for member in members:
                _check_answerable(member)


@given(_streams, st.sampled_from([LIMITS, SMALL]))
def test_any_bytes_give_messages_and_nothing_else(stream: bytes, limits: Limits) -> None:
    for message in read_all([stream], limits, eof=True):
        _check_answerable(message)


@given(_streams, st.lists(st.integers(0, 600), max_size=12), st.sampled_from([LIMITS, SMALL]))
def test_how_the_bytes_are_cut_does_not_matter(stream: bytes, cuts: list[int], limits: Limits) -> None:
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    chunks = [stream[start:end] for start, end in itertools.pairwise(edges)]
    assert read_all(chunks, limits, eof=True) == read_all([stream], limits, eof=True)


@given(_streams)
def test_a_byte_at_a_time_is_no_different(stream: bytes) -> None:
    single = [stream[at : at + 1] for at in range(len(stream))]
    assert read_all(single, SMALL, eof=True) == read_all([stream], SMALL, eof=True)


@given(_json)
def test_what_is_read_is_what_any_json_parser_reads(value: Any) -> None:
    """Our limits refuse, they never alter: an accepted request has exactly the params that were sent."""
    message = parse(call(id=1, params={"value": value}))
    if isinstance(message, Request):
        assert message.params == json.loads(json.dumps({"value": value}))
