"""Command lines of the field through the importer: every word has a fate, and what comes out is a file that checks."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.config.guest import Guest
from kvmd.config.rules import guest_rules
from kvmd.errors import ConfigInvalid
from kvmd.importers import keyval
from kvmd.importers.account import Fate
from kvmd.importers.grammar import TAKES_VALUE, options
from kvmd.importers.qemu import Imported, import_qemu
from kvmd.importers.shell import CommandLine, command_lines, of_argv

LINES: list[dict[str, Any]] = tomllib.loads((Path(__file__).parents[2] / "data/importers/lines.toml").read_text())[
    "line"
]


def imported(text: str, **more: Any) -> Imported:
    return import_qemu(command_lines(text)[0], look=lambda _path: None, base="/srv/vm", **more)


def unsupported(found: Imported) -> list[str]:
    return [entry.option for entry in found.entries if entry.fate is Fate.UNSUPPORTED]


@pytest.mark.parametrize("line", LINES, ids=[line["source"][:40] for line in LINES])
def test_every_word_has_a_fate(line: dict[str, Any]) -> None:
    """Each option of the line stands in the account, and only what is listed is left out."""
    call = command_lines(line["text"])[0]
    found = imported(line["text"])
    told = "\n".join(entry.option for entry in found.entries)
    for option, value in options(call.arguments):
        ident = keyval.parse(value or "").get("id") if option in ("device", "netdev", "drive", "chardev") else None
        names = [f"-{option}", ident or "?", (value or "?").partition(",")[0], option or "-hda"]
        assert any(name in told for name in names), (option, value, told)
    left = unsupported(found)
    for wanted in line.get("left", []):
        assert any(option.startswith(wanted) for option in left), (wanted, left)
    assert all(any(option.startswith(wanted) for wanted in line.get("left", [])) for option in left), left
    assert all(entry.detail for entry in found.entries)


@pytest.mark.parametrize("line", LINES, ids=[line["source"][:40] for line in LINES])
def test_what_comes_out_is_read_back_the_same(line: dict[str, Any]) -> None:
    found = imported(line["text"])
    assert tomllib.loads(found.text) == {key: value for key, value in found.tables.items() if value}
    assert imported(line["text"]).text == found.text


@pytest.mark.parametrize("line", LINES, ids=[line["source"][:40] for line in LINES])
def test_it_is_a_guest_without_fault(line: dict[str, Any]) -> None:
    guest = Guest.model_validate(tomllib.loads(imported(line["text"]).text))
    wrong = [complaint for complaint in guest_rules(guest) if complaint.severity == "error"]
    assert not wrong


def test_the_classic_line_is_what_an_administrator_would_write() -> None:
    text = imported(next(line["text"] for line in LINES if line["source"] == "the classic qemu-kvm manual")).text
    tables = tomllib.loads(text)
    assert tables["machine"] == {"type": "pc", "accel": "kvm"}
    assert tables["cpu"] == {"vcpus": 2, "sockets": 2, "model": "qemu64"}
    assert tables["memory"] == {"size": "1GiB", "balloon": {"enabled": False}}
    assert tables["boot"] == {"once": "d", "menu": True}
    assert tables["disk"]["hda"] == {
        "file": "/srv/vm/old.img",
        "format": "raw",
        "interface": "ide",
        "index": 0,
        "cache": "writethrough",
    }
    assert tables["disk"]["cdrom"] == {
        "file": "/dev/cdrom",
        "format": "raw",
        "index": 2,
        "media": "cdrom",
        "cache": "writethrough",
    }
    assert tables["nic"]["net0"] == {
        "type": "tap",
        "ifname": "tap7",
        "script": "/etc/qemu-ifup",
        "downscript": "/etc/qemu-ifdown",
        "model": "rtl8139",
        "mac": "52:54:00:00:00:07",
    }


@pytest.mark.parametrize(
    ("words", "table", "expected"),
    [
        ("-smp 4", "cpu", {"vcpus": 4, "cores": 4, "model": "qemu64"}),
        ("-M pc-i440fx-6.1 -smp 4", "cpu", {"vcpus": 4, "sockets": 4, "model": "qemu64"}),
        ("-smp 8,cores=2", "cpu", {"vcpus": 8, "sockets": 4, "cores": 2, "model": "qemu64"}),
        ("-smp sockets=2,cores=3", "cpu", {"vcpus": 6, "sockets": 2, "cores": 3, "model": "qemu64"}),
        ("-cpu host,+vmx,hle=off", "cpu", {"model": "host", "features": {"vmx": True, "hle": False}}),
        ("-m 2G", "memory", {"size": "2GiB", "balloon": {"enabled": False}}),
        ("-m 1536", "memory", {"size": "1536MiB", "balloon": {"enabled": False}}),
        ("", "memory", {"size": "128MiB", "balloon": {"enabled": False}}),
        ("-m 1G -mem-path /mnt/huge_1G -mem-prealloc", "memory",
         {"size": "1GiB", "backing": "hugepages", "page_size": "1GiB", "prealloc": True}),
        ("-boot cn", "boot", {"order": "cn"}),
        ("-machine q35,accel=kvm:tcg", "machine", {"type": "q35", "accel": "auto"}),
        ("-net none", "machine", {"type": "pc", "accel": "tcg", "default_nic": False}),
        ("", "nic", {"net0": {"type": "user", "model": "e1000"}}),
        ("-nic user,model=virtio,mac=52:54:00:12:34:56", "nic", {"net0": {"type": "user", "mac": "52:54:00:12:34:56"}}),
        ("-nic bridge,br=br0", "nic", {"net0": {"type": "bridge", "bridge": "br0", "model": "e1000"}}),
        ("-vga cirrus", "video", {"model": "cirrus"}),
        ("-watchdog ib700 -watchdog-action shutdown", "watchdog", {"model": "ib700", "action": "poweroff"}),
        ("-device vfio-pci,host=3b:00.0", "hostdev", {"dev0": {"pci": "0000:3b:00.0"}}),
    ],
)  # fmt: skip
def test_rows(words: str, table: str, expected: dict[str, Any]) -> None:
    assert imported(f"qemu-system-x86_64 {words}").tables[table] == expected


def test_qemu_kvm_had_other_defaults() -> None:
    assert imported("qemu-kvm -hda a.img").tables["nic"]["net0"]["model"] == "rtl8139"
    assert (
        imported("qemu-system-x86_64 -hda a.img", dialect="qemu-kvm").tables["disk"]["hda"]["cache"] == "writethrough"
    )
    assert imported("/usr/bin/kvm -smp 2").tables["machine"]["accel"] == "kvm"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("-net nic,vlan=1 -net user,vlan=2", "vlan 1 has no backend"),
        ("-net nic -net nic -net user", "a hub of 2 cards and 1 backends"),
        ("-device virtio-blk-pci,drive=none", "no -drive or -blockdev of that name"),
        ("-drive if=none,file=a,id=x", "no device uses it"),
        ("-frobnicate yes", "no option of QEMU that kvmd knows"),
        ("-m lots,maxmem=4G", "memory hot-plug is not there yet"),
        ("-spice port=5900", "SPICE is not there yet"),
        ("-no-reboot", "a guest that reboots is reset"),
        ("-blockdev {", "it is not understood"),
        ("-smp many", "it is not understood"),
    ],
)
def test_what_is_left_out_is_told_with_the_reason(words: str, told: str) -> None:
    found = imported(f"qemu-system-x86_64 {words}")
    assert any(told in entry.detail for entry in found.entries if entry.fate is Fate.UNSUPPORTED), found.entries


def test_a_script_with_variables_continuations_and_noise() -> None:
    text = """#!/bin/sh
# qemu-system-x86_64 -m 1   a comment is none
IMG=/srv/vm/a.qcow2
MEM=${MEM:-512}
OPTS="-smp 2 -enable-kvm"
if true; then echo hello; fi
exec sudo taskset -c 2,3 qemu-system-x86_64 -m $MEM $OPTS \\
   -drive "file=$IMG,if=virtio" -vnc $DISPLAY_AT  > /tmp/log 2>&1 &
"""
    (call,) = command_lines(text)
    assert call.arguments[:5] == ("-m", "512", "-smp", "2", "-enable-kvm")
    assert call.open_variables == ("DISPLAY_AT",)
    assert call.prefix == ("exec", "sudo", "taskset", "-c", "2,3")
    found = import_qemu(call, look=lambda _path: "qcow2")
    assert found.tables["disk"]["disk0"]["file"] == "/srv/vm/a.qcow2"
    assert any("$DISPLAY_AT is not set" in remark for remark in found.remarks)


@pytest.mark.parametrize("text", ["", "ls -l", 'qemu-system-x86_64 -name "open', "x" * ((1 << 20) + 1)])
def test_what_is_no_command_line_is_said(text: str) -> None:
    with pytest.raises(ConfigInvalid):
        command_lines(text)


def test_words_behind_two_dashes_or_of_a_process() -> None:
    call = of_argv(["numactl", "-N0", "/usr/bin/qemu-system-x86_64", "-m", "64"])
    assert call == CommandLine("/usr/bin/qemu-system-x86_64", ("-m", "64"), ("numactl", "-N0"))
    with pytest.raises(ConfigInvalid):
        of_argv(["bash"])


@given(st.lists(st.tuples(st.sampled_from(sorted(TAKES_VALUE)), st.text(max_size=30)), max_size=12))
def test_any_line_ends_in_a_file_and_an_account(given: list[tuple[str, str]]) -> None:
    """Whatever stands behind an option: no exception, TOML that can be read, and at least a line for each option."""
    arguments = [
        word for option, value in given for word in ([f"-{option}", value] if TAKES_VALUE[option] else [f"-{option}"])
    ]
    found = import_qemu(CommandLine("qemu-system-x86_64", tuple(arguments)), look=lambda _path: None)
    tomllib.loads(found.text)
    assert len(found.entries) >= len({option for option, _ in given} - {"S", "nodefaults"}) / 3


@given(
    st.dictionaries(st.from_regex(r"[a-z][a-z.-]{0,8}", fullmatch=True), st.text(max_size=20), min_size=1, max_size=6)
)
def test_keyval_takes_what_qemu_would_write(values: dict[str, str]) -> None:
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in values.items())
    assert keyval.parse(text) == values
