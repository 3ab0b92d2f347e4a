"""Drives a test guest over the Unix socket of its serial console: waits for its markers, runs shell commands in it.

The other side is tests/rig/guest/init. Blocking and standard library only, for tests, the demo and the lab alike;
asyncio code calls it through a thread. Everything read is kept in `transcript` for the failure report.
"""

from __future__ import annotations

import re
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

READY = re.compile(r"KVMD-GUEST READY role=(\S+) mem_kib=(\d+) cpus=(\d+) disks=(\S*) nics=(\S*)")
LEASE = re.compile(r"KVMD-GUEST LEASE (\S+) ([\d.]+)/(\d+) router=(\S*) dns=(\S*)")
POWERBUTTON = re.compile(r"KVMD-GUEST POWERBUTTON")


class GuestSilent(AssertionError):
    """The guest did not say what was waited for in time; the message quotes the end of what it did say."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What one command in the guest printed (both streams, markers removed) and returned."""

    status: int
    output: str


class GuestConsole:
    """One client of the console socket. QEMU serves one at a time: close it before kvmd-cli console is tried."""

    def __init__(self, path: Path, *, connect_timeout_s: float = 10.0) -> None:
        self.transcript = ""
        self._mark = 0
        deadline = time.monotonic() + connect_timeout_s
        while True:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._socket.connect(str(path))
            except OSError:
                self._socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the console; the guest runs on."""
        self._socket.close()

    def wait_for(self, pattern: re.Pattern[str], timeout_s: float = 60.0) -> re.Match[str]:
        """The first match in what was said after the previous match; GuestSilent after timeout_s."""
        deadline = time.monotonic() + timeout_s
        while True:
            # A match that ends where the text ends may still be growing: wait for the end of its line.
            match = pattern.search(self.transcript, self._mark)
            if match and "\n" in self.transcript[match.end() :]:
                self._mark = match.end()
                return match
            self._receive(deadline, pattern)

    def wait_ready(self, timeout_s: float = 60.0) -> re.Match[str]:
        """Userspace is up: groups are role, MemTotal in KiB, CPUs, disks, NICs. Works once, from the boot's start."""
        return self.wait_for(READY, timeout_s)

    def wait_lease(self, timeout_s: float = 60.0) -> re.Match[str]:
        """The next DHCP lease: groups are NIC, address, prefix length, router, DNS server."""
        return self.wait_for(LEASE, timeout_s)

    def run(self, command: str, timeout_s: float = 30.0) -> Ran:
        """Run one shell command as root in the guest. Its standard input is empty."""
        token = secrets.token_hex(6)
        # The token is split in what is sent, so that an echo of it could not be taken for the answer.
        script = (
            f"{{ {command}\n}} </dev/null 2>&1; kvmd_rc=$?; echo; echo KVMD-RC-'{token[:6]}''{token[6:]}' $kvmd_rc\n"
        )
        start = len(self.transcript)
        self._socket.sendall(f"echo KVMD-RUN-'{token[:6]}''{token[6:]}'\n{script}".encode())
        deadline = time.monotonic() + timeout_s
        end_pattern = re.compile(rf"\nKVMD-RC-{token} (\d+)\r?\n")
        while not (end := end_pattern.search(self.transcript, start)):
            self._receive(deadline, end_pattern)
        begin = re.compile(rf"KVMD-RUN-{token}\r?\n").search(self.transcript, start)
        text = self.transcript[begin.end() if begin else start : end.start()]
        lines = [line for line in text.replace("\r\n", "\n").split("\n") if not line.startswith("KVMD-GUEST ")]
        return Ran(int(end[1]), "\n".join(lines).strip("\n"))

    def check(self, command: str, timeout_s: float = 30.0) -> str:
        """Like run, but AssertionError unless the command succeeds; returns its output."""
        ran = self.run(command, timeout_s)
        assert ran.status == 0, f"in the guest: {command}: status {ran.status}: {ran.output}"
        return ran.output

    def memory(self) -> dict[str, int]:
        """held_mib, total_kib, available_kib and swap_free_kib as the guest sees them."""
        words = self.check("memactor report").split()
        return {key: int(value) for key, _, value in (word.partition("=") for word in words) if value}

    def _receive(self, deadline: float, pattern: re.Pattern[str]) -> None:
        left_s = deadline - time.monotonic()
        tail = self.transcript[-2000:]
        if left_s <= 0:
            raise GuestSilent(f"no {pattern.pattern!r} from the guest in time; the console ends with:\n{tail}")
        self._socket.settimeout(left_s)
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            return
        if not data:
            raise GuestSilent(f"the console closed before {pattern.pattern!r}; it ended with:\n{tail}")
        self.transcript += data.decode("utf-8", "replace")
