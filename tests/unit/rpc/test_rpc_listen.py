"""kvmd/rpc/listen.py: one server per path, leftovers replaced, rights right from the first moment."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from kvmd.errors import Conflict, HostFailed
from kvmd.rpc.listen import listen_unix
from kvmd.unixpath import PATH_BYTES, ShortPath


def reachable(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock, ShortPath(path) as address:
        try:
            sock.connect(address)
        except OSError:
            return False
        return True


@pytest.mark.parametrize("mode", [0o666, 0o600])
def test_rights_are_those_asked_for_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    before = os.umask(0o077)
    try:
        listener = listen_unix(tmp_path / "s", mode=mode)
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == mode
        assert stat.S_IMODE((tmp_path / "s.lock").stat().st_mode) == 0o600
        assert os.umask(0o077) == 0o077
        listener.close()
    finally:
        os.umask(before)


def test_closing_removes_the_socket(tmp_path: Path) -> None:
    listener = listen_unix(tmp_path / "s")
    assert reachable(tmp_path / "s")
    listener.close()
    assert not (tmp_path / "s").exists()
    listen_unix(tmp_path / "s").close()


def test_closing_leaves_another_ones_socket(tmp_path: Path) -> None:
    listener = listen_unix(tmp_path / "s")
    (tmp_path / "s").unlink()
    (tmp_path / "s").write_text("someone else's")
    listener.close()
    assert (tmp_path / "s").read_text() == "someone else's"


def test_a_second_server_is_refused_and_the_first_keeps_serving(tmp_path: Path) -> None:
    listener = listen_unix(tmp_path / "s")
    with pytest.raises(Conflict, match="another kvmd is serving here"):
        listen_unix(tmp_path / "s")
    assert reachable(tmp_path / "s")
    listener.close()


def test_a_listener_without_our_lock_is_respected(tmp_path: Path) -> None:
    """The socket may be systemd's."""
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(tmp_path / "s"))
        foreign.listen()
        with pytest.raises(Conflict, match="another kvmd is serving here"):
            listen_unix(tmp_path / "s")
        assert reachable(tmp_path / "s")


def test_a_listener_with_a_full_backlog_is_a_listener(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as foreign, socket.socket(socket.AF_UNIX) as waiting:
        foreign.bind(str(tmp_path / "s"))
        foreign.listen(0)
        waiting.connect(str(tmp_path / "s"))
        with pytest.raises(Conflict, match="another kvmd"):
            listen_unix(tmp_path / "s")


def test_a_leftover_of_a_killed_server_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    (tmp_path / "s.lock").touch()
    assert not reachable(tmp_path / "s")
    listener = listen_unix(tmp_path / "s")
    assert reachable(tmp_path / "s")
    listener.close()


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_what_is_no_socket_is_not_touched(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Conflict, match="no socket"):
        listen_unix(path)
    assert path.lstat()


def test_a_lock_that_is_a_symlink_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "s.lock").symlink_to(tmp_path / "target")
    with pytest.raises(HostFailed, match=r"s\.lock"):
        listen_unix(tmp_path / "s")
    assert not (tmp_path / "target").exists()


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(HostFailed, match="No such file"):
        listen_unix(tmp_path / "none" / "s")


@pytest.mark.parametrize(("length", "says"), [(252, "File name too long"), (250, "path too long")])
def test_a_name_too_long_by_itself(tmp_path: Path, length: int, says: str) -> None:
    """252 with ".lock" is more than a file system takes, 250 more than a socket address takes after /proc/self/fd."""
    with pytest.raises(HostFailed, match=says):
        listen_unix(tmp_path / ("s" * length))
    assert [entry for entry in tmp_path.iterdir() if not entry.name.endswith(".lock")] == []


@pytest.mark.parametrize("length", [PATH_BYTES, PATH_BYTES + 1, 200])
def test_paths_of_any_length(tmp_path: Path, length: int) -> None:
    directory = tmp_path / ("d" * (length - len(os.fsencode(tmp_path)) - 3))
    directory.mkdir()
    path = directory / "s"
    assert len(os.fsencode(path)) == length
    listener = listen_unix(path)
    assert reachable(path)
    with pytest.raises(Conflict):
        listen_unix(path)
    listener.close()
    assert not path.exists()
