"""The lab: a Debian VM under TCG with what only another host has, driven over a virtio-serial port.

Inside: systemd as PID 1, cgroup v2, kvm_amd (QEMU emulates SVM) so that `-accel kvm -cpu host` boots Linux, vhost-net,
reboots. The checkout is at /src/kvmd, the test environment at its own path, kvmd's wheels where pip finds them, the
test guest where `guest_kernel()` finds it. `scripts/lab` is this for people.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.rig.guestimage import cache, kernel_image
from tests.rig.labimage import ROOT, lab_disk
from tests.rig.labinstall import prepared_environment
from tests.rig.labprofiles import DEFAULT, PROFILES, Hardware

REPOSITORY = Path(__file__).resolve().parents[2]
# What the checkout's disk has room for beyond the files, for what is built in it.
SPARE_BYTES = 128 * 1024**2


class LabFailed(AssertionError):
    """The lab did not boot, answer, or a command in it failed; the message quotes what it said and where its log is."""


class Lab:
    """One lab VM with a disk of its own that survives its reboots. `boot`, then `run`; `close` ends it."""

    def __init__(self, hardware: Hardware | None = None, *, log_dir: Path | None = None) -> None:
        """`log_dir`: where console.log is kept; default a directory that `close` removes."""
        self.hardware = hardware or Hardware()
        parent = cache() / "labs"
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob("lab-*-*"):
            if not Path("/proc", left.name.split("-")[1]).exists():
                shutil.rmtree(left, ignore_errors=True)
        self._scratch = parent / f"lab-{os.getpid()}-{secrets.token_hex(3)}"
        self._scratch.mkdir()
        self.log = (log_dir or self._scratch) / "console.log"
        self._qemu: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None
        self._pending = b""
        self._replies: dict[int, dict[str, Any]] = {}
        self._next_id = 0
        self._boot_id = ""
        self._broken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def boot_id(self) -> str:
        """The kernel's boot id, as of the last hello."""
        return self._boot_id

    def command(self, *, interactive: bool = False) -> list[str]:
        """QEMU's argv. `interactive` puts the console on the terminal; otherwise it goes to the log."""
        root, source = self._scratch / "root.qcow2", self._scratch / "src.img"
        if not root.exists():
            _quiet(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(lab_disk()), str(root)])
            _make_source_disk(source, self._scratch / "src")
        console = (
            ["-serial", "mon:stdio"]
            if interactive
            else ["-chardev", f"file,id=console,append=on,path={self.log}", "-serial", "chardev:console"]
        )
        # loglevel=4: messages on an emulated serial line cost more than what they tell. mitigations=off: they cost half
        # the speed and protect nobody in here. nokaslr: where the kernel lies breaks one of the few whole GiB, and must
        # not be left to chance. A CPU that is stuck for two minutes ends the lab, with where it was on the console.
        kernel = (
            f"console=ttyS0 root={ROOT} rw panic=-1 loglevel=4 mitigations=off nokaslr"
            f" watchdog_thresh=60 softlockup_panic=1 {self.hardware.kernel}"
        )
        return [
            *("qemu-system-x86_64", "-name", "kvmd-lab", "-nodefaults", "-no-user-config", "-display", "none"),
            # A reboot ends this QEMU and another boots the same disk: after a reset inside one process the second
            # kernel hangs in QEMU 7.2 once kvm_amd was used (the emulated SVM state outlives the reset).
            "-no-reboot",
            *self.hardware.arguments(),
            *("-kernel", str(kernel_image()), "-append", kernel.strip()),
            *("-drive", f"if=none,id=root,format=qcow2,cache=unsafe,file={root}"),
            *("-device", "nvme,serial=root,drive=root"),
            *("-drive", f"if=none,id=src,format=raw,cache=unsafe,file={source}"),
            *("-device", "virtio-blk-pci,drive=src,serial=src"),
            *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=lab,name=kvmd.lab"),
            *("-chardev", f"socket,id=lab,server=on,wait=off,path={self._scratch}/lab.sock"),
            *("-device", "virtio-rng-pci"),
            *console,
        ]

    def boot(self, timeout_s: float = 240.0) -> Self:
        """Start the VM and wait until systemd has started everything; LabFailed with the console's end otherwise."""
        deadline = time.monotonic() + timeout_s
        self._start(deadline)
        self._wait_up("", deadline)
        return self

    def run(
        self,
        command: Sequence[str | Path] | str,
        *,
        timeout_s: float = 60.0,
        stdin: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the lab as root: a list, or a line for /bin/sh. Status 124 after timeout_s."""
        words = ["sh", "-c", command] if isinstance(command, str) else [str(word) for word in command]
        assert self._port is not None, "not booted"
        self._next_id += 1
        request = {"id": self._next_id, "argv": words, "stdin": stdin, "timeout_s": timeout_s}
        request["environment"] = {"PYTHONPATH": "/src/kvmd", **(environment or {})}
        self._port.settimeout(30)
        self._port.sendall(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + timeout_s + 30
        while self._next_id not in self._replies:
            self._receive(deadline)
        reply = self._replies.pop(self._next_id)
        return subprocess.CompletedProcess(words, reply["status"], reply["stdout"], reply["stderr"])

    def check(self, command: Sequence[str | Path] | str, *, timeout_s: float = 60.0, stdin: str = "") -> str:
        """Like run; returns its output, LabFailed when the status is not 0."""
        ran = self.run(command, timeout_s=timeout_s, stdin=stdin)
        if ran.returncode != 0:
            raise LabFailed(f"in the lab: {command}: status {ran.returncode}: {ran.stdout}{ran.stderr}")
        return ran.stdout

    def wait_for(self, command: str, timeout_s: float = 60.0) -> str:
        """Repeat a shell line until it succeeds; returns its output, LabFailed with its last words otherwise."""
        deadline = time.monotonic() + timeout_s
        while True:
            ran = self.run(command, timeout_s=timeout_s)
            if ran.returncode == 0:
                return ran.stdout
            if time.monotonic() > deadline:
                raise LabFailed(f"in the lab, for {timeout_s} s: {command}: {ran.stdout}{ran.stderr}")
            time.sleep(0.5)

    def write(self, path: str, content: str, mode: int = 0o644) -> None:
        """Write a text file in the lab, with its directories."""
        target = shlex.quote(path)
        self.check(f"mkdir -p $(dirname {target}) && cat >{target} && chmod {mode:o} {target}", stdin=content)

    def install(self) -> None:
        """scripts/install from the checkout, with the environment that was made beforehand."""
        self.check("mkdir -p /opt/kvmd && cd /opt/kvmd && ln -sfn /src/prepared/kvmd/venv-* . && ln -sfn venv-* venv")
        said = self.check("KVMD_WHEELS=/opt/kvmd-wheels /src/kvmd/scripts/install", timeout_s=600)
        assert "up to date" in said, f"the environment was made again in the lab, which takes minutes: {said}"

    def journal(self, unit: str | None = None) -> str:
        """This boot's journal, of one unit or all."""
        return self.check(["journalctl", "--no-pager", "-b", "-o", "short-monotonic", *(["-u", unit] if unit else [])])

    def reboot(self, timeout_s: float = 240.0) -> None:
        """Reboot as a person would, units in order, and wait until the lab is up with another boot id."""
        before, deadline = self._boot_id, time.monotonic() + timeout_s
        self.check("systemctl reboot --no-block")
        self._wait_gone(timeout_s)
        self._start(deadline)
        self._wait_up(before, deadline)

    def pull_the_plug(self, timeout_s: float = 240.0) -> None:
        """Cut the power without a word and boot again."""
        before, deadline = self._boot_id, time.monotonic() + timeout_s
        assert self._qemu is not None, "not booted"
        self._qemu.kill()
        self._wait_gone(10)
        self._start(deadline)
        self._wait_up(before, deadline)

    def poweroff(self, timeout_s: float = 120.0) -> None:
        """Shut down in order; LabFailed when the VM is not gone in time."""
        self.check("systemctl poweroff --no-block")
        self._wait_gone(timeout_s)

    def _wait_gone(self, timeout_s: float) -> None:
        assert self._qemu is not None, "not booted"
        try:
            self._qemu.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._broken = True
            raise LabFailed(f"the lab did not go down in {timeout_s} s:\n{self._console_end()}") from None
        if self._port is not None:
            self._port.close()
            self._port = None

    def close(self) -> None:
        """End the VM whatever state it is in, and remove its disks. Safe to repeat."""
        if self._port is not None:
            self._port.close()
            self._port = None
        if self._qemu is not None:
            if self._qemu.poll() is None:
                self._qemu.kill()
            self._qemu.wait(30)
            self._qemu = None
        if self._broken and self.log.exists():
            with contextlib.suppress(OSError):
                shutil.copyfile(self.log, cache() / "lab-failed-console.log")
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _start(self, deadline: float) -> None:
        """Run QEMU and connect to the agent's port before anything inside can speak."""
        self._pending = b""
        self._qemu = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *self.command()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        while self._port is None:
            self._must_be_running(deadline)
            port = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                port.connect(str(self._scratch / "lab.sock"))
            except OSError:
                port.close()
                time.sleep(0.05)
            else:
                self._port = port

    def _wait_up(self, before: str, deadline: float) -> None:
        """Wait for the hello of a boot other than `before`, then for systemd."""
        while self._boot_id in ("", before):
            self._receive(deadline)
        while True:
            state = self.run("systemctl is-system-running --wait", timeout_s=120).stdout.strip()
            if state in ("running", "degraded"):
                return
            self._must_be_running(deadline)
            time.sleep(0.2)

    def _receive(self, deadline: float) -> None:
        self._must_be_running(deadline)
        assert self._port is not None
        self._port.settimeout(1)
        try:
            data = self._port.recv(65536)
        except TimeoutError:
            return
        if not data:
            time.sleep(0.1)  # QEMU is ending; the next call says how
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):  # the half line of a boot that ended
                value = json.loads(line)
                if "hello" in value:
                    self._boot_id = value["hello"]
                else:
                    self._replies[value["id"]] = value

    def _must_be_running(self, deadline: float) -> None:
        assert self._qemu is not None
        status = self._qemu.poll()
        if status is not None or time.monotonic() > deadline:
            self._broken = True
            what = "took too long to answer" if status is None else f"ended with status {status}"
            raise LabFailed(f"the lab {what}; its console ends with:\n{self._console_end()}")

    def _console_end(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else "(nothing)"


def _quiet(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _make_source_disk(disk: Path, staging: Path) -> None:
    """An ext4 image of the checkout as it is (tracked files and new ones, nothing that git ignores), and of /opt/kvmd
    as its scripts/install makes it."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-coz", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    checkout = staging / "kvmd"
    checkout.mkdir(parents=True)
    for name in filter(None, listed.split("\0")):
        source, target = REPOSITORY / name, checkout / name
        if not source.exists():  # deleted in the work tree, not yet in git
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    shutil.copytree(prepared_environment(checkout), staging / "prepared/kvmd", symlinks=True)
    total = sum(file.lstat().st_size for file in staging.rglob("*") if not file.is_dir())
    size_kib = (2 * total + SPARE_BYTES) // 1024
    _quiet(["mkfs.ext4", "-q", "-F", "-m", "0", "-d", str(staging), str(disk), f"{size_kib}k"])
    shutil.rmtree(staging)


def main() -> int:
    """What scripts/lab does; run by the distribution's Python, since set-up has yet to make the environment."""
    asked, pytest_arguments = _parsed()
    if asked.verb == "list":
        for profile in PROFILES.values():
            print(f"{profile.name:10} {profile.about}{' (the default)' if profile.name == DEFAULT else ''}")
        return 0
    if asked.verb == "test":
        if asked.profile:
            os.environ["KVMD_TEST_LAB"] = asked.profile
        long = ["--long"] if asked.all or asked.profile else []
        script = REPOSITORY / "scripts/test"
        os.execv(script, [str(script), *long, "tests/lab", *pytest_arguments])
    _quiet([str(REPOSITORY / "scripts/setup"), "base", "lab"])
    with Lab(PROFILES[asked.profile].hardware) as lab:
        if asked.verb == "shell":
            return subprocess.run(lab.command(interactive=True), check=False).returncode
        lab.boot()
        ran = lab.run(" ".join(asked.command), timeout_s=3600)
        sys.stdout.write(ran.stdout)
        sys.stderr.write(ran.stderr)
        lab.poweroff()
        return ran.returncode


def _parsed() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it is pytest's."""
    parser = argparse.ArgumentParser(prog="scripts/lab")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="the profiles: each a machine of its own")
    shell = verbs.add_parser("shell", help="a root shell on its console; Ctrl-A X ends the VM")
    run = verbs.add_parser("run", help="boot, run one shell line as root, print its output, end with its status")
    for verb in (shell, run):
        verb.add_argument("--profile", choices=list(PROFILES), default=DEFAULT)
    run.add_argument("command", nargs=argparse.REMAINDER)
    test = verbs.add_parser(
        "test", help="the tests of every run, all of one profile's, or all; pytest's arguments follow"
    )
    which = test.add_mutually_exclusive_group()
    which.add_argument("--profile", choices=list(PROFILES))
    which.add_argument("--all", action="store_true")
    asked, rest = parser.parse_known_args()
    if asked.verb != "test" and rest:
        parser.error(f"unknown: {' '.join(rest)}")
    if asked.verb == "run" and not asked.command:
        run.error("what shall be run?")
    return asked, rest


if __name__ == "__main__":
    sys.exit(main())
