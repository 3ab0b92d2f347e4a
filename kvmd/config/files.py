"""Reading the configuration directory and writing the last good copies: the only file access of this layer.

What the bytes mean is `document.py`'s and `load.py`'s business.

A directory is untrusted input: droppings of editors and packagers, symlinks, FIFOs, huge files, names with
control characters. None of that raises; all of it becomes faults.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from kvmd.config.desired import Fault
from kvmd.config.scalars import guest_name

MAX_BYTES = 1 << 20
DIRECTORIES = ("guests.d", "networks.d", "profiles.d")
FILES = ("kvmd.toml", "host.toml")
_OTHERS = ("hooks.d", "secrets")
_DROPPING_ENDS = ("~", ".swp", ".swo", ".swx", ".tmp", ".bak", ".orig", ".rej", ".example", ".disabled", ".md")
_DROPPING_PARTS = (".dpkg-", ".ucf-", ".rpm")
_QCOW2_MAGIC = b"QFI\xfb"  # qemu, docs/interop/qcow2.txt


@dataclass(slots=True)
class Tree:
    """What was found: bytes by relative name, names by directory (only directories that could be read)."""

    sources: dict[str, bytes] = field(default_factory=dict)
    listed: dict[str, frozenset[str]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def read_tree(config_dir: Path, *, require_root_owner: bool = False) -> Tree:
    """Every file that may matter. Never raises OSError."""
    tree = Tree()
    reader = _Reader(config_dir, tree, require_root_owner=require_root_owner)
    names = reader.entries("")
    for name in names:
        if name in FILES:
            reader.read(name)
        elif name in DIRECTORIES:
            for entry in reader.entries(name):
                reader.read_entry(name, entry)
        elif not dropping(name) and name not in _OTHERS:
            close = difflib.get_close_matches(name, (*FILES, *DIRECTORIES), n=1)
            hint = f"did you mean {close[0]}?" if close else None
            tree.faults.append(Fault(shown(name), None, None, "is not a file kvmd reads", hint, "warning"))
    return tree


def fingerprint(config_dir: Path) -> frozenset[tuple[object, ...]]:
    """What changes when any file is written, added, removed or gets other rights; costs one stat a file."""
    found: set[tuple[object, ...]] = set()
    for directory in (config_dir, *(config_dir / name for name in DIRECTORIES)):
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=True)
                    found.add((entry.path, status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode))
        except OSError as error:
            found.add((str(directory), error.errno))
    return frozenset(found)


class _Reader:
    def __init__(self, root: Path, tree: Tree, *, require_root_owner: bool) -> None:
        self.root = root
        self.tree = tree
        self.require_root_owner = require_root_owner
        self.real_root = os.path.realpath(root)

    def entries(self, directory: str) -> list[str]:
        """The names in a directory, sorted; none if it cannot be read, which is a fault."""
        path = self.root / directory if directory else self.root
        try:
            info = path.stat()
            names = sorted(os.listdir(path))  # noqa: PTH208 - names, not paths
        except OSError as error:
            self._fault(directory or str(self.root), f"cannot be read: {error.strerror}")
            return []
        if (reason := self._unsafe(info)) is not None:
            self._fault(directory or str(self.root), reason)
            return []
        self.tree.listed[directory] = frozenset(names)
        return names

    def read_entry(self, directory: str, name: str) -> None:
        """One file of guests.d, networks.d or profiles.d, if its name says it is one."""
        if dropping(name):
            return
        file = f"{directory}/{name}"
        stem, dot, suffix = name.rpartition(".")
        if not dot or suffix != "toml":
            hint = f"rename it to {shown(stem or name)}.toml if it is meant"
            self._fault(file, "is ignored: the name does not end in .toml", hint, warning=True)
            return
        try:
            guest_name(stem)
        except ValueError as error:
            self._fault(file, f"the file's name: {error}")
            return
        self.read(file)

    def read(self, file: str) -> None:
        """Bytes of one file, or a fault."""
        path = self.root / file
        try:
            if path.is_symlink() and not self._inside(path):
                self._fault(file, "is a symbolic link that leaves the configuration directory", "copy the file instead")
                return
            # O_NONBLOCK: a FIFO must not hang us.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            try:
                self._read(file, descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._fault(file, f"cannot be read: {error.strerror}")

    def _read(self, file: str, descriptor: int) -> None:
        info = os.fstat(descriptor)
        if stat.S_ISDIR(info.st_mode):
            self._fault(file, "is a directory; a file is wanted")
        elif not stat.S_ISREG(info.st_mode):
            self._fault(file, "is not a regular file")
        elif (reason := self._unsafe(info)) is not None:
            self._fault(file, reason)
        else:
            with os.fdopen(descriptor, "rb", closefd=False) as stream:
                self._take(file, stream.read(MAX_BYTES + 1), info.st_size)

    def _take(self, file: str, raw: bytes, size: int) -> None:
        if len(raw) > MAX_BYTES:
            self._fault(file, f"has {size} bytes; at most {MAX_BYTES} (1 MiB) are read")
        else:
            self.tree.sources[file] = raw

    def _inside(self, path: Path) -> bool:
        return os.path.realpath(path).startswith(self.real_root + "/")

    def _unsafe(self, info: os.stat_result) -> str | None:
        if not self.require_root_owner:
            return None
        if info.st_uid != 0:
            return f"belongs to uid {info.st_uid}, not to root: whoever writes here becomes root"
        if info.st_mode & 0o022:
            return f"can be written by others than root (mode {stat.S_IMODE(info.st_mode):04o})"
        return None

    def _fault(self, file: str, message: str, hint: str | None = None, *, warning: bool = False) -> None:
        self.tree.faults.append(Fault(shown(file), None, None, message, hint, "warning" if warning else "error"))


def dropping(name: str) -> bool:
    """Left by an editor or a package manager, or not meant for us."""
    return (
        name.startswith((".", "#", "README"))
        or name.endswith(_DROPPING_ENDS)
        or any(part in name for part in _DROPPING_PARTS)
    )


def shown(name: str) -> str:
    """A file's name on one line of a terminal: what is unprintable or no UTF-8 is escaped."""
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in name[:200])


def guess_format(path: str) -> str | None:
    """ "qcow2" or "raw" by the first four bytes; None if it cannot be read. Nothing else of the file is looked at."""
    with suppress(OSError, ValueError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
                return "qcow2" if os.read(descriptor, 4) == _QCOW2_MAGIC else "raw"
        finally:
            os.close(descriptor)
    return None


def missing(path: str) -> bool:
    """Whether it is certain that there is no such file."""
    try:
        os.stat(path)  # noqa: PTH116 - the path is text from a file
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return False


def write_copies(target: Path, keep: Mapping[str, bytes], gone: frozenset[str]) -> None:
    """Writes `keep` below `target`, each file whole or not at all, and removes `gone`. Raises OSError."""
    for file, raw in sorted(keep.items()):
        path = target / file
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            if path.read_bytes() == raw:
                continue
        _replace(path, raw)
    for file in sorted(gone):
        (target / file).unlink(missing_ok=True)


def _replace(path: Path, raw: bytes) -> None:
    fresh = path.with_name(f".{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(raw)
        stream.flush()
        os.fsync(descriptor)
    fresh.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
