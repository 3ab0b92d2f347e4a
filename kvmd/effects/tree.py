"""Reading and writing small kernel files below a root path: what every observer of /sys and /proc stands on.

A file that is absent, unreadable or gives an error reads as None: kernels differ, and a sensor that is not there
is a fact. A write that fails is never silent. Nothing here knows what any file means.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kvmd.errors import HostFailed
from kvmd.units import CpuSet

_BLANK = " \t\r\n\0"  # node cpulist of 5.15 and 5.16 ends in a NUL
CHUNK_BYTES = 16 << 10  # all of nearly every file, in one read
MAX_BYTES = 1 << 20  # meminfo of a big host is a few KiB; /proc/sys answers a read of 4 MiB with ENOMEM (proc_sysctl.c)


class Tree:
    """The files below `root`; "/" is the machine itself, any other root a recorded or made-up one."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self._prefix = os.fspath(root).rstrip("/")

    @property
    def is_live(self) -> bool:
        """True for the machine we run on: only then may the process's own state complete the picture."""
        return self.root == Path("/")

    def path(self, path: str) -> Path:
        """Where the absolute `path` of the pictured machine lies here."""
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str | None:
        """Stripped content, None when it cannot be read."""
        raw = self.read_bytes(path)
        return None if raw is None else raw.decode("utf-8", "replace").strip(_BLANK)

    def read_bytes(self, path: str) -> bytes | None:
        """Content as it is (/proc/PID/cmdline has NULs), None when it cannot be read."""
        # Bare system calls: a scan of /proc reads hundreds of files, and Path and io objects are most of its time.
        try:
            fd = os.open(self._prefix + path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            found = os.read(fd, CHUNK_BYTES)
            while found and len(found) < MAX_BYTES and (more := os.read(fd, min(CHUNK_BYTES, MAX_BYTES - len(found)))):
                found += more
            return found
        except OSError:
            return None
        finally:
            os.close(fd)

    def link(self, path: str) -> str | None:
        """Where a symbolic link points, as it says itself; None when it is none."""
        try:
            return os.readlink(self._prefix + path)  # noqa: PTH115 - a text, no path
        except OSError:
            return None

    def number(self, path: str) -> int | None:
        """A decimal number, None when absent or not one ("-1" and "max" style answers included as they are)."""
        text = self.read(path)
        try:
            return int(text) if text else None
        except ValueError:
            return None

    def cpus(self, path: str) -> CpuSet | None:
        """A CPU or node list ("0-3,8"), None when absent or malformed ("(null)" on some kernels)."""
        text = self.read(path)
        if text is None:
            return None
        try:
            return CpuSet.parse(text)
        except ValueError:
            return None

    def cpu_mask(self, path: str) -> CpuSet | None:
        """CPUs of a hexadecimal mask in groups of 32 bits ("00000000,0000f00f"), for kernels without lists."""
        text = self.read(path)
        try:
            bits = int(text.replace(",", ""), 16) if text else None
        except ValueError:
            return None
        return None if bits is None else CpuSet(cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1)

    def names(self, path: str) -> list[str]:
        """Sorted entries of a directory, [] when there is none."""
        try:
            with os.scandir(self._prefix + path) as entries:
                return sorted(entry.name for entry in entries)
        except OSError:
            return []

    def numbered(self, path: str, prefix: str) -> list[int]:
        """Ascending N of the entries called prefixN ("node", "cpu"); ids may have gaps."""
        tails = (name[len(prefix) :] for name in self.names(path) if name.startswith(prefix))
        return sorted(int(tail) for tail in tails if tail.isascii() and tail.isdigit())

    def exists(self, path: str) -> bool:
        """True when something is there, readable or not."""
        return self.path(path).exists()

    def owner(self, path: str) -> tuple[int, int, int] | None:
        """Uid, gid and permission bits, None when there is nothing."""
        try:
            found = self.path(path).stat()
        except OSError:
            return None
        return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)

    def give(self, path: str, uid: int, gid: int, mode: int) -> None:
        """Make a node someone's. HostFailed."""
        try:
            os.chown(self.path(path), uid, gid)
            self.path(path).chmod(mode)
        except OSError as error:
            raise HostFailed(f"cannot give {path} to uid {uid}: {error.strerror}", path=path) from error

    def write(self, path: str, value: str) -> None:
        """Write `value` in one write(2), into an existing file only. Raises HostFailed."""
        try:
            fd = os.open(self.path(path), os.O_WRONLY | os.O_CLOEXEC | (0 if self.is_live else os.O_TRUNC))
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise HostFailed(
                f'cannot write "{value}" to {path}: {error.strerror}',
                hint=_write_hint(error),
                path=path,
                value=value,
                errno=error.errno,
            ) from error


def _write_hint(error: OSError) -> str | None:
    if isinstance(error, PermissionError):
        return "kvmd must run as root with a writable /sys and /proc/sys"
    if isinstance(error, FileNotFoundError):
        return "this kernel does not have it"
    return None
