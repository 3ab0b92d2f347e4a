"""Swap that kvmd makes on this machine's kernel: a few MiB of it, from plan to release, and never another's."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmd.effects import swap, syscalls
from kvmd.effects.sysfs import HostTree
from kvmd.facts import SwapArea
from tests.rig.kvmdhost import KvmdHost
from tests.rig.machinestate import Memory, differences, machine_lock

pytestmark = pytest.mark.system

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture
def machine() -> Iterator[Memory]:
    """This machine's memory and swap as they were and shall be again."""
    with machine_lock():
        memory = Memory.observe()
        yield memory
        memory.restore()
        assert differences(memory, Memory.observe()) == []


def area(path: str | Path) -> SwapArea | None:
    return next((one for one in swap.observe_swaps(HostTree(), [str(path)]) or () if one.path == str(path)), None)


def lines(host: KvmdHost) -> list[str]:
    return [action["line"] for action in host.call("host.plan")["actions"]]


def problems(host: KvmdHost) -> list[Any]:
    return [one["message"] for one in host.call("host.plan")["problems"]]


def test_a_swap_file_from_plan_to_release(machine: Memory, host: KvmdHost) -> None:
    path = host.images / "swap"
    host.write("host.toml", f'[swap.file]\npath = "{path}"\nsize = "16MiB"\n')
    host.start()
    host.call("host.apply")
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_size) == (0o600, 0, SIZE)
    assert status.st_blocks * 512 >= SIZE, "no holes"
    found = area(path)
    assert found is not None
    assert found.size_bytes == SIZE - os.sysconf("SC_PAGE_SIZE")
    assert lines(host) == []

    host.restart()
    assert lines(host) == []
    assert path.stat().st_ino == status.st_ino, "the same file"

    # what a kill between making and using it, or a reboot, leaves
    syscalls.swapoff(str(path))
    assert lines(host) == [f"+ swap file {path}: 16MiB"]
    host.call("host.apply")
    assert area(path) is not None
    assert path.stat().st_ino == status.st_ino

    host.write("host.toml", f'[swap.file]\npath = "{path}"\nsize = "8MiB"\n')
    host.call("host.apply")
    assert path.stat().st_size == SIZE // 2
    assert lines(host) == []
    host.write("host.toml", "")
    assert lines(host) == [f"- swap file {path}"]
    host.call("host.apply")
    assert not path.exists()
    assert area(path) is None

    host.write("host.toml", f'[swap.file]\npath = "{path}"\nsize = "16MiB"\n')
    host.call("host.apply")
    assert host.call("host.release")["restored"] == [f"- swap file {path}"]
    assert not path.exists()
    assert machine.swaps == Memory.observe().swaps


def test_a_file_that_is_there_is_never_taken(machine: Memory, host: KvmdHost) -> None:
    path = host.images / "swap"
    path.write_bytes(b"somebody's" * 1000)
    host.write("host.toml", f'[swap.file]\npath = "{path}"\nsize = "16MiB"\n')
    host.start()
    assert lines(host) == []
    (message,) = problems(host)
    assert f"{path} is there and kvmd did not make it" in message
    assert path.read_bytes() == b"somebody's" * 1000


def test_zram_from_plan_to_release(machine: Memory, host: KvmdHost) -> None:
    """On a kernel without it the plan says so; here it is made, used first, kept over a crash, and taken away."""
    host.write("host.toml", '[swap.zram]\nsize = "16MiB"\n')
    host.start()
    host.call("host.apply")
    if swap.observe_zrams(HostTree()) is None:
        (message,) = problems(host)
        assert "this kernel has no zram (there is no /sys/class/zram-control)" in message
        return
    (made,) = Memory.observe().zrams - machine.zrams
    device = f"/dev/zram{made}"
    found = area(device)
    assert found is not None
    assert (found.priority, found.size_bytes) == (swap.ZRAM_PRIORITY, SIZE - os.sysconf("SC_PAGE_SIZE"))
    host.restart()
    assert lines(host) == []

    # what a kill between adding the device and using it leaves: the same device is taken up
    syscalls.swapoff(device)
    Path(f"/sys/block/zram{made}/reset").write_text("1")
    assert lines(host) == ["+ swap zram: 16MiB"]
    host.restart()
    host.call("host.apply")
    assert area(device) is not None
    assert Memory.observe().zrams - machine.zrams == {made}

    host.write("host.toml", '[swap.zram]\nsize = "8MiB"\n')
    host.call("host.apply")
    assert lines(host) == []
    (other,) = Memory.observe().zrams - machine.zrams
    assert (area(f"/dev/zram{other}") or found).size_bytes == SIZE // 2 - os.sysconf("SC_PAGE_SIZE")
    assert host.call("host.release")["restored"] == [f"- swap zram{other}"]
    assert Memory.observe().zrams == machine.zrams
