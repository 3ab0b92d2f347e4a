"""Processes as /proc tells them: proof of identity, and which QEMUs run on this machine.

Reads only, ends nothing. A process may vanish between two reads: then it was not there.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kvmd.effects.tree import Tree
from kvmd.facts import Process

_START_TIME = 22 - 3  # proc(5): field 22, and the first field behind the command name is number 3
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_NAMES = ("qemu-system-", "qemu-kvm", "kvm")


@dataclass(frozen=True, slots=True)
class QemuProcess:
    """A QEMU found by looking, ours or not."""

    process: Process
    argv: tuple[str, ...]
    uuid: str | None  # of -uuid, lower case
    name: str | None  # of -name, without its options
    rss_bytes: int  # VmRSS: without hugetlb pages


def observe_process(tree: Tree, pid: int) -> Process | None:
    """The pid with its start time, None when there is no such process (or only its zombie is left)."""
    text = tree.read(f"/proc/{pid}/stat")
    if text is None:
        return None
    # the command name is in parentheses and may itself hold spaces and parentheses: the last one ends it
    fields = text.rpartition(")")[2].split()
    if len(fields) <= _START_TIME or fields[0] in ("Z", "X") or not fields[_START_TIME].isdigit():
        return None
    return Process(pid=pid, start_time=int(fields[_START_TIME]))


def observe_qemus(tree: Tree) -> tuple[QemuProcess, ...]:
    """All QEMU system emulators that run, by pid: those called so, and whatever has QEMU's -uuid option."""
    return tuple(found for pid in pids(tree) if (found := _qemu(tree, pid)))


def observe_threads(tree: Tree, pid: int) -> tuple[int, ...]:
    """Thread ids of a process, ascending; () when it is gone."""
    return tuple(sorted(int(name) for name in tree.names(f"/proc/{pid}/task") if name.isdigit()))


def foreign_qemu_bytes(tree: Tree, known_pids: frozenset[int]) -> int:
    """RSS of all QEMUs whose pid is not in `known_pids`: memory that others' guests hold."""
    strangers = (pid for pid in pids(tree) if pid not in known_pids)
    return sum(found.rss_bytes for pid in strangers if (found := _qemu(tree, pid)))


def locked_bytes(tree: Tree, pid: int) -> int:
    """VmLck of a process: what it has locked into RAM (proc(5)); hugetlb pages are not in it."""
    return _status_bytes(tree, pid, "VmLck")


def pids(tree: Tree) -> Iterator[int]:
    """All processes, kernel threads too, ascending."""
    yield from sorted(int(name) for name in tree.names("/proc") if name.isascii() and name.isdigit())


def _qemu(tree: Tree, pid: int) -> QemuProcess | None:
    raw = tree.read_bytes(f"/proc/{pid}/cmdline")
    if not raw:
        return None  # a kernel thread, or gone
    argv = tuple(raw.rstrip(b"\0").decode("utf-8", "surrogateescape").split("\0"))
    called = argv[0].rpartition("/")[2]
    is_emulator = called.startswith(_NAMES[0]) or called in _NAMES[1:]
    uuid = _option(argv, "uuid")
    uuid = uuid.lower() if uuid and _UUID.fullmatch(uuid) else None
    if not is_emulator and uuid is None:
        return None
    process = observe_process(tree, pid)
    if process is None:
        return None
    name = _option(argv, "name")
    return QemuProcess(
        process=process,
        argv=argv,
        uuid=uuid,
        name=_name_of(name) if name else None,
        rss_bytes=_rss_bytes(tree, pid),
    )


def _option(argv: tuple[str, ...], name: str) -> str | None:
    """The value behind -name or --name: QEMU takes both, and the last one wins."""
    value = None
    for option, following in itertools.pairwise(argv):
        if option in (f"-{name}", f"--{name}"):
            value = following
    return value


def _name_of(value: str) -> str:
    head = value.split(",", 1)[0]
    return head.removeprefix("guest=")


def _rss_bytes(tree: Tree, pid: int) -> int:
    return _status_bytes(tree, pid, "VmRSS")


def _status_bytes(tree: Tree, pid: int, wanted: str) -> int:
    for line in (tree.read(f"/proc/{pid}/status") or "").splitlines():
        key, _, value = line.partition(":")
        amount = value.split()
        if key == wanted and amount and amount[0].isdigit():
            return int(amount[0]) * 1024
    return 0
