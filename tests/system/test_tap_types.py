"""NICs on no network of kvmd's: a TAP by name, with scripts, by helper, or as a port of a bridge.

The guests are boot sectors: what counts is what QEMU holds and what was run around it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmd.effects.taps import open_queues
from kvmd.rpc.client import RemoteError
from tests.rig.guestfiles import tiny
from tests.rig.kvmdhost import KvmdHost
from tests.rig.netns import Namespace, inside

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

TUNGETIFF, TUNGETSNDBUF = 0x800454D2, 0x800454D3  # linux/if_tun.h
IFF_MULTI_QUEUE, IFF_VNET_HDR = 0x0100, 0x4000
SYS_pidfd_getfd = 438  # asm/unistd_64.h
HELPER = """\
#!{python}
import fcntl, os, socket, struct, subprocess, sys
words = dict(word.partition("=")[::2] for word in sys.argv[1:])
tap = os.open("/dev/net/tun", os.O_RDWR)
flags = 0x0002 | 0x1000 | (0x4000 if "--use-vnet" in words else 0)
name = fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"tap%d", flags))[:16].rstrip(b"\\0").decode()
subprocess.run(["ip", "link", "set", name, "master", words["--br"], "up"], check=True)
socket.send_fds(socket.socket(fileno=int(words["--fd"])), [b"x"], [tap])
"""


@contextlib.contextmanager
def qemus_tap(pid: int) -> Iterator[list[int]]:
    """Copies of the TAP descriptors a QEMU holds."""
    pidfd = os.pidfd_open(pid)
    libc = ctypes.CDLL(None, use_errno=True)
    found = []
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if str(entry.readlink()) == "/dev/net/tun":
                fd = libc.syscall(SYS_pidfd_getfd, pidfd, int(entry.name), 0)
                assert fd >= 0, os.strerror(ctypes.get_errno())
                found.append(fd)
        yield found
    finally:
        for fd in (pidfd, *found):
            os.close(fd)


def tap_state(fd: int) -> tuple[str, int, int]:
    """Name, flags and send buffer of a TAP."""
    raw, flags = struct.unpack("16sH22x", fcntl.ioctl(fd, TUNGETIFF, bytes(40)))
    (sndbuf,) = struct.unpack("i", fcntl.ioctl(fd, TUNGETSNDBUF, bytes(4)))
    return raw.rstrip(b"\0").decode(), flags, sndbuf


def start(host: KvmdHost, keys: str, name: str = "web", **more: Any) -> int:
    host.guest(name, tiny(host, name, extra=f"[nic.lan]\n{keys}\n", **more))
    host.call("guest.start", name=name)
    return int(host.show(name)["pid"])


def script(host: KvmdHost, name: str, text: str) -> Path:
    path = host.base / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def wait_for(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def links(host: KvmdHost) -> str:
    return host.inside("ip", "-d", "link").stdout


@pytest.fixture
def running(host: KvmdHost) -> KvmdHost:
    host.inside("ip", "link", "add", "br0", "type", "bridge")
    host.inside("ip", "link", "set", "br0", "mtu", "9000", "up")
    host.start()
    return host


@pytest.fixture
def journal(running: KvmdHost) -> Path:
    """Where the scripts `up` and `down` write who they were called for, and whether the TAP was there."""
    seen = running.base / "scripts.log"
    look = "[ -e /sys/class/net/$1 ] && there=there || there=gone"
    script(running, "up", f"{look}; echo up $# $1 $there >> {seen}; ip link set $1 master br0 up")
    script(running, "down", f"{look}; echo down $# $1 $there >> {seen}")
    return seen


def scripts(host: KvmdHost, more: str = "") -> str:
    up, down = host.base / "up", host.base / "down"
    return f'type = "tap"\nifname = "tap7"\nscript = "{up}"\ndownscript = "{down}"\n{more}'


def test_a_tap_by_name_with_its_scripts(running: KvmdHost, journal: Path) -> None:
    pid = start(running, scripts(running, 'sndbuf = "256KiB"\nvnet_hdr = false'))
    assert journal.read_text() == "up 1 tap7 there\n"
    assert "master br0" in running.inside("ip", "link", "show", "tap7").stdout
    assert "alias kvmd::web:lan" in running.inside("ip", "link", "show", "tap7").stdout
    with qemus_tap(pid) as (fd,):
        name, flags, sndbuf = tap_state(fd)
    assert (name, flags & IFF_VNET_HDR, sndbuf) == ("tap7", 0, 256 << 10)
    assert running.call("host.plan")["actions"] == []
    running.call("guest.kill", name="web")
    wait_for(lambda: "down" in journal.read_text(), "the downscript was not run")
    assert journal.read_text() == "up 1 tap7 there\ndown 1 tap7 gone\n"
    assert "tap7" not in links(running)


def test_the_downscript_is_run_after_a_crash_that_kvmd_did_not_see(running: KvmdHost, journal: Path) -> None:
    pid = start(running, scripts(running) + '\n[on]\ncrash = "stay_off"')
    running.kill()
    os.kill(pid, 9)
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "QEMU survived")
    assert "down" not in journal.read_text()
    running.start()
    wait_for(lambda: "down" in journal.read_text(), "the downscript was not run")
    running.call("guest.start", name="web")
    assert [line.split()[0] for line in journal.read_text().splitlines()] == ["up", "down", "up"]


def test_an_adopted_guest_has_its_downscript_at_its_end(running: KvmdHost, journal: Path) -> None:
    start(running, scripts(running))
    running.restart()
    assert "down" not in journal.read_text()
    running.call("guest.kill", name="web")
    wait_for(lambda: "down" in journal.read_text(), "the downscript was not run")
    running.call("guest.start", name="web")
    assert journal.read_text().split("\n")[-2].startswith("up"), "in that order"


def test_a_script_that_fails_keeps_the_guest_off_and_is_quoted(running: KvmdHost, journal: Path) -> None:
    script(running, "up", "echo no such bridge br9 >&2; exit 3")
    with pytest.raises(RemoteError, match="failed with 3: no such bridge br9"):
        start(running, scripts(running))
    assert journal.read_text() == "down 1 tap7 gone\n"
    assert "tap7" not in links(running)


def test_a_script_others_can_write_is_not_run(running: KvmdHost, journal: Path) -> None:
    (running.base / "up").chmod(0o777)
    with pytest.raises(RemoteError, match="others than root can write"):
        start(running, scripts(running))
    assert not journal.exists() and "tap7" not in links(running)


def test_a_tap_that_is_there_is_used_as_it_is_and_stays(running: KvmdHost) -> None:
    running.inside("ip", "tuntap", "add", "tap7", "mode", "tap")
    running.inside("ip", "link", "set", "tap7", "alias", "the office's")
    pid = start(running, 'type = "tap"\nifname = "tap7"')
    with qemus_tap(pid) as (fd,):
        assert tap_state(fd)[0] == "tap7"
    running.call("guest.kill", name="web")
    assert running.namespace
    with inside(Namespace(running.namespace)):
        (held,) = open_queues("tap7", 1, join=True)
    try:
        with pytest.raises(RemoteError, match="tap7: is there, and it is in use"):
            running.call("guest.start", name="web")
    finally:
        os.close(held)
    kept = running.inside("ip", "link", "show", "tap7").stdout
    assert "alias the office's" in kept and "master" not in kept


def test_a_name_that_is_no_tap_is_a_problem_before_a_start(running: KvmdHost) -> None:
    running.guest("web", tiny(running, "web", extra='[nic.lan]\ntype = "tap"\nifname = "br0"\n'))
    running.guest("db", tiny(running, "db", extra='[nic.lan]\ntype = "bridge"\nbr = "br9"\n'))
    said = [problem["message"] for problem in running.call("host.plan")["problems"]]
    assert any('ifname = "br0" is bridge, and no TAP' in message for message in said)
    assert any('there is no bridge "br9"' in message for message in said)
    with pytest.raises(RemoteError, match="br0"):
        running.call("guest.start", name="web")
    assert "bridge" in running.inside("ip", "-d", "link", "show", "br0").stdout


def test_a_port_of_a_bridge_takes_its_mtu_and_several_queues(running: KvmdHost) -> None:
    keys = 'type = "bridge"\nqueues = 2\n[cpu]\nvcpus = 2\nallow_overcommit = true'
    pid = start(running, keys)
    with qemus_tap(pid) as fds:
        assert len(fds) == 2 and all(tap_state(fd)[1] & (IFF_MULTI_QUEUE | IFF_VNET_HDR) for fd in fds)
        port = tap_state(fds[0])[0]
    shown = running.inside("ip", "link", "show", port).stdout
    assert "master br0" in shown and "mtu 9000" in shown and "alias kvmd::web:lan" in shown
    assert "mtu 9000" in running.inside("ip", "link", "show", "br0").stdout


def test_a_helper_makes_the_tap_and_hands_it_over(running: KvmdHost) -> None:
    helper = running.base / "helper"
    helper.write_text(HELPER.format(python=sys.executable))
    helper.chmod(0o755)
    pid = start(running, f'type = "tap"\nhelper = "{helper}"')
    with qemus_tap(pid) as (fd,):
        name, flags, _ = tap_state(fd)
    assert name.startswith("tap") and flags & IFF_VNET_HDR
    shown = running.inside("ip", "link", "show", name).stdout
    assert "master br0" in shown and "alias kvmd::web:lan" in shown
    running.call("guest.kill", name="web")
    assert name not in links(running)
