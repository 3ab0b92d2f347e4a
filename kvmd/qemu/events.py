"""QMP events as facts about a guest's life.

An event comes from a process that a guest may have taken over, so nothing here trusts a shape, a type or a length:
what does not parse is None, texts are cut and stripped of control characters, and no input raises.
(Event shapes: qapi/run-state.json, qapi/block-core.json, qapi/machine.json, qapi/qdev.json of QEMU 7.2.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LONGEST_TEXT = 200
_MAX_BYTES = 1 << 62


@dataclass(frozen=True, slots=True)
class Shutdown:
    """QEMU will not run this guest on. `reason` is QEMU's ShutdownCause: "guest-shutdown", "host-qmp-quit", …"""

    reason: str
    by_guest: bool


@dataclass(frozen=True, slots=True)
class Paused:
    """The vCPUs stand still (STOP). Why is told by the event before it, or by query-status."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The vCPUs run again."""


@dataclass(frozen=True, slots=True)
class Reset:
    """The board was reset; `by_guest` when the guest rebooted itself."""

    reason: str
    by_guest: bool


@dataclass(frozen=True, slots=True)
class Panicked:
    """The guest's kernel panicked, and pvpanic told. `action` is what QEMU did: "pause", "poweroff", "run"."""

    action: str
    crash_loaded: bool = False  # GUEST_CRASHLOADED: the guest's own kdump kernel is taking over


@dataclass(frozen=True, slots=True)
class IoError:
    """A disk of the guest could not be read or written. `stopped`: QEMU paused the guest for it (on_error)."""

    disk: str  # the NAME of [disk.NAME], or QEMU's own name for it
    operation: str  # "read" or "write"
    stopped: bool
    no_space: bool
    reason: str


@dataclass(frozen=True, slots=True)
class BalloonMoved:
    """The guest's memory is now this much, in bytes."""

    actual_bytes: int


@dataclass(frozen=True, slots=True)
class WatchdogFired:
    """The guest stopped feeding its watchdog. `action`: what QEMU does about it."""

    action: str


@dataclass(frozen=True, slots=True)
class DeviceGone:
    """A device was taken out. `device` is its id ("disk-data"), empty when it had none."""

    device: str


@dataclass(frozen=True, slots=True)
class PowerdownAsked:
    """The guest was told that its power button was pressed."""


Fact = (
    Shutdown
    | Paused
    | Resumed
    | Reset
    | Panicked
    | IoError
    | BalloonMoved
    | WatchdogFired
    | DeviceGone
    | PowerdownAsked
)


def translate(message: Mapping[str, Any]) -> Fact | None:
    """The fact behind one QMP event message, None for events that say nothing about the guest's life."""
    data = message.get("data")
    fields: Mapping[str, Any] = data if isinstance(data, Mapping) else {}
    match message.get("event"):
        case "SHUTDOWN":
            return Shutdown(_text(fields.get("reason")) or "unknown", fields.get("guest") is True)
        case "STOP":
            return Paused()
        case "RESUME":
            return Resumed()
        case "RESET":
            return Reset(_text(fields.get("reason")) or "unknown", fields.get("guest") is True)
        case "POWERDOWN":
            return PowerdownAsked()
        case "GUEST_PANICKED":
            return Panicked(_text(fields.get("action")) or "unknown")
        case "GUEST_CRASHLOADED":
            return Panicked(_text(fields.get("action")) or "unknown", crash_loaded=True)
        case "BLOCK_IO_ERROR":
            return _io_error(fields)
        case "BALLOON_CHANGE":
            actual = fields.get("actual")
            good = isinstance(actual, int) and not isinstance(actual, bool) and 0 <= actual <= _MAX_BYTES
            return BalloonMoved(actual) if good and isinstance(actual, int) else None
        case "WATCHDOG":
            return WatchdogFired(_text(fields.get("action")) or "unknown")
        case "DEVICE_DELETED":
            return DeviceGone(_text(fields.get("device")))
        case _:
            return None


def event_time(message: Mapping[str, Any]) -> float | None:
    """Seconds since the epoch as QEMU stamped the event, None when it did not."""
    stamp = message.get("timestamp")
    if not isinstance(stamp, Mapping):
        return None
    seconds, micro = stamp.get("seconds"), stamp.get("microseconds")
    if type(seconds) is not int or type(micro) is not int:
        return None
    # QEMU writes -1 where it could not read the clock (qapi/qmp-event.c).
    return seconds + micro / 1e6 if 0 <= seconds < 1 << 40 and 0 <= micro < 10**6 else None


def _io_error(fields: Mapping[str, Any]) -> IoError:
    node = _text(fields.get("node-name"))
    device = (
        _text(fields.get("device")) or _text(fields.get("qom-path")).removesuffix("/virtio-backend").rpartition("/")[2]
    )
    return IoError(
        disk=node or device.removeprefix("disk-") or "unknown",
        operation="read" if fields.get("operation") == "read" else "write",
        stopped=fields.get("action") == "stop",
        no_space=fields.get("nospace") is True,
        reason=_text(fields.get("reason")) or "unknown",
    )


def _text(value: object) -> str:
    """A guest-influenced text made fit for logs and terminals; "" when it is none."""
    if not isinstance(value, str):
        return ""
    return "".join(char for char in value[:LONGEST_TEXT] if char.isprintable())
