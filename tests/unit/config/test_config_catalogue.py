"""The catalogue against the list of keys the design fixed, and what is made from it."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

from kvmd.config.catalogue import MODELS, catalogue, keys_of, near
from kvmd.config.reference import render_reference

REPO = Path(__file__).parents[3]

# The keys as they were fixed, in a shorthand of this test: "a.b c d" is a.b, a.c, a.d.
KEYS = {
    "kvmd.toml": """
        access.admins operators viewers; storage.roots images backups low_space; apply.allow max_stops
        guests.start_concurrency shutdown_timeout default_profile; qemu.emulator uid_range supervisor sandbox
        log.level; log.serial.size files; log.qemu.size files; history.events samples max_size
        metrics.textfile listen; hooks.dir timeout; limits.connections request_size in_flight
    """,
    "host.toml": """
        cpu.housekeeping irq_affinity kernel_args overcommit_ratio; memory.reserve admission swap_factor
        hugepages.SIZE.pages spare compact; thp.enabled defrag khugepaged_defrag shmem_enabled
        ksm.mode max_cpu across_nodes scan_target sleep smart_scan use_zero_pages max_page_sharing min_pages max_pages
        swap.swappiness; swap.file.path size; swap.zram.size; tuning.mode balloon ksm placement; modules.load
        sriov.NIC.vfs; passthrough.allow; cpu_model.NAME.base features
    """,
    "networks.d": """
        network.mode bridge mtu stp vlan_filtering guests_isolated description; uplink.interface rollback
        ipv4.address; ipv4.dhcp.range lease options; ipv6.address mode; dns.domain upstream enabled; nat.uplink
        forward.NAME.listen to protocol; reservation.NAME.mac ipv4 ipv6; firewall.host_access
    """,
    "guests.d": """
        guest.uuid description owner profile tags protect cluster
        machine.type accel emulator os default_nic;
        machine.smbios.manufacturer product version serial sku family; qemu.extra_args sandbox
        start.auto after ready ready_timeout delay timeout; stop.method timeout at_host_shutdown
        on.crash panic poweroff reboot watchdog hang; restart.limit within backoff
        cpu.vcpus max_vcpus sockets dies cores threads model features placement isolated smt pin emulator nodes
        cpu.allow_overcommit weight quota
        memory.size max_size slots backing page_size fallback path prealloc lock share nodes policy numa ksm_group
        memory.guaranteed shares; memory.balloon.enabled free_page_reporting deflate_on_oom
        boot.order once menu splash splash_time kernel initrd cmdline firmware secure_boot nvram; tpm.version
        disk.NAME.file format size from interface bus unit index media snapshot cache aio readonly serial
        disk.NAME.pci_address discard detect_zeroes iothread queues throttle logical_block_size on_error backing shared
        disk.NAME.encryption.key_file
        nic.NAME.network type hub model mac pci_address vectors mtu queues vlan vlans native_vlan ipv4 ipv6 link
        nic.NAME.rate_in rate_out guard boot_index net dns hostfwd tftp restrict ifname fd script downscript helper
        nic.NAME.sndbuf vnet_hdr vhost vhostfd vhostforce interface macvtap_mode pool pci
        hostdev.NAME.pci usb mdev rom boot_index
        display.type listen password_file tls websocket keyboard; video.model memory; serial.NAME.type log
        console.NAME.type; agent.enabled; rng.source; watchdog.model; watchdog.action; rtc.base clock; vsock.cid
        sound.model; usb.controller tablet; pvpanic.enabled; hyperv.enabled; share.NAME.source tag readonly
        cloud_init.user_data_file meta_data network_config_file ssh_keys hostname
        tuning.mode balloon placement; limits.memory_max cpu_weight io_weight tasks_max oom_score_adjust
    """,
}
# Marks the design gives, a sample of each kind.
MARKS = {
    "guest.uuid": "restart",
    "cpu.placement": "live",
    "cpu.threads": "restart",
    "memory.guaranteed": "live",
    "memory.backing": "restart",
    "disk.NAME.format": "restart",
    "tuning.mode": "live",
    "limits.cpu_weight": "live",
    "start.auto": "",
    "restart.limit": "",
}


def expanded(shorthand: str) -> set[str]:
    keys = set()
    for group in shorthand.replace("\n", ";").split(";"):
        first, *others = group.split() or [""]
        table = first.rpartition(".")[0]
        keys |= {first, *(f"{table}.{other}" for other in others)} - {""}
    return keys


@pytest.mark.parametrize("kind", MODELS)
def test_every_key_of_the_design_exists_and_no_other(kind: str) -> None:
    extra = {"console.NAME.log", "nic.NAME.br"} if kind == "guests.d" else set()
    have = set(keys_of(kind)) - {"schema"}  # type: ignore[arg-type]
    assert have == expanded(KEYS[kind]) | extra


@pytest.mark.parametrize(("path", "applies"), MARKS.items())
def test_marks(path: str, applies: str) -> None:
    assert keys_of("guests.d")[path].applies == applies


def test_rows_are_complete() -> None:
    for row in catalogue():
        assert row.type, row
        assert row.doc, row
        assert row.later or row.example, row


def test_rows_are_json() -> None:
    rows = [dataclasses.asdict(row) for row in catalogue()]
    assert json.loads(json.dumps(rows)) == [{**row, "later_values": list(row["later_values"])} for row in rows]


def test_examples_are_toml() -> None:
    for row in catalogue():
        if not row.later:
            tomllib.loads(f"x = {row.example}")


def test_reference_is_up_to_date() -> None:
    assert (REPO / "docs/reference.md").read_text() == render_reference(), "run scripts/regen"


def test_reference_tells_what_is_later() -> None:
    page = render_reference()
    line = next(line for line in page.splitlines() if line.startswith("| `secure_boot`"))
    assert "later: `true`" in line
    line = next(line for line in page.splitlines() if line.startswith("| `max_vcpus`"))
    assert "**later**" in line
    for line in page.splitlines():
        if line.startswith("| `"):
            assert line.replace("\\|", "").count("|") == 8, line


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("memory.sise", "memory.size"),
        ("memroy", "memory"),
        ("vcpus", "cpu.vcpus"),
        ("cpu.vcpu", "cpu.vcpus"),
        ("disk.root.fiel", "disk.root.file"),
        ("nic.lan.networks", "nic.lan.network"),
        ("memory.baloon", "memory.balloon"),
        ("memory.balloon.enable", "memory.balloon.enabled"),
        ("limits.vcpus", "cpu.vcpus"),
        ("zzz", None),
        ("cpu.max_vcpu", "cpu.vcpus"),
    ],
)
def test_near(wrong: str, meant: str | None) -> None:
    assert near("guests.d", tuple(wrong.split("."))) == meant
