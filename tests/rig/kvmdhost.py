"""A whole kvmd of its own for a test: private directories, a network namespace, the real client.

`kill()` is SIGKILL, `start()` after it is what systemd would do. `close()` ends the daemon and every guest this rig's
daemon recorded, by pid and start time, and removes the namespace; it fails if a guest's process survives.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvmd.effects.proc import observe_process
from kvmd.effects.tree import Tree
from kvmd.rpc.client import Client
from tests.rig.guestimage import cache

REPO = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 30.0


class KvmdHost:
    """One kvmd on one small pretended host."""

    def __init__(self, base: Path | None = None, *, namespace: bool = True) -> None:
        self._own_base = base is None
        self.base = base or Path(tempfile.mkdtemp(prefix="kvmd-test-", dir="/var/tmp"))
        self.base.chmod(0o755)
        self.config = self.base / "etc"
        self.state = self.base / "state"
        self.run = self.base / "run"
        self.images = self.base / "images"
        for directory in (self.config, self.config / "guests.d", self.config / "networks.d", self.images):
            directory.mkdir(parents=True, exist_ok=True)
        self.log = self.base / "kvmd.log"
        self.namespace = f"kvmdt{secrets.token_hex(3)}" if namespace else None
        if self.namespace:
            _run("ip", "netns", "add", self.namespace)
            _run("ip", "-n", self.namespace, "link", "set", "lo", "up")
        self._daemon: subprocess.Popen[bytes] | None = None
        self.write("kvmd.toml", f'[storage]\nroots = ["{self.images}", "{cache()}"]\nimages = "{self.images}"\n')

    # ---- files ----

    def write(self, name: str, text: str) -> Path:
        """One configuration file."""
        path = self.config / name
        path.write_text(text)
        path.chmod(0o644)
        return path

    def guest(self, name: str, text: str) -> None:
        """guests.d/NAME.toml"""
        self.write(f"guests.d/{name}.toml", text)

    def network(self, name: str, text: str) -> None:
        """networks.d/NAME.toml"""
        self.write(f"networks.d/{name}.toml", text)

    # ---- the daemon ----

    def start(self, *, wait: bool = True) -> None:
        """Start the daemon; returns once its API answers."""
        argv = [sys.executable, "-m", "kvmd.daemon", "--config-dir", str(self.config), "--state-dir", str(self.state)]
        argv += ["--run-dir", str(self.run), "--log-level", "debug"]
        if self.namespace:
            argv = ["ip", "netns", "exec", self.namespace, *argv]
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"}
        with self.log.open("ab") as log:
            self._daemon = subprocess.Popen(argv, stdout=log, stderr=log, cwd="/", env=environment)
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Until daemon.ping is answered."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self._daemon is not None
            if self._daemon.poll() is not None:
                raise AssertionError(f"kvmd ended with {self._daemon.returncode}:\n{self.log.read_text()}")
            with contextlib.suppress(Exception):
                self.call("daemon.ping")
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"kvmd does not answer:\n{self.log.read_text()}")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self._end(signal.SIGKILL)

    def terminate(self) -> float:
        """SIGTERM; returns the seconds it took to end."""
        begun = time.monotonic()
        self._end(signal.SIGTERM)
        return time.monotonic() - begun

    def _end(self, number: signal.Signals) -> None:
        if self._daemon is None:
            return
        self._daemon.send_signal(number)
        self._daemon.wait(timeout=20)
        self._daemon = None

    def restart(self) -> None:
        """SIGKILL and start."""
        self.kill()
        self.start()

    # ---- talking to it ----

    def call(self, method: str, timeout_s: float = 120.0, **params: Any) -> Any:
        """One API call; RemoteError is raised as the client does."""
        with Client(self.run / "kvmd.sock", timeout_s) as client:
            return client.call(method, params)

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run kvmd-cli as a user would."""
        argv = [sys.executable, "-m", "kvmd.cli.main", "--config-dir", str(self.config), "--state-dir", str(self.state)]
        argv += ["--run-dir", str(self.run), *arguments]
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=300, check=False)
        if check and done.returncode:
            raise AssertionError(f"kvmd-cli {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def show(self, name: str) -> Any:
        """guest.show"""
        return self.call("guest.show", name=name)

    def wait_state(self, name: str, state: str, timeout_s: float = 60.0) -> Any:
        """Until the guest is in that state; the summary then."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = self.show(name)
            if found["state"] == state:
                return found
            if time.monotonic() > deadline:
                raise AssertionError(f"{name} is {found['state']} ({found['reason']}), not {state}\n{self.logs(name)}")
            time.sleep(0.05)

    def wait_placed(self, name: str, timeout_s: float = 30.0) -> Any:
        """Until the guest's threads are known (a kvmd that came back answers before they are); its summary then."""
        deadline = time.monotonic() + timeout_s
        while (found := self.show(name))["placement"] is None:
            if time.monotonic() > deadline:
                raise AssertionError(f"{name} is placed nowhere\n{self.logs(name)}")
            time.sleep(0.05)
        return found

    def logs(self, name: str) -> str:
        """What the daemon and this guest's QEMU said, for failures."""
        texts = [self.log.read_text()[-8000:]]
        for path in sorted((self.state / "log" / name).glob("*.log")):
            texts.append(f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}")
        return "\n".join(texts)

    def serial(self, name: str, port: str = "console") -> str:
        """What the guest wrote to a serial port."""
        path = self.state / "log" / name / f"serial-{port}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_serial(self, name: str, text: str, timeout_s: float = 60.0) -> str:
        """Until the guest has written `text`; everything it wrote then."""
        deadline = time.monotonic() + timeout_s
        while text not in (seen := self.serial(name)):
            if time.monotonic() > deadline:
                raise AssertionError(f"{name} never wrote {text!r}:\n{seen[-4000:]}\n{self.logs(name)}")
            time.sleep(0.05)
        return seen

    def inside(self, *argv: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run a command in the daemon's network namespace."""
        prefix = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        return subprocess.run([*prefix, *argv], capture_output=True, text=True, timeout=timeout_s, check=False)

    # ---- the end ----

    def close(self) -> None:
        """Leave nothing: daemon, guests, dnsmasq, namespace, files."""
        self._end(signal.SIGKILL)
        for pid, start_time in self._recorded():
            _end_process(pid, start_time)
        if self.namespace:
            _empty_namespace(self.namespace)  # dnsmasq, and whatever a test started there
            _run("ip", "netns", "del", self.namespace)
        if self._own_base:
            shutil.rmtree(self.base, ignore_errors=True)

    def _recorded(self) -> list[tuple[int, int]]:
        path = self.state / "state.db"
        if not path.exists():
            return []
        with contextlib.closing(sqlite3.connect(path)) as db:
            rows = db.execute("SELECT pid, start_time FROM run WHERE pid IS NOT NULL").fetchall()
        return [(int(pid), int(start)) for pid, start in rows]


def _end_process(pid: int, start_time: int) -> None:
    tree = Tree()
    found = observe_process(tree, pid)
    if found is None or found.start_time != start_time:
        return
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while observe_process(tree, pid) == found:
        if time.monotonic() > deadline:
            raise AssertionError(f"pid {pid} survived SIGKILL")
        time.sleep(0.02)


def _empty_namespace(name: str) -> None:
    """End all processes in it and wait until they are gone, with what they hold: pages, locks, files."""
    deadline = time.monotonic() + 10
    while pids := subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout:
        if time.monotonic() > deadline:
            raise AssertionError(f"survived SIGKILL in {name}: {pids.split()}")
        for pid in pids.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.02)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


@contextlib.contextmanager
def kvmd_host(*, namespace: bool = True) -> Iterator[KvmdHost]:
    """A KvmdHost that is closed whatever happens."""
    host = KvmdHost(namespace=namespace)
    try:
        yield host
    finally:
        host.close()
