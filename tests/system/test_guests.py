"""Guests on the real QEMU: born confined, seen as asked, adopted after SIGKILL, stopped, killed, restarted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmd.effects.sysfs import HostTree
from kvmd.rpc.client import RemoteError
from kvmd.unixpath import ShortPath
from tests.rig.guestconsole import LEASE, GuestConsole
from tests.rig.guestfiles import LAN, linux, tiny, tiny_on
from tests.rig.kvmdhost import REPO, KvmdHost
from tests.rig.strict import KVM_IS_REAL

pytestmark = pytest.mark.system


def live(host: KvmdHost, life: str) -> None:
    """Second half of each test: on the kvmd that started the guest, or on the next one after SIGKILL."""
    if life == "adopted":
        host.restart()


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_linux_guest_from_file_to_release(host: KvmdHost, life: str) -> None:
    """The whole walk: network made, guest booted with a lease, adopted, powered off politely, host as before."""
    before = host.inside("ip", "-br", "link").stdout
    host.network("lan", LAN)
    host.guest("web", linux("web", cmdline="kvmd.ip=dhcp"))
    host.start()
    host.call("host.apply")
    assert host.call("host.plan")["actions"] == []
    started = host.call("guest.start", name="web")
    assert (started["state"], started["changed"]) == ("running", True)
    pid = host.show("web")["pid"]
    with GuestConsole(host.run / "guests/web/serial-console.sock") as console:
        console.wait_for(LEASE, timeout_s=90)
        live(host, life)
        shown = host.show("web")
        assert (shown["state"], shown["pid"]) == ("running", pid)
        assert console.run("ping -c1 -W2 192.168.50.1").status == 0
    assert host.call("host.plan")["actions"] == []
    host.call("guest.stop", name="web", timeout_s=60)
    stopped = host.wait_state("web", "stopped")
    assert stopped["pid"] is None
    assert not Path(f"/proc/{pid}").exists() or status_of(pid)["State"].startswith("Z")
    assert host.call("host.plan")["actions"] == []
    host.call("host.release")
    time.sleep(2)  # the pass that a vanished bridge asks for must not make it again
    assert host.call("host.reconcile")["outcomes"] == []
    assert host.inside("ip", "-br", "link").stdout == before
    host.call("host.apply")
    assert "kvlan" in host.inside("ip", "-br", "link").stdout


def test_confinement(host: KvmdHost, life: str) -> None:
    """No root, no capability, seccomp on, nothing open but what was handed over; two guests, two uids."""
    host.guest("a", tiny(host, "a"))
    host.guest("b", tiny(host, "b"))
    host.start()
    uids = set()
    for name in ("a", "b"):
        host.call("guest.start", name=name)
    live(host, life)
    for name in ("a", "b"):
        pid = host.show(name)["pid"]
        status = status_of(pid)
        uid = set(status["Uid"].split())
        assert len(uid) == 1
        uids |= uid
        assert 64100 <= int(uid.pop()) <= 65099
        assert status["CapEff"] == status["CapPrm"] == "0000000000000000"
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        opened = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
        allowed = ("socket:", "pipe:", "anon_inode:", "/dev/null", "/memfd:")
        files = {path for path in opened if not path.startswith(allowed)}
        logs = host.state / "log" / name
        assert files == {str(host.images / f"{name}.img"), str(logs / "qemu.log"), str(logs / "serial-console.log")}
        assert Path(f"/proc/{pid}/environ").read_bytes() == b""
    assert len(uids) == 2


def test_sigterm_touches_no_guest(host: KvmdHost) -> None:
    host.guest("a", tiny(host, "a"))
    host.start()
    host.call("guest.start", name="a")
    before = host.show("a")
    host.terminate()
    assert Path(f"/proc/{before['pid']}").exists()
    host.start()
    after = host.show("a")
    assert (after["pid"], after["state"], after["since"] is not None) == (before["pid"], "running", True)


def test_kill_and_start_again(host: KvmdHost, life: str) -> None:
    host.guest("a", tiny(host, "a"))
    host.start()
    host.call("guest.start", name="a")
    live(host, life)
    first = host.show("a")["pid"]
    assert host.call("guest.kill", name="a") == {"name": "a", "state": "stopped", "changed": True}
    assert host.call("guest.kill", name="a")["changed"] is False
    assert not Path(f"/proc/{first}").exists() or status_of(first)["State"].startswith("Z")
    assert host.call("guest.start", name="a")["state"] == "running"
    assert host.show("a")["pid"] != first


def test_a_hung_qemu_can_be_killed_and_hides_nobody(host: KvmdHost) -> None:
    """SIGSTOP: others are listed and answered at once, and kill needs no word from QEMU."""
    for name in ("a", "b"):
        host.guest(name, tiny(host, name))
    host.start()
    for name in ("a", "b"):
        host.call("guest.start", name=name)
    os.kill(host.show("a")["pid"], signal.SIGSTOP)
    assert {g["name"]: g["state"] for g in host.call("guest.list", timeout_s=2)["guests"]}["b"] == "running"
    with pytest.raises(RemoteError):
        host.call("guest.reset", name="a")
    assert host.show("a")["state"] == "unreachable"
    assert host.call("guest.reset", name="b", timeout_s=2)["changed"]
    host.kill()
    begun = time.monotonic()
    host.start()  # a hung guest keeps a kvmd that comes back from nothing
    assert {g["name"]: g["state"] for g in host.call("guest.list")["guests"]} == {"a": "unreachable", "b": "running"}
    assert time.monotonic() - begun < 4.5  # QMP's own patience alone is 5 s
    assert host.call("guest.kill", name="a", timeout_s=5)["state"] == "stopped"


def test_a_hung_qemu_that_comes_back_is_taken_up_again(host: KvmdHost) -> None:
    host.guest("a", tiny(host, "a"))
    host.start()
    host.call("guest.start", name="a")
    pid = host.show("a")["pid"]
    os.kill(pid, signal.SIGSTOP)
    host.restart()
    host.wait_state("a", "unreachable")
    os.kill(pid, signal.SIGCONT)
    assert host.wait_state("a", "running", 60)["pid"] == pid
    host.wait_placed("a")


def test_crash_is_told_and_restarted_within_its_budget(host: KvmdHost, life: str) -> None:
    host.guest("a", tiny(host, "a", extra='[restart]\nlimit = 1\nwithin = "10min"\n'))
    host.start()
    host.call("guest.start", name="a")
    live(host, life)
    first = host.show("a")["pid"]
    os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while (found := host.show("a"))["pid"] in (first, None) or found["state"] != "running":
        assert time.monotonic() < deadline, host.logs("a")
        time.sleep(0.05)
    os.kill(found["pid"], signal.SIGKILL)
    failed = host.wait_state("a", "failed")
    time.sleep(1.5)
    assert host.show("a")["state"] == "failed"
    assert "restart.limit = 1" in host.show("a")["reason"]
    assert failed["wanted"] == "running"
    assert host.call("host.reconcile")["outcomes"] == []  # the budget holds for cron too
    assert host.call("guest.start", name="a")["state"] == "running"  # a person may


@pytest.mark.parametrize(
    ("name", "text", "slug", "words"),
    [
        ("noimage", 'file = "{images}/none.img"\nformat = "raw"', "not-found", "none.img"),
        ("outside", 'file = "/etc/shadow"\nformat = "raw"', "denied", "/etc/shadow"),
        ("link", 'file = "{images}/link.img"\nformat = "raw"', "denied", "link.img"),
        ("evil", 'file = "{images}/evil.img"\nformat = "qcow2"', "refused", "evil.img"),
    ],
)
def test_a_start_that_cannot_be_changes_nothing(host: KvmdHost, name: str, text: str, slug: str, words: str) -> None:
    (host.images / "link.img").symlink_to("/etc/shadow")
    header = b"QFI\xfb" + (3).to_bytes(4, "big") + (0x200).to_bytes(8, "big") + (11).to_bytes(4, "big")
    (host.images / "evil.img").write_bytes(header.ljust(0x200, b"\0") + b"/etc/shadow" + bytes(4096))
    host.guest(
        name,
        '[machine]\naccel = "tcg"\ndefault_nic = false\n[memory]\nsize = "32MiB"\n[disk.root]\n'
        + text.format(images=host.images),
    )
    host.start()
    with pytest.raises(RemoteError) as error:
        host.call("guest.start", name=name)
    assert error.value.slug == slug, str(error.value)
    assert words in str(error.value)
    shown = host.show(name)
    assert (shown["state"], shown["pid"]) == ("failed", None)
    assert not (host.run / "guests" / name / "qmp.sock").exists()


def test_kvm_is_refused_with_the_fix_where_there_is_none(host: KvmdHost) -> None:
    """A /dev/kvm alone is none: without kvm_intel or kvm_amd it cannot run Linux."""
    if HostTree().kvm_module():
        pytest.skip(KVM_IS_REAL)
    host.guest("a", tiny(host, "a").replace('accel = "tcg"', 'accel = "kvm"'))
    host.guest("b", tiny(host, "b").replace('accel = "tcg"', 'accel = "auto"'))
    host.start()
    with pytest.raises(RemoteError) as error:
        host.call("guest.start", name="a")
    assert error.value.slug == "refused"
    assert "modprobe" in (error.value.hint or "")
    host.call("guest.start", name="b")
    assert any("TCG" in warning or "emulat" in warning for warning in host.show("b")["warnings"])


def test_one_image_has_one_writer(host: KvmdHost) -> None:
    """A second guest on the same image is refused, naming the holder, also after kvmd's own death."""
    host.guest("a", tiny(host, "a"))
    host.start()
    host.call("guest.start", name="a")
    host.restart()
    # Past the check of the files: b's good version has an image of its own, which is then swapped for a's.
    host.guest("b", tiny(host, "b"))
    host.call("host.reconcile")
    (host.images / "b.img").unlink()
    (host.images / "b.img").symlink_to(host.images / "a.img")
    with pytest.raises(RemoteError, match=r"b\.img") as error:
        host.call("guest.start", name="b")
    assert error.value.slug == "denied"
    (host.images / "b.img").unlink()
    (host.images / "a.img").rename(host.images / "b.img")
    with pytest.raises(RemoteError, match="guest a") as error:
        host.call("guest.start", name="b")
    assert error.value.slug == "conflict"


def test_adding_a_disk_moves_nothing(host: KvmdHost) -> None:
    host.guest("a", tiny(host, "a"))
    host.start()
    host.call("guest.start", name="a")
    first = (host.state / "guests/a/identity.toml").read_text()
    host.call("guest.kill", name="a")
    (host.images / "more.img").write_bytes(bytes(1 << 20))
    more = f'[disk.aaa]\nfile = "{host.images}/more.img"\nformat = "raw"\ncache = "writeback"\n'
    host.guest("a", tiny_on(host.images / "a.img", extra=more))
    host.call("host.reconcile")
    host.call("guest.start", name="a")
    second = (host.state / "guests/a/identity.toml").read_text()
    assert set(first.splitlines()) <= set(second.splitlines())
    assert len(second) > len(first)


def test_pending_changes_are_shown_and_not_made(host: KvmdHost) -> None:
    deaf = '[stop]\ntimeout = "1s"\n'  # a boot sector does not hear the power button
    host.guest("a", tiny(host, "a", extra=deaf))
    host.start()
    host.call("guest.start", name="a")
    pid = host.show("a")["pid"]
    host.guest("a", tiny_on(host.images / "a.img", size="48MiB", extra=deaf))
    report = host.call("host.reconcile")
    assert [action["line"] for action in report["skipped"]] == ["~ guest a: restart for memory.size"]
    shown = host.show("a")
    assert (shown["pid"], shown["pending"]) == (pid, ["memory.size"])
    (outcome,) = host.call("host.apply", allow=["guest"])["outcomes"]
    assert "did not power off" in outcome["error"]  # asked, never forced
    assert host.show("a")["pid"] == pid
    host.call("guest.kill", name="a")
    host.call("guest.start", name="a")
    assert host.show("a")["pending"] == []


def test_a_broken_file_runs_from_its_last_good_version(host: KvmdHost) -> None:
    host.guest("a", tiny(host, "a"))
    host.guest("b", tiny(host, "b"))
    host.start()
    host.call("host.reconcile")
    host.guest("a", "[memory]\nsise = '1G'\n")
    plan = host.call("host.plan")
    assert any(fault["file"] == "guests.d/a.toml" and "memory.size" in str(fault) for fault in plan["faults"])
    assert host.call("guest.start", name="a")["state"] == "running"
    assert host.show("a")["stale"] is True
    assert host.call("guest.start", name="b")["state"] == "running"


def test_a_run_directory_may_have_any_length() -> None:
    """A socket's address holds 107 bytes: clients, launchers, monitors and consoles all get along with more."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        Path(scratch).chmod(0o755)
        base = Path(scratch, "x" * 150)
        base.mkdir()
        host = KvmdHost(base)
        try:
            host.guest("deep", tiny(host, "deep"))
            host.start()
            host.call("guest.start", name="deep")
            pid = host.wait_state("deep", "running")["pid"]
            host.restart()
            assert host.wait_state("deep", "running")["pid"] == pid
            assert "deep" in host.cli("list").stdout
            with (
                socket.socket(socket.AF_UNIX) as console,
                ShortPath(host.run / "guests/deep/serial-console.sock") as at,
            ):
                console.connect(at)
            stop = [sys.executable, "-I", "-S", str(REPO / "kvmd/launch.py"), "--stop", str(host.run), "deep"]
            subprocess.run(stop, env={"KVMD_STOP_TIMEOUT_S": "0"}, check=True, timeout=30)
            assert host.wait_state("deep", "stopped")["pid"] is None
        finally:
            host.close()


@pytest.mark.parametrize("delay_ms", [0, 15, 30, 60, 120])
def test_kvmd_killed_at_any_moment_of_a_start(host: KvmdHost, delay_ms: int) -> None:
    """Afterwards the guest is up exactly once, or is brought up by the next reconcile."""
    host.guest("a", tiny(host, "a"))
    host.start()
    host.call("guest.start", name="a", wait=False)
    time.sleep(delay_ms / 1000)
    host.restart()
    host.call("host.reconcile")
    host.wait_state("a", "running", 20)
    host.wait_serial("a", "a is up")
    uuid = host.show("a")["uuid"]
    running = [
        pid.name
        for pid in Path("/proc").iterdir()
        if pid.name.isdigit() and uuid.encode() in _cmdline(pid) and b"qemu-system" in _cmdline(pid)
    ]
    assert running == [str(host.show("a")["pid"])]


def _cmdline(pid: Path) -> bytes:
    try:
        return (pid / "cmdline").read_bytes()
    except OSError:
        return b""


def test_what_others_break_is_mended(host: KvmdHost) -> None:
    """dnsmasq killed, the bridge deleted by hand: kvmd sees it and makes it again, without being asked."""
    host.network("lan", LAN)
    host.start()
    _until(lambda: _plan_is_empty(host))
    first = host.call("host.facts")["dnsmasq"][0]["pid"]
    os.kill(first, signal.SIGKILL)
    _until(lambda: [d["pid"] for d in host.call("host.facts")["dnsmasq"]] not in ([], [first]))
    host.inside("ip", "link", "del", "kvlan")
    _until(lambda: "kvlan" in host.inside("ip", "-br", "link").stdout and _plan_is_empty(host))


def _plan_is_empty(host: KvmdHost) -> bool:
    return host.call("host.plan")["actions"] == []


def _until(reached: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)
