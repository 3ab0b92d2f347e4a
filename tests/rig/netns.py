"""Network namespaces for tests: made with unique names, entered by the calling thread, gone at the end.

    with private_namespace("host") as host, private_namespace("outside") as outside:
        with inside(host):
            ...            # this thread, what it spawns and the sockets it opens are in `host`
        outside.run("busybox", "ping", "-c1", "192.0.2.1")

Nothing here touches the namespace the test run was started in.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Namespace:
    """A named namespace below /run/netns."""

    name: str

    @property
    def path(self) -> Path:
        """The file that keeps it alive."""
        return Path("/run/netns") / self.name

    def run(self, *argv: str, check: bool = True, timeout: float = 20, text: str = "") -> str:
        """Run a program inside and return what it wrote; an exit code other than 0 fails unless `check` is off."""
        done = subprocess.run(
            ("ip", "netns", "exec", self.name, *argv),
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(argv)} in {self.name} exited {done.returncode}:\n{done.stdout}")
        return done.stdout

    def ip(self, words: str) -> str:
        """`ip WORDS` inside."""
        return self.run("ip", *words.split())

    @contextlib.contextmanager
    def running(self, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
        """A program that runs inside until the block ends; it and its children are killed by process group."""
        child = subprocess.Popen(
            ("ip", "netns", "exec", self.name, *argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(10)


@contextlib.contextmanager
def private_namespace(purpose: str) -> Iterator[Namespace]:
    """A new namespace with `lo` up; removed at the end, with every process that is still in it killed by pid."""
    namespace = Namespace(f"kvt-{os.getpid()}-{purpose}-{secrets.token_hex(2)}")
    subprocess.run(("ip", "netns", "add", namespace.name), check=True)
    try:
        namespace.ip("link set lo up")
        yield namespace
    finally:
        for pid in _processes_in(namespace):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(("ip", "netns", "del", namespace.name), check=True)


def _processes_in(namespace: Namespace) -> list[int]:
    """Processes in a namespace that this module made, so all of them were started by the test; not ourselves."""
    found = subprocess.run(("ip", "netns", "pids", namespace.name), capture_output=True, text=True, check=True)
    return [int(word) for word in found.stdout.split() if int(word) != os.getpid()]


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


@contextlib.contextmanager
def inside(namespace: Namespace) -> Iterator[None]:
    """The calling thread is in the namespace; so are threads it starts, processes it spawns, sockets it opens."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(namespace.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _enter(home)
    finally:
        os.close(home)


def veth(left: Namespace, left_name: str, right: Namespace, right_name: str) -> None:
    """A cable between two namespaces, both ends up."""
    left.ip(f"link add {left_name} type veth peer name {right_name} netns {right.name}")
    left.ip(f"link set {left_name} up")
    right.ip(f"link set {right_name} up")
