"""What `doctor` looked at, frozen, and the shape of what it says. Data only: gathered in effects/, judged in checks_*.

What could not be looked at is `Unseen` with the reason, never a guess; None means "is not there".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from kvmd.config.desired import Desired, Loaded
from kvmd.facts import EMPTY, Facts
from kvmd.paths import Paths
from kvmd.qemu.caps import Kvm


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"  # works, but worse or less safely than it could
    FAIL = "fail"  # something declared cannot work, or lets in who must stay out
    SKIP = "skip"  # does not apply here, or cannot be seen; the message says which


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `doctor`. `fix` is one command or configuration line."""

    name: str
    status: Status
    message: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """A check without its name, which is the table's."""

    status: Status
    message: str
    fix: str | None = None


def ok(message: str) -> Finding:
    """All is well."""
    return Finding(Status.OK, message)


def warn(message: str, fix: str | None = None) -> Finding:
    """Worse than it could be."""
    return Finding(Status.WARN, message, fix)


def fail(message: str, fix: str | None = None) -> Finding:
    """Cannot work, or must not be."""
    return Finding(Status.FAIL, message, fix)


def skip(message: str) -> Finding:
    """Does not apply, or cannot be seen."""
    return Finding(Status.SKIP, message)


def count(number: int, noun: str) -> str:
    """ "1 guest", "2 guests"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass(frozen=True, slots=True)
class Unseen:
    """Not looked at, and why."""

    reason: str


FileKind = Literal["file", "directory", "socket", "device", "other"]


@dataclass(frozen=True, slots=True)
class FileStat:
    """Kind, permission bits and owner of a path."""

    kind: FileKind
    mode: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Emulator:
    """One QEMU that kvmd.toml or a guest names. `error` is why it could not be asked."""

    name: str
    version: str = ""
    can_sandbox: bool = False
    error: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class HostLink:
    """A network interface with the mark it carries (IFLA_IFALIAS)."""

    name: str
    alias: str = ""
    kind: Literal["bridge", "tap", "other"] = "other"


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that waits for packets. `program` is None where other users' processes cannot be looked into."""

    protocol: Literal["udp", "tcp"]
    address: str  # "0.0.0.0", "::", "127.0.0.53"
    port: int
    pid: int | None = None
    program: str | None = None
    ours: bool = False  # the server of one of this kvmd's networks

    @property
    def is_wildcard(self) -> bool:
        """True when it takes what is sent to any address of the host."""
        return self.address in ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class ImageReport:
    """One file or device that a guest names. `slug` is that of the error that opening it gave, None when it opened."""

    guest: str
    key: str  # "disk.root", "boot.kernel"
    path: str
    slug: str | None = None
    message: str = ""
    hint: str | None = None
    mode: int = 0
    is_block: bool = False
    direct_io: bool = True
    cache: str | None = None  # as the guest's file has it
    growth_bytes: int = 0  # what a writable image may still take of the file system
    file_system: int = 0  # its device number, to add up what lies on one
    free_bytes: int | None = None  # None for a device
    content: str = "raw"  # what the header looks like, whatever was declared
    warnings: tuple[str, ...] = ()  # of qemu.imageheader


@dataclass(frozen=True, slots=True)
class Place:
    """A directory kvmd writes to, and the file system below it."""

    what: str  # "state", "logs", "images"
    path: str
    free_bytes: int
    total_bytes: int
    is_readonly: bool = False


@dataclass(frozen=True, slots=True)
class Clock:
    """What adjtimex(2) says, and who keeps time."""

    synchronized: bool
    service: str | None = None


@dataclass(frozen=True, slots=True)
class UnitState:
    """kvmd.service as its files tell it."""

    systemd: bool = False
    installed: bool = False
    enabled: bool = False


@dataclass(frozen=True, slots=True)
class Accounts:
    """The user database as its files tell it."""

    users: Mapping[str, int] = field(default_factory=lambda: EMPTY)
    groups: Mapping[str, int] = field(default_factory=lambda: EMPTY)
    subordinate: tuple[tuple[str, int, int], ...] = ()  # owner, first uid, last uid (/etc/subuid)


@dataclass(frozen=True, slots=True)
class HostReport:
    """Everything the checks judge."""

    paths: Paths = field(default_factory=Paths)
    euid: int = 0
    loaded: Loaded = field(default_factory=lambda: Loaded(Desired()))
    facts: Facts = field(default_factory=Facts)
    kernel: str = ""
    kvm: Kvm | Unseen = field(default_factory=lambda: Unseen("not asked"))
    under_hypervisor: bool = False
    nested: str | None = None  # the kvm module's parameter `nested`: "Y", "1", "N", "0"
    emulators: tuple[Emulator, ...] = ()
    has_psi: bool = True
    cgroup: Literal["v2", "v1", "hybrid"] = "v2"
    memlock_bytes: int | None = None  # None: no limit
    aio_max: int | None = None
    programs: frozenset[str] = frozenset()  # installed, of those the checks name
    ruleset: str | Unseen = field(default_factory=lambda: Unseen("not asked"))  # `nft -j list ruleset`
    legacy_tables: frozenset[str] = frozenset()  # of the old iptables, which nft does not list
    links: tuple[HostLink, ...] = ()
    listeners: tuple[Listener, ...] = ()
    network_setup: Literal["NetworkManager", "netplan", "networkd", "ifupdown"] = "ifupdown"
    uplink: str | None = None  # the interface of the default route
    processes: Mapping[str, int] = field(default_factory=lambda: EMPTY)  # command name -> a pid of it
    images: tuple[ImageReport, ...] = ()
    places: tuple[Place, ...] = ()
    files: Mapping[str, FileStat | Unseen | None] = field(default_factory=lambda: EMPTY)
    config_files: Mapping[str, FileStat] = field(default_factory=lambda: EMPTY)
    listening: bool = False  # somebody answers on kvmd.sock
    clock: Clock | Unseen = field(default_factory=lambda: Unseen("not asked"))
    accounts: Accounts = field(default_factory=Accounts)
    unit: UnitState = field(default_factory=UnitState)
    needrestart: Literal["absent", "exempt", "would restart guests"] = "absent"
    network_manager: Literal["absent", "leaves", "may take"] = "absent"

    @property
    def desired(self) -> Desired:
        """What the files want."""
        return self.loaded.desired

    @property
    def trusted(self) -> frozenset[int]:
        """Uids kvmd's own files may belong to: root, and whoever runs a kvmd of their own."""
        return frozenset({0, self.euid})

    @property
    def kernel_version(self) -> tuple[int, int]:
        """Major and minor number of the running kernel, (0, 0) when unknown."""
        numbers = [part for part in self.kernel.replace("-", ".").split(".")[:2] if part.isdigit()]
        return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 else (0, 0)
