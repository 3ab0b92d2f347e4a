"""Who may use a disk image at the same time: open-file-description locks that QEMU's own tools understand.

The lock lives as long as any copy of the descriptor does, in kvmd or in a QEMU that outlived it, and goes with the
last one whatever happened. Byte ranges follow QEMU's layout, so a foreign `qemu-img` or QEMU that would write is
refused, and one that reads beside readers is not.

Sources: fcntl(2) F_OFD_SETLK; QEMU block/file-posix.c (RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE), qapi BlockPermission.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from kvmd.effects.proc import observe_qemus
from kvmd.effects.tree import Tree

_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, length, pid
_TO_END = 0  # a length of 0 reaches to the end of the file, wherever it will be
_PERM_BASE, _SHARED_BASE = 100, 200  # "I use this" and "nobody else may use this" of each permission
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3  # bit numbers of BLK_PERM_*


class Use(Enum):
    """How an image is used: (permissions used, permissions denied to others); EXCLUSIVE takes every byte."""

    EXCLUSIVE = ((), ())
    READ = ((_CONSISTENT_READ,), (_WRITE, _RESIZE))
    SHARED_WRITE = ((_CONSISTENT_READ, _WRITE), ())


@dataclass(frozen=True, slots=True)
class Holder:
    """A process with a lock on an image. `guest` is what its QEMU is named, None when it is no QEMU."""

    pid: int
    command: str
    guest: str | None = None

    def __str__(self) -> str:
        if self.pid == os.getpid():
            return f"kvmd itself, for a guest that is being started (pid {self.pid})"
        who = f"guest {self.guest}, " if self.guest else ""
        return f"{who}{self.command} (pid {self.pid})"


def lock_image(fd: int, use: Use) -> bool:
    """Lock the image for `use` without waiting; False when someone's use stands against it.

    After False some bytes may be locked: close the descriptor. EXCLUSIVE and SHARED_WRITE need it open for writing.
    Raises OSError where the file system has no locks.
    """
    if use is Use.EXCLUSIVE:
        return _set(fd, fcntl.F_WRLCK, 0, _TO_END)
    used, denied = use.value
    taken = [_PERM_BASE + bit for bit in used] + [_SHARED_BASE + bit for bit in denied]
    against = [_SHARED_BASE + bit for bit in used] + [_PERM_BASE + bit for bit in denied]
    # First take, then look: of two that come at once at least one sees the other.
    return all(_set(fd, fcntl.F_RDLCK, byte, 1) for byte in taken) and not any(_held(fd, byte) for byte in against)


def _set(fd: int, kind: int, start: int, length: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _held(fd: int, byte: int) -> bool:
    """Whether another open file description has any lock on the byte."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    return bool(_FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK)


def find_holder(fd: int) -> Holder | None:
    """A process other than by this very descriptor that holds a lock on the file; None if none can be seen.

    OFD locks have no owner pid in /proc/locks; /proc/PID/fdinfo/N shows them with each descriptor that carries
    them (proc(5)). Slow (all descriptors of all processes): for the error message only.
    """
    wanted = os.fstat(fd)
    with os.scandir("/proc") as processes:
        found = [int(p.name) for p in processes if p.name.isdigit() and _holds(p.name, wanted, fd)]
    if not found:
        return None
    # A launcher's or kvmd's own copy of the descriptor says less than the QEMU that uses it.
    guests = {qemu.process.pid: qemu.name for qemu in observe_qemus(Tree())}
    pid = min(found, key=lambda pid: (pid not in guests, pid == os.getpid(), pid))
    with contextlib.suppress(OSError):
        return Holder(pid, Path(f"/proc/{pid}/comm").read_text("utf-8", "replace").strip(), guests.get(pid))
    return None


def _holds(pid: str, wanted: os.stat_result, our_fd: int) -> bool:
    ours = str(our_fd) if pid == str(os.getpid()) else None
    # scandir: this looks at every descriptor of the machine, and Path objects are half the time
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # closed meanwhile, or not for us to see
                found = entry.stat()
                if entry.name == ours or (found.st_ino, found.st_dev) != (wanted.st_ino, wanted.st_dev):
                    continue
                if "\nlock:" in Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text("utf-8", "replace"):
                    return True
    return False
