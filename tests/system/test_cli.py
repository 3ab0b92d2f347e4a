"""kvmd-cli as a user runs it, against a real daemon with real guests."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvmd.cli.completion import script
from kvmd.cli.verbs import VERBS
from tests.rig.guestconsole import POWERBUTTON, GuestConsole
from tests.rig.guestfiles import LAN, linux, tiny, tiny_on
from tests.rig.kvmdhost import REPO, KvmdHost

pytestmark = pytest.mark.system
KEEP_KSM = '[ksm]\nmode = "keep"\n'  # page merging is the whole machine's: others may be testing it
DEAF = '[stop]\ntimeout = "1s"\n'  # a boot sector does not hear the power button


def run(host: KvmdHost, *words: str) -> tuple[int, str, str]:
    done = host.cli(*words, check=False)
    return done.returncode, done.stdout, done.stderr


def spawn(host: KvmdHost, *words: str, **options: object) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "kvmd.cli.main", "--config-dir", str(host.config), "--state-dir", str(host.state)]
    argv += ["--run-dir", str(host.run), *words]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(argv, env=environment, **options)  # type: ignore[call-overload,no-any-return]


def read_until(fd: int, text: bytes, timeout_s: float = 20.0) -> bytes:
    """What comes from `fd` until `text` has come."""
    seen, deadline = b"", time.monotonic() + timeout_s
    while text not in seen:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"never came: {text!r}; came: {seen!r}"
        seen += os.read(fd, 4096)
    return seen


def test_the_first_guest_in_a_few_commands(host: KvmdHost) -> None:
    """init, create, check, plan (10), apply, plan (0), start: what the README promises."""
    image = host.images / "web.img"
    tiny(host, "web")
    code, out, _ = run(host, "init")
    assert code == 0
    assert "lan.toml" in out
    host.start()
    host.cli("create", "web", "--image", str(image), "--memory", "32MiB", "--accel", "tcg")
    assert run(host, "check")[0] == 0
    assert run(host, "start", "web")[:2] == (0, "web is running\n")
    host.wait_serial("web", "web is up")
    code, out, _ = run(host, "list")
    assert code == 0
    assert out.splitlines()[1].split()[:2] == ["web", "running"]
    assert json.loads(host.cli("list", "--json").stdout) == host.call("guest.list")
    assert "web is up" in host.cli("logs", "web").stdout
    assert run(host, "destroy", "web")[:2] == (0, "web is stopped\n")


def test_plan_apply_and_the_empty_second_plan(host: KvmdHost) -> None:
    host.write("host.toml", KEEP_KSM)
    host.start()
    host.network("lan", LAN)
    code, out, _ = run(host, "plan")
    assert code == 10
    assert "+ bridge kvlan 192.168.50.1/24" in out
    assert "(" in out
    assert json.loads(run(host, "plan", "--json")[1])["actions"] == host.call("host.plan")["actions"]
    assert run(host, "apply", "--dry-run")[0] == 0
    assert run(host, "plan")[0] == 10
    assert run(host, "apply", "--yes")[0] == 0
    assert run(host, "plan")[:2] == (0, "")
    assert run(host, "reconcile") == (0, "", "")
    code, out, _ = run(host, "status")
    assert code == 0
    assert "kvlan" in out
    code, out, _ = run(host, "host", "release", "--dry-run")
    assert code == 0
    assert "- bridge kvlan" in out
    assert run(host, "host", "release")[0] == 4
    code, out, _ = run(host, "host", "release", "--yes")
    assert code == 0
    assert "- bridge kvlan" in out
    assert "kvlan" not in host.inside("ip", "-br", "link").stdout


def test_set_is_pending_until_a_restart(host: KvmdHost) -> None:
    host.guest("web", tiny(host, "web", extra=DEAF))
    host.write("host.toml", KEEP_KSM)
    host.start()
    host.cli("start", "web")
    code, out, err = run(host, "set", "web", "memory.size", "48MiB")
    assert (code, out) == (0, '~ guests.d/web.toml: memory.size: "32MiB" -> "48MiB"  (restart)\n')
    assert run(host, "plan")[0] == 10
    assert "pending: memory.size" in host.cli("list").stdout
    code, _, err = run(host, "apply")
    assert code == 4
    assert "restart for memory.size" in err
    assert host.show("web")["pending"] == ["memory.size"]
    assert run(host, "restart", "web", "--force", "--timeout", "1")[0] == 0
    assert "48 MiB" in host.cli("show", "web").stdout
    assert run(host, "plan")[:2] == (0, "")


def test_argv_and_explain_of_running_and_stopped(host: KvmdHost) -> None:
    host.guest("web", tiny(host, "web"))
    host.start()
    code, stopped, err = run(host, "argv", "web")
    assert code == 0
    assert "would be" in err
    host.cli("start", "web")
    running = host.cli("argv", "web")
    assert "as it was started" in running.stderr
    assert running.stdout == stopped  # the preview is the truth, fd numbers and all
    assert json.loads(host.cli("argv", "web", "--json").stdout)["argv"] == host.show("web")["argv"]
    assert "pinned at the first start" in host.cli("explain", "web").stdout
    host.terminate()
    assert host.cli("argv", "web").stdout == stopped


def test_exit_codes(host: KvmdHost) -> None:
    """Each of the fixed ones, from the real daemon."""
    assert run(host, "list")[0] == 6
    host.guest("web", tiny(host, "web", extra=DEAF + '[guest]\nprotect = ["delete"]\n'))
    host.write("host.toml", KEEP_KSM)
    host.start()
    code, _, err = run(host, "show", "wbe")
    assert code == 3
    assert "did you mean web?" in err
    assert run(host, "reset", "web")[0] == 4
    host.cli("start", "web")
    code, _, err = run(host, "stop", "web")
    assert code == 7
    assert "--force" in err
    assert host.show("web")["state"] == "running"
    assert run(host, "stop", "web", "nope", "--force", "--timeout", "0.2")[0] == 9
    assert run(host, "strat", "web")[0] == 2
    assert run(host, "show", "web/../web")[0] == 2
    host.guest("web", "[memory]\nsise = '1G'\n")
    code, out, _ = run(host, "check")
    assert code == 8
    assert "guests.d/web.toml:2: memory.sise: unknown key (did you mean memory.size?)" in out
    code, _, err = run(host, "plan")
    assert code in (8, 10)
    assert "guests.d/web.toml:2" in err


def test_somebody_without_a_role_is_denied(host: KvmdHost) -> None:
    host.start()
    argv = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", sys.executable, "-m", "kvmd.cli.main"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"}
    host.base.chmod(0o755)
    argv += ["--run-dir", str(host.run), "--config-dir", str(host.config)]
    done = subprocess.run([*argv, "list"], capture_output=True, text=True, env=environment, check=False, cwd="/")
    assert done.returncode == 5, done.stderr
    done = subprocess.run([*argv, "check"], capture_output=True, text=True, env=environment, check=False, cwd="/")
    assert done.returncode == 0, done.stderr  # needs neither daemon nor root
    done = subprocess.run([*argv, "console", "web"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode in (3, 5), done.stderr


def test_events_once_and_followed(host: KvmdHost) -> None:
    host.guest("web", tiny(host, "web"))
    host.start()
    host.cli("start", "web")
    found = json.loads(host.cli("events", "web", "--since", "1h", "--json").stdout)
    assert [event["type"] for event in found["events"]][-1] == "guest.running"
    follower = spawn(host, "events", "-f", "--json", "--since", str(found["cursor"]), stdout=subprocess.PIPE)
    assert follower.stdout is not None
    try:
        host.cli("kill", "web")
        seen = read_until(follower.stdout.fileno(), b'"guest.stopped"')
        assert all(json.loads(line) for line in seen.splitlines())
    finally:
        follower.send_signal(signal.SIGINT)
        assert follower.wait(timeout=10) == -signal.SIGINT  # 130 in a shell
        follower.stdout.close()


def test_console_through_a_terminal(host: KvmdHost) -> None:
    """Raw bytes both ways, ^] leaves, the terminal is as before, the guest goes on; also without the daemon."""
    host.guest("web", linux("web", network=None))
    host.start()
    host.cli("start", "web")
    with GuestConsole(host.run / "guests/web/serial-console.sock") as console:
        console.wait_ready(90)
    host.terminate()
    ours, theirs = pty.openpty()
    before = subprocess.run(["stty", "-a"], stdin=theirs, capture_output=True, check=True).stdout
    client = spawn(host, "console", "web", stdin=theirs, stdout=theirs, stderr=theirs)
    try:
        read_until(ours, b"^] leaves")
        os.write(ours, b"echo con''sole-$((6*7))\n")
        read_until(ours, b"console-42")
        os.write(ours, b"\x1d")
        read_until(ours, b"Left the console")
        assert client.wait(timeout=10) == 0
        assert subprocess.run(["stty", "-a"], stdin=theirs, capture_output=True, check=True).stdout == before
    finally:
        client.kill()
        client.wait()
        os.close(ours)
        os.close(theirs)
    host.start()
    assert host.show("web")["state"] == "running"
    code, _, err = run(host, "console", "web", "--serial", "second")
    assert (code, "no serial port second" in err) == (3, True)
    with GuestConsole(host.run / "guests/web/serial-console.sock") as console:
        assert run(host, "stop", "web", "--timeout", "60")[:2] == (0, "web is stopped\n")
        console.wait_for(POWERBUTTON, 5)
    assert run(host, "console", "web")[0] == 3


def test_a_terminal_left_by_a_signal_is_put_back(host: KvmdHost) -> None:
    host.guest("web", tiny(host, "web"))
    host.start()
    host.cli("start", "web")
    ours, theirs = pty.openpty()
    before = subprocess.run(["stty", "-a"], stdin=theirs, capture_output=True, check=True).stdout
    client = spawn(host, "console", "web", stdin=theirs, stdout=theirs, stderr=theirs)
    try:
        read_until(ours, b"^] leaves")
        deadline = time.monotonic() + 10
        while subprocess.run(["stty", "-a"], stdin=theirs, capture_output=True, check=True).stdout == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        client.terminate()
        assert client.wait(timeout=10) == 128 + signal.SIGTERM
        assert subprocess.run(["stty", "-a"], stdin=theirs, capture_output=True, check=True).stdout == before
    finally:
        client.kill()
        client.wait()
        os.close(ours)
        os.close(theirs)


def test_apply_asks_on_a_terminal(host: KvmdHost) -> None:
    host.guest("web", tiny(host, "web"))
    host.write("host.toml", KEEP_KSM)
    host.start()
    host.cli("start", "web")
    host.guest("web", tiny_on(host.images / "web.img", size="48MiB", extra=DEAF))
    ours, theirs = pty.openpty()
    client = spawn(host, "apply", stdin=theirs, stdout=theirs, stderr=theirs)
    try:
        seen = read_until(ours, b"[y/N]")
        assert b"restart for memory.size" in seen
        os.write(ours, b"n\n")
        read_until(ours, b"nothing was done")
        assert client.wait(timeout=10) == 4
    finally:
        client.kill()
        client.wait()
        os.close(ours)
        os.close(theirs)
    assert host.show("web")["pending"] == ["memory.size"]


def test_doctor_runs_here(host: KvmdHost) -> None:
    host.start()
    code, out, _ = run(host, "doctor", "--json")
    checks = json.loads(out)["checks"]
    assert len({check["name"] for check in checks}) >= 20
    assert code == (1 if any(check["status"] == "fail" for check in checks) else 0)


def test_kvmd_itself_runs_what_needs_no_daemon(host: KvmdHost) -> None:
    argv = [sys.executable, "-m", "kvmd.daemon"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"}
    host.guest("web", "[memory]\nsise = '1G'\n")
    for words, code in ((["check", str(host.config)], 8), (["list"], 2)):
        done = subprocess.run([*argv, *words], capture_output=True, text=True, env=environment, check=False, cwd="/")
        assert done.returncode == code, done.stderr


def test_completion_in_bash(host: KvmdHost, tmp_path: Path) -> None:
    host.guest("web", tiny(host, "web"))
    (tmp_path / "completion").write_text(script())

    def offered(*words: str) -> set[str]:
        line = " ".join(f"'{word}'" for word in ("kvmd-cli", *words))
        text = f"""source {tmp_path}/completion; COMP_WORDS=({line}); COMP_CWORD={len(words)}
        _kvmd_cli; printf '%s\\n' "${{COMPREPLY[@]}}" """
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return set(done.stdout.split())

    assert {name.split()[0] for name in VERBS} <= offered("")
    assert offered("sta") == {"start", "status"}
    config = ("--config-dir", str(host.config))
    assert "web" in offered(*config, "start", "")
    assert "web" in offered(*config, "tune", "explain", "")
    assert offered("host", "") == {name.split()[1] for name in VERBS if name.startswith("host ")}
    assert "--format" in offered("create", "new", "--fo")
