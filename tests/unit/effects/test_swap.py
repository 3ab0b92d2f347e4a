"""What kvmd's swap is recognised by, and that nothing else is ever written to or removed. No swapping is done here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kvmd.effects import swap
from kvmd.effects.swap import observe_file, observe_swaps, observe_zrams, signature
from kvmd.effects.sysfs import HostTree
from kvmd.errors import HostFailed
from kvmd.facts import SwapArea, SwapFile, Zram
from tests.rig.hosts import MIB, write_tree

SWAPS = """Filename				Type		Size		Used		Priority
/dev/vda2                               partition	1048572		12		-2
/srv/a\\040b/swap                        file		2044		0		-3
/dev/zram1                              partition	4092		0		100
"""


def test_areas_with_blanks_and_links(tmp_path: Path) -> None:
    write_tree({"/proc/swaps": SWAPS}, tmp_path)
    assert observe_swaps(HostTree(tmp_path)) == (
        SwapArea("/dev/vda2", 1048572 << 10, 12 << 10, -2),
        SwapArea("/srv/a b/swap", 2044 << 10, 0, -3),
        SwapArea("/dev/zram1", 4092 << 10, 0, 100),
    )
    assert observe_swaps(HostTree(tmp_path / "none")) is None
    link = tmp_path / "link"
    link.symlink_to("/dev/vda2")
    named = observe_swaps(HostTree(tmp_path), [str(link)]) or ()
    assert named[0].path == str(link), "called as the configuration calls it"


def test_only_our_label_makes_a_file_ours(tmp_path: Path) -> None:
    tree = HostTree(tmp_path)
    (tmp_path / "d").mkdir()
    assert observe_file(tree, "/none/swap") == SwapFile("/none/swap")
    empty = observe_file(tree, "/d/swap")
    assert empty.size_bytes is None
    assert (empty.free_bytes or 0) > 0
    ours, foreign, plain = (tmp_path / "d" / name for name in ("ours", "foreign", "plain"))
    ours.write_bytes(signature(MIB).ljust(MIB, b"\0"))
    data = signature(MIB).replace(swap.LABEL, b"something")
    foreign.write_bytes(data.ljust(MIB, b"\0"))
    plain.write_bytes(b"kvmd-swap")
    os.mkfifo(tmp_path / "d" / "fifo")
    (tmp_path / "d" / "link").symlink_to(ours)
    found = {name: observe_file(tree, f"/d/{name}") for name in ("ours", "foreign", "plain", "fifo", "link")}
    assert [name for name, file in found.items() if file.ours] == ["ours"]
    assert found["ours"].size_bytes == MIB


def test_the_signature_is_what_mkswap_writes(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    path.write_bytes(signature(MIB).ljust(MIB, b"\0"))
    shown = subprocess.run(
        ["blkid", "-p", "-o", "export", path], check=True, capture_output=True, text=True, timeout=20
    ).stdout
    assert {"TYPE=swap", "VERSION=1", "LABEL=kvmd-swap"} <= set(shown.splitlines()), shown


def test_zram_devices(tmp_path: Path) -> None:
    assert observe_zrams(HostTree(tmp_path)) is None
    (tmp_path / "sys/class/zram-control").mkdir(parents=True)
    write_tree({"/sys/block/zram0/disksize": "0\n", "/sys/block/zram7/disksize": f"{MIB}\n"}, tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/zram7").write_bytes(signature(MIB))
    assert observe_zrams(HostTree(tmp_path)) == (Zram(0, 0), Zram(7, MIB, ours=True))


def test_what_is_not_ours_stays_as_it_is(tmp_path: Path) -> None:
    tree = HostTree(tmp_path)
    write_tree({"/proc/swaps": SWAPS, "/d/swap": "somebody's", "/sys/block/zram1/disksize": "4096"}, tmp_path)
    (tmp_path / "sys/class/zram-control").mkdir(parents=True)
    with pytest.raises(HostFailed, match="not the swap file kvmd wants"):
        swap.ensure_file(tree, "/d/swap", MIB)
    with pytest.raises(HostFailed, match="does not carry kvmd's label"):
        swap.remove_file(tree, "/d/swap")
    with pytest.raises(HostFailed, match="does not carry kvmd's label"):
        swap.remove_zram(tree, 1)
    assert (tmp_path / "d/swap").read_text() == "somebody's"
    swap.remove_file(tree, "/d/none")
    swap.remove_zram(tree, 5)


def test_a_directory_others_may_change_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    write_tree({"/proc/swaps": SWAPS}, tmp_path)
    open_to_all = tmp_path / "d"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(HostFailed, match=r"can be changed by others than root .* mode 0777"):
        swap.ensure_file(HostTree(tmp_path), "/d/swap", MIB)
    open_to_all.chmod(0o755)
    (open_to_all / ".swap.kvmd-new").write_text("of a kvmd that was killed")
    with pytest.raises(HostFailed):  # a whole disk of them is more than any file system has
        swap.ensure_file(HostTree(tmp_path), "/d/swap", 1 << 60)
    assert list(open_to_all.iterdir()) == []


def test_a_file_that_cannot_be_swapped_to_is_taken_away_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree({"/proc/swaps": SWAPS}, tmp_path)
    (tmp_path / "d").mkdir(mode=0o755)

    def refuse(path: str, priority: int | None) -> None:
        status = Path(path).stat()
        assert (status.st_mode & 0o7777, status.st_size, status.st_blocks * 512 >= MIB) == (0o600, MIB, True)
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(swap.syscalls, "swapon", refuse)
    with pytest.raises(HostFailed, match="cannot swap to /d/swap: Invalid argument") as caught:
        swap.ensure_file(HostTree(tmp_path), "/d/swap", MIB)
    assert "file system" in (caught.value.hint or "")
    assert list((tmp_path / "d").iterdir()) == []
