"""A real QEMU started from a Launch: opens what it asks for, hands the fds over, speaks QMP on the `qmp` socket."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from kvmd.effects.ramfile import open_ram
from kvmd.qemu.fds import FdRequest, Launch, ListenUnix, Memfd, OpenImage, OpenLog, OpenMemory, OpenTap, OpenVhostNet

EMULATOR = "/usr/bin/qemu-system-x86_64"
ANSWER_TIMEOUT_S = 30.0


class RealQemu:
    """QEMU under `-S`."""

    def __init__(
        self, launch: Launch, directory: Path, taps: Mapping[str, list[int]] | None = None, uid: int | None = None
    ) -> None:
        self.directory = directory
        self.launch = launch
        self._taps = taps or {}
        self.uid = uid
        opened = {request.fd: self._open(request) for request in launch.opens}
        self.stderr = (directory / "stderr").open("w+b")
        self.process = subprocess.Popen(
            [EMULATOR, *launch.args],
            stdin=subprocess.DEVNULL,
            stdout=self.stderr,
            stderr=self.stderr,
            env={},
            close_fds=False,
            preexec_fn=lambda: _place(opened, uid),  # noqa: PLW1509 - dup2 and close only
        )
        for fd in opened.values():
            os.close(fd)
        self._peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._buffer = b""
        self.events: list[dict[str, Any]] = []

    def _open(self, request: FdRequest) -> int:
        match request:
            case OpenImage(path=path, writable=writable):
                return os.open(path, os.O_RDWR if writable else os.O_RDONLY)
            case ListenUnix(purpose=purpose):
                listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                listener.bind(str(self.directory / f"{purpose}.sock"))
                listener.listen(1)
                return listener.detach()
            case OpenLog(purpose=purpose):
                return os.open(self.directory / f"{purpose}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            case Memfd(path=path, purpose=purpose):
                fd = os.memfd_create(purpose)
                os.write(fd, Path(path).read_bytes())
                os.lseek(fd, 0, os.SEEK_SET)
                return fd
            case OpenTap(nic=nic, queue=queue):
                return os.dup(self._taps[nic][queue])
            case OpenMemory(path=path, size_bytes=size, page_bytes=page):
                return open_ram(path, size, page, self.uid or 0, self.uid or 0)
            case OpenVhostNet():
                return os.open("/dev/vhost-net", os.O_RDWR)

    def connect(self) -> None:
        """Open the QMP session. AssertionError with QEMU's last words when it did not start."""
        self._peer.settimeout(ANSWER_TIMEOUT_S)
        try:
            self._peer.connect(str(self.directory / "qmp.sock"))
        except ConnectionRefusedError:
            self._ended()
        self._line()
        self.ask("qmp_capabilities")

    def _line(self) -> Any:
        while b"\n" not in self._buffer:
            try:
                data = self._peer.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                self._ended()
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _ended(self) -> NoReturn:
        raise AssertionError(f"QEMU ended with {self.process.wait(10)}: {self.words()}")

    def ask(self, command: str, **arguments: Any) -> Any:
        """The `return` of one command; AssertionError with QEMU's error."""
        request = {"execute": command, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
        self._peer.sendall(json.dumps(request).encode())
        message = self._line()
        while "event" in message:
            self.events.append(message)
            message = self._line()
        assert "return" in message, f"{command}: {message}"
        return message["return"]

    def wait_event(self, name: str) -> dict[str, Any]:
        """The first event of that name, seen already or to come within the time of an answer."""
        while not any(event["event"] == name for event in self.events):
            self.events.append(self._line())
        return next(event for event in self.events if event["event"] == name)

    def words(self) -> str:
        """What QEMU wrote on stderr."""
        self.stderr.flush()
        return (self.directory / "stderr").read_text(errors="replace")

    def end(self) -> None:
        """Kill and reap it."""
        self._peer.close()
        self.process.kill()
        self.process.wait(10)
        self.stderr.close()


def _place(opened: Mapping[int, int], uid: int | None) -> None:
    """In the child: each fd under its number, nothing else inherited, root shed (as kvmd/launch.py does)."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 300) for fd in opened.values()]
    for target, fd in zip(opened, high, strict=True):
        os.dup2(fd, target, True)
    os.closerange(3, min(opened))
    os.closerange(max(opened) + 1, max(high) + 1)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


@contextlib.contextmanager
def running(launch: Launch, taps: Mapping[str, list[int]] | None = None, uid: int | None = None) -> Iterator[RealQemu]:
    """A QEMU in a directory of its own, under `uid`, gone at the end whatever happened."""
    with tempfile.TemporaryDirectory(prefix="kvmd-qemu-") as directory:
        qemu = None
        try:
            qemu = RealQemu(launch, Path(directory), taps, uid)
            qemu.connect()
            yield qemu
        finally:
            if qemu:
                qemu.end()
