"""What the benchmarks share: a private kvmd as it is installed, bare QEMUs to compare with, and how figures are told.

Run as root from the repository, one at a time: `python -m benchmarks.start`. Every benchmark measures both sides in
one go, alternating, so that a busy machine hurts both; medians and minima are printed, never a single run. On a
machine that others use, KVMD_BENCH_REALTIME=1 puts both sides before them; a core shared by two threads stays slower.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import fcntl
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kvmd.effects.proc import observe_process
from kvmd.effects.tree import Tree
from kvmd.rpc.client import Client
from tests.rig.guestfiles import LAN, tiny_on
from tests.rig.guestimage import bootsector
from tests.rig.kvmdhost import REPO, KvmdHost

PYCACHE = Path("/var/tmp/kvmd-bench-pycache")  # an installation has its bytecode; the test rig writes none
CLONE_NEWNET = 0x40000000
HIGH_FD = 200
QUIET_IDLE = 0.75  # of all CPUs, seen over a second, before a measurement begins
QUIET_PATIENCE_S = 60.0
BIG_HOST_KIB = 64 << 20  # what a host must have for 100 guests by admission's estimate of each QEMU
STARTERS = 3
REALTIME = "KVMD_BENCH_REALTIME"  # 1: everything measured, both sides, goes before what else the machine does


class BenchHost(KvmdHost):
    """The test rig's kvmd, started as an installed one is: with its bytecode and at log level info."""

    def launch(self, *, memory_kib: int | None = None) -> float:
        """Start the daemon without waiting; the UNIX time just before. `memory_kib`: what /proc/meminfo pretends."""
        argv = [sys.executable, "-m", "kvmd.start", "--config-dir", str(self.config), "--state-dir", str(self.state)]
        argv += ["--run-dir", str(self.run)]
        if memory_kib:
            argv = ["sh", "-c", f'mount --bind "{self._meminfo(memory_kib)}" /proc/meminfo && exec "$@"', "sh", *argv]
        if self.namespace:  # has a mount namespace of its own
            argv = ["ip", "netns", "exec", self.namespace, *argv]
        with self.log.open("ab") as log:
            begun = time.time()
            self._daemon = subprocess.Popen(argv, stdout=log, stderr=log, cwd="/", env=environment())
        return begun

    def start(self, *, wait: bool = True) -> None:
        self.launch()
        if wait:
            self.wait_ready()

    def _meminfo(self, total_kib: int) -> Path:
        lines = Path("/proc/meminfo").read_text().splitlines()
        path = self.base / "meminfo"
        path.write_text(f"MemTotal: {total_kib} kB\n" + "\n".join(lines[1:]) + "\n")
        return path

    @property
    def pid(self) -> int:
        """The daemon's."""
        assert self._daemon is not None
        return self._daemon.pid

    def client(self, timeout_s: float = 120.0) -> Client:
        """A connection of one's own."""
        return Client(self.run / "kvmd.sock", timeout_s)

    def boot_guests(self, count: int, *, nic: bool = False, extra: str = "") -> list[str]:
        """Declare `count` halted boot sectors of 32 MiB, q35, one disk each."""
        names = [f"g{number:03d}" for number in range(count)]
        for name in names:
            image = bootsector(self.images / f"{name}.img", f"{name} is up\n")
            table = '[nic.lan]\nnetwork = "lan"\n' if nic else ""
            self.guest(name, tiny_on(image, extra=table + extra))
        return names


@contextlib.contextmanager
def bench_host() -> Iterator[BenchHost]:
    """A BenchHost with one NAT network, closed whatever happens; its bytecode is warm."""
    subprocess.run(
        [sys.executable, "-c", "import kvmd.start, kvmd.daemon, kvmd.cli.main"], env=environment(), check=False, cwd="/"
    )
    host = BenchHost()
    host.network("lan", LAN)
    try:
        yield host
    finally:
        host.close()


def environment() -> dict[str, str]:
    """Of the daemon and the client: as systemd starts them, with bytecode in a directory of ours."""
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), "PYTHONPYCACHEPREFIX": str(PYCACHE)}


# ---- bare QEMU ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class BareQemu:
    """A QEMU that nobody manages, with the very descriptors kvmd would hand over."""

    pid: int
    monitor: socket.socket

    def cont(self) -> None:
        """Let the guest go: from now on it takes CPU time as a guest of kvmd's does."""
        self.monitor.send(b'{"execute":"cont"}\n')
        seen = b""
        while b'"return"' not in seen:
            seen += self.monitor.recv(65536)

    def end(self) -> None:
        """SIGKILL and reap."""
        self.monitor.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def spawn_bare(argv: Sequence[str], fds: Sequence[tuple[int, int]]) -> int:
    """exec QEMU with `fds` (target number, ours) and nothing in between: no uid, no launcher. Its pid."""
    high = [(target, fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)) for target, ours in fds]
    null = os.open("/dev/null", os.O_RDWR)
    try:
        moves = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
        moves += [(os.POSIX_SPAWN_DUP2, ours, target) for target, ours in high]
        return os.posix_spawn(argv[0], list(argv), {}, file_actions=moves)
    finally:
        for fd in (null, *(ours for _, ours in high)):
            os.close(fd)


def await_greeting(path: Path, timeout_s: float = 60.0) -> socket.socket:
    """Connect to a monitor that is listened on and wait for QEMU to answer `qmp_capabilities`."""
    monitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    monitor.settimeout(timeout_s)
    monitor.connect(os.fspath(path))
    monitor.send(b'{"execute":"qmp_capabilities"}\n')
    seen = b""
    while b'"return"' not in seen:
        data = monitor.recv(65536)
        if not data:
            raise AssertionError("the bare QEMU ended before it answered")
        seen += data
    return monitor


@contextlib.contextmanager
def inside_network(namespace: str) -> Iterator[None]:
    """This thread's network is that namespace's meanwhile, so that its bridges can take our TAPs."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{namespace}") as there:
        if libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            yield
        finally:
            libc.setns(home.fileno(), CLONE_NEWNET)


# ---- figures ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Series:
    """Seconds (or another unit) of one side."""

    name: str
    values: list[float] = field(default_factory=list)

    def time(self, work: Callable[[], object]) -> None:
        """Add the seconds `work` takes."""
        begun = time.perf_counter()
        work()
        self.values.append(time.perf_counter() - begun)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def best(self) -> float:
        return min(self.values)

    def line(self) -> str:
        """For people, in milliseconds."""
        return (
            f"  {self.name:<44} median {self.median * 1e3:8.1f} ms   min {self.best * 1e3:8.1f} ms"
            f"   max {max(self.values) * 1e3:8.1f} ms   n={len(self.values)}"
        )


def differences(ours: Series, bare: Series) -> Series:
    """Pair by pair: what ours takes more."""
    return Series(f"{ours.name} - {bare.name}", [a - b for a, b in zip(ours.values, bare.values, strict=True)])


def verdict(what: str, value: float, limit: float, unit: str, *, at_least: bool = False) -> None:
    """One line against the target."""
    good = value >= limit if at_least else value <= limit
    word = "at least" if at_least else "at most"
    print(f"{'MET ' if good else 'MISS'}  {what}: {value:.4g} {unit} ({word} {limit:g} {unit})", flush=True)


def machine() -> str:
    """The machine, as a figure has to name it."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    version = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} x {model}, "
        f"Linux {os.uname().release}, Python {platform.python_version()}, "
        f"QEMU {version.split(' (')[0].removeprefix('QEMU emulator version ')}, "
        f"load {os.getloadavg()[0]:.2f}"
    )


def begin(title: str) -> None:
    """Root, a headline, and as quiet a moment as patience allows."""
    if os.geteuid():
        sys.exit("run it as root")
    realtime = bool(os.environ.get(REALTIME))
    share = settle(0 if realtime else QUIET_PATIENCE_S)
    if realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    first = ", both sides at real-time priority" if realtime else ""
    print(f"{title}\n  {machine()}, {share:.0%} idle at the start{first}", flush=True)


def settle(patience_s: float) -> float:
    """Wait until the machine is mostly idle, or patience ends; the idle share then."""
    deadline = time.monotonic() + patience_s
    while True:
        share = idle_share(1.0)
        if share >= QUIET_IDLE or time.monotonic() > deadline:
            return share


def idle_share(seconds: float) -> float:
    """Of all CPUs, over that time (proc(5): fields 4 and 5 of the cpu line)."""
    before = _cpu_times()
    time.sleep(seconds)
    spent = [late - early for late, early in zip(_cpu_times(), before, strict=True)]
    return (spent[3] + spent[4]) / max(1, sum(spent))


def _cpu_times() -> list[int]:
    return [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS:"))


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    return observe_process(Tree(), pid) is not None


def running_hundred(host: BenchHost, count: int, *, nic: bool = False) -> list[str]:
    """`count` guests running on a host that seems big enough for admission's estimate of each."""
    names = host.boot_guests(count, nic=nic)
    host.launch(memory_kib=BIG_HOST_KIB)
    host.wait_ready()
    host.call("host.reconcile")  # it answers before its networks are there
    begun = time.monotonic()
    with ThreadPoolExecutor(STARTERS) as pool:
        for started in pool.map(lambda name: host.call("guest.start", name=name), names):
            assert started["state"] == "running", host.log.read_text()[-4000:]
    print(f"  {count} guests running after {time.monotonic() - begun:.1f} s", flush=True)
    return names


def options(description: str | None, **defaults: int) -> argparse.Namespace:
    """A command line of whole numbers with defaults."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    return parser.parse_args()


def as_json(data: object) -> str:
    """For logs."""
    return json.dumps(data, separators=(",", ":"))
