"""effects/statelock.py: one kvmd for a state directory, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmd.effects.statelock import lock_state
from kvmd.errors import Conflict, HostFailed


def test_the_second_is_told_who_is_first_and_the_third_gets_it(tmp_path: Path) -> None:
    with lock_state(tmp_path):
        with pytest.raises(Conflict, match=rf"another kvmd \(pid {os.getpid()}\) has this state"), lock_state(tmp_path):
            raise AssertionError("two at once")
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
    with lock_state(tmp_path):
        pass


def test_a_holder_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from kvmd.effects.statelock import lock_state\n"
        "with lock_state(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == -9 and (tmp_path / "lock").read_text().strip().isdecimal()
    with lock_state(tmp_path):
        pass


def test_a_child_started_meanwhile_does_not_keep_it(tmp_path: Path) -> None:
    with lock_state(tmp_path):
        child = subprocess.Popen(["sleep", "60"])
    try:
        with lock_state(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("kind", ["missing", "link"])
def test_a_place_that_is_not_ours_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "link":
        (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    where = tmp_path if kind == "link" else tmp_path / "nowhere"
    with pytest.raises(HostFailed, match="lock: "), lock_state(where):
        raise AssertionError("locked what is not there")
    assert not (tmp_path / "elsewhere").exists()
