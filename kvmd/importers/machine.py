"""Board, processors, memory, boot: the options every command line has."""

from __future__ import annotations

import re

from kvmd.importers.account import Keys
from kvmd.importers.keyval import boolean, parse
from kvmd.importers.model import Draft

_SIZE = re.compile(r"(\d+)([bBkKmMgGtT]?)(?:i?[bB])?")
_OLD_FIRST = 6, 2  # from this version of its boards on QEMU gives cores before sockets (qapi/machine.json, -smp)


def machine(draft: Draft, value: str) -> None:
    """-M, -machine."""
    keys = Keys("-machine", parse(value, "type"), draft.account)
    kind = keys.take("type", "machine.type")
    if kind:
        draft.machine = kind
        draft.put("machine", "type", kind)
    accel(draft, keys.take("accel"), "-machine accel")
    for key, expected, why in (
        ("usb", ("off", "on"), "by [usb]"),
        ("vmport", ("off", "auto"), "as QEMU has it"),
        ("dump-guest-core", ("off",), "as kvmd has it"),
        ("mem-merge", ("off",), "as kvmd has it; memory.ksm_group merges"),
        ("kernel_irqchip", ("on", "split"), "as QEMU has it"),
        ("kernel-irqchip", ("on", "split"), "as QEMU has it"),
        ("smm", ("on", "auto", "off"), "as QEMU has it"),
        ("hpet", ("on", "off"), "as QEMU has it"),
        ("graphics", ("on", "off"), "by [display]"),
        ("memory-backend", (keys.peek("memory-backend") or "",), "by [memory]"),
    ):
        keys.default(key, expected, why)
    keys.finish()


def accelerator(draft: Draft, value: str) -> None:
    """-accel KIND[,…]."""
    accel(draft, value.partition(",")[0], "-accel")


def accel(draft: Draft, value: str | None, option: str) -> None:
    """kvm, tcg, or `kvm:tcg`, which is auto."""
    if value is None:
        return
    kinds = re.split(r"[:,]", value)
    known = [kind for kind in kinds if kind in ("kvm", "tcg")]
    if not known:
        draft.account.unsupported(f"{option} {value}", "kvmd has kvm and tcg")
        return
    found = "auto" if known == ["kvm", "tcg"] else known[0]
    draft.put("machine", "accel", found)
    draft.account.mapped(f"{option} {value}", "machine.accel")


def cpu(draft: Draft, value: str) -> None:
    """-cpu MODEL[,+feature][,-feature][,feature=on]."""
    model, *words = value.split(",")
    draft.put("cpu", "model", model)
    draft.account.mapped(f"-cpu {model}", "cpu.model")
    features: dict[str, bool] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name.startswith(("hv_", "hv-")):
            draft.put("hyperv", "enabled", True)
            draft.account.mapped(f"-cpu {word}", "hyperv.enabled")
            continue
        try:
            on = boolean(text) if text else not name.startswith("-")
        except ValueError:
            draft.account.unsupported(f"-cpu {word}", "only features that are on or off")
            continue
        features[name.lstrip("+-")] = on
        draft.account.mapped(f"-cpu {word}", "cpu.features")
    if features:
        draft.put("cpu", "features", features)


def smp(draft: Draft, value: str) -> None:
    """-smp N or its parts; what is left out is derived as the board's own QEMU did, and written down."""
    keys = Keys("-smp", parse(value, "cpus"), draft.account)
    given = {
        key: int(text) for key in ("sockets", "dies", "cores", "threads") if (text := keys.take(key, f"cpu.{key}"))
    }
    text = keys.take("cpus", "cpu.vcpus")
    most = keys.take("maxcpus")
    product = 1
    for count in given.values():
        product *= count
    vcpus = int(text) if text else product
    if most is not None and int(most) != vcpus:
        draft.account.unsupported(f"-smp maxcpus={most}", "CPU hot-plug is not there yet")
    elif most is not None:
        draft.account.default(f"-smp maxcpus={most}", "all CPUs are there from the start")
    draft.put("cpu", "vcpus", vcpus)
    rest = max(1, vcpus // max(1, product))
    if vcpus > 1 and "sockets" not in given and "cores" not in given:
        given["cores" if _cores_first(draft) else "sockets"] = rest
    elif "cores" not in given and "sockets" in given and rest > 1:
        given["cores"] = rest
    elif "sockets" not in given and rest > 1:
        given["sockets"] = rest
    for key in ("sockets", "dies", "cores", "threads"):
        if key in given:
            draft.put("cpu", key, given[key])
    keys.finish()


def _cores_first(draft: Draft) -> bool:
    if draft.dialect == "qemu-kvm":
        return False
    found = re.search(r"-(\d+)\.(\d+)$", draft.machine)
    return found is None or (int(found[1]), int(found[2])) >= _OLD_FIRST


def memory(draft: Draft, value: str) -> None:
    """-m: MiB unless a unit is named."""
    keys = Keys("-m", parse(value, "size"), draft.account)
    size = keys.take("size", "memory.size")
    if size is not None:
        draft.put("memory", "size", size_text(size))
    keys.finish("memory hot-plug is not there yet")


def size_text(text: str) -> str:
    """A size as kvmd's files have it; a bare number is MiB. The text as it is where it is no size."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        return text
    number, unit = int(found[1]), found[2].upper() or "M"
    scale = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}[unit]
    total = number * scale
    for power, name in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if total and total % (1 << power) == 0:
            return f"{total >> power}{name}"
    return f"{total}B"


def memory_path(draft: Draft, path: str) -> None:
    """-mem-path: hugepages where the path says so, else files in that directory."""
    if "huge" in path.lower():
        draft.put("memory", "backing", "hugepages")
        draft.account.mapped(f"-mem-path {path}", 'memory.backing = "hugepages"')
        if not draft.has("memory.prealloc"):
            draft.put("memory", "prealloc", False)
        match = re.search(r"(1G|1048576|2M|2048)", path)
        if match:
            draft.put("memory", "page_size", "1GiB" if match[1] in ("1G", "1048576") else "2MiB")
        return
    draft.put("memory", "backing", "file")
    draft.put("memory", "path", path)
    draft.account.mapped(f"-mem-path {path}", "memory.path")


def boot(draft: Draft, value: str) -> None:
    """-boot cn, or order=, once=, menu=, splash=, splash-time=."""
    keys = Keys("-boot", parse(value, "order"), draft.account)
    for key in ("order", "once"):
        text = keys.take(key, f"boot.{key}")
        if text:
            draft.put("boot", key, text)
    menu = keys.take("menu", "boot.menu")
    if menu is not None and boolean(menu):
        draft.put("boot", "menu", True)
    splash, wait = keys.take("splash"), keys.take("splash-time")
    for key, text, at in (("splash", splash, "splash"), ("splash-time", wait, "splash_time")):
        if text is None:
            continue
        if not draft.has("boot.menu"):
            draft.account.dropped(f"-boot {key}={text}", "QEMU shows it with the menu only, and the menu is off")
            continue
        draft.put("boot", at, draft.path(text) if key == "splash" else f"{int(text)}ms")
        draft.account.mapped(f"-boot {key}={text}", f"boot.{at}")
    keys.default("strict", ("on", "off"), "kvmd boots only what boot.order names")
    keys.drop("reboot-timeout", "the guest stays where its firmware leaves it")
    keys.finish()


def clock(draft: Draft, value: str) -> None:
    """-rtc."""
    keys = Keys("-rtc", parse(value), draft.account)
    base = keys.take("base", "rtc.base")
    if base is not None:
        draft.put("rtc", "base", base)
    source = keys.take("clock", "rtc.clock")
    if source is not None:
        draft.put("rtc", "clock", source)
    keys.drop("driftfix", "QEMU's own choice")
    keys.finish()


def smbios(draft: Draft, value: str) -> None:
    """-smbios type=1."""
    keys = Keys("-smbios", parse(value), draft.account)
    if keys.take("type") != "1":
        draft.account.unsupported(f"-smbios {value}", "only type=1, the system's own strings")
        return
    uuid = keys.take("uuid", "guest.uuid")
    if uuid is not None:
        draft.put("guest", "uuid", uuid.lower())
    for key in ("manufacturer", "product", "version", "serial", "sku", "family"):
        text = keys.take(key, f"machine.smbios.{key}")
        if text is not None:
            draft.put("machine.smbios", key, text)
    keys.finish()
