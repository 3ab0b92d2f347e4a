"""Passes of a running kvmd: many at once, two kvmds on one state, what `plan --reboot` and `status` say of drift."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.rig.guestfiles import LAN, tiny
from tests.rig.kvmdhost import REPO, KvmdHost

pytestmark = pytest.mark.system

NIC = '[nic.lan]\nnetwork = "lan"\n'
KEEP = '[ksm]\nmode = "keep"\n'


def test_ten_reconciles_at_once_are_ten_results_and_nothing_is_done_twice(host: KvmdHost) -> None:
    host.write("host.toml", KEEP)
    host.start()
    host.network("lan", LAN)
    with ThreadPoolExecutor(10) as pool:
        runs = list(pool.map(lambda _: host.cli("--json", "reconcile"), range(10)))
    results = [json.loads(run.stdout) for run in runs]
    done = [outcome["line"] for result in results for outcome in result["outcomes"]]
    assert len(results) == 10 and all(not result["problems"] for result in results)
    assert sorted(done) == sorted(set(done)) and len(done) == 4, done
    assert host.call("host.plan")["actions"] == []


def test_a_reconcile_behind_a_long_pass_waits_or_says_so(host: KvmdHost) -> None:
    host.write("host.toml", KEEP)
    host.guest("slow", tiny(host, "slow", extra='[start]\nauto = true\ndelay = "4s"\n'))
    host.start(wait=False)
    host.wait_ready()  # answers while the boot's own pass waits for the guest's delay
    told = host.cli("--timeout", "1", "reconcile", check=False)
    assert told.returncode == 7 and "no answer within 1 s" in told.stderr, told.stderr
    assert host.cli("reconcile").returncode == 0
    assert host.show("slow")["state"] == "running"
    assert host.call("host.plan")["actions"] == []


def test_a_second_kvmd_on_the_same_state_is_refused(host: KvmdHost) -> None:
    host.write("host.toml", KEEP)
    host.start()
    other = host.base / "run2"
    argv = [sys.executable, "-m", "kvmd.daemon", "--config-dir", str(host.config), "--state-dir", str(host.state)]
    done = subprocess.run(
        [*argv, "--run-dir", str(other)],
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    pid = host.call("daemon.status")["pid"]
    assert done.returncode == 4 and f"another kvmd (pid {pid}) has this state" in done.stderr, done.stderr
    host.restart()  # a killed one holds nothing
    host.call("daemon.ping")


def test_drift_of_three_kinds_and_what_a_reboot_changes(host: KvmdHost) -> None:
    host.write("host.toml", KEEP)
    host.network("lan", LAN)
    host.guest("web", tiny(host, "web", extra=NIC))
    host.start()
    host.call("host.apply")
    host.call("guest.start", name="web")
    drifts = host.call("daemon.status")["drifts"]
    assert drifts == {kind: {"count": 0, "first": []} for kind in ("running", "host", "yielded")}
    refused = host.cli("host", "release", "--yes", check=False)
    assert refused.returncode == 4 and "web needs bridge kvlan" in refused.stderr, refused.stderr
    assert host.call("host.plan")["actions"] == [], "a refused release changes nothing"

    host.guest("web", tiny(host, "web", extra=NIC).replace('size = "32MiB"', 'size = "48MiB"'))
    deadline = time.monotonic() + 30
    while True:  # the new TAP may have called for a pass, which mends it before it is seen
        host.inside("nft", "delete", "table", "inet", "kvmd")
        shown = host.cli("status").stdout
        if "running 1, host 1\n" in shown or time.monotonic() > deadline:
            break
    assert "  web: memory.size\n" in shown and "  + nft table inet kvmd\n" in shown, shown
    host.call("host.reconcile")
    drifts = host.call("daemon.status")["drifts"]
    assert (drifts["running"]["first"], drifts["host"]["count"]) == (["web: memory.size"], 0)

    told = host.cli("plan", "--reboot", check=False)
    assert told.returncode == 10
    for line in ("- guest web: stays off", "+ bridge kvlan", "+ dnsmasq for network lan", "+ nft table inet kvmd"):
        assert line in told.stdout, told.stdout
    done = host.cli("--json", "host", "release", "--partial", "--yes")
    kept = json.loads(done.stdout)["kept"]
    assert any(line.startswith("bridge kvlan: web needs it") for line in kept), kept
    assert host.inside("ip", "link", "show", "kvlan").returncode == 0
    host.call("guest.kill", name="web")
    host.call("host.release")
    assert host.inside("ip", "link", "show", "kvlan").returncode != 0
