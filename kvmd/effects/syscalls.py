"""System calls the standard library does not offer: mount(2), umount2(2), swapon(2), swapoff(2). Each may block.

All raise OSError with the kernel's errno; whoever calls translates it, for only there it is known what was asked.
"""

from __future__ import annotations

import ctypes
import os

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8  # these and MNT_DETACH: sys/mount.h
MNT_DETACH = 2
SWAP_FLAG_PREFER = 0x8000  # these two: sys/swap.h
SWAP_FLAG_PRIO_MASK = 0x7FFF
_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    """Mount a file system of `kind` on the directory `target`."""
    words = (os.fsencode(word) for word in (source, target, kind))
    _check(_libc.mount(*words, ctypes.c_ulong(flags), os.fsencode(options)))


def umount(target: str, *, detach: bool = False) -> None:
    """Unmount; with `detach` what is open there lives on without a name."""
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH if detach else 0))


def swapon(path: str, priority: int | None) -> None:
    """Swap to `path`, before others of lower priority (0 to 32767); None leaves the order to the kernel."""
    flags = 0 if priority is None else SWAP_FLAG_PREFER | priority & SWAP_FLAG_PRIO_MASK
    _check(_libc.swapon(os.fsencode(path), flags))


def swapoff(path: str) -> None:
    """Bring everything back that is in `path`, and no longer swap to it. Seconds to minutes."""
    _check(_libc.swapoff(os.fsencode(path)))


def _check(answer: int) -> None:
    if answer:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
