"""`scripts/demo` as an integration test: it proves every step and leaves the machine as it was, also after Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.rig.demo import Demo, main, need
from tests.rig.machinestate import Memory, Net, differences, machine_lock, processes_about

REPO = Path(__file__).resolve().parents[2]
STEPS = 10

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


def demo() -> subprocess.Popen[str]:
    """The script as a user starts it, except that what it needs is there already."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.Popen(
        [REPO / "scripts/demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
        env=environment,
        start_new_session=True,
    )


def test_every_step_is_proved_and_the_machine_is_as_before() -> None:
    net = Net.observe()
    with demo() as running:
        said, _ = running.communicate(timeout=500)
    assert running.returncode == 0, said
    assert re.findall(r"^ ?(\d+)\. ", said, re.MULTILINE) == [str(number + 1) for number in range(STEPS)]
    for words in (
        "2 MiB pages: ",
        "userspace is up in all three",
        "hello 203.0.113.2",
        "KernelPageSize: 2048 kB",
        "take idle: ",
        "give hungry: ",
        "hungry holds all the",
        "planning again finds nothing to do",
        "the same processes",
        "no process is left",
        "This machine is as before.",
    ):
        assert words in said, words
    assert differences(net, Net.observe()) == []


@pytest.mark.parametrize("moment", [" 3. ", " 4. "])
def test_ctrl_c_leaves_nothing(moment: str) -> None:
    """In the middle of preparing the host, and of booting the guests."""
    with machine_lock():
        memory, net, begun = Memory.observe(), Net.observe(), time.monotonic()
    with demo() as running:
        assert running.stdout
        said = ""
        for line in running.stdout:
            said += line
            if line.startswith(moment):
                break
        assert running.poll() is None, said
        os.killpg(running.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches everything in the foreground
        rest, _ = running.communicate(timeout=60)
    assert running.returncode == 130, said + rest
    assert "interrupted" in rest
    with machine_lock():
        assert differences(memory, Memory.observe()) == []
    assert differences(net, Net.observe()) == []
    assert processes_about("/var/tmp/kvmd-demo") == []
    assert time.monotonic() - begun < 120


def test_a_step_that_fails_is_loud_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pages are reserved and the network is up when it happens; the reason and the daemon's last words are told."""
    with machine_lock():
        memory, net = Memory.observe(), Net.observe()
    monkeypatch.setattr(Demo, "boot", lambda _demo: need(False, "no guest boots today"))
    assert main() == 1
    said = capsys.readouterr()
    assert "demo: FAILED: no guest boots today" in said.err
    assert "--- kvmd.log" in said.err
    assert "+ bridge kvlan" in said.err
    with machine_lock():
        assert differences(memory, Memory.observe()) == []
    assert differences(net, Net.observe()) == []
    assert processes_about("/var/tmp/kvmd-demo") == []
