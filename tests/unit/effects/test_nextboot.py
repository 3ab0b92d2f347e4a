"""effects/nextboot.py: the file the boot loader will read, for each kind of boot loader."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmd.effects.nextboot import observe
from kvmd.effects.tree import Tree

GRUB = """\
set default="0"
menuentry 'Debian GNU/Linux' --class debian {
\tinsmod gzio
\tlinux\t/boot/vmlinuz-6.1.0-56-amd64 root=UUID=1 ro quiet isolcpus=2-3
\tinitrd\t/boot/initrd.img-6.1.0-56-amd64
}
submenu 'Advanced options' {
\tlinux /boot/vmlinuz-6.1.0-50-amd64 root=UUID=1 ro single
}
"""
CASES = {
    "grub": ({"/boot/grub/grub.cfg": GRUB}, "root=UUID=1 ro quiet isolcpus=2-3", "/boot/grub/grub.cfg"),
    "grub2": (
        {"/boot/grub2/grub.cfg": "  linuxefi /vmlinuz root=a b\n"},
        "root=a b",
        "/boot/grub2/grub.cfg",
    ),
    "no arguments": ({"/boot/grub/grub.cfg": "linux /vmlinuz\nnext root=wrong\n"}, "", "/boot/grub/grub.cfg"),
    "entries, newest first": (
        {
            "/boot/loader/entries/m-6.1.0-9.conf": "title a\noptions root=old\n",
            "/boot/loader/entries/m-6.1.0-56.conf": "title b\nlinux /v\noptions root=new\noptions quiet\n",
            "/boot/loader/entries/m-0-rescue.conf": "options root=rescue\n",
            "/boot/grub/grub.cfg": GRUB,
        },
        "root=new quiet",
        "/boot/loader/entries/m-6.1.0-56.conf",
    ),
    "entries with GRUB's environment": (
        {
            "/boot/loader/entries/m-5.conf": "options root=a $kernelopts\n",
            "/boot/grub2/grubenv": "# GRUB Environment Block\nkernelopts=ro quiet \n####\n",
        },
        "root=a ro quiet",
        "/boot/loader/entries/m-5.conf",
    ),
    "small board": ({"/boot/firmware/cmdline.txt": "console=tty1 root=b\n"}, "console=tty1 root=b",
                    "/boot/firmware/cmdline.txt"),
    "nothing known": ({"/etc/default/grub": 'GRUB_CMDLINE_LINUX="x"\n'}, None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_where_the_next_boot_is_written(tmp_path: Path, name: str) -> None:
    files, configured, source = CASES[name]
    for path, text in {"/proc/cmdline": "root=now ro\n", **files}.items():
        file = tmp_path / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    found = observe(Tree(tmp_path))
    assert (found.running, found.configured, found.source) == ("root=now ro", configured, source)
