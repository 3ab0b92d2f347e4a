"""What is handed to the launcher: QEMU's arguments, and what has to be open under which number.

QEMU opens nothing of a guest's by path. The argv builder gives out numbers; `effects/` opens what each stands for and
the launcher moves it there. Same guest, same numbers: the arguments can be read as a diff.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvmd.facts import EMPTY
from kvmd.qemu.text import double

FIRST_FD = 10  # 0 to 2 are stdio; a few stay free for what the launcher may need


@dataclass(frozen=True, slots=True)
class OpenImage:
    """A disk image, opened beneath a storage root, O_RDWR or O_RDONLY, with kvmd's OFD lock on it."""

    fd: int
    disk: str
    path: str
    writable: bool
    format: str
    direct: bool  # O_DIRECT is asked of it


@dataclass(frozen=True, slots=True)
class OpenTap:
    """One queue of a NIC's TAP. Queues of one NIC are numbered from 0 and follow each other."""

    fd: int
    nic: str
    queue: int
    queues: int


@dataclass(frozen=True, slots=True)
class OpenVhostNet:
    """/dev/vhost-net, O_RDWR, one for each queue."""

    fd: int
    nic: str
    queue: int


@dataclass(frozen=True, slots=True)
class ListenUnix:
    """A bound and listening stream socket RUN/guests/NAME/PURPOSE.sock ("qmp", "rescue", "agent", "serial-NAME")."""

    fd: int
    purpose: str


@dataclass(frozen=True, slots=True)
class OpenLog:
    """A log file, O_WRONLY|O_APPEND|O_CREAT ("serial-NAME")."""

    fd: int
    purpose: str


@dataclass(frozen=True, slots=True)
class Memfd:
    """A memfd with a copy of the file: QEMU reads it as /proc/self/fd/N under a uid that cannot read the path."""

    fd: int
    path: str
    purpose: str  # "kernel", "initrd"


@dataclass(frozen=True, slots=True)
class OpenMemory:
    """The guest's memory as a file: without a name in the directory `path`, or the file `path`; of exactly this size.

    QEMU opens it once more as /proc/self/fd/N, so it belongs to the guest's uid.
    """

    fd: int
    path: str
    size_bytes: int
    page_bytes: int | None  # of the hugetlbfs it must be on; None: it must not be on one


FdRequest = OpenMemory | OpenImage | OpenTap | OpenVhostNet | ListenUnix | OpenLog | Memfd


@dataclass(frozen=True, slots=True)
class Command:
    """One QMP command."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the running QEMU must turn out to be; `verify.check_running` compares."""

    uuid: str
    vcpus: int
    memory_bytes: int
    kvm: bool
    disks: Mapping[str, str | None]  # device id -> node name, None: a drive without medium
    readonly: frozenset[str]  # device ids
    nics: Mapping[str, str]  # device id -> MAC, of the models that can be asked
    functions: Mapping[str, str] = field(default_factory=lambda: EMPTY)  # device id -> PCI function of the host


@dataclass(frozen=True, slots=True)
class Launch:
    """All of a start. `args` are QEMU's arguments without the program; `warnings` are for people."""

    args: tuple[str, ...]
    opens: tuple[FdRequest, ...]
    expect: Expectation
    commands: tuple[Command, ...] = ()  # to be run while it stands, before the guest's first instruction
    display_socket: str | None = None  # QEMU itself listens there, in a directory of the guest's uid
    warnings: tuple[str, ...] = ()

    def argv(self, emulator: str) -> tuple[str, ...]:
        """What is exec'ed."""
        return (emulator, *self.args)


class FdTable:
    """Gives out fd numbers and fdset ids while an argv is built, in the order they are asked for."""

    def __init__(self) -> None:
        self._opens: list[FdRequest] = []
        self._sets: list[str] = []

    @property
    def next_fd(self) -> int:
        """The number the next request must carry."""
        return FIRST_FD + len(self._opens)

    def add(self, request: FdRequest) -> int:
        """Record a request made with `next_fd`; returns its number."""
        if request.fd != self.next_fd:
            raise ValueError(f"fd {request.fd} is not the next one, {self.next_fd}")
        self._opens.append(request)
        return request.fd

    def fdset(self, fd: int, opaque: str) -> str:
        """Put an fd into a set of its own; returns the path QEMU opens. `opaque` is what `query-fdsets` will show."""
        number = len(self._sets) // 2 + 1
        self._sets += ["-add-fd", f"fd={fd},set={number},opaque={double(opaque)}"]
        return f"/dev/fdset/{number}"

    @property
    def opens(self) -> tuple[FdRequest, ...]:
        """All requests, in the order of their numbers."""
        return tuple(self._opens)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The `-add-fd` options; they must come before what uses the sets."""
        return tuple(self._sets)
