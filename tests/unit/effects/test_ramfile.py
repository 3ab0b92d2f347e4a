"""A guest's memory file: without a name in a directory, or one that is named, and never another's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kvmd.effects.hugetlbfs import observe
from kvmd.effects.ramfile import open_ram
from kvmd.effects.sysfs import HostTree
from kvmd.errors import Conflict, NotFound, Refused
from kvmd.facts import MemoryPath
from tests.rig.hosts import MIB, write_tree

UID, GID = os.geteuid(), os.getegid()


def test_in_a_directory_it_has_no_name(tmp_path: Path) -> None:
    fd = open_ram(str(tmp_path), MIB, None, UID, GID)
    status = os.fstat(fd)
    assert (status.st_size, status.st_nlink, stat.S_IMODE(status.st_mode)) == (MIB, 0, 0o600)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    assert os.fstat(again).st_ino == status.st_ino, "as QEMU opens it"
    os.close(again)
    os.close(fd)
    assert list(tmp_path.iterdir()) == []


def test_a_named_file_is_made_once_kept_and_locked(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    fd = open_ram(str(path), MIB, None, UID, GID)
    os.pwrite(fd, b"here", 100)
    with pytest.raises(Conflict, match="is the memory of a guest that runs"):
        open_ram(str(path), MIB, None, UID, GID)
    os.close(fd)
    fd = open_ram(str(path), MIB, None, UID, GID)
    assert os.pread(fd, 4, 100) == b"here"
    os.close(fd)
    with pytest.raises(Refused, match=r"has 1 MiB, memory\.size is 2MiB: it stays as it is"):
        open_ram(str(path), 2 * MIB, None, UID, GID)
    os.link(path, tmp_path / "other")
    with pytest.raises(Refused, match="another name"):
        open_ram(str(path), MIB, None, UID, GID)


def test_what_cannot_be_memory_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no directory"):
        open_ram(str(tmp_path / "none" / "ram"), MIB, None, UID, GID)
    with pytest.raises(Refused, match=r"is on no hugetlbfs, and memory\.page_size asks for 2MiB") as caught:
        open_ram(str(tmp_path / "ram"), MIB, 2 * MIB, UID, GID)
    assert "kvmd-cli apply" in (caught.value.hint or "")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(Refused, match="neither a directory nor a regular file"):
        open_ram(str(tmp_path / "fifo"), MIB, None, UID, GID)
    assert [path.name for path in tmp_path.iterdir()] == ["fifo"]


MOUNTINFO = r"""21 1 0:20 / / rw - ext4 /dev/vda rw
30 21 0:25 / /srv/a\040b rw,nosuid shared:1 - hugetlbfs kvmd-hugetlbfs rw,mode=700,pagesize=2M,size=67108864
31 21 0:26 / /dev/hugepages rw - hugetlbfs hugetlbfs rw,pagesize=1024M
32 21 0:27 / /srv/over rw - hugetlbfs kvmd-hugetlbfs rw,pagesize=2M
33 32 0:28 / /srv/over rw - tmpfs tmpfs rw
"""


def test_mounts_as_mountinfo_shows_them(tmp_path: Path) -> None:
    write_tree({"/proc/self/mountinfo": MOUNTINFO, "/srv/file": "", "/srv/full/one": ""}, tmp_path)
    (tmp_path / "srv/empty").mkdir()
    (tmp_path / "srv/over").mkdir()
    paths = ["/srv/a b", "/dev/hugepages", "/srv/over", "/srv/none", "/srv/file", "/srv/full", "/srv/empty"]
    assert observe(HostTree(tmp_path), paths) == (
        MemoryPath("/dev/hugepages", "directory", page_bytes=1 << 30),
        MemoryPath("/srv/a b", "directory", page_bytes=2 * MIB, limit_bytes=64 * MIB, ours=True),
        MemoryPath("/srv/empty", "directory"),
        MemoryPath("/srv/file", "file", is_empty=False),
        MemoryPath("/srv/full", "directory", is_empty=False),
        MemoryPath("/srv/none"),
        MemoryPath("/srv/over", "directory"),
    )
