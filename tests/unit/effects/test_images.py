import contextlib
import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from kvmd.effects.imagelock import Use, find_holder, lock_image
from kvmd.effects.images import (
    create_image,
    inspect_image,
    open_image,
    sealed_copy,
    suggest_format,
)
from kvmd.errors import Conflict, Denied, KvmdError, NotFound, Refused
from kvmd.qemu.imageheader import MAX_VIRTUAL_BYTES
from tests.data.images import corpus

MIB = 1 << 20


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "vm"
    root.mkdir()
    (root / "raw.img").write_bytes(b"disk" * 1024)
    (root / "good.qcow2").write_bytes(corpus.qcow2())
    (tmp_path / "shadow").write_bytes(corpus.SECRET)
    return root


@contextlib.contextmanager
def opened(path, root, **options):
    settings = {"writable": True, "format": "raw", "roots": [root]} | options
    image = open_image(str(path), **settings)
    try:
        yield image
    finally:
        os.close(image.fd)


def refusal(path, root, **options) -> KvmdError:
    with pytest.raises(KvmdError) as refused, opened(path, root, **options):
        pass
    return refused.value


# ---- what is opened ---------------------------------------------------------------------------------------------


def test_a_sound_image_is_described(root):
    with opened(root / "good.qcow2", root, format="qcow2") as image:
        assert (image.info.virtual_bytes, image.is_block, image.file_bytes) == (16 * MIB, False, 4 << 16)
        assert image.free_bytes > 0
        assert 0 < image.allocated_bytes <= image.file_bytes
        assert not os.get_inheritable(image.fd)
        assert os.get_blocking(image.fd)
        assert fcntl.fcntl(image.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    with opened(root / "raw.img", root, writable=False) as image:
        assert fcntl.fcntl(image.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def test_direct_io_is_what_the_kernel_says(root):
    try:
        os.close(os.open(root / "raw.img", os.O_RDONLY | os.O_DIRECT))
        expected = True
    except OSError:
        expected = False
    with opened(root / "raw.img", root) as image:
        assert image.direct_io is expected


@pytest.mark.parametrize("name", ["a,b=c.img", "-daemonize", "x y", "%n", "é.img", "json:{}", "nbd:x"])
def test_no_name_is_special(root, name):
    (root / name).write_bytes(name.encode())
    with opened(root / name, root) as image:
        assert os.read(image.fd, 100) == name.encode()


@pytest.mark.parametrize("name", corpus.EVIL)
def test_evil_image_is_refused_and_leaves_no_descriptor(root, name):
    evil, reason = corpus.EVIL[name]
    (root / "evil").write_bytes(evil)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for writable in (True, False):
        error = refusal(root / "evil", root, format="qcow2", writable=writable)
        assert isinstance(error, Refused)
        assert reason in error.message
        assert error.message.startswith(f"{root}/evil ")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_sparse_file_counts_by_what_the_guest_sees(root):
    os.truncate(root / "raw.img", 1 << 40)
    with opened(root / "raw.img", root) as image:
        assert image.info.virtual_bytes == 1 << 40
        assert image.allocated_bytes <= 4096


def test_inspection_works_while_the_image_is_locked(root):
    with opened(root / "good.qcow2", root, format="qcow2"):
        assert inspect_image(str(root / "good.qcow2"), format="qcow2", roots=[root]).virtual_bytes == 16 * MIB
    assert suggest_format(str(root / "good.qcow2"), [root]) == "qcow2"
    assert suggest_format(str(root / "raw.img"), [root]) == "raw"


def test_a_declared_backing_file_passes(root):
    (root / "top.qcow2").write_bytes(corpus.with_backing(b"base.qcow2"))
    with opened(root / "top.qcow2", root, format="qcow2", backing="base.qcow2") as image:
        assert image.info.backing_file == "base.qcow2"


# ---- where it may lie -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/etc/shadow", "{root}x/raw.img", "/vm/raw.img"])
def test_outside_of_every_root(root, path):
    error = refusal(path.format(root=root), root)
    assert isinstance(error, Denied)
    assert str(root) in error.message
    assert "storage.roots" in error.hint


@pytest.mark.parametrize(
    "path", ["raw.img", "", "/", "{root}/../shadow", "{root}//raw.img", "{root}/./raw.img", "{root}/a\0b"]
)
def test_only_plain_absolute_paths(root, path):
    assert "not a plain absolute path" in refusal(path.format(root=root), root).message


def test_without_any_root_nothing_opens(root):
    assert "declared: none" in refusal(root / "raw.img", root, roots=[]).message


def test_root_may_be_a_link_and_may_be_the_file_itself(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    with opened(tmp_path / "link" / "raw.img", tmp_path / "link"):
        pass
    (tmp_path / "cdrom").symlink_to(root / "raw.img")
    with opened(tmp_path / "cdrom", tmp_path / "cdrom", writable=False, media="cdrom"):
        pass


def test_links_beneath_a_root_are_refused(root, tmp_path):
    (root / "link").symlink_to(tmp_path / "shadow")
    (root / "inner").symlink_to("raw.img")
    (root / "dir").symlink_to(tmp_path)
    for path in ("link", "inner", "dir/shadow"):
        error = refusal(root / path, root)
        assert isinstance(error, Denied)
        assert "symlink" in error.message


def test_a_second_name_is_refused(root, tmp_path):
    (root / "hard").hardlink_to(tmp_path / "shadow")
    error = refusal(root / "hard", root)
    assert isinstance(error, Denied)
    assert "2 names" in error.message


@pytest.mark.parametrize("writable", [True, False])
def test_what_is_no_image_is_refused_at_once(root, writable):
    (root / "dir").mkdir()
    os.mkfifo(root / "fifo")
    assert "a directory" in refusal(root / "dir", root, writable=writable).message
    assert "a FIFO" in refusal(root / "fifo", root, writable=writable).message  # and does not wait for a reader
    assert "a character device" in refusal("/dev/null", Path("/dev"), writable=writable).message
    assert isinstance(refusal(root / "none", root, writable=writable), NotFound)


def test_dev_is_one_file_system(root):
    error = refusal("/dev/shm/x", Path("/dev"))  # where anybody may write
    assert isinstance(error, Denied | NotFound)


def test_swapped_with_a_symlink_a_thousand_times_never_opens_outside(root, tmp_path):
    """Row 72: an attacker who may write in the root swaps the file and a link to a secret as fast as he can."""
    target, link = root / "disk", root / "linked"
    stop = threading.Event()

    def attack():
        while not stop.is_set():
            for source, make in ((link, lambda: link.symlink_to(tmp_path / "shadow")), (root / "f", make_file)):
                with contextlib.suppress(OSError):
                    make()
                    source.rename(target)

    def make_file():
        (root / "f").write_bytes(b"inside")

    make_file()
    (root / "f").rename(target)
    attacker = threading.Thread(target=attack)
    attacker.start()
    seen = {"opened": 0, "refused": 0}
    try:
        for _ in range(1000):
            try:
                with opened(target, root, writable=False, lock=False) as image:
                    assert corpus.SECRET not in os.pread(image.fd, 100, 0)
                    seen["opened"] += 1
            except (Denied, NotFound):
                seen["refused"] += 1
    finally:
        stop.set()
        attacker.join()
    assert seen["refused"] > 0, "the race was never won by the link: the test proves nothing"


# ---- one user at a time -----------------------------------------------------------------------------------------


def test_a_second_writer_is_told_who_has_it(root):
    with opened(root / "raw.img", root):
        error = refusal(root / "raw.img", root)
        assert isinstance(error, Conflict)
        assert "kvmd itself" in error.message
        assert error.details["pid"] == os.getpid()
        assert isinstance(refusal(root / "raw.img", root, writable=False), Conflict)
    with opened(root / "raw.img", root):
        pass


def test_readers_share_and_keep_writers_out(root):
    with opened(root / "raw.img", root, writable=False), opened(root / "raw.img", root, writable=False):
        assert isinstance(refusal(root / "raw.img", root), Conflict)
        assert isinstance(refusal(root / "raw.img", root, shared=True), Conflict)


def test_declared_sharers_write_together_and_keep_others_out(root):
    with opened(root / "raw.img", root, shared=True), opened(root / "raw.img", root, shared=True):
        assert isinstance(refusal(root / "raw.img", root), Conflict)
        assert isinstance(refusal(root / "raw.img", root, writable=False), Conflict)


def test_the_lock_is_the_descriptors_not_the_process(root):
    with opened(root / "raw.img", root) as image:
        copy = os.dup(image.fd)
        os.close(os.open(root / "raw.img", os.O_RDWR))  # with POSIX locks, this close would lose the lock
    try:
        assert isinstance(refusal(root / "raw.img", root), Conflict)
        assert find_holder(copy) is None  # its own lock is no one else's
    finally:
        os.close(copy)
    fd = os.open(root / "raw.img", os.O_RDWR)
    assert lock_image(fd, Use.EXCLUSIVE) is True
    os.close(fd)


# ---- copies and new images --------------------------------------------------------------------------------------


def test_a_sealed_copy_cannot_change(root):
    kernel = root / "vmlinuz"
    kernel.write_bytes(b"k" * (3 * MIB + 7))
    fd = sealed_copy(str(kernel), [root])
    try:
        kernel.write_bytes(b"other")
        assert os.pread(fd, 4 * MIB, 0) == b"k" * (3 * MIB + 7)
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
        assert not os.get_inheritable(fd)
        for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0), lambda: os.ftruncate(fd, 9 * MIB)):
            with pytest.raises(PermissionError):
                change()
    finally:
        os.close(fd)


def test_a_copy_is_bounded_and_of_a_regular_file(root):
    with pytest.raises(Refused, match="larger than 1 KiB"):
        sealed_copy(str(root / "raw.img"), [root], max_bytes=1024)
    os.close(sealed_copy(str(root / "raw.img"), [root], max_bytes=4096))
    (root / "empty").write_bytes(b"")
    with pytest.raises(Refused, match="empty"):
        sealed_copy(str(root / "empty"), [root])
    with pytest.raises(Denied):
        sealed_copy("/etc/passwd", [root])
    with pytest.raises(Refused, match="directory"):
        sealed_copy(str(root), [root])


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_new_image_is_private_sparse_and_opens(root, image_format):
    (root / "sub").mkdir()
    for path in (root / "new", root / "sub" / "new"):
        create_image(str(path), format=image_format, size_bytes=20 << 30, roots=[root])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with opened(path, root, format=image_format) as image:
            assert image.info.virtual_bytes == 20 << 30
            assert image.allocated_bytes < MIB
            assert image.info.warnings == ()
    assert not list(root.rglob("*.kvmd-tmp"))


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_nothing_is_ever_overwritten(root, tmp_path, image_format):
    (root / "dangling").symlink_to(tmp_path / "made-outside")
    for name in ("raw.img", "dangling"):
        with pytest.raises(Conflict, match="exists already"):
            create_image(str(root / name), format=image_format, size_bytes=MIB, roots=[root])
    assert (root / "raw.img").read_bytes() == b"disk" * 1024
    assert not (tmp_path / "made-outside").exists()


def test_new_images_of_impossible_kinds(root):
    for size in (0, -512, 513, MAX_VIRTUAL_BYTES + 512):
        with pytest.raises(Refused):
            create_image(str(root / "new"), format="raw", size_bytes=size, roots=[root])
    with pytest.raises(Refused, match="format"):
        create_image(str(root / "new"), format="vmdk", size_bytes=MIB, roots=[root])
    with pytest.raises(Denied):
        create_image("/etc/new", format="raw", size_bytes=MIB, roots=[root])
    with pytest.raises(Denied):
        create_image("/dev/new", format="raw", size_bytes=MIB, roots=[Path("/dev")])
    with pytest.raises(NotFound):
        create_image(str(root / "none" / "new"), format="raw", size_bytes=MIB, roots=[root])
    assert sorted(entry.name for entry in root.iterdir()) == ["good.qcow2", "raw.img"]
