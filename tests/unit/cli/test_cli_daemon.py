"""Commands against a daemon that answers by script: what is asked, what is printed where, and the exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmd.cli import events as events_module
from kvmd.cli.main import main
from kvmd.errors import Conflict, KvmdError, NotFound, ProtocolFault, TimedOut
from tests.rig.scripteddaemon import SILENT, ScriptedDaemon, scripted

REPO = Path(__file__).resolve().parents[3]
SUMMARY: dict[str, Any] = {
    "name": "web",
    "state": "running",
    "reason": None,
    "uuid": "70aa9b3c-8e67-4f23-a8d6-7dcd2f0234e5",
    "pid": 7,
    "vcpus": 2,
    "memory_bytes": 2 << 30,
    "balloon_bytes": None,
    "wanted": "running",
    "since": 100.0,
    "pending": [],
    "stale": False,
    "held": None,
    "observed_at": 100.0,
}
DETAIL = SUMMARY | {
    "description": "shop \x1b[31mfront",
    "owner": "@web-team",
    "tags": ["shop", "prod"],
    "machine": "pc-q35-7.2",
    "accel": "tcg",
    "display": None,
    "disks": [{"name": "root", "file": "/srv/web.img", "format": "raw", "size_bytes": None}],
    "nics": [{"name": "lan", "network": "lan", "mac": "52:54:00:00:00:01", "ipv4": None, "tap": "kv12"}],
    "placement": {"vcpus": ["0", "1"], "emulator": "2-3"},
    "warnings": ["runs emulated"],
    "argv": ["/usr/bin/qemu", "-S", "-name", "web"],
    "log_dir": "/nowhere",
}
KNOB = {"kind": "write-knob", "line": "~ /sys/x: 0 -> 1", "why": "ksm.mode", "disruption": "none", "when": "now"}
STOP = {
    "kind": "stop-guest",
    "line": "- guest web: stop",
    "why": "wanted stopped",
    "disruption": "guest",
    "when": "guest-restart",
}
NET = {
    "kind": "ensure-bridge",
    "line": "~ bridge kvlan: mtu",
    "why": "networks.d",
    "disruption": "network",
    "when": "network",
}
FAULT = {
    "file": "guests.d/web.toml",
    "line": 14,
    "key": "memory.sise",
    "message": "unknown key",
    "hint": "did you mean memory.size?",
    "severity": "error",
}
PROBLEM = {
    "subject": "hugepages 2MiB",
    "message": "512 wanted, 300 had",
    "hint": "free memory",
    "guests": ["web"],
    "needs": None,
}
KINDS = [
    k for k in (KvmdError, *KvmdError.__subclasses__()) if k.__module__ == "kvmd.errors" and k is not ProtocolFault
]
ADMISSION = {
    "guest": "web",
    "rule": "strict",
    "own_bytes": 1 << 30,
    "others_bytes": 0,
    "others": 0,
    "limit_bytes": 4 << 30,
    "remaining_bytes": 3 << 30,
    "terms": "5 GiB RAM - 1 GiB reserve",
    "note": None,
    "admitted": True,
    "line": "web 1 GiB of 4 GiB (5 GiB RAM - 1 GiB reserve): 3 GiB remain (rule strict)",
}
VERBS = ("start", "stop", "kill", "reboot", "reset")


def plan(
    *actions: Any, problems: Any = (), yielded: Any = (), admissions: Any = (), faults: Any = ()
) -> dict[str, Any]:
    return {
        "actions": list(actions),
        "problems": list(problems),
        "yielded": list(yielded),
        "admissions": list(admissions),
        "faults": list(faults),
    }


def applied(*done: Any, skipped: Any = (), faults: Any = ()) -> dict[str, Any]:
    outcomes = [action | {"error": error} for action, error in done]
    return {"outcomes": outcomes, "skipped": list(skipped), "problems": [], "yielded": [], "faults": list(faults)}


def known(params: dict[str, Any]) -> Any:
    if params["name"] != "web":
        return NotFound(f"no guest is called {params['name']}", hint="did you mean web?")
    return DETAIL


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[ScriptedDaemon]:
    done = {"name": "web", "state": "running", "changed": True}
    answers: dict[str, Any] = {f"guest.{verb}": done for verb in VERBS}
    answers |= {"guest.list": {"guests": [SUMMARY]}, "guest.show": known, "host.plan": plan()}
    with scripted(tmp_path, answers) as found:
        yield found


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody at a terminal."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.delenv("KVMD_SOCKET", raising=False)


def cli(daemon: ScriptedDaemon, *words: str) -> int:
    return main(["--run-dir", str(daemon.socket.parent), *words])


class TestResults:
    def test_json_is_the_api_s_answer(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli(daemon, "list", "--json") == 0
        assert json.loads(capsys.readouterr().out) == {"guests": [SUMMARY]}
        assert cli(daemon, "--json", "show", "web") == 0
        assert json.loads(capsys.readouterr().out) == DETAIL

    def test_show_has_all_and_strips_what_a_terminal_obeys(
        self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli(daemon, "dominfo", "web") == 0
        out = capsys.readouterr().out
        for word in (
            "web: running",
            "shop \ufffd[31mfront",
            "/srv/web.img",
            "52:54:00:00:00:01",
            "vCPU 1 on 1",
            "@web-team",
            "shop, prod",
            "! runs",
        ):
            assert word in out

    @pytest.mark.parametrize("verb", VERBS)
    def test_verbs(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str], verb: str) -> None:
        assert cli(daemon, verb, "web") == 0
        assert capsys.readouterr().out == "web is running\n"
        assert daemon.asked(f"guest.{verb}")[0]["name"] == "web"

    @pytest.mark.parametrize("verb", [*VERBS, "restart"])
    def test_dry_run_asks_for_nothing(
        self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str], verb: str
    ) -> None:
        assert cli(daemon, verb, "web", "--dry-run") == 0
        seen = capsys.readouterr()
        assert [method for method, _ in daemon.calls] == ["guest.show"]
        if verb == "start":
            assert (seen.out, seen.err) == ("", "web is running: nothing to do\n")
        else:
            assert seen.out.endswith(f"guest web: {verb}  (asked for; it is running)\n")

    def test_a_dry_start_shows_the_sum_that_decides(
        self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        known: Any = daemon.answers["guest.show"]
        stopped = known({"name": "web"}) | {"state": "stopped"}
        daemon.answers |= {"guest.show": stopped, "host.admission": {"admissions": [ADMISSION]}}
        assert cli(daemon, "start", "web", "--dry-run") == 0
        assert daemon.asked("host.admission") == [{"names": ["web"]}]
        assert capsys.readouterr().out == (
            f"+ guest web: start  (asked for; it is stopped)\nmemory:\n  {ADMISSION['line']}\n"
        )

    def test_restart_is_stop_and_start(self, daemon: ScriptedDaemon) -> None:
        assert cli(daemon, "restart", "web", "--force") == 0
        assert [method for method, _ in daemon.calls] == ["guest.stop", "guest.start"]
        assert daemon.asked("guest.stop")[0]["force"] is True

    def test_stop_s_timeout_is_the_guest_s(self, daemon: ScriptedDaemon) -> None:
        assert cli(daemon, "shutdown", "web", "--timeout", "2min") == 0
        assert daemon.asked("guest.stop") == [{"name": "web", "force": False, "timeout_s": 120.0}]

    def test_no_wait(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
        monkeypatch.setattr("kvmd.cli.guests.BEGUN_S", 0.05)
        assert cli(daemon, "start", "web", "--no-wait") == 0
        assert daemon.asked("guest.start")[0]["wait"] is False
        daemon.answers["guest.stop"] = SILENT
        assert cli(daemon, "stop", "web", "--no-wait") == 0
        assert capsys.readouterr().out.endswith("web is stopping\n")
        daemon.answers["guest.stop"] = Conflict("protected")
        assert cli(daemon, "stop", "web", "--no-wait") == 4

    def test_argv(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli(daemon, "argv", "web") == 0
        seen = capsys.readouterr()
        assert seen.out == "/usr/bin/qemu \\\n  -S \\\n  -name web\n"
        assert "pid 7" in seen.err

    def test_status_facts_tune_and_explain(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
        decision = {
            "time": 5.0, "action": "inflate", "guest": "web", "from_bytes": 2 << 30, "to_bytes": 1 << 30,
            "why": "db starves", "considered": ["nas: busy"], "limited_by": "the floor", "expected": "1 GiB",
            "seen": None, "applied": False,
        }  # fmt: skip
        row = {
            "name": "web", "eligible": True, "reason": None, "actual_bytes": 2 << 30, "used_bytes": 1 << 30,
            "available_bytes": 1 << 30, "target_bytes": None, "floor_bytes": 1 << 29, "pressed": False,
        }  # fmt: skip
        host = {"available_bytes": 1 << 30, "usable_bytes": 4 << 30, "why": "quiet"}
        value = {"key": "cpu.model", "value": "max", "reason": "without KVM"}
        daemon.answers |= {
            "daemon.status": {
                "version": "9", "pid": 1, "since": 0.0, "supervisor": "direct", "guests_total": 2, "guests_running": 1,
                "faults": [FAULT], "networks": [{"name": "lan", "mode": "nat", "bridge": "kvlan", "state": "up"}],
                "drift": 7, "tuning_mode": "advise",
                "drifts": {
                    "running": {"count": 1, "first": ["web: memory.size"]},
                    "host": {"count": 7, "first": ["~ /sys/x: 0 -> 1", "b", "c", "d", "e"]},
                    "yielded": {"count": 0, "first": []},
                },
            },
            "host.facts": {"memory": {"total_bytes": 1 << 30}},
            "tune.status": {"mode": "advise", "host_state": "OK", "host": host, "guests": [row], "last": [decision]},
            "tune.explain": {"decisions": [decision]},
            "guest.explain": {"values": [value]},
            "daemon.version": {"version": "9"},
        }  # fmt: skip
        for line, words in (
            (
                "status",
                [
                    "1 of 2 run",
                    "running 1, host 7\n",
                    "kvlan",
                    "guests.d/web.toml:14",
                    "  web: memory.size\n",
                    "  ~ /sys/x: 0 -> 1\n",
                    "  and 2 more",
                ],
            ),
            ("host facts", ["total_bytes: 1 GiB"]),
            ("tune status", ["mode advise, host OK (quiet)", "512 MiB", "inflate web: 2 GiB -> 1 GiB  [advice only]"]),
            ("tune explain web", ["db starves", "considered: nas: busy", "limited by: the floor"]),
            ("explain web", ["cpu.model  max", "never below 512 MiB"]),
            ("version", ["kvmd 9"]),
        ):
            assert cli(daemon, *line.split()) == 0, line
            out = capsys.readouterr().out
            for word in words:
                assert word in out, (line, out)
        assert cli(daemon, "tune", "explain", "web", "--limit", "0") == 2


class TestPasses:
    def test_plan_exits_10_when_there_is_something(
        self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli(daemon, "plan") == 0
        daemon.answers["host.plan"] = plan(faults=[FAULT])
        assert cli(daemon, "plan") == 8
        daemon.answers["host.plan"] = plan(KNOB, problems=[PROBLEM])
        capsys.readouterr()
        assert cli(daemon, "plan") == 10
        seen = capsys.readouterr()
        assert seen.out == "now, disturbs nobody:\n  ~ /sys/x: 0 -> 1  (ksm.mode)\n"
        assert seen.err == "! hugepages 2MiB: 512 wanted, 300 had\n    hint: free memory\n"
        assert cli(daemon, "plan", "--json") == 10
        assert json.loads(capsys.readouterr().out) == daemon.answers["host.plan"]

    def test_plan_shows_what_waits_for_a_reboot_and_what_is_somebody_else_s(
        self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        waiting = PROBLEM | {"subject": "hugepages 1GiB", "needs": "reboot"}
        knob = {"path": "/sys/x", "ours": "1", "theirs": "0", "why": "ksm.mode is kvmd"}
        daemon.answers["host.plan"] = plan(problems=[waiting, PROBLEM], yielded=[knob])
        assert cli(daemon, "plan") == 0
        seen = capsys.readouterr()
        assert seen.out.splitlines()[:2] == [
            "only after a reboot of the host:",
            "  ! hugepages 1GiB: 512 wanted, 300 had",
        ]
        assert "hugepages 1GiB" not in seen.err and "! hugepages 2MiB" in seen.err
        assert "= /sys/x: 0, left to whoever set it; kvmd wrote 1" in seen.err
        assert cli(daemon, "apply", "--dry-run") == 0
        assert [asked["retake"] for asked in daemon.asked("host.plan")[1:]] == [True]

    def test_plan_for_a_reboot(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
        found = plan(KNOB) | {"reboot": []}
        daemon.answers["host.plan"] = found
        assert cli(daemon, "plan", "--reboot") == 0
        assert capsys.readouterr() == ("", "a reboot changes nothing\n")
        found["reboot"] = [
            {"kind": "remade", "line": "+ bridge kvlan", "why": "networks.d"},
            {"kind": "guest", "line": "+ guest db: starts", "why": "start.auto"},
        ]
        assert cli(daemon, "plan", "--reboot") == 10
        assert capsys.readouterr().out == (
            "guests that start, or do not come back:\n  + guest db: starts  (start.auto)\n"
            "gone with the boot, made again by kvmd:\n  + bridge kvlan  (networks.d)\n"
        )
        assert [asked["reboot"] for asked in daemon.asked("host.plan")] == [True, True]

    def test_apply_without_a_person_refuses_what_disturbs(
        self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        daemon.answers["host.plan"] = plan(KNOB, STOP)
        assert cli(daemon, "apply") == 4
        assert "guest web: stop" in capsys.readouterr().err
        assert not daemon.asked("host.apply")
        assert cli(daemon, "apply", "--prune") == 4

    def test_apply_allows_what_was_shown_and_no_more(self, daemon: ScriptedDaemon) -> None:
        daemon.answers |= {"host.plan": plan(KNOB, STOP, NET), "host.apply": applied((KNOB, None), (STOP, None))}
        assert cli(daemon, "apply", "--yes") == 0
        assert daemon.asked("host.apply") == [{"allow": ["guest", "network"], "prune": False}]

    def test_prune_allows_what_it_will_find(self, daemon: ScriptedDaemon) -> None:
        daemon.answers["host.apply"] = applied()
        assert cli(daemon, "apply", "--prune", "--yes") == 0
        assert daemon.asked("host.apply") == [{"allow": ["guest", "host", "network"], "prune": True}]

    def test_apply_of_harmless_things_needs_nobody(self, daemon: ScriptedDaemon) -> None:
        daemon.answers |= {"host.plan": plan(KNOB), "host.apply": applied((KNOB, None))}
        assert cli(daemon, "apply") == 0
        assert daemon.asked("host.apply") == [{"allow": [], "prune": False}]

    def test_apply_exits_9_when_some_failed(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
        failing = applied((KNOB, "the kernel\x1b says no"), (NET, None))
        daemon.answers |= {"host.plan": plan(KNOB), "host.apply": failing}
        assert cli(daemon, "apply", "--yes") == 9
        assert "failed: the kernel\ufffd says no" in capsys.readouterr().out

    def test_apply_with_nothing_to_do(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli(daemon, "apply", "--json") == 0
        assert json.loads(capsys.readouterr().out) == {
            name: [] for name in ("outcomes", "skipped", "problems", "yielded", "faults")
        }
        assert not daemon.asked("host.apply")

    def test_dry_runs_only_plan(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
        daemon.answers["host.plan"] = plan(KNOB, STOP)
        assert cli(daemon, "apply", "--dry-run", "--yes") == 0
        assert "guest web" in capsys.readouterr().out
        assert cli(daemon, "reconcile", "--dry-run") == 0
        assert "guest web" not in capsys.readouterr().out
        assert {method for method, _ in daemon.calls} == {"host.plan"}

    def test_reconcile_is_silent_when_nothing_was_done(
        self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        daemon.answers["host.reconcile"] = applied(skipped=[STOP])
        assert cli(daemon, "reconcile") == 0
        assert capsys.readouterr() == ("", "")
        daemon.answers["host.reconcile"] = applied((KNOB, None), skipped=[STOP])
        assert cli(daemon, "reconcile") == 0
        seen = capsys.readouterr()
        assert (seen.out, "kvmd-cli apply" in seen.err) == ("~ /sys/x: 0 -> 1  (ksm.mode)\n", True)
        assert cli(daemon, "reconcile", "--quiet") == 0
        assert capsys.readouterr() == ("", "")
        daemon.answers["host.reconcile"] = applied((KNOB, "no"), (NET, None))
        assert cli(daemon, "reconcile", "-q") == 9
        assert capsys.readouterr().out == "~ /sys/x: 0 -> 1  (ksm.mode)\n    failed: no\n"

    def test_release_asks(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
        daemon.answers["host.release"] = {"restored": ["- bridge kvlan"], "kept": ["x is y"]}
        assert cli(daemon, "host", "release") == 4
        assert not daemon.asked("host.release")
        assert cli(daemon, "host", "release", "--yes") == 0
        seen = capsys.readouterr()
        assert seen.out == "- bridge kvlan\n"
        assert "kept: x is y" in seen.err


class TestEvents:
    def script(self, daemon: ScriptedDaemon) -> None:
        daemon.events = [
            {
                "cursor": 100 + n,
                "time": 50.0 + n,
                "type": "guest.running",
                "guest": guest,
                "actor": "root",
                "data": {"n": n},
            }
            for n, guest in enumerate(["web", "db", "web\x1b"])
        ]

    def test_ends_with_the_newest_there_was(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
        self.script(daemon)
        assert cli(daemon, "events") == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[2] for line in lines] == ["100", "101", "102"]
        assert lines[2].endswith("guest.running  web\ufffd  by root  n=2")
        assert cli(daemon, "events", "--since", "100", "--json", "db") == 0
        found = json.loads(capsys.readouterr().out)
        assert [event["guest"] for event in found["events"]] == ["db"]
        assert found["cursor"] == 102

    def test_nothing_newer(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
        self.script(daemon)
        assert cli(daemon, "events", "--since", "102") == 0
        assert capsys.readouterr().out == ""

    def test_since_a_time(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
        self.script(daemon)
        monkeypatch.setattr(events_module.time, "time", lambda: 61.0)
        assert cli(daemon, "events", "--since", "10s") == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
        assert cli(daemon, "events", "--since", "yesterday") == 2

    def test_what_is_no_longer_kept_is_said(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
        self.script(daemon)

        def subscribe(params: dict[str, Any]) -> Any:
            if 0 <= params.get("since", 100) < 99:
                return Conflict("no longer kept", cursor=102, oldest=100)
            return {"subscription": "s1", "cursor": 102}

        daemon.answers["events.subscribe"] = subscribe
        assert cli(daemon, "events", "--since", "5") == 0
        seen = capsys.readouterr()
        assert len(seen.out.splitlines()) == 3
        assert "before 100" in seen.err


class TestExitCodes:
    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
    def test_of_every_error_of_the_daemon(
        self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str], kind: type[KvmdError]
    ) -> None:
        daemon.answers["guest.list"] = kind("what failed\x1b", hint="do this")
        assert cli(daemon, "list") == kind.exit_code
        seen = capsys.readouterr()
        assert seen.out == ""
        assert seen.err == "kvmd-cli: what failed\ufffd\n  hint: do this\n"

    def test_an_error_in_json_is_one_document(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli(daemon, "show", "wbe", "--json") == 3
        seen = capsys.readouterr()
        error = json.loads(seen.out)["error"]
        assert (error["data"]["slug"], error["data"]["hint"]) == ("not-found", "did you mean web?")
        assert "no guest is called wbe" in seen.err

    def test_of_several_guests(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
        def kill(params: dict[str, Any]) -> Any:
            name = params["name"]
            return {"name": name, "state": "stopped", "changed": True} if name == "web" else NotFound(f"no {name}")

        daemon.answers["guest.kill"] = kill
        assert cli(daemon, "destroy", "web", "a", "b") == 9
        seen = capsys.readouterr()
        assert (seen.out, seen.err) == ("web is stopped\n", "kvmd-cli: no a\nkvmd-cli: no b\n")
        assert cli(daemon, "kill", "a", "b") == 3
        daemon.answers["guest.kill"] = lambda params: TimedOut("t") if params["name"] == "a" else NotFound("n")
        assert cli(daemon, "kill", "a", "b") == 9

    def test_nobody_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--socket", str(tmp_path / "none"), "list"]) == 6
        assert "systemctl start kvmd" in capsys.readouterr().err

    def test_no_answer_in_time(self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
        daemon.answers["guest.list"] = SILENT
        assert cli(daemon, "list", "--timeout", "0.1") == 7
        assert "--timeout" in capsys.readouterr().err

    @pytest.mark.parametrize("words", ["strat", "start", "list --frob", "disk add web", "list --timeout soon"])
    def test_usage(self, daemon: ScriptedDaemon, words: str) -> None:
        assert cli(daemon, *words.split()) == 2
        assert daemon.calls == []

    @pytest.mark.parametrize("name", ["a/b", "Web", "", "-a", "a-", "w\x1b[2Jeb", "web\n", "ü", "a" * 48, "a_b", "a.b"])
    def test_a_name_that_can_be_no_guest_s(
        self, daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        assert cli(daemon, "show", "--", name) == 2
        seen = capsys.readouterr().err
        assert "no guest can be called" in seen
        assert "\x1b" not in seen
        assert daemon.calls == []

    def test_interrupted(self, daemon: ScriptedDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_args: Any, **_kwargs: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr("kvmd.rpc.client.Client.call", interrupt)
        assert cli(daemon, "list") == 130

    def test_the_reader_has_gone(self, daemon: ScriptedDaemon) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        argv = [sys.executable, "-m", "kvmd.cli.main", "list", "--socket", str(daemon.socket)]
        with os.fdopen(writer, "wb") as out:
            done = subprocess.run(argv, stdout=out, stderr=subprocess.PIPE, cwd=REPO, check=False)
        assert (done.returncode, done.stderr) == (0, b"")


def test_the_environment_names_a_socket(daemon: ScriptedDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMD_SOCKET", str(daemon.socket))
    assert main(["list"]) == 0
    assert main(["--socket", "/nowhere", "list"]) == 6


def test_it_starts_on_little(daemon: ScriptedDaemon) -> None:
    """`list` must not pay for the daemon's dependencies, nor for argparse (13 ms), asyncio (45), dataclasses (8)."""
    argv = [sys.executable, "-X", "importtime", "-m", "kvmd.cli.main", "list", "--socket", str(daemon.socket)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=REPO, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "kvmd.rpc.client" in loaded
    heavy = {"pydantic", "pyroute2", "qemu", "asyncio", "argparse", "dataclasses", "tomlkit", "difflib", "inspect"}
    assert not {name.split(".")[0] for name in loaded} & heavy
    assert {name for name in loaded if name.startswith("kvmd.")} <= {
        "kvmd.cli", "kvmd.cli.arguments", "kvmd.cli.session", "kvmd.cli.verbs", "kvmd.cli.guests", "kvmd.cli.render",
        "kvmd.rpc", "kvmd.rpc.client", "kvmd.errors", "kvmd.unixpath",
    }  # fmt: skip
