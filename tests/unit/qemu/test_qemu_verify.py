"""What runs against what was asked: each difference is found, nothing an answer holds raises."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.qemu.fds import Launch
from kvmd.qemu.verify import check_running, queries
from tests.rig import golden_argv

LAUNCH = golden_argv.launch("server", golden_argv.recorded())


def good(launch: Launch = LAUNCH) -> dict[str, Any]:
    """What a QEMU that is as asked answers."""
    blocks: list[dict[str, Any]] = [
        {
            "qdev": f"/machine/peripheral/{device}/virtio-backend",
            "inserted": {"node-name": node, "ro": device in launch.expect.readonly},
        }
        for device, node in launch.expect.disks.items()
    ]
    return {
        "query-status": {"status": "prelaunch"},
        "query-uuid": {"UUID": launch.expect.uuid},
        "query-kvm": {"enabled": False, "present": True},
        "query-cpus-fast": [{"cpu-index": index} for index in range(launch.expect.vcpus)],
        "query-memory-size-summary": {"base-memory": launch.expect.memory_bytes, "plugged-memory": 0},
        "query-block": blocks,
        **{f"mac:{device}": mac.upper() for device, mac in launch.expect.nics.items()},
    }


def test_as_asked_is_no_difference() -> None:
    assert {query.label for query in queries(LAUNCH)} == set(good())
    assert check_running(LAUNCH, good()) == ()


@pytest.mark.parametrize(
    ("label", "value", "what", "severity"),
    [
        ("query-uuid", {"UUID": "00000000-0000-4000-8000-000000000001"}, "uuid", "refuse"),
        ("query-kvm", {"enabled": True}, "KVM", "refuse"),
        ("query-status", {"status": "running"}, "run state", "warn"),
        ("query-cpus-fast", [{}], "vCPUs", "warn"),
        ("query-memory-size-summary", {"base-memory": 1 << 20}, "memory", "warn"),
        ("mac:nic-lan", "52:54:00:00:00:01", "MAC of nic-lan", "refuse"),
    ],
)
def test_each_difference_is_found(label: str, value: object, what: str, severity: str) -> None:
    (found,) = check_running(LAUNCH, good() | {label: value})
    assert (found.what, found.severity) == (what, severity)
    assert str(found).startswith(f"{what}: asked for ")


@pytest.mark.parametrize(
    ("change", "what", "seen"),
    [
        (lambda blocks: blocks.pop(0), "disk-root", "no such device"),
        (lambda blocks: blocks[0].pop("inserted"), "disk-root", "no medium"),
        (lambda blocks: blocks[0]["inserted"].update({"node-name": "data"}), "disk-root", "data"),
        (lambda blocks: blocks[1]["inserted"].update({"ro": True}), "disk-data", "read-only"),
        (lambda blocks: blocks.append({"qdev": "spy", "inserted": {"node-name": "x"}}), "spy", "x"),
    ],
)
def test_disks_are_those_of_the_file(change: Any, what: str, seen: str) -> None:
    replies = good()
    blocks = copy.deepcopy(replies["query-block"])
    change(blocks)
    (found,) = check_running(LAUNCH, replies | {"query-block": blocks})
    assert (found.what, found.seen) == (what, seen)
    assert found.severity == ("warn" if what == "spy" else "refuse")


def test_silence_warns_and_never_stops_a_host() -> None:
    found = check_running(LAUNCH, {})
    assert len(found) == len(queries(LAUNCH))
    assert {difference.severity for difference in found} == {"warn"}
    assert {difference.seen for difference in found} == {"no answer"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["qdev", "inserted", "node-name", "ro", "UUID", "status"]), inner, max_size=3)
    ),
)


@given(st.fixed_dictionaries({query.label: JSON for query in queries(LAUNCH)}))
def test_no_answer_raises(replies: dict[str, Any]) -> None:
    for difference in check_running(LAUNCH, replies):
        assert str(difference).isprintable()


def test_another_device_of_the_host_is_refused() -> None:
    launch = replace(LAUNCH, expect=replace(LAUNCH.expect, functions={"hostdev-gpu": "0000:3b:00.0"}))
    asked = {query.label: query for query in queries(launch)}["function:hostdev-gpu"]
    assert asked.arguments == {"path": "/machine/peripheral/hostdev-gpu", "property": "host"}
    assert check_running(launch, good() | {"function:hostdev-gpu": "0000:3b:00.0"}) == ()
    (found,) = check_running(launch, good() | {"function:hostdev-gpu": "0000:3b:00.1"})
    assert (found.what, found.severity) == ("hostdev-gpu", "refuse")
    (found,) = check_running(launch, good())
    assert found.severity == "warn"
