"""A starving Linux guest receives its idle neighbour's memory, and the reason can be read afterwards."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from kvmd.effects.sensors import HostSensors
from tests.rig.guestconsole import READY, GuestConsole
from tests.rig.guestfiles import linux
from tests.rig.kvmdhost import KvmdHost

pytestmark = pytest.mark.system

MIB = 1 << 20
SIZE = 384 * MIB
MEMORY = 'guaranteed = "128MiB"\n'


def host_toml(host: KvmdHost, *, mode: str, reserve_bytes: int) -> None:
    """The host as small as `reserve_bytes` makes it."""
    host.write("host.toml", f'[memory]\nreserve = "{reserve_bytes >> 20}MiB"\n[tuning]\nmode = "{mode}"\n')


def balloon(path: Path, target_bytes: int) -> None:
    """Somebody else's hand: the second monitor."""
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(10)
        monitor.connect(str(path))
        stream = monitor.makefile("rwb")
        stream.readline()
        for command in ({"execute": "qmp_capabilities"}, {"execute": "balloon", "arguments": {"value": target_bytes}}):
            stream.write(json.dumps(command).encode() + b"\n")
            stream.flush()
            assert "return" in json.loads(stream.readline())


def guests(host: KvmdHost) -> dict[str, dict[str, Any]]:
    return {guest["name"]: guest for guest in host.call("tune.status")["guests"]}


def wait_for(what: str, found: Any, timeout_s: float, host: KvmdHost) -> float:
    """Seconds until `found()` is true; what the agent thinks is told when it does not come."""
    begin = time.monotonic()
    while not found():
        if time.monotonic() - begin > timeout_s:
            pytest.fail(f"not within {timeout_s} s: {what}\n{host.cli('tune', 'status').stdout}")
        time.sleep(0.5)
    return time.monotonic() - begin


def test_memory_moves_from_the_idle_to_the_starving_guest(host: KvmdHost, life: str) -> None:
    host_toml(host, mode="off", reserve_bytes=0)
    for name in ("idle", "starving"):
        host.guest(name, linux(name, size=f"{SIZE >> 20}MiB", network=None, memory=MEMORY))
    host.start()
    for name in ("idle", "starving"):
        host.call("guest.start", name=name)
    run = host.run / "guests"
    with (
        GuestConsole(run / "idle/serial-console.sock") as idle,
        GuestConsole(run / "starving/serial-console.sock") as starving,
    ):
        for console in (idle, starving):
            console.wait_for(READY, timeout_s=90)
        idle.check("memactor hold 200 && memactor free", timeout_s=60)  # touched once, so that it is real memory
        balloon(run / "starving/rescue.sock", 176 * MIB)
        wait_for("a shrunk balloon", lambda: (starving.memory()["available_kib"] >> 10) < 120, 60, host)
        hungry = (starving.memory()["available_kib"] >> 10) - 16
        starving.check(f"memactor hold {hungry}", timeout_s=60)
        if life == "adopted":
            host.restart()
        sample = HostSensors().host()
        assert sample is not None
        host_toml(host, mode="apply", reserve_bytes=sample.available_bytes + 64 * MIB)
        host.call("host.reconcile")
        took_s = wait_for(
            "relief of the starving guest",
            lambda: (guests(host).get("starving", {}).get("actual_bytes") or 0) >= 216 * MIB,
            60,
            host,
        )
        print(f"relief after {took_s:.1f} s")
        print(host.cli("tune", "status").stdout)
        after = guests(host)
        assert after["idle"]["actual_bytes"] < SIZE - 30 * MIB
        taken = [one for one in host.call("tune.explain", name="idle", limit=50)["decisions"] if one["applied"]]
        assert any("starving wants" in one["why"] for one in taken)
        given = [one for one in host.call("tune.explain", name="starving", limit=50)["decisions"] if one["applied"]]
        assert given
        assert "available in it" in given[0]["why"]
        starving.check("memactor report")
