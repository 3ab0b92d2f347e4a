"""Capabilities from recorded replies, and the choice of the accelerator."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.errors import NotSupported, QemuFailed, Refused
from kvmd.qemu.caps import COMMANDS, DEVICES, Kvm, choose_accel, device_queries, from_data, near, parse, to_data
from tests.rig import golden_argv


@pytest.fixture
def replies() -> dict[str, Any]:
    found = json.loads((golden_argv.DATA / "replies-7.2.json").read_text())
    assert isinstance(found, dict)
    return found


def test_qemu_7_2_as_recorded(replies: dict[str, Any]) -> None:
    caps = parse(replies)
    assert caps.version[:2] == (7, 2)
    assert caps.machine("q35").name == "pc-q35-7.2"
    assert caps.machine("pc").cpu_max == 255
    assert {"host", "max", "qemu64", "Skylake-Server"} <= caps.cpu_models
    assert {"avx2", "vmx", "hle"} <= caps.cpu_features
    assert "xlevel" not in caps.cpu_features
    assert set(DEVICES) <= caps.device_types
    assert "free-page-reporting" in caps.device_properties["virtio-balloon-pci"]
    assert {"memory-backend-memfd", "rng-builtin"} <= caps.object_types
    assert {"user", "tap"} <= caps.netdev_types
    assert {"qcow2", "raw", "file", "host_device"} <= caps.block_drivers
    assert caps.aio == {"threads", "native", "io_uring"}
    assert (caps.can_sandbox, caps.can_action, caps.kvm_present, caps.kvm_enabled) == (True, True, True, False)


def test_each_question_is_asked_for_a_reason(replies: dict[str, Any]) -> None:
    asked = [label for label, _ in (*COMMANDS, *device_queries(replies))]
    assert set(asked) == set(replies)
    assert len(asked) == len(set(asked))


def test_a_missing_module_is_not_asked_about(replies: dict[str, Any]) -> None:
    """device-list-properties of a type whose module is missing kills the emulator that is asked."""
    kept = [entry for entry in replies["qom-list-types:device"] if entry["name"] != "virtio-vga"]
    fewer = replies | {"qom-list-types:device": kept}
    assert "device-list-properties:virtio-vga" not in dict(device_queries(fewer))
    with pytest.raises(NotSupported, match="virtio-vga"):
        parse(fewer).require_device({"driver": "virtio-vga"}, "guest web: video.model")


def test_an_old_qemu_is_refused(replies: dict[str, Any]) -> None:
    replies["query-version"] = {"qemu": {"major": 6, "minor": 2, "micro": 0}, "package": ""}
    with pytest.raises(NotSupported, match=r"6\.2\.0 is older than 7\.2"):
        parse(replies)


@pytest.mark.parametrize("label", [label for label, _ in COMMANDS])
@pytest.mark.parametrize("odd", [None, 7, "x", [], {}, [{}], [7]])
def test_odd_answers_are_one_clear_error(replies: dict[str, Any], label: str, odd: object) -> None:
    """An empty list can be meant (no such options), everything else of another shape is refused."""
    replies[label] = odd
    if odd == [] and label != "query-qmp-schema":
        with contextlib.suppress(QemuFailed):
            parse(replies)
        return
    with pytest.raises(QemuFailed):
        parse(replies)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda x: st.lists(x) | st.dictionaries(st.text(max_size=5), x),
    )
)
def test_no_cache_content_raises_anything_else(data: Any) -> None:
    with pytest.raises(QemuFailed):
        from_data(data)


def test_the_cache_gives_back_the_same(replies: dict[str, Any]) -> None:
    caps = parse(replies)
    assert from_data(json.loads(json.dumps(to_data(caps)))) == caps
    with pytest.raises(QemuFailed, match="schema"):
        from_data(to_data(caps) | {"schema": 0})


USABLE = Kvm(usable=True, reason="a QEMU ran under KVM")
MISSING = Kvm(usable=False, reason="neither kvm_intel nor kvm_amd is loaded", fix="modprobe kvm_amd")


def test_kvm_is_never_replaced_unasked() -> None:
    assert choose_accel("kvm", USABLE) == ("kvm", None)
    with pytest.raises(Refused) as caught:
        choose_accel("kvm", MISSING)
    assert "neither kvm_intel" in caught.value.message
    assert "modprobe kvm_amd" in (caught.value.hint or "")


def test_auto_takes_what_is_there_and_says_so() -> None:
    assert choose_accel("auto", USABLE) == ("kvm", None)
    accel, warning = choose_accel("auto", MISSING)
    assert accel == "tcg"
    assert "neither kvm_intel" in (warning or "")
    assert "no security boundary" in (warning or "")
    assert choose_accel("tcg", USABLE) == ("tcg", None)


def test_near_matches() -> None:
    assert near("q53", ["q35", "pc"]) == "did you mean q35?"
    assert near("zzz", ["q35", "pc"]) is None
