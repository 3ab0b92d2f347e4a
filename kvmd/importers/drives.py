"""-hda … -cdrom, -drive, -blockdev and the devices on top of them, as [disk.NAME]."""

from __future__ import annotations

from kvmd.importers.account import Keys
from kvmd.importers.keyval import boolean, parse
from kvmd.importers.model import Draft

# Shorthands of the classic command line and the -drive each stands for (vl.c).
SHORTHANDS = {
    "hda": {"media": "disk", "index": "0"},
    "hdb": {"media": "disk", "index": "1"},
    "hdc": {"media": "disk", "index": "2"},
    "hdd": {"media": "disk", "index": "3"},
    "cdrom": {"media": "cdrom", "index": "2"},
    "fda": {"if": "floppy", "index": "0"},
    "fdb": {"if": "floppy", "index": "1"},
    "sd": {"if": "sd"},
}
_INTERFACES = {"ide": "ide", "scsi": "scsi", "virtio": "virtio", "floppy": "floppy", "sd": "sd"}
DEVICES = {
    "virtio-blk-pci": "virtio",
    "virtio-blk": "virtio",
    "scsi-hd": "scsi",
    "scsi-cd": "scsi",
    "scsi-disk": "scsi",
    "ide-hd": "ide",
    "ide-cd": "ide",
    "ide-drive": "ide",
    "nvme": "nvme",
    "usb-storage": "usb",
    "floppy": "floppy",
    "sd-card": "sd",
}
CONTROLLERS = frozenset(
    ("virtio-scsi-pci", "virtio-scsi", "lsi", "lsi53c895a", "megasas", "ahci", "ich9-ahci", "piix3-ide", "sdhci-pci")
) | {"isa-fdc"}
ROOT_BUSES = frozenset({"pci.0", "pcie.0"})
_ENDINGS = {"qcow2": "qcow2", "iso": "raw", "img": "raw", "raw": "raw"}
_ENDINGS |= {ending: ending for ending in ("qed", "vmdk", "vdi", "vhdx")}
_FORMATS = {"host_device": "raw", "host_cdrom": "raw", "file": "raw"}


# werror and rerror -> on_error; QEMU's own default, enospc and report, is kvmd's too
_POLICIES: dict[tuple[str | None, str | None], str] = {
    ("report", None): "report",
    ("report", "report"): "report",
    ("stop", None): "stop",
    ("stop", "stop"): "stop",
    ("ignore", "ignore"): "ignore",
}


def shorthand(draft: Draft, option: str, path: str) -> None:
    """-hda FILE and its kin; a word alone is -hda."""
    name = option or "hda"
    _disk(draft, f"-{name}", {"file": path, **SHORTHANDS[name]}, name=name)


def drive(draft: Draft, value: str) -> None:
    """-drive: a disk of its own, or with if=none the half that a -device asks for by id."""
    values = parse(value, "file")
    if values.get("if") == "none":
        draft.backends[f"drive:{values.get('id', '')}"] = values
        return
    interface = values.get("if") or "ide"
    if interface == "pflash":
        draft.account.unsupported(f"-drive {value}", "firmware volumes: boot.firmware is not there yet")
        return
    if interface not in _INTERFACES:
        draft.account.unsupported(f"-drive {value}", f"kvmd has no interface {interface}")
        return
    _disk(draft, "-drive", values, name=values.get("id"))


def blockdev(draft: Draft, value: str) -> None:
    """-blockdev: a node, found by the device or the node above it."""
    values = parse(value, "driver")
    draft.backends[f"node:{values.get('node-name', '')}"] = values


def device(draft: Draft, driver: str, values: dict[str, str]) -> None:
    """-device of a drive: what it hangs on comes from its -drive or -blockdev."""
    below = values.get("drive", "")
    option = f"-device {driver}"
    found = draft.claim(f"drive:{below}", option) or _nodes(draft, below, option)
    if found is None:
        if driver in ("ide-cd", "scsi-cd"):
            draft.account.unsupported(
                f"{option} {values.get('id', '')}", "an empty CD drive: there is no medium to name"
            )
        else:
            draft.account.unsupported(f"{option} drive={below}", "no -drive or -blockdev of that name")
        return
    merged = {key: value for key, value in found.items() if key not in ("if", "id")}
    merged |= {key: value for key, value in values.items() if key not in ("drive", "driver", "id")}
    merged["if"] = DEVICES[driver]
    if driver in ("ide-cd", "scsi-cd"):
        merged["media"] = "cdrom"
    _place(draft, driver, merged)
    _disk(draft, option, merged, name=values.get("id") or below)


def _place(draft: Draft, driver: str, values: dict[str, str]) -> None:
    """`bus=ide.1,unit=0` and `scsi-id=3` as bus and unit of the file."""
    bus = values.pop("bus", None)
    if bus is not None and bus not in ROOT_BUSES and (address := values.pop("addr", None)) is not None:
        draft.account.dropped(
            f"-device {driver} addr={address}", f"it counts on {bus}; kvmd puts drives on the root bus"
        )
    tail = bus.rpartition(".")[2] if bus else ""
    if driver.startswith("ide-") and tail.isdigit():
        values["bus"] = tail
        if draft.is_q35:
            values.pop("unit", None)
    elif bus is not None and not driver.startswith(("virtio-blk", "nvme", "scsi-", "usb-")):
        draft.account.dropped(f"-device {driver} bus={bus}", "kvmd finds the drive's place itself and keeps it")
    elif bus is not None:
        draft.account.default(f"-device {driver} bus={bus}", "kvmd makes the controller and keeps the place")
    if "scsi-id" in values:
        values["unit"] = values.pop("scsi-id")


def _nodes(draft: Draft, node: str, by: str) -> dict[str, str] | None:
    """The chain of -blockdev nodes below a device as one -drive would say it."""
    top = draft.claim(f"node:{node}", by)
    if top is None:
        return None
    found: dict[str, str] = {}
    values, depth = dict(top), 0
    while depth < 8:
        depth += 1
        driver = values.pop("driver", "")
        values.pop("node-name", None)
        if driver in _FORMATS:
            found["file"] = values.pop("filename", "")
            found.setdefault("format", _FORMATS[driver])
        else:
            found.setdefault("format", driver)
        for key, value in values.items():
            if not key.startswith("file"):
                found.setdefault({"read-only": "readonly", "cache.direct": "direct"}.get(key, key), value)
        inner = {key.removeprefix("file."): value for key, value in values.items() if key.startswith("file.")}
        below = values.get("file")
        if below is not None:
            values = dict(draft.claim(f"node:{below}", by) or {})
        elif inner:
            values = inner
        else:
            break
    if found.pop("direct", None) == "on":
        found["cache"] = "none"
    return found


def _disk(draft: Draft, option: str, values: dict[str, str], *, name: str | None) -> None:
    """One [disk.NAME] of the keys of a -drive, with its account."""
    keys = Keys(option, values, draft.account)
    interface = values.get("if") or "ide"
    media = "cdrom" if values.get("media") == "cdrom" else "disk"
    default = {"floppy": "fda", "cdrom": "cdrom"}.get(interface if interface == "floppy" else media, "disk0")
    disk = draft.fresh("disk", name, default)
    table = f"disk.{disk}"
    path = keys.take("file", f"{table}.file")
    if not path:
        draft.account.unsupported(option, "an empty drive: there is no medium to name")
        keys.finish()
        return
    draft.put(table, "file", draft.path(path))
    _format(draft, keys, table, path)
    _interface(draft, keys, table, interface, media)
    placed = draft.tables["disk"][disk].get("interface") or ("ide" if media == "cdrom" else "virtio")
    for key in ("index", "bus", "unit"):
        text = keys.take(key)
        if text is not None and text.isdigit() and placed in ("ide", "sata", "scsi", "floppy"):
            draft.put(table, key, int(text))
            draft.account.mapped(f"{option} {key}={text}", f"{table}.{key}")
        elif text is not None:
            draft.account.default(f"{option} {key}={text}", "kvmd finds the drive's place itself and keeps it")
    _caching(draft, keys, table)
    _rest(draft, keys, table, media)


def _format(draft: Draft, keys: Keys, table: str, path: str) -> None:
    given = keys.take("format", f"{table}.format")
    if given is not None:
        draft.put(table, "format", _FORMATS.get(given, given))
        return
    seen = draft.look(path)
    guess = seen or _ENDINGS.get(path.rpartition(".")[2].lower(), "raw")
    draft.put(table, "format", guess)
    why = "its header says so" if seen else "by the file's name: the image was not there to be looked at"
    draft.remarks.append(f'{table}.format = "{guess}": {why}; QEMU guessed it at each start, kvmd never does')


def _interface(draft: Draft, keys: Keys, table: str, interface: str, media: str) -> None:
    keys.take("if")
    keys.take("media", f"{table}.media" if media == "cdrom" else None)
    if interface == "ide" and draft.is_q35:
        interface = "sata"  # q35's `if=ide` is its AHCI
    if media == "cdrom":
        draft.put(table, "media", "cdrom")
        if interface not in ("ide", "sata"):
            draft.put(table, "interface", interface)
        return
    if interface != "virtio":
        draft.put(table, "interface", interface)


def _caching(draft: Draft, keys: Keys, table: str) -> None:
    """QEMU's default is writeback (qemu-kvm's was writethrough) with threads; kvmd's is another, so it is written."""
    classic = "writethrough" if draft.dialect == "qemu-kvm" else "writeback"
    cache = keys.take("cache", f"{table}.cache")
    draft.put(table, "cache", cache or classic)
    aio = keys.take("aio", f"{table}.aio")
    if aio is not None:
        draft.put(table, "aio", aio)
    elif cache in ("none", "directsync"):
        draft.put(table, "aio", "threads")


def _rest(draft: Draft, keys: Keys, table: str, media: str) -> None:
    for key in ("readonly", "read-only"):
        text = keys.take(key)
        if text is not None and media == "disk" and boolean(text):
            draft.put(table, "readonly", True)
            draft.account.mapped(f"{keys.option} {key}={text}", f"{table}.readonly")
        elif text is not None:
            draft.account.default(f"{keys.option} {key}={text}", "a CD is read-only, a disk is not")
    for key, at in (("serial", "serial"), ("discard", "discard"), ("detect-zeroes", "detect_zeroes")):
        text = keys.take(key, f"{table}.{at}")
        if text is not None:
            draft.put(table, at, {"on": "unmap", "off": "ignore"}.get(text, text) if key == "discard" else text)
    address = keys.take("addr", f"{table}.pci_address")
    if address is not None:
        draft.put(table, "pci_address", address.lower().removeprefix("0x"))
    for key, at in (("num-queues", "queues"), ("logical_block_size", "logical_block_size")):
        text = keys.take(key, f"{table}.{at}")
        if text is not None:
            draft.put(table, at, int(text, 0))
    thread = keys.take("iothread", f"{table}.iothread")
    if thread is not None:
        draft.put(table, "iothread", thread)
        draft.claim(f"object:{thread}", f"{table}.iothread")
    if keys.take("share-rw", f"{table}.shared") in ("on", "true"):
        draft.put(table, "shared", True)
    _errors(draft, keys, table)
    index = keys.take("bootindex")
    if index is not None:
        draft.backends.setdefault("boot:", {})[table] = index
        draft.account.mapped(f"{keys.option} bootindex={index}", "boot.order")
    boot = keys.take("boot")  # qemu-kvm's extboot
    if boot is not None:
        draft.account.default(f"{keys.option} boot={boot}", "kvmd boots from any drive")
    keys.drop("lun", "kvmd gives each drive a target of its own")
    keys.drop("cyls", "a disk's geometry is not kept")
    keys.drop("heads", "a disk's geometry is not kept")
    keys.drop("secs", "a disk's geometry is not kept")
    keys.default("locking", ("on", "off", "auto"), "kvmd holds the image's lock")
    keys.default("scsi", ("off",), "as kvmd has it")
    keys.default("write-cache", ("on", "auto"), "by disk.NAME.cache")
    keys.finish()


def _errors(draft: Draft, keys: Keys, table: str) -> None:
    write, read = keys.take("werror"), keys.take("rerror")
    for key, text in (("werror", write), ("rerror", read)):
        if text is not None:
            draft.account.mapped(f"{keys.option} {key}={text}", f"{table}.on_error")
    policy = _POLICIES.get((write, read))
    if policy is not None:
        draft.put(table, "on_error", policy)
