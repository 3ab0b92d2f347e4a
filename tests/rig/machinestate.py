"""What a run may have changed of this machine: pages, knobs, links, firewall, forwarding. Seen, compared, put back.

Pages and knobs are the whole machine's; who changes them holds `machine_lock`, so that two runs never mix.
"""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvmd.effects import swap
from kvmd.effects.sysfs import HostTree
from kvmd.facts import HugepagePool
from kvmd.plan.ksm import KNOBS
from tests.rig.netns import Namespace

LOCK = Path("/run/lock/kvmd-test-host.lock")
_COUNTERS = ("pages_shared",)  # among KNOBS, but the kernel's to change


@contextlib.contextmanager
def machine_lock(waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Alone with this machine's pages and knobs; `waiting` is called when another run has them."""
    LOCK.parent.mkdir(mode=0o1777, exist_ok=True)  # a machine without systemd may lack it
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True, slots=True)
class Memory:
    """The machine's hugepage pools, memory knobs and swap."""

    pools: tuple[HugepagePool, ...]
    knobs: Mapping[str, str]
    swaps: frozenset[str] = frozenset()  # what is swapped to
    zrams: frozenset[int] = frozenset()

    @classmethod
    def observe(cls) -> Memory:
        """As they are now."""
        tree = HostTree()
        knobs = tree.observe_knobs([knob for knob in KNOBS if not knob.endswith(_COUNTERS)])
        zrams = swap.observe_zrams(tree) or ()
        return cls(
            tree.observe_hugepages(),
            dict(knobs),
            swaps=frozenset(area.path for area in swap.observe_swaps(tree, [zram.path for zram in zrams]) or ()),
            zrams=frozenset(zram.number for zram in zrams),
        )

    def pages(self, page_bytes: int = 2 << 20) -> int:
        """Pages of that size on all nodes."""
        return sum(pool.total for pool in self.pools if pool.page_bytes == page_bytes)

    def restore(self) -> None:
        """Put back what differs, whoever changed it."""
        tree, now = HostTree(), Memory.observe()
        for pool in self.pools:
            if pool not in now.pools:
                tree.set_hugepages(pool.node, pool.page_bytes, pool.total - pool.surplus)
        for path in sorted(now.swaps - self.swaps):
            if swap.observe_file(tree, path).ours:
                swap.remove_file(tree, path)
        for zram in swap.observe_zrams(tree) or ():
            if zram.number not in self.zrams and zram.ours:
                swap.remove_zram(tree, zram.number)
        # the advisor first: it owns pages_to_scan and resets it
        for path in sorted(self.knobs, key=lambda path: not path.endswith("advisor_mode")):
            if tree.observe_knobs([path])[path] != self.knobs[path]:
                tree.write_knob(path, self.knobs[path])


@dataclass(frozen=True, slots=True)
class Net:
    """A network namespace as `ip` and `nft` show it."""

    links: str
    nft: str
    forwarding: str

    @classmethod
    def observe(cls, namespace: Namespace | None = None) -> Net:
        """That namespace now; None: the one this process is in."""
        return cls(
            links=_output(namespace, "ip", "-br", "address"),
            nft=_output(namespace, "nft", "list", "ruleset"),
            forwarding=_output(namespace, "cat", "/proc/sys/net/ipv4/ip_forward"),
        )


def differences(before: Memory | Net, after: Memory | Net) -> list[str]:
    """One line for each thing that is not as it was."""
    return [
        f"{field}: was {getattr(before, field)!r}, is {getattr(after, field)!r}"
        for field in type(before).__slots__
        if getattr(before, field) != getattr(after, field)
    ]


def processes_about(text: str) -> list[str]:
    """Command lines of all processes that mention it, this one left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if text in command and path.parent.name != str(Path("/proc/self").readlink()):
                found.append(f"{path.parent.name} {command}")
    return found


def _output(namespace: Namespace | None, *argv: str) -> str:
    if namespace:
        return namespace.run(*argv)
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=20).stdout
