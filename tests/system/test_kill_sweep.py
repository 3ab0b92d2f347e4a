"""kvmd killed again and again, at moments nobody chose: no guest is harmed, none starts twice, nothing is left."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from kvmd.rpc.client import RemoteError
from tests.rig.guestfiles import LAN, tiny
from tests.rig.kvmdhost import KvmdHost

pytestmark = pytest.mark.system

NIC = '[nic.lan]\nnetwork = "lan"\n'


def _qemus_of(host: KvmdHost, name: str) -> list[int]:
    """Every QEMU that has this guest's UUID."""
    uuid = host.show(name)["uuid"]
    found = []
    for entry in Path("/proc").iterdir():
        try:
            argv = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if uuid and uuid.encode() in argv and b"qemu-system" in argv[0]:
            found.append(int(entry.name))
    return found


def _sweep(host: KvmdHost, rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    host.network("lan", LAN)
    host.guest("rock", tiny(host, "rock", extra=NIC))
    host.guest("a", tiny(host, "a", extra=NIC))
    host.start()
    host.call("host.apply")
    host.call("guest.start", name="rock")
    rock = host.show("rock")["pid"]
    for number in range(rounds):
        verb = chance.choice(["start", "start", "kill", "reconcile"])
        params = {} if verb == "reconcile" else {"name": "a"}
        method = "host.reconcile" if verb == "reconcile" else f"guest.{verb}"
        try:
            if verb == "start":
                host.call(method, **params, wait=False)
            else:
                host.call(method, timeout_s=10, **params)
        except RemoteError as error:
            raise AssertionError(f"round {number} (seed {seed}): {verb}: {error}") from None
        time.sleep(chance.uniform(0, 0.2))
        host.restart()
        host.call("host.reconcile")
        where = f"round {number} (seed {seed}) after {verb}"
        assert host.show("rock")["pid"] == rock, where
        wanted = host.show("a")["wanted"]
        shown = host.wait_state("a", "running" if wanted == "running" else "stopped", 20)
        assert _qemus_of(host, "a") == ([shown["pid"]] if shown["pid"] else []), where
        taps = [
            line for line in host.inside("ip", "-br", "link", "show", "master", "kvlan").stdout.splitlines() if line
        ]
        assert len(taps) == (2 if shown["pid"] else 1), where
    assert host.call("host.plan")["actions"] == []


def test_a_short_sweep(host: KvmdHost) -> None:
    _sweep(host, 4, seed=1)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_a_long_sweep(host: KvmdHost, seed: int) -> None:
    _sweep(host, 40, seed=seed)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_hour_of_life_in_a_few_minutes(host: KvmdHost) -> None:
    """Starts, kills and lists by the hundred: no descriptor, task or memory is kept."""
    host.guest("a", tiny(host, "a"))
    host.start()

    def descriptors() -> int:
        return len(list(Path(f"/proc/{host.call('daemon.status')['pid']}/fd").iterdir()))

    def resident_kib() -> int:
        status = Path(f"/proc/{host.call('daemon.status')['pid']}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))

    for _ in range(20):
        host.call("guest.start", name="a")
        host.call("guest.kill", name="a")
    before, memory = descriptors(), resident_kib()
    for _ in range(150):
        host.call("guest.start", name="a")
        host.call("guest.list")
        host.call("guest.kill", name="a")
    assert descriptors() <= before + 2
    assert resident_kib() < memory + 8192
