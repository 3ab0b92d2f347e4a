"""The kernel's command line now, and the one the boot loader will give at the next boot. Reads only.

What a boot loader will do is in the file it reads, not in the file that file is made from: an edited
/etc/default/grub changes nothing before update-grub. Looked at in this order: Boot Loader Specification entries
(uapi-group.org/specifications/specs/boot_loader_specification), GRUB's own configuration, the firmware partition of
small boards. Where none is, the next boot is unknown, and that is said.
"""

from __future__ import annotations

import re

from kvmd.effects.tree import Tree
from kvmd.plan.reboot import NextBoot

_ENTRIES = ("/boot/loader/entries", "/efi/loader/entries", "/boot/efi/loader/entries")
_GRUB = ("/boot/grub/grub.cfg", "/boot/grub2/grub.cfg", "/boot/efi/EFI/debian/grub.cfg")
_GRUBENV = ("/boot/grub2/grubenv", "/boot/grub/grubenv")
_FIRMWARE = ("/boot/firmware/cmdline.txt", "/boot/cmdline.txt")
_LINUX = re.compile(r"^\s*linux(?:16|efi)?\s+\S+[ \t]*(.*)$", re.MULTILINE)  # grub.cfg: the first entry is the default
_DIGITS = re.compile(r"(\d+)")


def observe(tree: Tree) -> NextBoot:
    """Both command lines, and where the next one was read."""
    running = tree.read("/proc/cmdline") or ""
    for find in (_entry, _grub, _firmware):
        found = find(tree)
        if found is not None:
            configured, source = found
            return NextBoot(running, configured, source)
    return NextBoot(running)


def _entry(tree: Tree) -> tuple[str, str] | None:
    """`options` of the newest entry (boot loaders sort by version, the newest first)."""
    for directory in _ENTRIES:
        names = [name for name in tree.names(directory) if name.endswith(".conf") and "rescue" not in name]
        for name in sorted(names, key=_version, reverse=True):
            path = f"{directory}/{name}"
            lines = (tree.read(path) or "").splitlines()
            options = [line.partition(" ")[2].strip() for line in lines if line.split(" ", 1)[0] == "options"]
            if options:
                return _expand(tree, " ".join(options)), path
    return None


def _version(name: str) -> list[tuple[int, str]]:
    """Numbers as numbers: 6.1.0-9 comes before 6.1.0-56."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _DIGITS.split(name)]


def _expand(tree: Tree, options: str) -> str:
    """$kernelopts is kept in GRUB's environment block."""
    if "$kernelopts" not in options:
        return options
    for path in _GRUBENV:
        for line in (tree.read(path) or "").splitlines():
            if line.startswith("kernelopts="):
                return options.replace("$kernelopts", line.partition("=")[2].strip())
    return options.replace("$kernelopts", "").strip()


def _grub(tree: Tree) -> tuple[str, str] | None:
    for path in _GRUB:
        found = _LINUX.search(tree.read(path) or "")
        if found:
            return found[1].strip(), path
    return None


def _firmware(tree: Tree) -> tuple[str, str] | None:
    return next(((text, path) for path in _FIRMWARE if (text := tree.read(path))), None)
