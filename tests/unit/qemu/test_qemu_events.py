"""QMP events as facts; any message a taken-over QEMU may send is a fact or None."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.qemu.events import (
    LONGEST_TEXT,
    BalloonMoved,
    DeviceGone,
    Fact,
    IoError,
    Panicked,
    Paused,
    PowerdownAsked,
    Reset,
    Resumed,
    Shutdown,
    WatchdogFired,
    event_time,
    translate,
)

DISK = "/machine/peripheral/disk-root/virtio-backend"


@pytest.mark.parametrize(
    ("event", "data", "fact"),
    [
        ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}, Shutdown("guest-shutdown", True)),
        ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}, Shutdown("host-qmp-quit", False)),
        ("SHUTDOWN", {}, Shutdown("unknown", False)),
        ("STOP", None, Paused()),
        ("RESUME", None, Resumed()),
        ("POWERDOWN", None, PowerdownAsked()),
        ("RESET", {"guest": True, "reason": "guest-reset"}, Reset("guest-reset", True)),
        ("GUEST_PANICKED", {"action": "pause", "info": {"type": "hyper-v"}}, Panicked("pause")),
        ("GUEST_CRASHLOADED", {"action": "run"}, Panicked("run", crash_loaded=True)),
        ("BALLOON_CHANGE", {"actual": 268435456}, BalloonMoved(268435456)),
        ("BALLOON_CHANGE", {"actual": True}, None),
        ("BALLOON_CHANGE", {"actual": -1}, None),
        ("WATCHDOG", {"action": "reset"}, WatchdogFired("reset")),
        ("DEVICE_DELETED", {"device": "disk-data", "path": "/machine/peripheral/disk-data"}, DeviceGone("disk-data")),
        ("DEVICE_DELETED", {"path": "/machine/peripheral-anon/device[3]"}, DeviceGone("")),
        ("RTC_CHANGE", {"offset": 1}, None),
        (7, {}, None),
        (None, {}, None),
    ],
)
def test_translate(event: object, data: object, fact: Fact | None) -> None:
    message = {"event": event} if data is None else {"event": event, "data": data}
    assert translate(message) == fact


@pytest.mark.parametrize(
    ("data", "disk"),
    [
        ({"device": "", "node-name": "root", "qom-path": DISK}, "root"),
        ({"device": "", "qom-path": DISK}, "root"),
        ({"device": "disk-root"}, "root"),
        ({}, "unknown"),
    ],
)
def test_an_io_error_names_the_disk(data: dict[str, Any], disk: str) -> None:
    told = {"operation": "write", "action": "stop", "nospace": True, "reason": "No space left on device"}
    assert translate({"event": "BLOCK_IO_ERROR", "data": told | data}) == IoError(
        disk, "write", stopped=True, no_space=True, reason="No space left on device"
    )


def test_texts_are_cut_and_stripped() -> None:
    fact = translate({"event": "SHUTDOWN", "data": {"reason": "\x1b[31mred\n" + "x" * 10_000}})
    assert isinstance(fact, Shutdown)
    assert fact.reason.startswith("[31mred")
    assert len(fact.reason) <= LONGEST_TEXT


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
)
NAMES = st.sampled_from(
    [
        "SHUTDOWN",
        "STOP",
        "RESUME",
        "RESET",
        "POWERDOWN",
        "GUEST_PANICKED",
        "BLOCK_IO_ERROR",
        "BALLOON_CHANGE",
        "WATCHDOG",
        "DEVICE_DELETED",
    ]
)
FIELDS = st.sampled_from(
    ["reason", "guest", "action", "actual", "device", "node-name", "qom-path", "operation", "nospace"]
)


@given(st.fixed_dictionaries({"event": NAMES | JSON, "data": st.dictionaries(FIELDS, JSON) | JSON, "timestamp": JSON}))
def test_no_message_raises(message: dict[str, Any]) -> None:
    fact = translate(message)
    assert fact is None or str(fact).isprintable()
    event_time(message)


def test_time_of_an_event() -> None:
    assert event_time({"timestamp": {"seconds": 1700000000, "microseconds": 500000}}) == 1700000000.5
    assert event_time({"timestamp": {"seconds": -1, "microseconds": -1}}) is None
    assert event_time({"timestamp": {"seconds": True, "microseconds": 0}}) is None
    assert event_time({}) is None
