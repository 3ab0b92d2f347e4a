"""Guests started without kvmd, as they last were, and taken up by the next kvmd with the same pid.

Here the standby runs as a child of the test, in the network namespace of the kvmd that is away; as a unit, with kvmd's
environment gone, it is in tests/systemd.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmd.effects.imagelock import Use, lock_image
from kvmd.effects.laststart import load
from tests.rig.guestfiles import LAN, linux, tiny
from tests.rig.kvmdhost import REPO, KvmdHost, kvmd_host

pytestmark = pytest.mark.system
PATH = {"PATH": os.environ["PATH"]}
STATIC = """
[network]
mode = "isolated"
bridge = "kvlan"
guests_isolated = true
[ipv4]
address = "192.168.50.1/24"
"""
# What kvmd-standby.socket does, for one launcher. The proof of who asks is a unit's cgroup; there is no systemd here.
STANDBY = """
import os, socket, sys
from kvmd import standby
listener, *directories = sys.argv[1:]
peer, _ = socket.socket(fileno=int(listener)).accept()
os.dup2(peer.fileno(), standby.CONNECTION)
standby.runs_as_unit = lambda _pid, _name: True
sys.exit(standby.main(directories))
"""


@pytest.fixture
def host() -> Iterator[KvmdHost]:
    with kvmd_host() as found:
        yield found


@contextmanager
def standby(host: KvmdHost) -> Iterator[None]:
    """A standby that answers one launcher."""
    path = host.run / "standby.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        number = listener.fileno()
        argv = [*inside(host), sys.executable, "-c", STANDBY, str(number)]
        argv += [str(host.state), str(host.run), str(host.state / "log")]
        child = subprocess.Popen(argv, pass_fds=[number], env={"PYTHONPATH": str(REPO), **PATH}, cwd="/")
        try:
            yield
        finally:
            path.unlink()
            child.kill()
            child.wait()


def inside(host: KvmdHost) -> list[str]:
    return ["ip", "netns", "exec", host.namespace] if host.namespace else []


def launcher(host: KvmdHost, name: str) -> subprocess.Popen[str]:
    """The guest's launcher, as its unit runs it; it becomes QEMU."""
    argv = ["/usr/bin/python3", "-I", "-S", str(REPO / "kvmd/launch.py"), str(host.run), name]
    return subprocess.Popen(
        [*inside(host), *argv], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd="/"
    )


def started_without(host: KvmdHost, name: str) -> subprocess.Popen[str]:
    """The guest, started by its standby; returns when its QEMU runs."""
    with standby(host):
        child = launcher(host, name)
        _until(lambda: b"-uuid" in Path(f"/proc/{child.pid}/cmdline").read_bytes() or child.poll() is not None)
        assert child.poll() is None, child.communicate()[1]
    return child


def slay(pid: int) -> None:
    """SIGKILL, and back when it has ended: until then its images are locked."""
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert select.select([pidfd], [], [], 20)[0]
    os.close(pidfd)


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    if child.stderr:
        child.stderr.close()


def test_a_guest_is_up_without_kvmd_and_adopted_by_the_next(host: KvmdHost) -> None:
    host.network("lan", STATIC)
    host.guest("web", tiny(host, "web", extra='[nic.lan]\nnetwork = "lan"\n'))
    host.start()
    host.call("host.apply")
    host.call("guest.start", name="web")
    before = host.show("web")
    host.wait_serial("web", "web is up")
    _recorded(host)
    host.kill()
    slay(before["pid"])
    child = started_without(host, "web")
    try:
        tap = before["nics"][0]["tap"]
        shown = json.loads(host.inside("ip", "-d", "-j", "link", "show", tap).stdout)[0]
        assert (shown["master"], shown["operstate"] != "DOWN", shown["ifalias"]) == ("kvlan", True, "kvmd:lan:web:lan")
        assert shown["linkinfo"]["info_slave_data"]["isolated"] is True
        status = Path(f"/proc/{child.pid}/status").read_text()
        assert f"Uid:\t{Path('/proc', str(child.pid)).stat().st_uid}\t" in status
        assert Path(f"/proc/{child.pid}").stat().st_uid >= 64100
        with (host.images / "web.img").open("r+b") as image:
            assert not lock_image(image.fileno(), Use.EXCLUSIVE)
        _until(lambda: host.serial("web").count("web is up") == 2)  # not left paused
        host.start()
        after = host.wait_state("web", "running")
        assert after["pid"] == child.pid
        assert "was started without kvmd: neither verified nor placed" in after["warnings"]
        assert after["wanted"] == "running"
        assert host.call("host.plan")["actions"] == []
        host.restart()  # on record now like any other
        assert host.wait_state("web", "running")["pid"] == child.pid
        host.call("guest.kill", name="web")
        assert host.show("web")["state"] == "stopped"
    finally:
        end(child)


def test_a_lost_database_loses_no_guest(host: KvmdHost) -> None:
    host.guest("one", tiny(host, "one"))
    host.guest("two", tiny(host, "two"))
    host.start()
    for name in ("one", "two"):
        host.call("guest.start", name=name)
    pids = {name: host.show(name)["pid"] for name in ("one", "two")}
    _recorded(host)
    host.kill()  # what shall run is lost too: nobody may take that for a wish to stop them
    for left in host.state.glob("state.db*"):
        left.unlink()
    host.start()
    for name, pid in pids.items():
        shown = host.wait_state(name, "running")
        assert (shown["pid"], shown["warnings"], shown["wanted"]) == (pid, [], "running")
    assert host.call("host.plan")["actions"] == []
    for name in pids:
        host.call("guest.kill", name=name)


def test_kvmd_waits_for_a_guest_that_is_being_born_without_it(host: KvmdHost) -> None:
    """kvmd comes back between the standby's first step and its last."""
    host.guest("web", tiny(host, "web"))
    host.start()
    host.call("guest.start", name="web")
    _recorded(host)
    pid = host.show("web")["pid"]
    host.kill()
    slay(pid)
    mark = os.open(host.run / "standby/web", os.O_RDWR | os.O_CREAT)
    fcntl.flock(mark, fcntl.LOCK_EX)
    host.start()
    shown = host.show("web")
    assert (shown["state"], shown["reason"]) == ("starting", "it is being started without kvmd")
    os.close(mark)  # nothing came of it: kvmd starts the guest itself, for it shall run
    assert host.wait_state("web", "running")["pid"] not in (None, pid)
    host.call("guest.kill", name="web")


def test_what_is_not_sound_is_not_started(host: KvmdHost) -> None:
    host.guest("web", tiny(host, "web"))
    host.start()
    host.call("guest.start", name="web")
    _recorded(host)
    host.kill()
    refused(host, "it runs already")
    host.start()
    host.call("guest.kill", name="web")
    host.kill()
    record, image = host.state / "guests/web/last-start.json", host.images / "web.img"
    sound = record.read_text()
    with image.open("r+b") as held:
        assert lock_image(held.fileno(), Use.EXCLUSIVE)
        refused(host, "in use by another process")
    record.parent.chmod(0o777)
    refused(host, "is not root's alone to write")
    record.parent.chmod(0o700)
    os.chown(record, 65534, 65534)
    refused(host, "is not root's alone to write")
    os.chown(record, 0, 0)
    for text, words in (
        ("[" * 100_000, "RecursionError"),
        ('{"format": "kvmd-last-start-2"}', "of another version"),
        (sound.replace('"kind": "image"', '"kind": "portal"'), "only kvmd can open its portal"),
        (sound.replace("web.img", "none.img"), "cannot open image"),
        (sound.replace(f'"root": "{host.images}"', '"root": "/etc"'), "does not lie beneath /etc"),
    ):
        record.write_text(text)
        refused(host, words)
    record.write_text(sound)
    image.rename(host.base / "moved.img")
    image.symlink_to(host.base / "moved.img")
    refused(host, "a part of the path is a symlink")
    record.unlink()
    refused(host, "it was never started")


def refused(host: KvmdHost, words: str) -> None:
    """The standby says why, and the launcher ends."""
    with standby(host):
        child = launcher(host, "web")
        _, said = child.communicate(timeout=30)
    assert child.returncode == 1
    assert words in said


def test_a_nic_that_needs_more_than_a_bridge_is_left_unplugged(host: KvmdHost) -> None:
    host.network("lan", LAN)
    host.guest("web", linux("web"))
    host.start()
    host.call("host.apply")
    host.call("guest.start", name="web")
    _recorded(host)
    tap = host.show("web")["nics"][0]["tap"]
    host.call("guest.kill", name="web")
    host.kill()
    record = host.state / "guests/web/last-start.json"
    found = json.loads(record.read_text())
    nic = next(entry for entry in found["open"] if entry["kind"] == "tap")
    nic["tap"]["vlan"] = 7
    record.write_text(json.dumps(found))
    child = started_without(host, "web")
    try:
        assert "master" not in json.loads(host.inside("ip", "-j", "link", "show", tap).stdout)[0]
        host.start()
        notes = host.wait_state("web", "running")["warnings"]
        assert "nic lan is unplugged: only kvmd can do vlan" in notes
        host.call("guest.kill", name="web")
    finally:
        end(child)


def _recorded(host: KvmdHost) -> None:
    """Until every running guest has left its last start, which it does after it runs."""
    names = [guest["name"] for guest in host.call("guest.list")["guests"] if guest["state"] == "running"]
    _until(lambda: all(load(host.state / "guests" / name) for name in names))


def _until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)
