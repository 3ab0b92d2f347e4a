import errno
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmd.effects import files
from kvmd.errors import Conflict, Denied, HostFailed, KvmdError, NotFound


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


class FailingSync:
    """An fsync that fails at its n-th call, and counts."""

    def __init__(self, at: int, code: int = errno.EIO) -> None:
        self.at, self.code, self.calls = at, code, 0

    def __call__(self, fd: int) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise OSError(self.code, os.strerror(self.code))
        os.fsync(fd)


# ---- write_atomic ---------------------------------------------------------------------------------------------


def test_writes_replaces_and_leaves_nothing_beside(tmp_path):
    target = tmp_path / "identity.toml"
    files.write_atomic(target, b"one")
    files.write_atomic(target, b"two" * 100_000, 0o644)
    assert target.read_bytes() == b"two" * 100_000
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert names(tmp_path) == ["identity.toml"]


def test_mode_is_exact_whatever_the_umask(tmp_path):
    before = os.umask(0o777)
    try:
        files.write_atomic(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_a_symlink_in_place_of_the_file_is_replaced_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"keep")
    (tmp_path / "a").symlink_to("elsewhere")
    files.write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "elsewhere").read_bytes() == b"keep"
    assert not (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_failed_fsync_keeps_the_old_content_and_is_not_repeated(tmp_path, code):
    target = tmp_path / "a"
    target.write_bytes(b"old")
    sync = FailingSync(1, code)
    with pytest.raises(HostFailed) as failed:
        files.write_atomic(target, b"new", fsync=sync)
    assert sync.calls == 1
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]
    assert str(target) in failed.value.message
    assert "nothing was changed" in failed.value.hint


def test_failed_sync_of_the_directory_says_that_the_new_content_is_in_place(tmp_path):
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(HostFailed, match="new content is in place"):
        files.write_atomic(target, b"new", fsync=FailingSync(2))
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_missing_directory_is_reported_with_the_path(tmp_path):
    with pytest.raises(HostFailed, match=r"cannot write .*/none/a: No such file"):
        files.write_atomic(tmp_path / "none" / "a", b"")


def test_stale_temps_go_and_nothing_else(tmp_path):
    (tmp_path / ".a.0123456789ab.kvmd-tmp").write_bytes(b"half")
    (tmp_path / ".swp.kvmd-tmp").mkdir()
    (tmp_path / ".link.kvmd-tmp").symlink_to("a")
    (tmp_path / "a.kvmd-tmp").write_bytes(b"not hidden: someone else's")
    assert files.remove_stale_temps(tmp_path) == (".a.0123456789ab.kvmd-tmp",)
    assert names(tmp_path) == [".link.kvmd-tmp", ".swp.kvmd-tmp", "a.kvmd-tmp"]
    assert files.remove_stale_temps(tmp_path / "none") == ()


# ---- ensure_dir, logs -----------------------------------------------------------------------------------------


def test_directory_is_made_corrected_and_left(tmp_path):
    target = tmp_path / "guests"
    me = (os.getuid(), os.getgid())
    for _ in range(2):
        files.ensure_dir(target, 0o711, *me)
        assert stat.S_IMODE(target.stat().st_mode) == 0o711
    target.chmod(0o777)
    files.ensure_dir(target, 0o700, *me)
    assert stat.S_IMODE(target.stat().st_mode) == 0o700


@pytest.mark.parametrize("make", [lambda p: p.symlink_to("/tmp"), lambda p: p.write_bytes(b""), os.mkfifo])
def test_what_is_no_directory_is_refused_and_left_alone(tmp_path, make):
    target = tmp_path / "guests"
    make(target)
    before = target.lstat()
    with pytest.raises(Denied, match="not a directory"):
        files.ensure_dir(target, 0o700, os.getuid(), os.getgid())
    assert target.lstat() == before


def test_log_appends_and_survives_truncation(tmp_path):
    log = tmp_path / "serial.log"
    fd = files.append_log_fd(log)
    try:
        os.write(fd, b"one\n")
        os.truncate(log, 0)
        os.write(fd, b"two\n")
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)
    assert log.read_bytes() == b"two\n"


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "hardlink"])
def test_log_is_a_regular_file_with_one_name(tmp_path, kind):
    log, other = tmp_path / "serial.log", tmp_path / "other"
    other.write_bytes(b"keep")
    match kind:
        case "symlink":
            log.symlink_to(other)
        case "fifo":
            os.mkfifo(log)
        case "directory":
            log.mkdir()
        case "hardlink":
            log.hardlink_to(other)
    with pytest.raises(Denied):
        files.append_log_fd(log)
    assert other.read_bytes() == b"keep"


# ---- open_beneath ---------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (root / "link").symlink_to("../secret")
    (root / "inner").symlink_to("sub/a")
    (root / "sublink").symlink_to("sub")
    (root / "out").symlink_to(tmp_path)
    (tmp_path / "rootlink").symlink_to(root)
    return root


@pytest.fixture(params=[True, False], ids=["openat2", "by component"])
def way(request):
    return request.param


def test_opens_what_lies_beneath(tree, way):
    for root in (tree, tree.parent / "rootlink"):  # the root itself may be reached by a link
        fd = files.open_beneath(root, "sub/a", os.O_RDONLY, openat2=way)
        try:
            assert os.read(fd, 100) == b"inside"
            assert not os.get_inheritable(fd)
        finally:
            os.close(fd)


@pytest.mark.parametrize("path", ["link", "inner", "sublink/a", "out/secret"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_PATH, os.O_RDWR])
def test_no_symlink_anywhere(tree, way, path, flags):
    with pytest.raises(Denied, match="symlink"):
        files.open_beneath(tree, path, flags, openat2=way)


@pytest.mark.parametrize(
    "path", ["", "/etc/shadow", "../secret", "sub/../../secret", "sub//a", "./sub/a", "a\0b", "sub/"]
)
def test_only_plain_relative_paths(tree, way, path):
    with pytest.raises(Denied, match="not a plain path"):
        files.open_beneath(tree, path, os.O_RDONLY, openat2=way)


def test_missing_and_existing(tree, way):
    with pytest.raises(NotFound):
        files.open_beneath(tree, "sub/none", os.O_RDONLY, openat2=way)
    with pytest.raises(NotFound):
        files.open_beneath(tree, "sub/a/b", os.O_RDONLY, openat2=way)
    with pytest.raises(Conflict):
        files.open_beneath(tree, "sub/a", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, openat2=way)


def test_links_beneath_dev_are_followed_only_where_they_stay(tree):
    fd = files.open_beneath(tree, "sublink/a", os.O_RDONLY, links_of_root=True)
    os.close(fd)
    for path in ("link", "out/secret"):
        with pytest.raises(Denied, match="outside"):
            files.open_beneath(tree, path, os.O_RDONLY, links_of_root=True)


PARTS = st.sampled_from(["sub", "a", "link", "inner", "sublink", "out", "secret", "..", ".", "none", ""])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PARTS, min_size=1, max_size=4), st.sampled_from([os.O_RDONLY, os.O_PATH, os.O_PATH | os.O_DIRECTORY]))
def test_both_ways_give_the_same_answer_and_never_the_outside(tree, parts, flags):
    def answer(way: bool) -> object:
        try:
            fd = files.open_beneath(tree, "/".join(parts), flags, openat2=way)
        except KvmdError as error:
            return type(error), error.message
        try:
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)

    found = answer(True)
    assert found == answer(False)
    assert found != (tree.parent / "secret").stat().st_ino


# ---- rename_new -----------------------------------------------------------------------------------------------


def test_rename_new_replaces_nothing(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    with files.directory_fd(tmp_path) as directory:
        with pytest.raises(FileExistsError):
            files.rename_new("a", "b", directory=directory)
        files.rename_new("a", "c", directory=directory)
    assert names(tmp_path) == ["b", "c"]
