"""Machines, recorded and made up: what is read of each, exactly, and where guests go on it (golden files).

Recorded ones keep their source and licence in the entry `source` (tests/data/hosts); the others are called synthetic.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmd.plan.cpus import CpuWish, place_all
from kvmd.units import CpuSet
from tests.rig import golden_hosts
from tests.rig.hosts import DATA, HWLOC, NO_HWLOC, REPO, hwloc_names, load, made_up, unpack_hwloc

GOLDEN = REPO / "tests/data/placements"

# Of the recorded machines, as hwloc's own pictures of them have it (PU, Core, L3Cache, Package, NUMANode):
# CPUs, cores, last-level caches, packages, nodes. Where there is no L3 each core's L2 counts; Bulldozer's modules are
# cores to the kernel and pairs of cores to hwloc.
COUNTS = {
    "flat-2cpu": (2, 2, 1, 1, "0"),
    "hwloc-128arm-2pa2n8cluster4co": (128, 128, 4, 2, "0-3"),
    "hwloc-16amd64-8n2c": (16, 16, 16, 8, "0-7"),
    "hwloc-16em64t-4s2c2t": (16, 8, 4, 4, "0"),
    "hwloc-16em64t-4s2c2t-offlines": (12, 7, 4, 4, "0"),
    "hwloc-20em64t-hybrid-1p6c2t+2ca4co1t": (20, 14, 1, 1, "0"),
    "hwloc-32amd64-4s2n4c-cgroup2": (32, 32, 8, 4, "0-7"),
    "hwloc-40intel64-2g2n4c+pcilocality": (40, 40, 4, 4, "0-3"),
    "hwloc-48amd64-4pa2n6c-sparse": (48, 48, 8, 4, "0-2,33-34,45,72-73"),
    "hwloc-64amd64-4s2n4ca2co": (64, 32, 8, 4, "0-7"),
    "hwloc-offline-cpu0-node0": (17, 17, 2, 2, "0-1"),
}


@pytest.mark.parametrize("name", sorted(made_up()))
def test_a_made_up_host_is_read_exactly_as_it_was_made(name: str, tmp_path: Path) -> None:
    assert load(name, tmp_path).observe_cpus() == made_up()[name][0]


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_a_recorded_host_is_read_as_hwloc_saw_it(name: str, tmp_path: Path) -> None:
    found = load(name, tmp_path).observe_cpus()
    counts = (
        len(found.cpus),
        len({cpu.core for cpu in found.cpus}),
        len({cpu.l3 for cpu in found.cpus}),
        len({cpu.package for cpu in found.cpus}),
        str(CpuSet(found.nodes)),
    )
    assert counts == COUNTS[name]


def test_every_host_is_accounted_for() -> None:
    assert set(golden_hosts.names()) == COUNTS.keys() | made_up().keys()
    assert len(golden_hosts.names()) >= 12


@pytest.mark.parametrize("name", golden_hosts.names())
def test_topology_and_placements_are_the_golden_ones(name: str) -> None:
    """When this fails and the change is meant: scripts/regen, and read the diff as the owner of such a host would."""
    assert (GOLDEN / f"{name}.txt").read_text() == golden_hosts.text(name)


@pytest.mark.parametrize("name", golden_hosts.names())
def test_no_placement_leaves_the_machine_or_its_rules(name: str, tmp_path: Path) -> None:
    """Of every host, with every guest at once: nothing offline, forbidden or twice; a second plan changes nothing."""
    shape = load(name, tmp_path).observe_cpus()
    wishes = dict(golden_hosts.GUESTS)
    answer = place_all(wishes, shape, golden_hosts.HOST)
    owners: list[int] = []
    for guest, found in answer.of.items():
        assert found.cpus | found.emulator <= shape.online & shape.allowed
        if wishes[guest].placement == "dedicated":
            owners += found.cpus
            assert not found.cpus & answer.housekeeping
            assert set(found.nodes) == {cpu.node for cpu in shape.cpus if cpu.id in found.cpus}
        elif not shape.isolated >= shape.online:
            assert not found.cpus & shape.isolated
    assert len(owners) == len(set(owners))
    placed: dict[str, CpuWish] = {guest: wishes[guest] for guest in answer.of}
    taken = {guest: found.vcpus for guest, found in answer.of.items()}
    assert place_all(placed, shape, golden_hosts.HOST, taken=taken).of == answer.of


@pytest.mark.parametrize("name", hwloc_names())
def test_a_recording_says_what_the_machine_said(name: str, tmp_path: Path) -> None:
    """Where hwloc's archives are at hand: the whole tree and its trimmed recording are one topology."""
    recording = "flat-2cpu" if name == NO_HWLOC else f"hwloc-{name}"
    whole, trimmed = unpack_hwloc(name, tmp_path / "whole"), load(recording, tmp_path / "trimmed")
    assert whole.observe_cpus() == trimmed.observe_cpus()
    assert whole.observe_memory().total_bytes == trimmed.observe_memory().total_bytes
    if name != NO_HWLOC:
        assert (HWLOC / "COPYING").read_text() == (DATA / "LICENSE.hwloc").read_text()


def test_recordings_name_nobody() -> None:
    secret = re.compile(r"(?i)([0-9a-f]{2}:){5}[0-9a-f]{2}|serial|uuid|hostname|machine-id|root=|\.service")
    for path in DATA.glob("*.json"):
        found: dict[str, str] = json.loads(path.read_text())
        assert not [
            key for key, text in found.items() if key != "source" and (secret.search(key) or secret.search(text))
        ]
        assert found.get("source", "recorded here") != ""


def record(root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "scripts/record-host"), "--root", str(root), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_recorder_keeps_what_is_needed_and_nothing_that_names_the_machine(tmp_path: Path) -> None:
    host = load("synthetic-2node-smt", tmp_path / "host")
    (tmp_path / "host/proc/cmdline").write_text(
        "root=UUID=11111111-2222 isolcpus=2-3 nohz_full=2-3 hostname=secret ro\n"
    )
    (tmp_path / "host/proc/meminfo").write_text("MemTotal: 100 kB\nPrivate: 7 kB\n")
    (tmp_path / "host/proc/irq/24").mkdir(parents=True)
    (tmp_path / "host/proc/irq/24/smp_affinity_list").write_text("0-3\n")
    (tmp_path / "host/proc/irq/24/enx001122334455").mkdir()
    ran = record(tmp_path / "host", "--source", "a test")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["source"] == "a test"
    assert found["/proc/cmdline"] == "isolcpus=2-3 nohz_full=2-3\n"
    assert found["/proc/meminfo"] == "MemTotal: 100 kB\n"
    assert found["/proc/irq/24/smp_affinity_list"] == "0-3\n"
    assert "secret" not in ran.stdout
    assert "001122334455" not in ran.stdout
    for path, text in found.items():
        if path != "source":
            file = tmp_path / "again" / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    again = type(host)(tmp_path / "again")
    assert again.observe_cpus() == host.observe_cpus()
    assert again.observe_hugepages() == host.observe_hugepages()


def test_the_recorder_refuses_what_would_name_the_machine(tmp_path: Path) -> None:
    load("synthetic-1socket", tmp_path)
    (tmp_path / "proc/sys/vm/swappiness").write_text("52:54:00:aa:bb:cc\n")
    ran = record(tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "/proc/sys/vm/swappiness" in ran.stderr
