"""Where a guest's memory is put on a host with several NUMA nodes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvmd.config.guest import Guest
from kvmd.qemu.fds import FdTable
from kvmd.qemu.memory import memory
from tests.rig.golden_argv import recorded


def backend(beside: tuple[int, ...], **table: Any) -> dict[str, Any]:
    guest = Guest.model_validate({"memory": {"size": "64MiB", **table}})
    arguments, _ = memory("web", guest, recorded(), FdTable(), hugepages=True, nodes=beside, threads=1)
    found: dict[str, Any] = json.loads(arguments[arguments.index("-object") + 1])
    return found


@pytest.mark.parametrize(
    ("nodes", "backing", "policy"),
    [
        ((), "anonymous", None),
        ((1,), "anonymous", ("preferred", [1])),
        ((0, 1), "anonymous", None),
        ((1,), "memfd", ("preferred", [1])),
        ((1,), "hugepages", ("bind", [1])),
        ((1, 0), "hugepages", ("bind", [0, 1])),
        ((), "hugepages", None),
    ],
)
def test_hugepages_are_bound_and_other_memory_may_spill(nodes: tuple[int, ...], backing: str, policy: Any) -> None:
    """Bound to a full node, memory that is taken as it is touched would end the guest."""
    found = backend(nodes, backing=backing)
    has = (found["policy"], found["host-nodes"]) if "policy" in found else None
    assert has == policy


@pytest.mark.parametrize("backing", ["anonymous", "hugepages"])
def test_nodes_of_the_file_win_with_its_policy(backing: str) -> None:
    found = backend((0,), backing=backing, nodes="1-2", policy="interleave")
    assert (found["policy"], found["host-nodes"]) == ("interleave", [1, 2])
    assert backend((), backing=backing, nodes="3")["policy"] == "bind"
