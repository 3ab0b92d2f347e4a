"""The boot loader's drop-in: which loader there is, the file written whole, read back, taken away."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from kvmd.actions import WriteKernelArgs
from kvmd.config.desired import Desired
from kvmd.effects import kernelargs
from kvmd.effects.tree import Tree
from kvmd.errors import HostFailed
from kvmd.facts import BootLine, Facts
from kvmd.plan.kernelargs import DROP_IN, KernelWord, kernel_arguments, parse_drop_in
from tests.rig.hosts import topology, write_tree

DEBIAN = {"/etc/default/grub": "", "/usr/sbin/update-grub": "", "/proc/cmdline": "root=/dev/sda1 quiet\n"}
TEXT = '# kvmd\nGRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX isolcpus=2-3 nohz_full=2-3"\n'


def action(old: str, new: str) -> WriteKernelArgs:
    return WriteKernelArgs(path=DROP_IN, old=old, new=new, words=" ".join(parse_drop_in(new)), why="test")


@pytest.mark.parametrize(
    ("files", "loader"),
    [
        (DEBIAN, "grub"),
        ({"/etc/default/grub": "", "/usr/sbin/grubby": ""}, "grubby"),
        ({"/etc/kernel/cmdline": "", "/usr/bin/kernel-install": ""}, "kernel-install"),
        ({"/etc/default/grub": ""}, ""),
        ({}, ""),
    ],
)
def test_the_loader_is_known_by_what_it_left(tmp_path: Path, files: dict[str, str], loader: str) -> None:
    write_tree(files, tmp_path)
    assert kernelargs.observe(Tree(tmp_path)).loader == loader


def test_written_read_back_and_taken_away(tmp_path: Path) -> None:
    write_tree(DEBIAN, tmp_path)
    tree = Tree(tmp_path)
    assert kernelargs.observe(tree) == BootLine("root=/dev/sda1 quiet", None, "grub")
    for old, new in (("", TEXT), (TEXT, TEXT), (TEXT, TEXT.replace("2-3", "4"))):
        kernelargs.write(tree, action(old, new))
        assert kernelargs.observe(tree).drop_in == new
    path = tmp_path / DROP_IN.lstrip("/")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    for _ in range(2):  # removing what is absent succeeds
        kernelargs.write(tree, action(TEXT, ""))
        assert kernelargs.observe(tree).drop_in is None


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    write_tree(DEBIAN | {"/etc/default/grub.d": "a file\n"}, tmp_path)
    with pytest.raises(HostFailed, match=r"cannot change /etc/default/grub\.d/50-kvmd\.cfg"):
        kernelargs.write(Tree(tmp_path), action("", TEXT))


def test_what_is_written_is_shell_that_grub_mkconfig_takes(tmp_path: Path) -> None:
    """Sourced as Debian's grub-mkconfig sources it: the words come behind what is there."""
    path = tmp_path / "50-kvmd.cfg"
    asked = KernelWord("isolcpus", "isolcpus=2-3", None, "test", enough=False)
    path.write_text(kernel_arguments(Desired(), Facts(cpus=topology()), [asked]).drop_in)
    script = f'set -eu; GRUB_CMDLINE_LINUX="console=ttyS0"; . {path}; echo "$GRUB_CMDLINE_LINUX"'
    ran = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "console=ttyS0 isolcpus=2-3\n"
