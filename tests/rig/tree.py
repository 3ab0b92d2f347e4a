"""A Debian tree booted with systemd as PID 1 (systemd-nspawn), copy-on-write over the cached one.

For tests of units, socket activation, the watchdog, the journal and autostart. Needs root; leaves nothing: the
overlay is mounted in a mount namespace of its own that ends with the container, which gets SIGTERM when the test
process dies. What it cannot show: resource limits (on a cgroup v1 host they are accepted and not enforced), other
kernels, reboots into another kernel: those are lab tests.

The container shares the host's kernel and, writable, its /proc and /sys (kvmd must be able to work). So services
that would set the host's sysctls or trigger its uevents are masked.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.rig.guestimage import cache

HOST_HAS_SYSTEMD = Path("/run/systemd/system").exists()
REPOSITORY = Path(__file__).resolve().parents[2]
MASKED = (
    "systemd-udevd.service",
    "systemd-udev-trigger.service",
    "systemd-sysctl.service",
    "systemd-modules-load.service",
    "systemd-networkd-wait-online.service",
    "systemd-timesyncd.service",
    "console-getty.service",
)
# Nothing here is seen by the host: the overlay is mounted in the namespace this runs in.
MOUNT = """
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
for cgroup in $CGROUPS; do echo $$ >"$cgroup/cgroup.procs"; done
shift 2
exec "$@"
"""
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
}


class TreeFailed(AssertionError):
    """The tree did not boot, a command in it failed, or it did not power off; the message quotes what it said."""


def tree_path() -> Path:
    """The pristine cached tree; FileNotFoundError with the remedy when setup has not made it."""
    path = cache() / "tree"
    if not (path / "usr/lib/systemd/systemd").exists():
        raise FileNotFoundError(f"no Debian tree at {path}: run scripts/setup tree as root")
    return path


class Tree:
    """One booted copy. Put files with `write` before or after `boot`; `close` (or the with block) ends it.

    The checkout is at /src/kvmd and the test environment at its own path, both read-only, so `python -m kvmd.daemon`
    runs with PYTHONPATH=/src/kvmd without an installation; the guest kernel is at its own path too.
    """

    def __init__(self, *, binds: Mapping[Path, Path] | None = None, network_namespace: Path | None = None) -> None:
        """`binds`: host path -> path inside, writable. `network_namespace`: join this one, not a new empty one."""
        parent = cache() / "trees"
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob("tree-*-*"):
            # Of a test process that was killed; its container went with it.
            if not Path("/proc", left.name.split("-")[1]).exists():
                shutil.rmtree(left, ignore_errors=True)
        self._scratch = parent / f"tree-{os.getpid()}-{secrets.token_hex(3)}"
        self._scratch.mkdir()
        for directory in ("upper", "work", "root"):
            (self._scratch / directory).mkdir()
        (self._scratch / "upper").chmod(0o755)
        self._binds = dict(binds or {})
        self._network_namespace = network_namespace
        self._container: subprocess.Popen[bytes] | None = None
        self._leader = 0
        self.log = self._scratch / "console.log"
        # nspawn takes over the cgroup it is in: give it one of its own, from systemd where systemd runs the host.
        self._cgroups = [] if HOST_HAS_SYSTEMD else [top / f"{self._scratch.name}" for top in _cgroup_roots()]
        for unit in MASKED:
            link = self._scratch / "upper/etc/systemd/system" / unit
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to("/dev/null")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def root(self) -> Path:
        """The running tree's root as the host sees it."""
        return Path(f"/proc/{self._leader}/root")

    @property
    def leader(self) -> int:
        """The host's pid of the tree's PID 1."""
        return self._leader

    def write(self, path: str, content: str | bytes, mode: int = 0o644) -> None:
        """Write a file at an absolute path inside, with its directories; before boot into the overlay's upper layer."""
        top = self.root if self._leader else self._scratch / "upper"
        target = top / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)
        target.chmod(mode)

    def boot(self, timeout_s: float = 60.0) -> Self:
        """Boot and wait until systemd has finished starting; TreeFailed with the console's end otherwise."""
        arguments = self._nspawn_arguments()
        lower = tree_path()
        unshared = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", MOUNT, "sh", lower, self._scratch]
        for cgroup in self._cgroups:
            cgroup.mkdir(exist_ok=True)
        environment = ENVIRONMENT | {"SYSTEMD_NSPAWN_API_VFS_WRITABLE": "yes", "SYSTEMD_NSPAWN_LOCK": "0"}
        with self.log.open("wb") as log:
            self._container = subprocess.Popen(
                [*self._scope(), *map(str, unshared), "setpriv", "--pdeathsig", "TERM", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | {"CGROUPS": " ".join(map(str, self._cgroups))},
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout_s
        while not self._leader:
            self._leader = _leader_below(self._container.pid)
            self._still_booting(deadline)
        while True:
            # "is-system-running --wait" cannot be asked before the manager's bus is there.
            asked = self.run(["systemctl", "is-system-running"], timeout_s=20)
            if asked.stdout.strip() in ("running", "degraded"):
                return self
            self._still_booting(deadline)

    def run(
        self,
        command: Sequence[str | Path] | str,
        *,
        timeout_s: float = 60.0,
        stdin: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside as root: a list, or a line for /bin/sh. It is outside the tree's cgroups; use
        systemd-run in it where that matters. subprocess.TimeoutExpired after timeout_s."""
        words = ["sh", "-c", command] if isinstance(command, str) else [str(word) for word in command]
        # The container's namespaces, every one but the user's: nspawn makes none of those here.
        enter = ["nsenter", f"--target={self._leader}", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
        inside = ENVIRONMENT | {"PYTHONPATH": "/src/kvmd", "PYTHONDONTWRITEBYTECODE": "1"} | dict(environment or {})
        assignments = [f"{key}={value}" for key, value in inside.items()]
        return subprocess.run(
            [*enter, "--", "env", "-i", *assignments, *words],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def check(self, command: Sequence[str | Path] | str, *, timeout_s: float = 60.0, stdin: str = "") -> str:
        """Like run; returns its output, TreeFailed when the status is not 0."""
        ran = self.run(command, timeout_s=timeout_s, stdin=stdin)
        if ran.returncode != 0:
            raise TreeFailed(f"in the tree: {command}: status {ran.returncode}: {ran.stdout}{ran.stderr}")
        return ran.stdout

    def wait_for(self, command: str, timeout_s: float = 30.0) -> str:
        """Repeat a shell line until it succeeds; returns its output, TreeFailed with its last words otherwise."""
        deadline = time.monotonic() + timeout_s
        while True:
            ran = self.run(command, timeout_s=timeout_s)
            if ran.returncode == 0:
                return ran.stdout
            if time.monotonic() > deadline:
                raise TreeFailed(f"in the tree, for {timeout_s} s: {command}: {ran.stdout}{ran.stderr}")
            time.sleep(0.1)

    def journal(self, unit: str | None = None) -> str:
        """This boot's journal, of one unit or all, with the seconds since boot."""
        selection = ["--unit", unit] if unit else []
        return self.check(["journalctl", "--no-pager", "-o", "short-monotonic", *selection])

    def poweroff(self, timeout_s: float = 60.0) -> None:
        """Shut down as a machine would, units in order; TreeFailed when it is not gone in time."""
        assert self._container is not None, "not booted"
        self.run(["systemctl", "poweroff"])
        try:
            self._container.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TreeFailed(f"the tree did not power off in {timeout_s} s:\n{self._console_end()}") from None
        self._leader = 0

    def close(self) -> None:
        """End the container whatever state it is in and remove its files. Safe to repeat."""
        if self._container is not None and self._container.poll() is None:
            # nspawn turns SIGTERM into an orderly shutdown; tests that want that say poweroff, so do not wait long.
            self._container.send_signal(signal.SIGTERM)
            try:
                self._container.wait(10)
            except subprocess.TimeoutExpired:
                self._container.kill()
                self._container.wait(10)
        self._container = None
        self._leader = 0
        for cgroup in self._cgroups:
            # Deepest first; cgroup directories are removed one by one, their files vanish with them.
            for path in (*sorted((path for path in cgroup.rglob("*") if path.is_dir()), reverse=True), cgroup):
                _remove_cgroup(path)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _scope(self) -> list[str]:
        if not HOST_HAS_SYSTEMD:
            return []
        return ["systemd-run", "--scope", "--quiet", "--collect", f"--unit={self._scratch.name}", "-pDelegate=yes"]

    def _nspawn_arguments(self) -> list[str]:
        environment = (cache() / "venv").resolve()
        read_only = {
            REPOSITORY: Path("/src/kvmd"),
            environment: environment,
            cache() / "kernel": cache() / "kernel",
            cache() / "guest": cache() / "guest",
        }
        (self._scratch / "upper" / str(cache()).lstrip("/")).mkdir(parents=True, exist_ok=True)
        link = self._scratch / "upper" / str(cache() / "venv").lstrip("/")
        if not link.is_symlink():
            link.symlink_to(environment.name)
        arguments = [
            *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot", "--console=pipe"),
            *("--machine", self._scratch.name, "--hostname", "kvmdtree", "--resolv-conf=off", "--timezone=off"),
            *("--link-journal=no", "--settings=no", "--capability=all", f"--directory={self._scratch / 'root'}"),
            *(f"--bind-ro={source}:{target}" for source, target in read_only.items()),
            *(f"--bind={source}:{target}" for source, target in self._binds.items()),
            *(f"--bind={node}" for node in ("/dev/kvm", "/dev/net/tun", "/dev/vhost-net") if Path(node).exists()),
        ]
        if self._network_namespace:
            return [*arguments, f"--network-namespace-path={self._network_namespace}"]
        return [*arguments, "--private-network"]

    def _still_booting(self, deadline: float) -> None:
        assert self._container is not None
        status = self._container.poll()
        if status is not None or time.monotonic() > deadline:
            what = "took too long" if status is None else f"ended with status {status}"
            raise TreeFailed(f"the tree's boot {what}:\n{self._console_end()}")
        time.sleep(0.1)

    def _console_end(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def _cgroup_roots() -> list[Path]:
    """Where systemd in the tree keeps its units: version 2, and version 1's name=systemd where both are mounted."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(where) for _, where, kind, options, *_ in mounts if kind == "cgroup2" or "name=systemd" in options]


def _remove_cgroup(path: Path, timeout_s: float = 10.0) -> None:
    """Remove an empty cgroup; what was killed in it may still be leaving."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _leader_below(pid: int) -> int:
    """The host pid of the process that is PID 1 of a pid namespace below `pid`; 0 when there is none yet."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            try:
                status = Path(f"/proc/{child}/status").read_text()
                program = Path(f"/proc/{child}/comm").read_text().strip()
            except OSError:
                continue
            ids = next((line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")), [])
            # Until nspawn's stub has executed init there is nobody to talk to.
            if ids[-1:] == ["1"] and len(ids) > 1 and program == "systemd":
                return child
            if found := _leader_below(child):
                return found
    return 0
