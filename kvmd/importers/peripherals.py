"""Screens, serial ports and the small devices."""

from __future__ import annotations

import re

from kvmd.importers.account import Keys
from kvmd.importers.keyval import parse
from kvmd.importers.model import Draft

_VGA = {"std": "std", "cirrus": "cirrus", "vmware": "vmware", "qxl": "qxl", "virtio": "virtio", "none": "none"}
_VIDEO = {
    "VGA": "std",
    "cirrus-vga": "cirrus",
    "vmware-svga": "vmware",
    "qxl-vga": "qxl",
    "qxl": "qxl",
    "virtio-vga": "virtio",
    "virtio-gpu-pci": "virtio",
    "bochs-display": "bochs",
    "ramfb": "ramfb",
}
_SOUND = {
    "hda": "hda",
    "intel-hda": "hda",
    "ich9-intel-hda": "hda",
    "ac97": "ac97",
    "AC97": "ac97",
    "es1370": "es1370",
    "ES1370": "es1370",
}
_CODECS = frozenset({"hda-duplex", "hda-output", "hda-micro"})
_USB_CONTROLLER = re.compile(r"(qemu-xhci|nec-usb-xhci|piix[34]-usb-uhci|ich9-usb-.*|usb-ehci|pci-ohci|usb-hub)")
_BRIDGES = re.compile(
    r"(pcie-root-port|ioh3420|pci-bridge|i82801b11-bridge|pcie-pci-bridge|x3130-upstream|xio3130-.*|pxb.*)"
)
GUEST_AGENT = "org.qemu.guest_agent.0"


def vga(draft: Draft, value: str) -> None:
    """-vga."""
    if value in _VGA:
        draft.put("video", "model", _VGA[value])
        draft.account.mapped(f"-vga {value}", "video.model")
    else:
        draft.account.unsupported(f"-vga {value}", "kvmd has no such card")


def vnc(draft: Draft, value: str) -> None:
    """-vnc: kvmd listens on a socket of the guest's own directory, which ssh can forward."""
    where, _, rest = value.partition(",")
    if where == "none":
        draft.account.default("-vnc none", "no display")
        return
    draft.put("display", "type", "vnc")
    draft.account.mapped(f"-vnc {where}", "display.type")
    if not where.startswith("unix:"):
        draft.remarks.append(f"display: -vnc {where} listened on TCP; here it is a socket (`kvmd-cli show` names it)")
    for word in filter(None, rest.split(",")):
        draft.account.unsupported(f"-vnc …,{word}", "VNC on a socket that is root's alone needs none of it")


def display(draft: Draft, option: str, value: str | None) -> None:
    """-display, -sdl, -curses, -nographic, -spice."""
    word = (value or option).partition(",")[0]
    shown = f"-{option}" + (f" {value}" if value else "")
    if word.startswith("vnc="):
        vnc(draft, (value or "")[4:])
    elif word in ("none", "nographic", "egl-headless", "dbus"):
        draft.account.default(shown, "no display")
        if word == "nographic" and not draft.has("serial"):
            draft.put("serial.console", "log", True)
            draft.account.mapped(f"{shown} (serial port)", "serial.console")
    elif option == "spice":
        draft.account.unsupported(shown, 'SPICE is not there yet; display.type = "vnc" is')
    else:
        draft.put("display", "type", "vnc")
        draft.account.mapped(shown, 'display.type = "vnc"')
        draft.remarks.append(f"display: {shown} was a window on a desktop; here it is VNC on a socket")


def serial(draft: Draft, value: str) -> None:
    """-serial: a port with a socket and a kept log, whatever was behind it."""
    if value == "none":
        draft.account.default("-serial none", "no port unless one is named")
        return
    name = draft.fresh("serial", None, "console" if not draft.has("serial") else "serial")
    draft.put(f"serial.{name}", "log", True)
    draft.account.mapped(f"-serial {value}", f"serial.{name}")
    if value.startswith("chardev:"):
        draft.claim(value, f"serial.{name}")
    if not value.startswith(("stdio", "mon:", "pty", "chardev:", "unix:", "vc", "null")):
        draft.remarks.append(f"serial.{name}: -serial {value} is a socket now (kvmd-cli console) and its log is kept")


def usbdevice(draft: Draft, value: str) -> None:
    """-usbdevice."""
    if value == "tablet":
        draft.put("usb", "tablet", True)
        draft.account.mapped("-usbdevice tablet", "usb.tablet")
    elif value in ("mouse", "keyboard"):
        draft.account.default(f"-usbdevice {value}", "the board has PS/2")
    elif value.startswith("disk:"):
        draft.account.unsupported(f"-usbdevice {value}", 'say it as -drive with interface = "usb"')
    else:
        draft.account.unsupported(f"-usbdevice {value}", "USB devices of the host are not there yet")


def sound(draft: Draft, value: str) -> None:
    """-soundhw."""
    for card in value.split(","):
        if card in _SOUND and not draft.has("sound"):
            draft.put("sound", "model", _SOUND[card])
            draft.account.mapped(f"-soundhw {card}", "sound.model")
        else:
            draft.account.unsupported(f"-soundhw {card}", "kvmd has hda, ac97 and es1370, one of them")


def device(draft: Draft, driver: str, values: dict[str, str]) -> None:
    """Every -device that is neither drive nor network card."""
    keys = Keys(f"-device {driver}", {key: value for key, value in values.items() if key != "id"}, draft.account)
    option = f"-device {driver}"
    for key, why in (("bus", "kvmd finds the device's place itself"), ("addr", "kvmd finds the device's place itself")):
        keys.drop(key, why)
    keys.drop("multifunction", "each device has a slot of its own")
    if driver in _VIDEO:
        draft.put("video", "model", _VIDEO[driver])
        draft.account.mapped(option, "video.model")
        megabytes = keys.take("vgamem_mb", "video.memory")
        if megabytes is not None:
            draft.put("video", "memory", f"{int(megabytes)}MiB")
    elif driver in _SOUND:
        draft.put("sound", "model", _SOUND[driver])
        draft.account.mapped(option, "sound.model")
    elif driver in _CODECS:
        draft.account.default(option, "part of the sound card")
        keys.drop("audiodev", "nobody hears it")
        keys.drop("cad", "part of the sound card")
    elif driver == "usb-tablet":
        draft.put("usb", "tablet", True)
        draft.account.mapped(option, "usb.tablet")
        keys.drop("port", "kvmd finds the device's place itself")
    elif driver in ("usb-kbd", "usb-mouse"):
        draft.account.default(option, "the board has PS/2")
        keys.drop("port", "kvmd finds the device's place itself")
    elif _USB_CONTROLLER.fullmatch(driver):
        draft.put("usb", "controller", "xhci")
        draft.account.mapped(option, 'usb.controller = "xhci", which has all speeds')
        for key in ("p2", "p3", "masterbus", "firstport", "port"):
            keys.drop(key, "one xhci has all speeds")
    elif _BRIDGES.fullmatch(driver):
        draft.account.dropped(option, "kvmd puts devices on the root bus")
        for key in ("port", "chassis", "chassis_nr", "slot", "hotplug", "bus_nr", "shpc"):
            keys.drop(key, "kvmd puts devices on the root bus")
    else:
        _more(draft, driver, option, keys)
    keys.finish()


def _more(draft: Draft, driver: str, option: str, keys: Keys) -> None:
    if driver in ("virtio-balloon-pci", "virtio-balloon"):
        draft.put("memory.balloon", "enabled", True)
        draft.account.mapped(option, "memory.balloon.enabled")
        for key, at in (("deflate-on-oom", "deflate_on_oom"), ("free-page-reporting", "free_page_reporting")):
            text = keys.take(key, f"memory.balloon.{at}")
            if text is not None:
                draft.put("memory.balloon", at, text in ("on", "true"))
    elif driver in ("virtio-rng-pci", "virtio-rng"):
        source = draft.claim(f"object:{keys.take('rng')}", option) or {}
        path = source.get("filename")
        draft.put("rng", "source", "/dev/urandom" if path in ("/dev/random", "/dev/urandom") else "builtin")
        draft.account.mapped(option, "rng.source")
        for key in ("max-bytes", "period"):
            keys.drop(key, "the source does not run dry")
    elif driver in ("i6300esb", "ib700"):
        draft.put("watchdog", "model", driver)
        draft.account.mapped(option, "watchdog.model")
    elif driver in ("pvpanic", "pvpanic-pci"):
        draft.put("pvpanic", "enabled", True)
        draft.account.mapped(option, "pvpanic.enabled")
    elif driver in ("virtio-serial-pci", "virtio-serial"):
        draft.account.default(option, "made for the ports that need it")
        keys.drop("max_ports", "made for the ports that need it")
    elif driver == "virtserialport" and keys.peek("name") == GUEST_AGENT:
        keys.take("name", "agent.enabled")
        draft.put("agent", "enabled", True)
        draft.claim(f"chardev:{keys.take('chardev')}", option)
        keys.drop("nr", "made for the ports that need it")
    elif driver in ("isa-serial", "pci-serial"):
        serial(draft, f"chardev:{keys.take('chardev')}")
        keys.drop("index", "ports are numbered in the order of the file")
    elif driver == "vfio-pci":
        host = keys.take("host")
        name = draft.fresh("hostdev", None, "dev0")
        draft.put(f"hostdev.{name}", "pci", host if host and host.count(":") == 2 else f"0000:{host}")
        draft.account.mapped(f"{option} host={host}", f"hostdev.{name}.pci")
        draft.remarks.append(f"hostdev.{name}: also list the device under passthrough.allow in host.toml")
    else:
        draft.account.unsupported(option, "kvmd does not make this device")


def watchdog(draft: Draft, option: str, value: str) -> None:
    """-watchdog MODEL, -watchdog-action, -action."""
    if option == "watchdog":
        draft.put("watchdog", "model", value)
        draft.account.mapped(f"-watchdog {value}", "watchdog.model")
        return
    keys = Keys("-action" if option == "action" else "-watchdog-action", parse(value, "watchdog"), draft.account)
    action = keys.take("watchdog", "watchdog.action")
    if action is not None:
        draft.put("watchdog", "action", {"shutdown": "poweroff", "debug": "none"}.get(action, action))
    for key in ("reboot", "shutdown", "panic"):
        keys.drop(key, "kvmd sees to the guest's ends: on.*")
    keys.finish()
