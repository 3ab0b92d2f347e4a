"""One dnsmasq per network: started, stopped, watched, adopted. Its configuration is decided in plan/dnsmasq.py.

Under RUN/networks/NAME lie `dnsmasq.conf`, what dnsmasq said (`dnsmasq.log`) and the record of the process
(`dnsmasq.json`); the leases are under STATE/networks/NAME, where a reboot leaves them. A server outlives the daemon: as
`kvmd-net@NAME.service` where kvmd itself is a unit, else in a session of its own. It is found again by its record, or,
if the daemon died before writing that or systemd restarted the server meanwhile, by its pid file and command line.
"""

from __future__ import annotations

import asyncio
import json
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from kvmd.actions import StartDnsmasq, StopDnsmasq
from kvmd.effects.files import write_atomic
from kvmd.effects.proc import observe_process
from kvmd.effects.process import Watched, last_words
from kvmd.effects.systemd import Units
from kvmd.effects.tree import Tree
from kvmd.errors import HostFailed
from kvmd.facts import Dnsmasq, Process
from kvmd.plan.dnsmasq import Lease, bridge_of, config_sha256, parse_leases

_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
_START_DEADLINE_S = 10.0
_STOP_DEADLINE_S = 5.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(slots=True)
class Backoff:
    """When something that keeps failing may be tried again: at once, then after 1, 2, 4 ... 60 s.

    What lasted `calm_s` begins anew. Time is the caller's clock, in seconds.
    """

    first_s: float = 1.0
    ceiling_s: float = 60.0
    calm_s: float = 300.0
    _failures: int = 0
    _last: float = float("-inf")

    def failed(self, now: float) -> float:
        """Count a failure; returns in how many seconds to try again."""
        if now - self._last > self.calm_s:
            self._failures = 0
        self._failures += 1
        self._last = now
        return self.wait(now)

    def wait(self, now: float) -> float:
        """Seconds until it may be tried again; 0 means now."""
        if self._failures < 2:
            return 0.0
        pause = min(self.ceiling_s, self.first_s * 2.0 ** min(self._failures - 2, 30))
        return max(0.0, pause - (now - self._last))  # in this order 60 s stay 60 s whatever the clock says


@dataclass(frozen=True, slots=True)
class _Record:
    """dnsmasq.json."""

    pid: int
    start_time: int
    boot_id: str
    bridge: str
    bridge_index: int  # its DHCP socket is bound to this link and does not follow a new one of that name
    config_sha256: str


def _user() -> str:
    """Debian's dnsmasq-base makes the user `dnsmasq`; elsewhere nobody."""
    try:
        return pwd.getpwnam("dnsmasq").pw_name
    except KeyError:
        return "nobody"


class Dnsmasqs:
    """All DHCP/DNS servers of this daemon's networks."""

    def __init__(self, run_dir: Path, state_dir: Path) -> None:
        self.units: Units | None = None  # None: servers are started here and not by systemd
        self._run = run_dir / "networks"
        self._state = state_dir / "networks"
        self._backoffs: dict[str, tuple[str, Backoff]] = {}  # network -> configuration it counts for
        self._expected: set[Process] = set()  # ended by us
        self._changed = asyncio.Event()

    def dnsmasq_argv(self, network: str) -> tuple[str, ...]:
        """The whole command line of one network's server; it goes into the background once it serves.

        systemd/kvmd-net@.service has the same.
        """
        run, program = self._run / network, shutil.which("dnsmasq", path=_PATH) or "dnsmasq"
        return (
            program,
            f"--conf-file={run / 'dnsmasq.conf'}",
            f"--pid-file={run / 'dnsmasq.pid'}",
            f"--dhcp-leasefile={self._state / network / 'leases'}",
            f"--log-facility={run / 'dnsmasq.log'}",
            f"--user={_user()}",
        )

    def observe(self) -> tuple[Dnsmasq, ...]:
        """Every server of ours that runs, by network.

        `config_sha256` is empty for one that must be replaced in any case: its bridge is not the link it was started
        on, or kvmd died before recording it.
        """
        try:
            names = sorted(entry.name for entry in self._run.iterdir() if entry.is_dir())
        except FileNotFoundError:
            return ()
        return tuple(found for found in map(self._find, names) if found)

    def _find(self, network: str) -> Dnsmasq | None:
        record = self._recorded(network)
        process: Process | None = Process(record.pid, record.start_time) if record else None
        # The start time has ticks of 10 ms: the command line is what no other process has.
        if process is None or _process(process.pid) != process or not self._is_server(process.pid, network):
            process = self._by_pid_file(network)
        if process is None:
            return None
        # A record is gone before the configuration is rewritten: with one, whoever runs has read what it says.
        known = record is not None and _link_index(record.bridge) == record.bridge_index
        digest = record.config_sha256 if record and known else ""
        return Dnsmasq(network, process.pid, process.start_time, digest)

    def _is_server(self, pid: int, network: str) -> bool:
        argv = _command_line(pid)
        return len(argv) > 1 and Path(argv[0]).name == "dnsmasq" and argv[1] == self.dnsmasq_argv(network)[1]

    def _recorded(self, network: str) -> _Record | None:
        try:
            record = _Record(**json.loads((self._run / network / "dnsmasq.json").read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        return record if record.boot_id == _boot_id() else None

    def _by_pid_file(self, network: str) -> Process | None:
        """A server whose record was never written (the daemon ended between its start and that) or is of another."""
        try:
            pid = int((self._run / network / "dnsmasq.pid").read_text()[:20])
        except (OSError, ValueError):
            return None
        return _process(pid) if pid > 1 and self._is_server(pid, network) else None

    async def start(self, action: StartDnsmasq) -> None:
        """Start the server, or replace it by one with the new configuration; back when it serves. Raises HostFailed.

        A configuration that failed again and again is not tried before its time (`Backoff`).
        """
        network, digest = action.network, config_sha256(action.config)
        running = self._find(network)
        if running is not None and running.config_sha256 == digest:
            return
        self._check_backoff(network, digest)
        if running is not None:
            await self._end(running)
        self._prepare(network, action.config)
        bridge = bridge_of(action.config) or ""
        index = _link_index(bridge)  # before the start: if the bridge is replaced meanwhile, this one is seen as stale
        try:
            process = await self._spawn(network)
        except HostFailed as error:
            wait = self._count_failure(network, digest)
            error.details["retry_in_s"] = wait
            raise
        record = _Record(process.pid, process.start_time, _boot_id(), bridge, index, digest)
        write_atomic(self._run / network / "dnsmasq.json", json.dumps(asdict(record)).encode())
        self._changed.set()

    def _check_backoff(self, network: str, digest: str) -> None:
        counted, backoff = self._backoffs.get(network, ("", Backoff()))
        wait = backoff.wait(time.monotonic()) if counted == digest else 0.0
        if wait > 0:
            said = last_words(self._run / network / "dnsmasq.log")
            message = f"dnsmasq of network {network} keeps ending" + (f": {said}" if said else "")
            raise HostFailed(message, hint=f"it is tried again in {wait:.0f} s", retry_in_s=wait)

    def _count_failure(self, network: str, digest: str) -> float:
        counted, backoff = self._backoffs.get(network, ("", Backoff()))
        if counted != digest:
            backoff = Backoff()
        self._backoffs[network] = (digest, backoff)
        return backoff.failed(time.monotonic())

    def _prepare(self, network: str, config: str) -> None:
        run = self._run / network
        try:
            run.mkdir(mode=0o755, parents=True, exist_ok=True)
            (self._state / network).mkdir(mode=0o755, parents=True, exist_ok=True)
            for name in ("dnsmasq.json", "dnsmasq.pid", "dnsmasq.log"):
                (run / name).unlink(missing_ok=True)
        except OSError as error:
            raise HostFailed(f"network {network}: cannot prepare {error.filename}: {error.strerror}") from None
        write_atomic(run / "dnsmasq.conf", config.encode())

    async def _spawn(self, network: str) -> Process:
        """dnsmasq binds, says what is wrong on stderr, and its first process ends when the second one serves."""
        if self.units:
            await self._start_unit(self.units, network)
        else:
            done = await asyncio.to_thread(self._launch, self.dnsmasq_argv(network), network)
            if done.returncode:
                raise _not_started(network, done.stderr, f"exit code {done.returncode}")
        process = self._by_pid_file(network)
        if process is None:
            said_last = last_words(self._run / network / "dnsmasq.log")
            raise HostFailed(f"dnsmasq of network {network} ended at once: {said_last or 'it says nothing'}")
        return process

    async def _start_unit(self, units: Units, network: str) -> None:
        try:
            await units.start_network(network)
        except HostFailed as error:
            said = (self._run / network / "dnsmasq.stderr").read_text("utf-8", "replace")[:4096]
            raise _not_started(network, said, error.message) from None

    def _launch(self, argv: tuple[str, ...], network: str) -> subprocess.CompletedProcess[str]:
        stderr = self._run / network / "dnsmasq.stderr"
        try:
            # A file, not a pipe: the server keeps its stderr, and a pipe would have no end.
            with stderr.open("w+b") as said:
                code = subprocess.run(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    env={"PATH": _PATH, "LC_ALL": "C"},
                    cwd="/",
                    start_new_session=True,
                    timeout=_START_DEADLINE_S,
                    check=False,
                ).returncode
                said.seek(0)
                return subprocess.CompletedProcess(argv, code, "", said.read(4096).decode("utf-8", "replace"))
        except subprocess.TimeoutExpired:
            raise HostFailed(f"dnsmasq of network {network}: not ready after {_START_DEADLINE_S:g} s") from None
        except FileNotFoundError:
            raise HostFailed("dnsmasq is not installed", hint="apt-get install dnsmasq-base") from None
        except OSError as error:
            raise HostFailed(f"cannot run {argv[0]}: {error.strerror}") from None

    async def stop(self, action: StopDnsmasq) -> None:
        """End a network's server; one that does not run is stopped. Its leases stay. Raises HostFailed."""
        running = self._find(action.network)
        if running is not None:
            await self._end(running)
        if self.units:
            await self.units.stop_network(action.network)
        self._backoffs.pop(action.network, None)
        for name in ("dnsmasq.json", "dnsmasq.pid", "dnsmasq.conf", "dnsmasq.stderr", "dnsmasq.log"):
            (self._run / action.network / name).unlink(missing_ok=True)
        self._changed.set()

    async def _end(self, server: Dnsmasq) -> None:
        process = Process(server.pid, server.start_time)
        watched = Watched.open(process)
        if watched is None:
            return
        self._expected.add(process)
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                watched.kill(number)
                try:
                    async with asyncio.timeout(_STOP_DEADLINE_S):
                        await asyncio.shield(watched.exited)
                    return
                except TimeoutError:
                    continue
            raise HostFailed(
                f"dnsmasq of network {server.network} (pid {server.pid}) does not end, not even by SIGKILL"
            )
        finally:
            watched.close()

    async def watch(self, ended: Callable[[str, float], None]) -> None:
        """For ever: call `ended(network, retry_in_s)` when a server ends that kvmd did not stop.

        Adopted servers are watched like new ones. The caller reconciles after that many seconds.
        """
        watched: dict[Process, tuple[Dnsmasq, Watched]] = {}
        try:
            while True:
                self._changed.clear()
                for server in self.observe():
                    process = Process(server.pid, server.start_time)
                    if process not in watched and (opened := Watched.open(process)) is not None:
                        opened.exited.add_done_callback(lambda _: self._changed.set())
                        watched[process] = (server, opened)
                for process, (server, opened) in list(watched.items()):
                    if opened.exited.done():
                        del watched[process]
                        self._report(process, server, ended)
                await self._changed.wait()
        finally:
            for _, opened in watched.values():
                opened.close()

    def _report(self, process: Process, server: Dnsmasq, ended: Callable[[str, float], None]) -> None:
        if process in self._expected:
            self._expected.discard(process)
        else:
            ended(server.network, self._count_failure(server.network, server.config_sha256))

    def leases(self, network: str) -> tuple[Lease, ...]:
        """The leases of one network, expired ones too; empty if it never had a server. Raises HostFailed."""
        path = self._state / network / "leases"
        try:
            return parse_leases(path.read_text("utf-8", "replace"))
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise HostFailed(f"cannot read {path}: {error.strerror}") from None


def _not_started(network: str, said: str, otherwise: str) -> HostFailed:
    """`said`: dnsmasq's own words."""
    lines = said.strip().splitlines()
    reason = lines[-1].removeprefix("dnsmasq: ") if lines else otherwise
    hint = "another DNS or DHCP server has the port: `ss -lnp`" if "in use" in reason else None
    return HostFailed(f"dnsmasq of network {network} does not start: {reason}", hint=hint)


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def _link_index(name: str) -> int:
    """Index of a link, 0 when there is none."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _process(pid: int) -> Process | None:
    return observe_process(Tree(), pid)


def _command_line(pid: int) -> tuple[str, ...]:
    """argv of a process, empty when it is gone."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(part.decode("utf-8", "surrogateescape") for part in raw.split(b"\0")[:-1])
