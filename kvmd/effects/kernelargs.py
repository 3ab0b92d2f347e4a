"""The kernel's command line, the boot loader that gives it, and the one file of kvmd's by which it is changed.

/etc/default/grub.d is read by Debian's grub-mkconfig (update-grub) and by no other; there kvmd has a file of its own.
Other loaders keep one file that is the administrator's: kvmd writes nothing there and says what to do.
"""

from __future__ import annotations

from typing import Literal

from kvmd.actions import WriteKernelArgs
from kvmd.effects.files import host_failed, write_atomic
from kvmd.effects.tree import Tree
from kvmd.errors import HostFailed
from kvmd.facts import BootLine
from kvmd.plan.kernelargs import DROP_IN

# The first of these that is there decides, with what must be there besides.
_LOADERS: tuple[tuple[Literal["grub", "grubby", "kernel-install"], str, str], ...] = (
    ("grub", "/etc/default/grub", "/usr/sbin/update-grub"),
    ("grubby", "/etc/default/grub", "/usr/sbin/grubby"),
    ("kernel-install", "/etc/kernel/cmdline", "/usr/bin/kernel-install"),
)


def observe(tree: Tree) -> BootLine:
    """What the kernel was given, and where more of it would come from."""
    raw = tree.read_bytes(DROP_IN)
    return BootLine(
        cmdline=tree.read("/proc/cmdline") or "",
        drop_in=None if raw is None else raw.decode("utf-8", "replace"),
        loader=next((name for name, file, tool in _LOADERS if tree.exists(file) and tree.exists(tool)), ""),
    )


def write(tree: Tree, action: WriteKernelArgs) -> None:
    """Make the drop-in say exactly this, or take it away. HostFailed."""
    path = tree.path(action.path)
    try:
        if action.new:
            path.parent.mkdir(mode=0o755, exist_ok=True)
            path.parent.chmod(0o755)  # whatever our umask is
            write_atomic(path, action.new.encode(), mode=0o644)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise host_failed("change", action.path, error) from None
    found = observe(tree).drop_in or ""
    if found != action.new:
        raise HostFailed(f"wrote {action.path}, and it reads otherwise", hint="who else writes it?", path=action.path)
