"""JSON-RPC 2.0 over a byte stream, without the stream: bytes go in, messages and refusals come out.

One JSON value per line, UTF-8, `\\n` (or `\\r\\n`) between them, both ways. Everything a peer can do wrong ends in a
`Refusal`, never in an exception, and costs no more than reading its bytes: sizes are checked while they arrive,
nesting and item counts by a scan of the raw bytes before any parser sees them (json.loads dies at 1,000 levels).
This module must not do I/O, know a clock or know a method. Rules: https://www.jsonrpc.org/specification.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from kvmd.errors import KvmdError, ProtocolFault

# The standard's own error codes (section 5.1).
PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603

Id = str | int | None

_BLANK = b" \t\r\n"
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b"[]{},")
_OPENERS = b"[{"
_MEMBERS = frozenset(("jsonrpc", "id", "method", "params"))
_GONE = object()
# An id or a number beyond 64 bits is mangled by most JSON libraries on the way back.
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1
_INT_CHARS = 20
_FLOAT_CHARS = 400  # a double has at most 309 digits before the point; longer text only burns time


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer may send. Sizes are bytes unless the name says otherwise."""

    request_bytes: int = 1 << 20
    string_bytes: int = 256 << 10
    nesting: int = 64
    items: int = 50_000
    batch: int = 32
    id_chars: int = 128
    method_chars: int = 128


@dataclass(frozen=True, slots=True)
class Request:
    """One call; `notification` means the peer gave no id and gets no reply of any kind (section 4.1)."""

    method: str
    params: dict[str, Any] | list[Any] | None = None
    id: Id = None
    notification: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that is no request. `final`: the place in the stream is lost, answer and close."""

    code: int
    message: str
    hint: str | None = None
    id: Id = None
    final: bool = False

    def fault(self) -> ProtocolFault:
        """The same as the error it is answered with."""
        return ProtocolFault(self.code, self.message, hint=self.hint)


@dataclass(frozen=True, slots=True)
class Batch:
    """Several calls on one line (section 6), answered by one line."""

    members: tuple[Request | Refusal, ...]


Message = Request | Refusal | Batch


class Reader:
    """The receiving half of one connection: `receive` bytes, then take messages until `next_message` gives None.

    Lines are parsed one at a time, when asked for, so that a peer cannot make the server parse ahead of what it
    answers. How the bytes were cut into chunks never matters.
    """

    __slots__ = ("_buffer", "_closed", "_eof", "_limits", "_scanned")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._scanned = 0  # no newline before this offset
        self._closed = False
        self._eof = False

    def receive(self, data: bytes) -> None:
        """Add what arrived; ignored after a final refusal."""
        if not self._closed:
            self._buffer += data

    def receive_eof(self) -> None:
        """The peer will send no more: what is left counts as a line (a JSON object cut short never parses)."""
        self._eof = True

    @property
    def partial(self) -> bool:
        """A line has begun and its end has not arrived."""
        return bool(self._buffer) and not self.waiting

    @property
    def waiting(self) -> bool:
        """`next_message` may have something to give."""
        buffer = self._buffer
        return bool(buffer) and (
            self._eof or len(buffer) > self._limits.request_bytes or buffer.find(b"\n", self._scanned) >= 0
        )

    def next_message(self) -> Message | None:
        """The next complete line as a message; blank lines are skipped. None: more bytes are needed."""
        buffer = self._buffer
        if buffer and buffer[0] in _BLANK:
            del buffer[: len(buffer) - len(buffer.lstrip(_BLANK))]
            self._scanned = 0
        end = buffer.find(b"\n", self._scanned)
        if end < 0:
            self._scanned = end = len(buffer)
            if end <= self._limits.request_bytes and not (end and self._eof):
                return None
        if end > self._limits.request_bytes:
            buffer.clear()
            self._scanned = 0
            self._closed = True
            return Refusal(
                INVALID_REQUEST,
                f"a request is at most {self._limits.request_bytes} bytes",
                hint="end each request with a newline",
                final=True,
            )
        line = bytes(buffer[:end])
        del buffer[: end + 1]
        self._scanned = 0
        return parse_line(line, self._limits)


def parse_line(line: bytes, limits: Limits) -> Message:
    """One line, without its newline, as a message."""
    try:
        value = _parse_json(line, limits)
    except ProtocolFault as fault:
        return Refusal(fault.rpc_code, fault.message, fault.hint)
    if not isinstance(value, list):
        return _parse_request(value, limits)
    if not value:
        return Refusal(INVALID_REQUEST, "the batch is empty")
    if len(value) > limits.batch:
        return Refusal(INVALID_REQUEST, f"a batch of {len(value)}: at most {limits.batch} requests go into one")
    return Batch(tuple(_parse_request(member, limits) for member in value))


def _parse_request(value: Any, limits: Limits) -> Request | Refusal:
    """One JSON value as a request (section 4); the id is given back whenever it can be told."""
    if not isinstance(value, dict):
        return Refusal(INVALID_REQUEST, f"a request is an object, not {_kind(value)}")
    ident: Id = None
    if "id" in value:
        ident = value["id"]
        # bool is an int in Python; fractions are what section 4 advises against, and 1.0 comes back as 1.
        if isinstance(ident, bool) or not (ident is None or isinstance(ident, str | int)):
            return Refusal(INVALID_REQUEST, f"id: a string, an integer or null, not {_kind(ident)}")
        if isinstance(ident, str) and len(ident) > limits.id_chars:
            return Refusal(INVALID_REQUEST, f"id: {len(ident)} characters, at most {limits.id_chars}")
    if value.get("jsonrpc") != "2.0":
        return Refusal(INVALID_REQUEST, "jsonrpc: not 2.0", hint='each request has "jsonrpc":"2.0"', id=ident)
    if not value.keys() <= _MEMBERS:
        unknown = min(value.keys() - _MEMBERS)
        return Refusal(
            INVALID_REQUEST,
            f"{_short(unknown)}: not a member of a request",
            hint="members are jsonrpc, id, method, params; arguments go into params",
            id=ident,
        )
    method = value.get("method")
    if not isinstance(method, str):
        return Refusal(INVALID_REQUEST, f"method: a string, not {_kind(method)}", id=ident)
    if not 0 < len(method) <= limits.method_chars:
        return Refusal(INVALID_REQUEST, f"method: {len(method)} characters, 1 to {limits.method_chars}", id=ident)
    params = value.get("params")
    if not isinstance(params, dict | list) and "params" in value:
        return Refusal(INVALID_REQUEST, f"params: an object, not {_kind(params)}", id=ident)
    return Request(method, params, ident, notification="id" not in value)


def _parse_json(line: bytes, limits: Limits) -> Any:
    """The JSON value in `line`; ProtocolFault when there is none or it is beyond a limit."""
    # The cheap test first: so few brackets and commas, even inside strings, cannot break a limit.
    brackets = line.count(b"[") + line.count(b"{")
    if brackets > limits.nesting or brackets + line.count(b",") > limits.items or len(line) > limits.string_bytes:
        _scan(line, limits)
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ProtocolFault(PARSE_ERROR, f"not UTF-8 at byte {error.start}") from None
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ProtocolFault(PARSE_ERROR, f"not JSON: {error.msg} at character {error.pos}") from None
    if "\\u" in text:
        _refuse_surrogates(value)
    return value


def _scan(line: bytes, limits: Limits) -> None:
    """Refuse by looking at the bytes alone: strings too long, too many items, nested too deep.

    All steps but the last run in C over the line; the last looks at no more bytes than `limits.items` allows twice.
    """
    # Escaped backslashes and quotes become filler, so that every quote left begins or ends a string.
    plain = line.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    if plain.count(b'"') > 4 * limits.items:  # an item is a string under a name at most
        raise ProtocolFault(INVALID_REQUEST, f"more than {limits.items} items")
    parts = plain.split(b'"')
    longest = max(map(len, parts[1::2]), default=0)
    if longest > limits.string_bytes:
        raise ProtocolFault(INVALID_REQUEST, f"a string of {longest} bytes: at most {limits.string_bytes}")
    structure = b"".join(parts[::2]).translate(None, _NOT_STRUCTURE)
    brackets = structure.translate(None, b",")
    depth = 0
    for byte in brackets[: 2 * limits.items]:
        if byte in _OPENERS:
            depth += 1
            if depth > limits.nesting:
                raise ProtocolFault(PARSE_ERROR, f"nested deeper than {limits.nesting} levels")
        else:
            depth -= 1
    if structure.count(b",") + structure.count(b"[") + structure.count(b"{") > limits.items:
        raise ProtocolFault(INVALID_REQUEST, f"more than {limits.items} items")


def _refuse_surrogates(value: Any) -> None:
    """Half a surrogate pair parses and cannot be sent back as UTF-8 (RFC 8259, section 8.2)."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ProtocolFault(INVALID_REQUEST, "half a surrogate pair in a string") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are told apart: of two with one name, the parser would silently keep the last."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for key, _ in pairs if made.pop(key, _GONE) is _GONE)
        raise ProtocolFault(INVALID_REQUEST, f"{_short(twice)}: given twice in one object")
    return made


def _integer(text: str) -> int:
    """An integer of at most 64 bits."""
    if len(text) <= _INT_CHARS and _INT_MIN <= (number := int(text)) <= _INT_MAX:
        return number
    raise ProtocolFault(INVALID_REQUEST, f"the number {_short(text)} has more than 64 bits")


def _real(text: str) -> float:
    """A finite double; 1e999 would silently become infinity."""
    if len(text) <= _FLOAT_CHARS and abs(number := float(text)) != float("inf"):
        return number
    raise ProtocolFault(INVALID_REQUEST, f"the number {_short(text)} is beyond a double")


def _constant(text: str) -> NoReturn:
    """NaN, Infinity and -Infinity are Python's, not JSON's."""
    raise ProtocolFault(PARSE_ERROR, f"not JSON: {text}")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer, parse_float=_real, parse_constant=_constant)


def _kind(value: Any) -> str:
    """What a JSON value is, for a message that must not repeat it."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


def _short(text: str) -> str:
    """A peer's own text in a message: at most 40 characters, nothing unprintable."""
    shown = text if len(text) <= 40 else text[:37] + "..."
    return shown if shown.isprintable() else ascii(shown)[1:-1]


@dataclass(frozen=True, slots=True)
class RawJson:
    """A result that is already JSON: made once, sent many times. One line; ValueError otherwise."""

    data: bytes

    def __post_init__(self) -> None:
        if b"\n" in self.data:
            raise ValueError("a newline in JSON that goes out as one line")


def encode_result(ident: Id, result: bytes) -> bytes:
    """A successful reply round a result that is JSON already, without the newline."""
    return b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (_encode_id(ident), result)


def encode_error(ident: Id, error: KvmdError) -> bytes:
    """An error reply, without the newline. Details that are no JSON go out as their text."""
    body: dict[str, Any] = {"code": error.rpc_code, "message": error.message, "data": error.to_data()}
    try:
        text = json.dumps(body, default=str, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError):
        body["data"] = {"slug": error.slug, "hint": error.hint, "details": {}}
        text = json.dumps(body, separators=(",", ":"))
    return b'{"jsonrpc":"2.0","id":%b,"error":%b}' % (_encode_id(ident), text.encode())


def encode_batch(replies: list[bytes]) -> bytes | None:
    """The replies of one batch as one line; None when no member wanted one (section 6)."""
    return b"[%b]" % b",".join(replies) if replies else None


def encode_notification(method: str, params: bytes) -> bytes:
    """A message to the peer that it does not answer; `params` is JSON already."""
    return b'{"jsonrpc":"2.0","method":"%b","params":%b}' % (method.encode(), params)


def _encode_id(ident: Id) -> bytes:
    return b"%d" % ident if isinstance(ident, int) else json.dumps(ident).encode()
