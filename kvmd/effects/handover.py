"""launch.sock: where a launcher asks for its guest's argv and file descriptors, and gets them once.

Whoever gets these fds has the guest's disks, so only uid 0 is answered, and only a process that is the child kvmd
spawned for this very start or that systemd runs as this guest's unit. An escaped QEMU has another uid.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmd.errors import HostFailed
from kvmd.launch import FDS_PER_MESSAGE, FORMAT
from kvmd.unixpath import ShortPath

_log = logging.getLogger(__name__)
NAME_TIMEOUT_S = 5.0
_NAME = re.compile(rb"(stop |down )?([a-z0-9](?:[a-z0-9-]{0,45}[a-z0-9])?)\n")


@dataclass(frozen=True, slots=True)
class Spec:
    """What the launcher is to become."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    argv: tuple[str, ...]

    def encode(self, targets: Sequence[int]) -> bytes:
        """NUL-terminated fields, the layout `kvmd/launch.py` documents."""
        fields = [
            FORMAT,
            str(self.uid),
            str(self.gid),
            ",".join(map(str, self.groups)),
            ",".join(map(str, targets)),
            *self.argv,
        ]
        return b"".join(os.fsencode(field) + b"\0" for field in fields)


class Asking:
    """A launcher that waits for its hand-over."""

    def __init__(
        self, name: str, pid: int, peer: socket.socket, *, stop: bool = False, host_goes_down: bool = False
    ) -> None:
        self.name = name
        self.pid = pid
        self.stop = stop  # no hand-over is asked for: the guest's unit is being stopped
        self.host_goes_down = host_goes_down  # ... because of that
        self._peer = peer

    def hand_over(self, spec: Spec, fds: Sequence[tuple[int, int]]) -> None:
        """Give it the spec and all `(target number, our fd)`. Raises HostFailed when it has gone."""
        memfd = os.memfd_create(f"kvmd-launch-{self.name}")
        try:
            os.write(memfd, spec.encode([target for target, _ in fds]))
            os.lseek(memfd, 0, os.SEEK_SET)
            ours = [memfd, *(fd for _, fd in fds)]
            groups = [ours[i : i + FDS_PER_MESSAGE] for i in range(0, len(ours), FDS_PER_MESSAGE)]
            for number, group in enumerate(groups, 1):
                socket.send_fds(self._peer, [b"!" if number == len(groups) else b"."], group)
        except OSError as error:
            raise HostFailed(f"guest {self.name}: the launcher went away before its hand-over: {error}") from None
        finally:
            os.close(memfd)
            self._peer.close()

    def note(self) -> None:
        """A stop is known; whoever announced it may go on."""
        with contextlib.suppress(OSError):
            self._peer.send(b"!")
        self._peer.close()

    def refuse(self, message: str) -> None:
        """Say no; the launcher prints the message and ends."""
        with contextlib.suppress(OSError):
            self._peer.send(b"-" + message.encode()[:4096])
        self._peer.close()


class HandoverServer:
    """Answers launchers.

    `on_asking` owns the Asking it is given: it must hand over or refuse. `on_left` hears of a guest whose launcher
    waited in vain while kvmd hung: it went to the standby, and no Asking is made of it.
    """

    def __init__(
        self,
        listener: socket.socket,
        on_asking: Callable[[Asking], Awaitable[None]],
        on_left: Callable[[str], Awaitable[None]],
    ) -> None:
        self._listener = listener
        self._on_asking = on_asking
        self._on_left = on_left
        listener.setblocking(False)

    async def run(self) -> None:
        """Serve for ever."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            while True:
                peer, _ = await loop.sock_accept(self._listener)
                group.create_task(self._serve(peer), name="launch-handover")

    async def _serve(self, peer: socket.socket) -> None:
        pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        try:
            line = await self._read_name(peer)
        except (OSError, TimeoutError):
            peer.close()
            return
        asked = _NAME.fullmatch(line)
        if uid != 0 or asked is None:
            _log.warning("refused a hand-over to pid %d of uid %d: only root's launchers are answered", pid, uid)
            peer.close()
            return
        name, stop = asked[2].decode(), asked[1] is not None
        if not stop:
            try:
                peer.send(b".")  # we are here: however long it takes, it is ours to hand over
            except OSError:
                peer.close()
                await self._on_left(name)
                return
        await self._on_asking(Asking(name, pid, peer, stop=stop, host_goes_down=asked[1] == b"down "))

    async def _read_name(self, peer: socket.socket) -> bytes:
        loop = asyncio.get_running_loop()
        line = b""
        async with asyncio.timeout(NAME_TIMEOUT_S):
            while not line.endswith(b"\n") and len(line) < 64:
                chunk = await loop.sock_recv(peer, 64)
                if not chunk:
                    break
                line += chunk
        return line


def listen_private(path: Path) -> socket.socket:
    """A listening socket of mode 0600 from its first moment. A stale one of an earlier kvmd is replaced."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        with ShortPath(path) as address:
            listener.bind(address)
    finally:
        os.umask(before)
    listener.listen(128)
    return listener


def runs_as_unit(pid: int, unit: str) -> bool:
    """Whether systemd put this process into that unit's cgroup (proc(5), cgroup; only root can move it there)."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return False
    return any(unit in line.rsplit(":", 1)[-1].split("/") for line in lines)
