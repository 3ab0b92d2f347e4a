"""The client: one blocking socket, one call at a time. Standard library only, and of that little.

`kvmd-cli` imports this at every start, so it must not import asyncio or pydantic (0.3 s), nor anything that does.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence

from kvmd.errors import KvmdError, TimedOut, Unreachable
from kvmd.unixpath import ShortPath

TYPE_CHECKING = False  # the client must not pay for importing typing; type checkers take this for true
if TYPE_CHECKING:
    from typing import Any

_CHUNK = 256 << 10
_NO_DAEMON = (errno.ENOENT, errno.ECONNREFUSED)
_START_HINT = "systemctl start kvmd"


class RemoteError(KvmdError):
    """The daemon's answer was an error: its slug, message, hint and details, and the exit code that goes with them."""

    def __init__(self, slug: str, message: str, *, hint: str | None, code: int, details: Mapping[str, Any]) -> None:
        super().__init__(message, hint=hint)
        self.details = dict(details)
        self.slug = slug
        self.rpc_code = code
        self.exit_code = exit_code_of(slug)


def exit_code_of(slug: str) -> int:
    """What `kvmd-cli` exits with for an error of this kind; 1 for kinds a newer daemon may have."""
    codes = {kind.slug: kind.exit_code for kind in KvmdError.__subclasses__() if kind is not RemoteError}
    return codes.get(slug, KvmdError.exit_code)


class Client:
    """Calls to one daemon. It connects at the first call and again after a failure; also a context manager.

    `timeout_s` bounds each call from connecting to the last byte of the answer; None waits for ever.
    """

    def __init__(self, socket_path: str | os.PathLike[str], timeout_s: float | None = 30.0) -> None:
        self._path = os.fspath(socket_path)
        self._timeout_s = timeout_s
        self._sock: socket.socket | None = None
        self._received = bytearray()
        self._calls = 0
        self._deadline: float | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave; a call in progress on the daemon's side goes on."""
        if self._sock:
            self._sock.close()
        self._sock = None
        self._received.clear()

    def call(self, method: str, params: Mapping[str, Any] | None = None) -> Any:
        """The result of one call, as JSON values.

        RemoteError when the daemon says no, Unreachable when it is not there or leaves, TimedOut.
        """
        self._deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        self._calls += 1
        request = {"jsonrpc": "2.0", "id": self._calls, "method": method, "params": dict(params or {})}
        try:
            self._send(json.dumps(request, separators=(",", ":")).encode() + b"\n")
            while True:
                reply = self._receive()
                if "error" in reply and reply.get("id") in (self._calls, None):
                    if reply.get("id") is None:
                        self.close()  # such an answer is about the connection
                    raise _remote_error(reply["error"])
                if "result" in reply and reply.get("id") == self._calls:
                    return reply["result"]
        except TimeoutError:
            self.close()
            raise TimedOut(
                f"{method}: no answer within {self._timeout_s:g} s",
                hint="it may still be carried out; a larger --timeout waits longer",
            ) from None
        except (KeyError, TypeError, AttributeError, ValueError):
            self.close()
            raise Unreachable(f"{self._path}: what answers is not kvmd", hint="check --socket") from None
        except Unreachable:
            self.close()
            raise

    def events(self, since: int | None = None, types: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Events as {subscription, cursor, time, type, guest, actor, data}, for ever, on a connection of their own.

        RemoteError with slug "lagged" and details.cursor when this reader was too slow: call again with that cursor.
        """
        with Client(self._path, self._timeout_s) as stream:
            params: dict[str, Any] = {} if since is None else {"since": since}
            if types is not None:
                params["types"] = list(types)
            stream.call("events.subscribe", params)
            stream._deadline = None
            while True:
                message = stream._receive()
                body = message.get("params", {})
                if message.get("method") == "event":
                    yield body
                elif message.get("method") == "events.end":
                    raise RemoteError(
                        body["code"], "the daemon ended the subscription", hint=body["hint"], code=-32000, details=body
                    )
                elif "error" in message:
                    raise _remote_error(message["error"])

    def _send(self, line: bytes) -> None:
        if self._sock is None:
            self._sock = self._connect()
        self._sock.settimeout(self._remaining())
        try:
            self._sock.sendall(line)
        except (BrokenPipeError, ConnectionResetError):
            return  # a daemon that turns us away says why before it closes: the answer is there to read

    def _receive(self) -> dict[str, Any]:
        """The next line as an object."""
        assert self._sock is not None
        start = 0
        while (end := self._received.find(b"\n", start)) < 0:
            start = len(self._received)
            self._sock.settimeout(self._remaining())
            try:
                data = self._sock.recv(_CHUNK)
            except ConnectionResetError:
                data = b""
            if not data:
                raise Unreachable(
                    "kvmd closed the connection before it answered",
                    hint="the call may have been carried out; journalctl -u kvmd says what happened",
                )
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        message = json.loads(line)
        if not isinstance(message, dict):
            raise TypeError("a message is an object")
        return message

    def _remaining(self) -> float | None:
        """Seconds left, or TimeoutError."""
        if self._deadline is None:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _connect(self) -> socket.socket:
        """A connected socket; Unreachable, TimedOut or Denied say what is in the way."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        left = self._remaining()
        if left is not None:
            # Python's own timeout makes the socket non-blocking, and then a full backlog is an error at once.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(left), int(left % 1 * 1e6)))
        try:
            with ShortPath(self._path) as address:
                sock.connect(address)
        except BlockingIOError:
            sock.close()
            raise TimeoutError from None
        except OSError as error:
            sock.close()
            hint = _START_HINT if error.errno in _NO_DAEMON else "the socket's rights decide who may connect"
            raise Unreachable(f"{self._path}: {error.strerror or error}", hint=hint) from None
        return sock


def _remote_error(error: Mapping[str, Any]) -> RemoteError:
    """A JSON-RPC error object as an exception; members a foreign server left out have defaults."""
    data = error.get("data") or {}
    return RemoteError(
        data.get("slug", "failed"),
        str(error["message"]),
        hint=data.get("hint"),
        code=int(error["code"]),
        details=data.get("details") or {},
    )
