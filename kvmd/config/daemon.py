"""kvmd.toml: the daemon itself."""

from __future__ import annotations

from typing import Literal

from kvmd.config.key import Table, key, later, table
from kvmd.config.scalars import (
    AutoCount,
    DurationT,
    Emulator,
    GuestName,
    Path,
    PercentT,
    PositiveSize,
    Principal,
    UidRange,
    UidRangeT,
)
from kvmd.units import Duration, Percent, Size


class Access(Table):
    """[access]: who may do what over the socket."""

    admins: tuple[Principal, ...] = key(("root", "@kvmd-admin"), "Everything.", mark="~")
    operators: tuple[Principal, ...] = key(("@kvmd-operator",), "Start, stop, console.", mark="~")
    viewers: tuple[Principal, ...] = key((), "Look.", mark="~", example='["@adm", "prometheus"]')


class Storage(Table):
    """[storage]"""

    roots: tuple[Path, ...] = key(
        ("/var/lib/kvmd/images", "/srv/vm"),
        "Directories and devices images may lie in; nothing else is ever opened.",
        mark="~",
        example='["/srv/vm", "/dev/vg0"]',
    )
    images: Path = key("/var/lib/kvmd/images", "Where new images are made; a root too.", mark="~")
    backups: None = later("absolute path", "Where backups go.")
    low_space: PercentT = key(Percent(0.1), "Warn below so much free space.", mark="~")


class Apply(Table):
    """[apply]"""

    allow: tuple[Literal["guest", "network", "host"], ...] = key(
        (), "Disruption that cron, timer and boot may cause for new edits.", mark="~", example='["guest"]'
    )
    max_stops: int = key(1, "More guests stopped by one pass: refuse and ask.", mark="~", ge=0, le=10000)


class Guests(Table):
    """[guests]"""

    start_concurrency: AutoCount = key(
        "auto", 'Guests started at once; "auto": twice the CPUs, from 4 to 16.', mark="~"
    )
    shutdown_timeout: None = later("duration", "All guests together at host shutdown.", mark="~")
    default_profile: GuestName | None = key(None, "Profile of guests that name none.", mark="~", example='"linux"')


class QemuDefaults(Table):
    """[qemu]"""

    emulator: Emulator = key("qemu-system-x86_64", "Program name in PATH, or absolute path.", mark="~")
    uid_range: UidRangeT = key(UidRange(64100, 65099), "Each guest gets a uid of its own.", mark="!")
    supervisor: Literal["auto", "systemd", "direct"] = key(
        "auto", 'Who is QEMU\'s parent; "auto": systemd when kvmd runs as kvmd.service.', mark="!"
    )
    sandbox: bool = key(True, "QEMU's seccomp filter.", mark="!", classic="-sandbox")


class LogFiles(Table):
    """[log.serial] and [log.qemu]"""

    size: PositiveSize = key(Size(2 << 20), "Of one file.", mark="~", unit="bytes", example='"2MiB"')
    files: int = key(3, "Files kept.", mark="~", ge=1, le=100)


class Log(Table):
    """[log]"""

    level: Literal["debug", "info", "warning", "error"] = key("info", "Of the journal.", mark="~")
    serial: LogFiles = table(LogFiles, "Each guest's serial output.")
    qemu: LogFiles = table(LogFiles, "Each QEMU's stderr.")


class History(Table):
    """[history]"""

    events: DurationT = key(Duration(90 * 86400), "How long events are kept.", mark="~", example='"90d"')
    samples: DurationT = key(
        Duration(86400),
        "How long samples of what guests need are kept; statistical admission looks at a day.",
        mark="~",
        example='"24h"',
    )
    max_size: PositiveSize = key(Size(512 << 20), "Of history.db.", mark="~", unit="bytes", example='"512MiB"')


class Metrics(Table):
    """[metrics]"""

    textfile: None = later("absolute path", "File for node_exporter.")
    listen: None = later("text", "ADDRESS:PORT for Prometheus.")


class Hooks(Table):
    """[hooks]"""

    dir: None = later("absolute path", "Programs run at events.")
    timeout: None = later("duration", "Deadline of one hook.")


class RpcLimits(Table):
    """[limits]: of the socket."""

    connections: int = key(256, "At once.", mark="~", ge=1, le=65536)
    request_size: PositiveSize = key(Size(1 << 20), "Of one request.", mark="~", unit="bytes", example='"1MiB"')
    in_flight: int = key(32, "Unanswered requests of one connection.", mark="~", ge=1, le=10000)


class Daemon(Table):
    """A whole file."""

    schema_: Literal[1] = key(1, "Version of the keys; absent: 1.", alias="schema")
    access: Access = table(Access)
    storage: Storage = table(Storage)
    apply: Apply = table(Apply)
    guests: Guests = table(Guests)
    qemu: QemuDefaults = table(QemuDefaults)
    log: Log = table(Log)
    history: History = table(History)
    metrics: Metrics = table(Metrics)
    hooks: Hooks = table(Hooks)
    limits: RpcLimits = table(RpcLimits)
