"""argv of everything small: monitors, serial ports, display, balloon, randomness, agent channel, panic notifier."""

from __future__ import annotations

from kvmd.config.guest import Guest
from kvmd.errors import NotSupported, Refused
from kvmd.qemu import defaults
from kvmd.qemu.caps import Capabilities
from kvmd.qemu.fds import FdTable, ListenUnix, Memfd, OpenLog
from kvmd.qemu.identity import Identity
from kvmd.qemu.text import device_args, double, to_json
from kvmd.unixpath import PATH_BYTES

MONITORS = ("qmp", "rescue")  # kvmd's own, and one for people and for a host without kvmd
ISA_SERIAL_PORTS = 4  # COM1 to COM4 (hw/char/serial-isa.c, MAX_ISA_SERIAL_PORTS)
AGENT_PORT = "org.qemu.guest_agent.0"  # the name qemu-ga looks for
_VIDEO = {"std": "VGA", "virtio": "virtio-vga"}


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
    model = defaults.video_model(guest)
    if model != "none":
        found += _pci(caps, f"guest {name}: video.model", identity, "video", _VIDEO[model])
    return found


def kernel(guest: Guest, fds: FdTable) -> list[str]:
    """Direct boot of a Linux kernel from copies in memory: the guest's uid need not reach the files."""
    found: list[str] = []
    for option, purpose, path in (("-kernel", "kernel", guest.boot.kernel), ("-initrd", "initrd", guest.boot.initrd)):
        if path is not None:
            fd = fds.add(Memfd(fds.next_fd, path, purpose))
            found += [option, f"/proc/self/fd/{fd}"]
    if guest.boot.kernel is not None and guest.boot.cmdline:
        # A leading space is nothing to Linux, and no argument of a file's begins with a dash.
        found += ["-append", " " * guest.boot.cmdline.startswith("-") + guest.boot.cmdline]
    return found


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
    return found


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
