"""`host kernel-args`: looking, writing, removing, and running the boot loader only when told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from kvmd.cli.kernelargs import draw
from kvmd.cli.main import main
from tests.rig.scripteddaemon import ScriptedDaemon, scripted

PATH = "/etc/default/grub.d/50-kvmd.cfg"


def word(*, enough: bool = False) -> dict[str, Any]:
    return {"key": "isolcpus", "wanted": "isolcpus=2-3", "present": None, "why": "web has CPUs", "enough": enough}


def answer(*words: dict[str, Any], **more: Any) -> dict[str, Any]:
    found = {
        "cmdline": "quiet", "words": list(words), "loader": "grub", "path": PATH, "now": None, "text": "text",
        "command": "update-grub", "problems": [],
    }  # fmt: skip
    return found | more


@pytest.fixture
def daemon(tmp_path: Any) -> Iterator[ScriptedDaemon]:
    with scripted(tmp_path, {}) as found:
        found.answers["host.kernel_args"] = answer(word())
        done = {"line": f"+ {PATH}: isolcpus=2-3", "path": PATH, "command": "update-grub"}
        found.answers["host.write_kernel_args"] = done
        yield found


def cli(daemon: ScriptedDaemon, *words: str) -> int:
    return main(["--run-dir", str(daemon.socket.parent), "host", "kernel-args", *words])


def test_looking_says_what_is_missing_and_exits_10(daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(daemon) == 10
    out = capsys.readouterr().out
    assert out.splitlines()[1].split()[:3] == ["isolcpus=2-3", "-", "missing"]
    assert "now: quiet" in out
    assert f"{PATH}: to be written (--write)" in out
    assert "to make it so: update-grub, and a reboot" in out
    daemon.answers["host.kernel_args"] = answer(word(enough=True), now="text")
    assert cli(daemon) == 0
    assert f"{PATH}: as it should be" in capsys.readouterr().out


def test_writing_asks_first(daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(daemon, "--write") == 4
    assert "--yes" in capsys.readouterr().err
    assert not daemon.asked("host.write_kernel_args")
    assert cli(daemon, "--write", "--dry-run") == 10
    assert not daemon.asked("host.write_kernel_args")
    assert cli(daemon, "--write", "--yes") == 0
    shown = capsys.readouterr()
    assert f"+ {PATH}: isolcpus=2-3" in shown.out
    assert "then: update-grub, and a reboot" in shown.err
    assert daemon.asked("host.write_kernel_args") == [{"remove": False}]
    assert cli(daemon, "--remove", "--yes") == 0
    assert daemon.asked("host.write_kernel_args")[-1] == {"remove": True}


def test_the_boot_loader_is_run_only_when_told(daemon: ScriptedDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(os, "execvp", lambda name, _argv: ran.append(name))
    assert cli(daemon, "--write", "--yes") == 0
    assert ran == []
    assert cli(daemon, "--write", "--update", "--yes") == 0
    assert ran == ["update-grub"]


@pytest.mark.parametrize("words", [("--write", "--remove"), ("--update",)])
def test_what_makes_no_sense(daemon: ScriptedDaemon, words: tuple[str, ...]) -> None:
    assert cli(daemon, *words) == 2


def test_other_loaders_and_nothing_wanted() -> None:
    assert draw(answer(path=None, loader="", command="see your loader"), on=False).splitlines()[0] == (
        "no guest asks anything of the kernel's command line"
    )
    assert "no longer needed (--remove)" in draw(answer(now="old", text=""), on=False)
    shown = draw(answer(word(), problems=[{"message": "clash\x1b", "hint": "change it"}]), on=True)
    assert "! clash\N{REPLACEMENT CHARACTER}\n  change it" in shown
