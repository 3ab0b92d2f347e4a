"""A log that is held open by someone else stays within its cap and loses nothing that was rotated."""

from __future__ import annotations

import os
from pathlib import Path

from kvmd.effects.logs import rotate


def test_a_log_below_its_cap_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    log.write_bytes(b"x" * 100)
    assert not rotate(log, max_bytes=100, keep=3)
    assert log.read_bytes() == b"x" * 100


def test_the_writer_goes_on_at_the_start(tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number in range(1, 5):
        os.write(fd, f"part {number}\n".encode() * 20)
        assert rotate(log, max_bytes=100, keep=3)
    os.write(fd, b"last\n")
    os.close(fd)
    assert log.read_text() == "last\n"
    assert (tmp_path / "serial.log.1").read_text() == "part 4\n" * 20
    assert (tmp_path / "serial.log.2").read_text() == "part 3\n" * 20
    assert not (tmp_path / "serial.log.3").exists()


def test_one_file_keeps_nothing_aside(tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    log.write_bytes(b"x" * 200)
    assert rotate(log, max_bytes=100, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["serial.log"]
    assert log.read_bytes() == b""


def test_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    assert not rotate(tmp_path / "none.log", max_bytes=1, keep=3)
