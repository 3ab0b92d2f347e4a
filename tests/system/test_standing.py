"""What shall become of a guest and what has: held, waited for, and each of its ends told from the others."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmd.rpc.client import RemoteError
from tests.rig.guestconsole import GuestConsole, GuestSilent
from tests.rig.guestfiles import linux, tiny
from tests.rig.kvmdhost import KvmdHost, kvmd_host

pytestmark = pytest.mark.system
QUICK = '[restart]\nbackoff = "1s"\n'


@pytest.fixture
def host() -> Iterator[KvmdHost]:
    with kvmd_host() as found:
        yield found


def why(host: KvmdHost, name: str) -> Any:
    return host.call("guest.why", name=name)


def test_a_held_guest_is_left_as_it_is_until_someone_says_so(host: KvmdHost) -> None:
    host.guest("web", tiny(host, "web", extra=QUICK))
    host.start()
    host.cli("start", "web")
    assert host.cli("hold", "--reason", "its disk is copied", "web").stdout == "web is held\n"
    assert host.cli("hold", "--reason", "its disk is copied", "web").stdout == "web is held already\n"
    os.kill(host.show("web")["pid"], signal.SIGKILL)
    shown = host.wait_state("web", "failed")
    assert "not restarted: held by root" in shown["reason"]
    assert shown["held"] == "its disk is copied"
    assert "held: its disk is copied" in host.cli("list").stdout
    host.call("host.reconcile")
    host.restart()
    host.call("host.reconcile")
    assert host.show("web")["state"] == "stopped"
    story = host.cli("why", "web").stdout
    assert "its QEMU crashed: QEMU was killed by signal 9" in story
    assert "by root: its disk is copied" in story
    host.cli("unhold", "web")
    host.call("host.reconcile")
    host.wait_state("web", "running")
    host.cli("hold", "web")
    host.cli("kill", "web")
    host.cli("start", "web")  # a person may


def test_waiting_ends_with_what_is_waited_for(host: KvmdHost) -> None:
    host.guest("web", tiny(host, "web"))
    host.start()
    late = host.cli("wait", "--for", "running", "--timeout", "0.3", "web", check=False)
    assert (late.returncode, "web is not running after 0.3 s" in late.stderr) == (7, True)
    host.cli("start", "--no-wait", "web")
    assert "web is running" in host.cli("wait", "--for", "running", "--timeout", "20", "web").stdout
    assert why(host, "web")["answer"] == "it runs"
    host.call("guest.kill", name="web")
    assert host.cli("wait", "web").stdout == "web is stopped already\n"
    found = why(host, "web")
    assert (found["cause"], found["answer"]) == ("admin-kill", "its plug was pulled: killed by root")
    assert (found["wanted"], found["wanted_by"]) == ("stopped", "root")
    assert found["begun_at"] < found["ended_at"]


def test_without_systemd_only_the_file_says_what_starts_with_the_host(host: KvmdHost) -> None:
    host.guest("web", tiny(host, "web"))
    host.guest("auto", tiny(host, "auto", extra="[start]\nauto = true\n"))
    host.start()
    with pytest.raises(RemoteError) as refused:
        host.call("guest.enable", name="web")
    assert (refused.value.slug, refused.value.hint) == ("refused", "kvmd-cli set web start.auto true")
    with pytest.raises(RemoteError) as contrary:
        host.call("guest.disable", name="auto")
    assert (contrary.value.slug, contrary.value.hint) == ("conflict", "kvmd-cli set auto start.auto false")
    assert host.call("guest.enable", name="auto")["changed"] is False


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup with room for next to nothing, of version 1 or 2, whichever this machine has."""
    top = Path("/sys/fs/cgroup")
    first = (top / "memory").is_dir()
    group = (top / "memory" if first else top) / f"kvmd-test-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(48 << 20))
    yield group
    deadline = time.monotonic() + 10
    while True:
        try:
            group.rmdir()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_an_end_for_lack_of_memory_is_told_from_a_kill(host: KvmdHost, small_cgroup: Path) -> None:
    host.guest("hungry", linux("hungry", network=None, extra='[on]\ncrash = "stay_off"\n'))
    host.start()
    host.call("guest.start", name="hungry")
    with GuestConsole(host.run / "guests/hungry/serial-console.sock") as guest:
        guest.wait_ready()
        (small_cgroup / "cgroup.procs").write_text(str(host.show("hungry")["pid"]))
        with contextlib.suppress(GuestSilent, OSError):
            guest.run("memactor hold 120", timeout_s=20)
        host.wait_state("hungry", "failed")
    found = why(host, "hungry")
    assert found["cause"] == "out-of-memory"
    assert found["answer"].startswith("the kernel killed its QEMU: out of memory")
