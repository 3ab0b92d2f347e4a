"""State under SIGKILL at each system call, lying disks and full ones. strace injects; no code knows of it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvmd.effects.files import remove_stale_temps
from kvmd.effects.images import open_image
from kvmd.effects.store import Store
from tests.rig.durability import NEW, OLD

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
CALLS = "openat,write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,fchmod,ftruncate,unlink,unlinkat,close"


class Traced:
    """One scenario under strace with one injection, attached after its preparation."""

    def __init__(self, scenario: str, directory: Path, inject: str | None, log: Path) -> None:
        command = [sys.executable, "-m", "tests.rig.durability", scenario, str(directory)]
        child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert child.stdout.readline() == b"ready\n"
            trace = ["strace", "-f", "-o", str(log), "-e", f"trace={CALLS}", "-p", str(child.pid)]
            injection = ["-e", f"inject={inject}"] if inject else []
            tracer = subprocess.Popen([*trace, *injection], stderr=subprocess.PIPE)
            try:
                assert b"attached" in tracer.stderr.readline()
                with contextlib.suppress(BrokenPipeError):
                    output, _ = child.communicate(b"\n", timeout=20)
            finally:
                tracer.terminate()
                tracer.communicate(timeout=20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            child.wait(timeout=20)
        self.killed = child.returncode == -signal.SIGKILL
        self.answer = {} if self.killed else json.loads(output)
        self.calls = re.findall(r"^\d+ +(\w+)\(", log.read_text(), re.MULTILINE)


def prepare(scenario: str, directory: Path) -> None:
    directory.mkdir()
    if scenario == "atomic":
        (directory / "record").write_bytes(OLD)
    if scenario == "store":
        store = Store(directory)
        store.set_meta("key", "old")
        store.close()


def check_old_or_new(scenario: str, directory: Path) -> str:
    """Which of the two is there; fails if it is anything else. Runs what kvmd does at its next start."""
    remove_stale_temps(directory)
    left = sorted(entry.name for entry in directory.iterdir())
    if scenario == "atomic":
        assert left == ["record"]
        found = {OLD: "old", NEW: "new"}
        return found[(directory / "record").read_bytes()]
    if scenario == "store":
        store = Store(directory)
        assert (store.rebuilt, store.degraded, store.check()) == (None, None, ())
        value = store.meta("key")
        store.close()
        return value
    assert left in ([], ["new.qcow2"])
    if not left:
        return "old"
    image = open_image(str(directory / "new.qcow2"), writable=True, format="qcow2", roots=[directory])
    os.close(image.fd)
    return "new"


@pytest.mark.parametrize(("scenario", "at_least"), [("atomic", 8), ("store", 8), ("image", 10)])
def test_killed_at_each_system_call_leaves_the_old_or_the_new(tmp_path, scenario, at_least):
    prepare(scenario, tmp_path / "whole")
    whole = Traced(scenario, tmp_path / "whole", None, tmp_path / "trace")
    assert whole.answer["first"] == "done"
    points = [(call, whole.calls[: index + 1].count(call)) for index, call in enumerate(whole.calls)]
    seen = []
    for number, (call, nth) in enumerate(points):
        directory = tmp_path / str(number)
        prepare(scenario, directory)
        # strace counts each call by itself, so a point is "the nth fsync"
        traced = Traced(scenario, directory, f"{call}:signal=KILL:when={nth}", tmp_path / "trace")
        assert traced.killed, (call, nth)
        seen.append(check_old_or_new(scenario, directory))
    assert len(seen) >= at_least
    assert (seen[0], seen[-1]) == ("old", "new")
    assert seen == sorted(seen, reverse=True), "once new, it stays new"


@pytest.mark.parametrize(
    ("scenario", "inject"),
    [
        ("atomic", "write:error=ENOSPC:when=1"),
        ("atomic", "write:error=EDQUOT:when=1"),
        ("atomic", "fsync:error=EIO:when=1"),
        ("atomic", "fsync:error=ENOSPC:when=1"),
        ("atomic", "renameat:error=EIO:when=1"),
        ("image", "write:error=ENOSPC:when=1"),
        ("image", "ftruncate:error=EFBIG:when=1"),
        ("image", "fsync:error=EIO:when=1"),
    ],
)
def test_an_error_changes_nothing_and_leaves_nothing(tmp_path, scenario, inject):
    directory = tmp_path / "state"
    prepare(scenario, directory)
    before = sorted(entry.name for entry in directory.iterdir())
    traced = Traced(scenario, directory, inject, tmp_path / "trace")
    assert traced.answer["first"].startswith("HostFailed: cannot "), traced.answer
    assert sorted(entry.name for entry in directory.iterdir()) == before
    assert check_old_or_new(scenario, directory) == "old"
    if inject.startswith("fsync"):
        assert traced.calls.count("fsync") == 1, "a failed fsync is never tried again"


@pytest.mark.parametrize(
    "inject", ["fdatasync:error=EIO:when=1", "pwrite64:error=ENOSPC:when=1", "pwrite64:error=EIO:when=1"]
)
def test_a_store_commit_fails_cleanly_and_the_next_one_works(tmp_path, inject):
    directory = tmp_path / "state"
    prepare("store", directory)
    traced = Traced("store", directory, inject, tmp_path / "trace")
    assert traced.answer["first"].startswith("HostFailed: cannot record key"), traced.answer
    assert traced.answer["second"] == "done"
    store = Store(directory)
    assert store.meta("second") == "there"
    assert store.check() == ()
    store.close()


def in_small_mount(scenario: str, directory: Path, options: str) -> dict:
    """Run a scenario on a tmpfs of its own, in a private mount namespace."""
    directory.mkdir()
    script = 'mount -t tmpfs -o "$3" tmpfs "$2" && exec "$0" -m tests.rig.durability "$1" "$2"'
    command = ["unshare", "-m", "sh", "-c", script, sys.executable, scenario, str(directory), options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_full_disk_refuses_before_any_effect_and_clears_by_itself(tmp_path):
    found = in_small_mount("full", tmp_path / "state", "size=256k,mode=0700")
    assert re.match(r"HostFailed: cannot write .*/record: No space left", found["atomic"])
    assert found["kept"] is True
    assert re.match(r"HostFailed: cannot record knob:/x: .*full", found["intent"])
    assert re.match(r"HostFailed: cannot make the image .*No space left", found["image"])
    assert (found["ended"], found["runs"]) == (False, 0)
    assert found["files"] == ["ballast", "record"]
    assert found["again"] == ["done", "done", "done"]
    assert found["after"] == [None, 1, 1, "guest-poweroff"]


def test_no_inode_left(tmp_path):
    """Row 24: room for bytes, none for files. The root, three of the database and the record are there already."""
    directory = tmp_path / "state"
    found = in_small_mount("full", directory, "size=1m,nr_inodes=7,mode=0700")
    assert found["kept"] is True
    assert found["after"] == [None, 1, 1, "guest-poweroff"]
    assert re.match("HostFailed: cannot write .*No space left", found["atomic"])


def test_state_directory_turned_read_only(tmp_path):
    found = in_small_mount("readonly", tmp_path / "state", "size=1m,mode=0700")
    assert "cannot be written" in found["degraded"]
    assert found["runs"] == ["web"]
    assert found["write"].startswith("HostFailed: cannot record a")
    assert found["again"] == "done"
    assert found["runs again"] == ["web"]
