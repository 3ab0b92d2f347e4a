"""`console NAME`: this terminal becomes the guest's serial port, until ^] is typed. Straight to QEMU's socket.

The daemon is not asked, so the console works without it. QEMU serves one client at a time.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kvmd.cli.arguments import Parsed
from kvmd.cli.session import Session
from kvmd.errors import Conflict, Denied, NotFound
from kvmd.unixpath import ShortPath

ESCAPE = 0x1D  # ^], as telnet and virsh have it
_CHUNK = 1 << 16
_ENDS = (signal.SIGTERM, signal.SIGHUP)


def console(session: Session, parsed: Parsed) -> int:
    """Connect, and carry bytes both ways until ^], the end of input or the end of the guest."""
    name, port = parsed.word("NAME"), parsed.text("--serial") or "console"
    if "/" in name or "/" in port:
        raise NotFound(f"no guest is called {name}" if "/" in name else f"no serial port is called {port}")
    with _connect(f"{session.run_dir}/guests/{name}", name, port) as sock, _raw(sys.stdin.fileno()):
        if session.interactive():  # raw by now: what is typed on seeing this reaches the guest
            session.say(f"Connected to {name}; ^] leaves.\r")
        ended = carry(sock, sys.stdin.fileno(), sys.stdout.fileno())
    if session.interactive():
        session.say(f"\n{ended}.")
    return 0


def carry(sock: socket.socket, source: int, sink: int) -> str:
    """Bytes from `source` to the guest and from the guest to `sink`; says what ended it."""
    watched: list[socket.socket | int] = [sock, source]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if sock in ready:
            data = _received(sock)
            if not data:
                return "The guest's QEMU closed the console"
            _write(sink, data)
        if source in ready:
            typed = _typed(source)
            before, escape, _ = typed.partition(bytes([ESCAPE]))
            if before:
                sock.sendall(before)
            if escape:
                return "Left the console; the guest goes on"
            if not typed:
                if os.isatty(source):
                    return "The terminal is gone"
                watched.remove(source)  # a script's input has ended; what the guest says until QEMU hangs up counts
                sock.shutdown(socket.SHUT_WR)


def _typed(source: int) -> bytes:
    """What was typed, nothing when the terminal was closed (EIO)."""
    try:
        return os.read(source, _CHUNK)
    except OSError:
        return b""


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(_CHUNK)
    except ConnectionResetError:
        return b""


def _write(sink: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(sink, rest) :]


def _connect(directory: str, name: str, port: str) -> socket.socket:
    """The port's socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with ShortPath(f"{directory}/serial-{port}.sock") as address:
            sock.connect(address)
    except OSError as error:
        sock.close()
        if isinstance(error, PermissionError):
            raise Denied(f"the console of {name} is root's", hint="run it as root") from None
        if error.errno == errno.ECONNREFUSED:
            raise Conflict(f"guest {name} does not listen on its console any more", hint="kvmd-cli list") from None
        if isinstance(error, FileNotFoundError):
            hint = f"kvmd-cli start {name}; [serial.{port}] in its file makes one"
            raise NotFound(f"guest {name} does not run, or has no serial port {port}", hint=hint) from None
        raise
    return sock


@contextmanager
def _raw(fd: int) -> Iterator[None]:
    """A terminal in raw mode, put back whatever ends this; anything else as it is."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    handlers = {number: signal.signal(number, _leave) for number in _ENDS}
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> None:
    """Killed: leave through the `finally` that puts the terminal back."""
    raise SystemExit(128 + number)
