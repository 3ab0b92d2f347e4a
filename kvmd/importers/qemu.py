"""A QEMU command line, legacy or modern, as a guest's file with an account of every word. Pure.

The machine is to be the same, not the words: what QEMU does when nothing is said (a card, 128 MiB, its CPU model) is
written down where kvmd would do something else. Order inside QEMU does not matter, so backends are read first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmd.importers import drives, machine, nics, peripherals
from kvmd.importers.account import Entry
from kvmd.importers.grammar import OURS, TAKES_VALUE, options
from kvmd.importers.keyval import parse
from kvmd.importers.model import Dialect, Draft, Look
from kvmd.importers.render import to_toml
from kvmd.importers.shell import CommandLine

DEFAULT_MEMORY = "128MiB"  # of QEMU, when -m is not given
DEFAULT_MODEL = "qemu64"


@dataclass(frozen=True, slots=True)
class Imported:
    """One guest out of a command line."""

    name: str
    text: str  # the file
    tables: Mapping[str, Any]
    entries: tuple[Entry, ...]
    remarks: tuple[str, ...]


def dialect_of(program: str) -> Dialect:
    """qemu-kvm and kvm were a fork with defaults of its own; everything else is QEMU."""
    return "qemu-kvm" if program.rpartition("/")[2].startswith(("qemu-kvm", "kvm")) else "qemu"


def import_qemu(
    call: CommandLine, *, name: str | None = None, dialect: Dialect | None = None, look: Look, base: str = ""
) -> Imported:
    """The guest of a command line. `look`: the format of an image as its header shows it, None where it is not there;
    `base`: the directory of relative paths.

    Raises ConfigInvalid through nothing of its own: what cannot be understood is in the account as unsupported.
    """
    draft = Draft(name or "", dialect or dialect_of(call.program), look, base)
    hubs = nics.Hubs()
    given = list(options(call.arguments))
    _emulator(draft, call)
    _backends(draft, given)
    for option, value in given:
        try:
            _one(draft, hubs, option, value)
        except ValueError as error:
            draft.account.unsupported(f"-{option} {value or ''}".strip(), f"it is not understood: {error}")
    nics.finish(draft, hubs)
    _defaults(draft, {option for option, _ in given})
    _boot_order(draft)
    _left_over(draft)
    for variable in call.open_variables:
        draft.remarks.append(f"${variable} is not set in what was given: put its value in by hand")
    for word in call.prefix:
        if word not in ("sudo", "exec", "nohup", "nice", "env"):
            draft.account.dropped(f"{word} (before QEMU)", "kvmd pins and limits by [cpu] and [limits]")
    for word in call.redirected:
        draft.account.dropped(word, "QEMU's words are in the guest's log directory")
    found = draft.name or "imported"
    text = to_toml(draft.tables, draft.remarks, call.program.rpartition("/")[2])
    return Imported(found, text, draft.tables, tuple(draft.account.entries), tuple(draft.remarks))


def _emulator(draft: Draft, call: CommandLine) -> None:
    program = call.program.rpartition("/")[2]
    if program.startswith("qemu-system-") and not program.startswith("qemu-system-x86_64"):
        draft.put("machine", "emulator", program)
        draft.account.mapped(call.program, "machine.emulator")
    if draft.dialect == "qemu-kvm":
        draft.put("machine", "accel", "kvm")
        draft.account.mapped(call.program, 'machine.accel = "kvm"')


def _backends(draft: Draft, given: list[tuple[str, str | None]]) -> None:
    """What other options refer to by id is known before they are read; boards decide about defaults."""
    for option, value in given:
        if value is None:
            continue
        try:
            if option in ("M", "machine"):
                machine.machine(draft, value)
            elif option == "netdev":
                nics.netdev(draft, value)
            elif option == "blockdev":
                drives.blockdev(draft, value)
            elif option == "chardev":
                values = parse(value, "backend")
                draft.backends[f"chardev:{values.get('id', '')}"] = values
            elif option == "object":
                values = parse(value, "qom-type")
                draft.backends[f"object:{values.get('id', '')}"] = values
            elif option == "drive" and parse(value, "file").get("if") == "none":
                drives.drive(draft, value)
        except ValueError as error:
            draft.account.unsupported(f"-{option} {value}", f"it is not understood: {error}")


_READ_FIRST = frozenset({"M", "machine", "netdev", "blockdev", "chardev", "object"})


def _one(draft: Draft, hubs: nics.Hubs, option: str, value: str | None) -> None:
    """One option, in the order of the command line."""
    text = value or ""
    if option in _READ_FIRST:
        return
    if option == "" or option in drives.SHORTHANDS:
        drives.shorthand(draft, option, text)
    elif option == "drive":
        if parse(text, "file").get("if") != "none":
            drives.drive(draft, text)
    elif option == "device":
        _device(draft, hubs, text)
    elif option == "net":
        nics.net(draft, hubs, text)
    elif option == "nic":
        nics.nic(draft, hubs, text)
    elif option in _SIMPLE:
        _SIMPLE[option](draft, text)
    elif option in OURS:
        draft.account.dropped(f"-{option}" + (f" {value}" if value else ""), OURS[option])
    else:
        _flags(draft, option, value)


def _device(draft: Draft, hubs: nics.Hubs, text: str) -> None:
    values = parse(text, "driver")
    driver = values.pop("driver", "")
    if driver in drives.DEVICES:
        drives.device(draft, driver, values)
    elif driver in drives.CONTROLLERS:
        thread = values.get("iothread")
        draft.account.default(f"-device {driver}", "made for the drives on it")
        if thread:
            draft.account.unsupported(f"-device {driver} iothread={thread}", "say it at its drives: disk.NAME.iothread")
    elif driver in nics.MODELS:
        nics.device(draft, hubs, driver, values)
    else:
        peripherals.device(draft, driver, values)


_SIMPLE = {
    "cpu": machine.cpu,
    "smp": machine.smp,
    "m": machine.memory,
    "mem-path": machine.memory_path,
    "boot": machine.boot,
    "rtc": machine.clock,
    "smbios": machine.smbios,
    "vga": peripherals.vga,
    "vnc": peripherals.vnc,
    "serial": peripherals.serial,
    "usbdevice": peripherals.usbdevice,
    "soundhw": peripherals.sound,
    "accel": machine.accelerator,
}
_SWITCHES: Mapping[str, tuple[str, str, object]] = {
    "enable-kvm": ("machine", "accel", "kvm"),
    "kvm": ("machine", "accel", "kvm"),
    "no-kvm": ("machine", "accel", "tcg"),
    "mem-prealloc": ("memory", "prealloc", True),
    "localtime": ("rtc", "base", "localtime"),
    "std-vga": ("video", "model", "std"),
}
_TEXTS: Mapping[str, tuple[str, str]] = {
    "kernel": ("boot", "kernel"),
    "initrd": ("boot", "initrd"),
    "append": ("boot", "cmdline"),
    "k": ("display", "keyboard"),
}


def _flags(draft: Draft, option: str, value: str | None) -> None:
    """Options of one word each."""
    shown = f"-{option}" + (f" {value}" if value else "")
    if option in _SWITCHES:
        table, key, what = _SWITCHES[option]
        draft.put(table, key, what)
        draft.account.mapped(shown, f"{table}.{key}")
    elif option in _TEXTS and value is not None:
        table, key = _TEXTS[option]
        draft.put(table, key, draft.path(value) if option in ("kernel", "initrd") else value)
        draft.account.mapped(shown, f"{table}.{key}")
    elif option == "name" and value is not None:
        words = parse(value, "guest")
        draft.name = draft.name or words.get("guest", "")
        draft.account.mapped(shown, "the file's name")
    elif option == "uuid" and value is not None:
        draft.put("guest", "uuid", value.lower())
        draft.account.mapped(shown, "guest.uuid")
    elif option in ("display", "sdl", "curses", "nographic", "spice"):
        peripherals.display(draft, option, value)
    elif option in ("watchdog", "watchdog-action", "action") and value is not None:
        peripherals.watchdog(draft, option, value)
    elif option == "usb":
        draft.put("usb", "controller", "xhci")
        draft.account.mapped(shown, 'usb.controller = "xhci"')
    elif option == "balloon":
        draft.put("memory.balloon", "enabled", value != "none")
        draft.account.mapped(shown, "memory.balloon.enabled")
    elif option == "no-reboot":
        draft.account.unsupported(shown, "a guest that reboots is reset")
    elif option in ("no-acpi", "no-hpet"):
        draft.account.unsupported(shown, "the board has it")
    elif option not in TAKES_VALUE:
        draft.account.unsupported(
            shown, "no option of QEMU that kvmd knows; if it takes a value, that is the next word"
        )
    else:
        draft.account.unsupported(shown, "kvmd has no key for it yet")


def _defaults(draft: Draft, given: set[str]) -> None:
    """What QEMU does when nothing is said, where kvmd does something else."""
    account = draft.account
    if not draft.has("machine.type"):
        draft.put("machine", "type", "pc")
        account.default("no -machine", 'QEMU\'s own board: machine.type = "pc"')
    if not draft.has("machine.accel"):
        draft.put("machine", "accel", "tcg")
        account.default("no -enable-kvm, -accel", 'QEMU emulates: machine.accel = "tcg"')
    if not draft.has("memory.size"):
        draft.put("memory", "size", DEFAULT_MEMORY)
        account.default("no -m", f'memory.size = "{DEFAULT_MEMORY}"')
    if not draft.has("cpu.model"):
        draft.put("cpu", "model", DEFAULT_MODEL)
        account.default("no -cpu", f'cpu.model = "{DEFAULT_MODEL}"')
    if draft.has("display.keyboard") and not draft.has("display.type"):
        layout = draft.tables.pop("display")["keyboard"]
        account.dropped(f"-k {layout}", "only a viewer needs it, and there is no display")
    if not draft.has("memory.balloon") and not draft.has("memory.backing"):
        draft.put("memory.balloon", "enabled", False)
        account.default("no balloon device", "memory.balloon.enabled = false: the same machine; true lets memory move")
    if "nodefaults" not in given:
        account.dropped("(no -nodefaults)", "the empty CD and floppy drives and the parallel port are not made")
    if not draft.has("guest"):
        draft.tables.setdefault("guest", {})


def _boot_order(draft: Draft) -> None:
    """bootindex of the devices as boot.order."""
    indices = draft.backends.pop("boot:", {})
    if indices and not draft.has("boot.order"):
        draft.put("boot", "order", [table for table, _ in sorted(indices.items(), key=lambda item: int(item[1]))])


def _left_over(draft: Draft) -> None:
    """Backends nobody referred to."""
    for key, values in draft.backends.items():
        kind, _, ident = key.partition(":")
        option = {
            "drive": "-drive",
            "node": "-blockdev",
            "netdev": "-netdev",
            "chardev": "-chardev",
            "object": "-object",
        }[kind]
        if kind == "object" and values.get("qom-type", "").startswith("memory-backend-"):
            _memory_object(draft, values)
        elif kind in ("chardev", "object") and values.get("qom-type", "") not in (
            "iothread",
            "throttle-group",
            "secret",
        ):
            draft.account.dropped(f"{option} {ident}", "kvmd makes what its devices need")
        else:
            draft.account.unsupported(f"{option} {ident}", "no device uses it")


def _memory_object(draft: Draft, values: dict[str, str]) -> None:
    """-object memory-backend-…: what the guest's memory is."""
    kind, option = values["qom-type"], f"-object {values['qom-type']}"
    if kind == "memory-backend-file" and values.get("mem-path"):
        machine.memory_path(draft, values["mem-path"])
    elif kind == "memory-backend-memfd" and values.get("hugetlb") == "on":
        draft.put("memory", "backing", "hugepages")
        if "hugetlbsize" in values:
            draft.put("memory", "page_size", machine.size_text(values["hugetlbsize"]))
        draft.account.mapped(option, "memory.backing")
    elif kind == "memory-backend-memfd":
        draft.put("memory", "backing", "memfd")
        draft.account.mapped(option, "memory.backing")
    else:
        draft.account.default(option, "anonymous memory")
    for key in ("prealloc", "share"):
        if values.get(key) == "on":
            draft.put("memory", key, True)
            draft.account.mapped(f"{option} {key}=on", f"memory.{key}")
