"""Programs run as root for a guest: whose they may be, what they see, when they are ended."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from kvmd.effects.programs import check_program, receive_descriptor, run
from kvmd.errors import HostFailed, Refused, TimedOut


def program(path: Path, text: str, mode: int = 0o755) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o722])
def test_what_others_can_write_is_not_run(tmp_path: Path, mode: int) -> None:
    with pytest.raises(Refused, match="others than root can write") as caught:
        check_program(program(tmp_path / "up", "", mode))
    assert "chmod go-w" in str(caught.value.hint)


def test_nor_what_lies_where_others_could_put_something_else(tmp_path: Path) -> None:
    path = program(tmp_path / "up", "")
    check_program(path)
    tmp_path.chmod(0o777)
    with pytest.raises(Refused, match=str(tmp_path)):
        check_program(path)
    tmp_path.chmod(0o1777)  # as /tmp: nobody replaces root's entry
    check_program(path)
    tmp_path.chmod(0o700)


def test_a_link_is_judged_where_it_leads(tmp_path: Path) -> None:
    target = tmp_path / "theirs"
    program(target, "", 0o777)
    (tmp_path / "up").symlink_to(target)
    with pytest.raises(Refused, match="theirs"):
        check_program(str(tmp_path / "up"))


def test_what_is_no_program_is_told(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="No such file"):
        check_program(str(tmp_path / "absent"))
    with pytest.raises(Refused, match="no executable file"):
        check_program(program(tmp_path / "plain", "", 0o644))
    with pytest.raises(Refused, match="no executable file"):
        check_program(str(tmp_path))


async def test_it_sees_its_arguments_and_nothing_of_kvmd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMD_SECRET", "x")
    seen = tmp_path / "seen"
    path = program(
        tmp_path / "up", f'(echo "$# $1"; env; pwd; ls /proc/self/fd) > {seen}; read line && echo line >> {seen}'
    )
    with (tmp_path / "open").open("w"), pytest.raises(HostFailed, match="failed with 1"):  # `read` finds no input
        await run((path, "tap7"))
    lines = seen.read_text().splitlines()
    assert lines[0] == "1 tap7" and "KVMD_SECRET=x" not in lines and "/" in lines
    assert {line.partition("=")[0] for line in lines if "=" in line} <= {
        "PATH",
        "LC_ALL",
        "PWD",
        "OLDPWD",
        "SHLVL",
        "_",
    }
    assert max(int(line) for line in lines if line.isdigit()) <= 10, "descriptors of kvmd's were open"


async def test_what_it_said_last_is_in_the_error(tmp_path: Path) -> None:
    path = program(tmp_path / "up", "echo 'no such bridge \033[31mbr9' >&2; exit 3")
    with pytest.raises(HostFailed, match=r"failed with 3: no such bridge .*br9") as caught:
        await run((path, "tap7"))
    assert "\033" not in caught.value.message


async def test_at_its_deadline_it_is_ended_with_all_it_started(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    path = program(tmp_path / "up", f"sleep 60 & echo $! > {pid_file}; wait")
    with pytest.raises(TimedOut, match="did not end within"):
        await run((path, "tap7"), deadline_s=0.5)
    assert await asyncio.to_thread(ended, int(pid_file.read_text())), "its child runs on"


def ended(pid: int) -> bool:
    """Whether the process ends; one that nobody has reaped yet has ended too."""
    for _ in range(500):
        try:
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


HELPER = """\
#!{python}
import os, socket, sys
words = dict(word.partition("=")[::2] for word in sys.argv[1:])
assert "--use-vnet" in words and words["--br"] == "br0", sys.argv
peer = socket.socket(fileno=int(words["--fd"]))
read, write = os.pipe()
os.write(write, b"hello")
{send}
"""


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def helper(tmp_path: Path, send: str) -> str:
    path = tmp_path / "helper"
    path.write_text(HELPER.format(python=sys.executable, send=send))
    path.chmod(0o755)
    return str(path)


async def test_a_helpers_descriptor_is_received_closed_on_exec_and_non_blocking(tmp_path: Path) -> None:
    path = helper(tmp_path, 'socket.send_fds(peer, [b"x"], [read])')
    fd = await receive_descriptor((path, "--use-vnet", "--br=br0"))
    try:
        assert os.read(fd, 9) == b"hello"
        assert not os.get_inheritable(fd) and not os.get_blocking(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("send", "reason"),
    [
        ("", "handed over 0 descriptors"),
        ('socket.send_fds(peer, [b"x"], [read, write])', "handed over 2 descriptors"),
        ('socket.send_fds(peer, [b"x"], [read]); sys.exit("access denied by acl file")', "access denied by acl file"),
    ],
)
async def test_a_helper_that_fails_leaves_no_descriptor(tmp_path: Path, send: str, reason: str) -> None:
    path = helper(tmp_path, send)
    before = open_fds()
    with pytest.raises(HostFailed, match=reason):
        await receive_descriptor((path, "--use-vnet", "--br=br0"))
    assert open_fds() == before
