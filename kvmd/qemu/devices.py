"""argv of everything small: monitors, serial ports, display, balloon, randomness, agent channel, panic notifier."""

from __future__ import annotations

from kvmd.config.guest import Guest
from kvmd.errors import NotSupported, Refused
from kvmd.qemu import defaults
from kvmd.qemu.caps import Capabilities
from kvmd.qemu.fds import FdTable, ListenUnix, OpenLog
from kvmd.qemu.identity import Identity
from kvmd.qemu.text import device_args, double, to_json
from kvmd.unixpath import PATH_BYTES

MONITORS = ("qmp", "rescue")  # kvmd's own, and one for people and for a host without kvmd
ISA_SERIAL_PORTS = 4  # COM1 to COM4 (hw/char/serial-isa.c, MAX_ISA_SERIAL_PORTS)
AGENT_PORT = "org.qemu.guest_agent.0"  # the name qemu-ga looks for
_VIDEO = {
    "std": "VGA",
    "virtio": "virtio-vga",
    "cirrus": "cirrus-vga",
    "qxl": "qxl-vga",
    "vmware": "vmware-svga",
    "bochs": "bochs-display",
}
_SOUND = {"hda": "ich9-intel-hda", "ac97": "AC97", "es1370": "ES1370"}


def monitors(fds: FdTable) -> list[str]:
    """Two QMP servers on sockets that listen already: connecting cannot race with QEMU's start."""
    found: list[str] = []
    for purpose in MONITORS:
        fd = fds.add(ListenUnix(fds.next_fd, purpose))
        found += [
            "-chardev",
            f"socket,id={purpose},fd={fd},server=on,wait=off",
            "-mon",
            f"chardev={purpose},mode=control",
        ]
    return found


def serials(name: str, guest: Guest, identity: Identity, caps: Capabilities, fds: FdTable) -> list[str]:
    """Serial ports; what the guest writes is logged by QEMU itself, so it is kept with nobody attached."""
    found: list[str] = []
    for key, serial in guest.serial.items():
        number = identity.serials[key]
        if number >= ISA_SERIAL_PORTS:
            raise Refused(
                f"guest {name}: serial.{key} would be port {number} of {ISA_SERIAL_PORTS}",
                hint="take a port out, or stale entries out of the identity file's [serial]",
            )
        fd = fds.add(ListenUnix(fds.next_fd, f"serial-{key}"))
        chardev = f"socket,id=serial-{key},fd={fd},server=on,wait=off"
        if serial.log:
            log = fds.add(OpenLog(fds.next_fd, f"serial-{key}"))
            chardev += f",logfile={fds.fdset(log, f'log-{key}')},logappend=on"
        device = {"driver": "isa-serial", "id": f"serial-{key}-port", "chardev": f"serial-{key}", "index": number}
        found += ["-chardev", chardev, *device_args(caps, f"guest {name}: serial.{key}", device)]
    return found


def display_socket(name: str, run_dir: str) -> str:
    """Where a guest's VNC server listens, in a directory of its uid. Raises Refused when that is too long a path."""
    path = f"{run_dir}/display/vnc.sock"
    if len(path.encode()) > PATH_BYTES:
        raise Refused(
            f"guest {name}: {path} is longer than the {PATH_BYTES} bytes of a socket's path",
            hint="choose a shorter --run-dir",
        )
    return path


def display(name: str, guest: Guest, identity: Identity, caps: Capabilities, socket: str | None) -> list[str]:
    """The graphics card and who may look at it."""
    found = ["-display", "none"]
    if socket:
        if "vnc" not in caps.options:
            raise NotSupported(f'guest {name}: display.type = "vnc": this QEMU {caps.version_text} has no VNC server')
        found += ["-vnc", f"unix:{double(socket)}"]
    if guest.display.keyboard:
        found += ["-k", guest.display.keyboard]
    model, key = defaults.video_model(guest), f"guest {name}: video.model"
    if model == "ramfb":
        found += device_args(caps, key, {"driver": "ramfb", "id": "video"})
    elif model != "none":
        found += _pci(caps, key, identity, "video", _VIDEO[model], **_video_memory(guest, model))
    return found


def _video_memory(guest: Guest, model: str) -> dict[str, object]:
    size = guest.video.memory
    if size is None:
        return {}
    return {"vgamem": int(size)} if model == "bochs" else {"vgamem_mb": int(size) >> 20}


def extras(name: str, guest: Guest, identity: Identity, caps: Capabilities, fds: FdTable) -> list[str]:
    """Balloon, randomness, agent channel, panic notifier."""
    found: list[str] = []
    if guest.ballooned:
        found += _pci(
            caps,
            f"guest {name}: memory.balloon",
            identity,
            "balloon",
            "virtio-balloon-pci",
            **{
                "deflate-on-oom": guest.memory.balloon.deflate_on_oom,
                "free-page-reporting": guest.memory.balloon.free_page_reporting,
            },
        )
    if guest.rng.source:
        found += _rng(name, guest, identity, caps)
    if guest.agent.enabled:
        key = f"guest {name}: agent.enabled"
        fd = fds.add(ListenUnix(fds.next_fd, "agent"))
        port = {
            "driver": "virtserialport",
            "id": "agent-port",
            "bus": "agent.0",
            "chardev": "agent",
            "name": AGENT_PORT,
        }
        found += ["-chardev", f"socket,id=agent,fd={fd},server=on,wait=off"]
        found += _pci(caps, key, identity, "agent", "virtio-serial-pci", max_ports=2) + device_args(caps, key, port)
    if guest.pvpanic.enabled:
        found += _pci(caps, f"guest {name}: pvpanic.enabled", identity, "pvpanic", "pvpanic-pci")
    if guest.watchdog.model == "i6300esb":
        found += _pci(caps, f"guest {name}: watchdog.model", identity, "watchdog", "i6300esb")
    elif guest.watchdog.model:
        found += device_args(caps, f"guest {name}: watchdog.model", {"driver": guest.watchdog.model, "id": "watchdog"})
    if guest.sound.model:
        found += _sound(name, guest.sound.model, identity, caps)
    if guest.usb.tablet:
        tablet = {"driver": "usb-tablet", "id": "tablet", "bus": "usb.0"}
        found += device_args(caps, f"guest {name}: usb.tablet", tablet)
    return found


def _sound(name: str, model: str, identity: Identity, caps: Capabilities) -> list[str]:
    """A card whose sound goes nowhere: a guest that wants one finds it."""
    key = f"guest {name}: sound.model"
    found = ["-audiodev", to_json({"driver": "none", "id": "sound-out"})]
    if model != "hda":
        return found + _pci(caps, key, identity, "sound", _SOUND[model], audiodev="sound-out")
    codec = {"driver": "hda-duplex", "id": "sound-codec", "bus": "sound.0", "audiodev": "sound-out"}
    return found + _pci(caps, key, identity, "sound", _SOUND[model]) + device_args(caps, key, codec)


def _rng(name: str, guest: Guest, identity: Identity, caps: Capabilities) -> list[str]:
    key = f"guest {name}: rng.source"
    source: dict[str, object] = {"qom-type": "rng-builtin", "id": "rng-source"}
    if guest.rng.source != "builtin":
        source = {"qom-type": "rng-random", "id": "rng-source", "filename": guest.rng.source}
    if source["qom-type"] not in caps.object_types:
        raise NotSupported(f"{key}: this QEMU {caps.version_text} has no {source['qom-type']}")
    return ["-object", to_json(source), *_pci(caps, key, identity, "rng", "virtio-rng-pci", rng="rng-source")]


def _pci(caps: Capabilities, key: str, identity: Identity, device: str, driver: str, **properties: object) -> list[str]:
    """A device in the slot its identity gives it."""
    place = {"bus": defaults.root_bus(identity.machine), "addr": identity.slots[device]}
    return device_args(caps, key, {"driver": driver, "id": device, **place, **properties})
