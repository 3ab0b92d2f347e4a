"""The device tables of a guest file: disks, NICs, display, serial ports and the small ones."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from kvmd.config.key import Table, key, later, not_yet, quote
from kvmd.config.pci import PciFunction, PoolName
from kvmd.config.scalars import (
    DiskSerial,
    GuestName,
    Hostfwd,
    Interface,
    Ipv4,
    Ipv4Network,
    Ipv6,
    KeyboardLayout,
    Mac,
    Path,
    PciAddress,
    PositiveSize,
    QemuWord,
    RateT,
    RtcBase,
    TableName,
    Vlan,
)

_BLOCK_FORMATS_LATER = ("vmdk", "vdi", "vhdx", "vpc", "qed", "luks")
_INTERFACES_LATER = ("mtd", "pflash")


def _unix_only(value: object) -> object:
    """Any address is a later capability, not a wrong value."""
    if isinstance(value, str) and value != "unix":
        raise not_yet(quote(value))
    return value


class DiskEncryption(Table):
    """[disk.NAME.encryption]"""

    key_file: None = later("absolute path", "File with the passphrase.", mark="!")


class Disk(Table):
    """[disk.NAME]"""

    file: Path = key(..., "Image or block device.", mark="!", classic="-drive file=", example='"/srv/vm/web.qcow2"')
    format: Literal["raw", "qcow2"] = key(
        ...,
        "Never guessed: a guest could write another format's header.",
        mark="!",
        classic="format=",
        example='"qcow2"',
        later_values=_BLOCK_FORMATS_LATER,
    )
    size: None = later("size", "With `from`: size of the image to make.", mark="~")
    from_: None = later("text", "Image to make the disk from.", alias="from")
    interface: Literal["virtio", "scsi", "ide", "sata", "nvme", "usb", "floppy", "sd"] = key(
        "virtio",
        'The device; media = "cdrom" has the machine\'s own controller instead of virtio.',
        mark="!",
        classic="if=",
        later_values=_INTERFACES_LATER,
    )
    bus: int | None = key(
        None,
        "Bus of the interface; absent: kept from the first start.",
        mark="!",
        classic="bus=",
        ge=0,
        le=255,
        example="0",
    )
    unit: int | None = key(
        None, "Unit, port or SCSI target on the bus.", mark="!", classic="unit=", ge=0, le=255, example="1"
    )
    index: int | None = key(
        None,
        "Bus and unit in one: bus x units per bus + unit, two units on ide, seven on scsi.",
        mark="!",
        classic="index=",
        ge=0,
        le=255,
        example="2",
    )
    media: Literal["disk", "cdrom"] = key("disk", "A CD is read-only.", mark="!", classic="media=")
    snapshot: Literal[False] = key(
        False, "Write to a temporary overlay.", mark="!", classic="snapshot=on", later_values=(True,)
    )
    cache: Literal["none", "writeback", "writethrough", "directsync", "unsafe"] | None = key(
        None,
        "Host page cache and flushes.",
        mark="!",
        classic="cache=",
        default_text="none where O_DIRECT works, else writeback",
        example='"none"',
    )
    aio: Literal["threads", "native", "io_uring"] | None = key(
        None,
        "How QEMU does I/O.",
        mark="!",
        classic="aio=",
        default_text="native with direct cache, else threads",
        example='"native"',
    )
    readonly: bool = key(False, "The guest cannot write.", mark="!", classic="readonly=on")
    serial: DiskSerial | None = key(
        None, "Serial number the guest sees, at most 20 bytes.", mark="!", classic="serial="
    )
    pci_address: PciAddress | None = key(None, "Slot and function.", mark="!", classic="addr=")
    discard: Literal["ignore", "unmap"] = key(
        "ignore", "Whether the guest's discards free space.", mark="!", classic="discard="
    )
    detect_zeroes: Literal["off", "on", "unmap"] = key(
        "off", "Turn writes of zeroes into holes.", mark="!", classic="detect-zeroes="
    )
    iothread: TableName | None = key(
        None,
        "Name of an I/O thread of the guest's own; disks that name the same one share it.",
        mark="!",
        classic="iothread=",
        example='"fast"',
    )
    queues: int | None = key(
        None,
        "Request queues, at most one per vCPU.",
        mark="!",
        classic="num-queues=",
        ge=1,
        le=256,
        example="4",
        default_text="QEMU's, one per vCPU",
    )
    throttle: None = later("table", "Limits of rate.", mark="~", classic="bps= iops=")
    logical_block_size: Literal[512, 1024, 2048, 4096] | None = key(
        None, "Sector size the guest sees.", mark="!", unit="bytes", default_text="512", example="4096"
    )
    on_error: Literal["report", "ignore", "stop", "stop_enospc"] = key(
        "stop_enospc", "What an I/O error does.", mark="!", classic="werror= rerror="
    )
    backing: None = later("absolute path", "Backing image.", mark="!")
    shared: bool = key(
        False,
        "Other guests write to it too, and its file system knows how.",
        mark="!",
        classic="share-rw=",
        example="true",
    )
    encryption: DiskEncryption | None = key(None, "Encrypted image.", mark="!")

    @property
    def writable(self) -> bool:
        """Whether the guest may write to it."""
        return not self.readonly and self.media == "disk"


class Nic(Table):
    """[nic.NAME]"""

    network: GuestName | None = key(
        None, "networks.d/NETWORK.toml to be plugged into.", mark="!", classic="-net tap", example='"lan"'
    )
    type: Literal["user", "tap", "bridge", "vf"] | None = key(
        None,
        'Instead of `network`: "user" is NAT inside QEMU, "tap" a TAP that a script, helper or you plug in, "bridge" a'
        ' port of `br`, "vf" a virtual function of a NIC of the host.',
        mark="!",
        classic="-net user",
        example='"user"',
        later_values=("hub", "macvtap", "vhost-user", "passt"),
    )
    hub: None = later("number", "Hub inside the guest's QEMU.", classic="-net vlan=")
    model: QemuWord = key("virtio", "The device.", mark="!", classic="-net nic,model=", needs="device of that name")
    mac: Mac | None = key(None, "Absent: made from the guest's uuid and NAME.", mark="!", classic="macaddr=")
    pci_address: PciAddress | None = key(None, "Slot and function.", mark="!", classic="addr=")
    vectors: int | None = key(
        None,
        "MSI-X vectors; 0: none, the card interrupts by a pin.",
        mark="!",
        classic="vectors=",
        ge=0,
        le=2048,
        example="4",
        default_text="2 a queue pair and 2, of a card with several; else QEMU's",
    )
    mtu: int | None = key(
        None,
        "MTU told to the guest.",
        mark="!",
        unit="bytes",
        needs="virtio-net host_mtu",
        ge=68,
        le=65535,
        example="1500",
        default_text="the network's",
    )
    queues: int = key(1, "Queue pairs, at most one per vCPU.", mark="!", classic="queues=", ge=1, le=256)
    vlan: Vlan | None = key(
        None,
        'Access port: this VLAN, without a tag. With type = "vf" the card of the host tags.',
        mark="~",
        classic="ip link set PF vf N vlan",
        example="10",
    )
    vlans: tuple[Vlan, ...] = key((), "Trunk port: these VLANs, with tags.", mark="~", example="[10, 20]")
    native_vlan: Vlan | None = key(None, "Of a trunk: this VLAN besides, without a tag.", mark="~", example="5")
    ipv4: Ipv4 | None = key(None, "The DHCP reservation and the DNS name's address.", mark="~")
    ipv6: Ipv6 | None = key(None, "As ipv4: the DHCPv6 reservation and the name's address.", mark="~")
    link: bool = key(True, "Cable plugged in.", mark="~")
    rate_in: RateT | None = key(None, "Limit of what reaches the guest.", mark="~")
    rate_out: RateT | None = key(None, "Limit of what leaves it; what is beyond is dropped.", mark="~")
    guard: bool = key(
        False,
        "No foreign MAC, VLAN or address leaves this port, no DHCP server's answer, no router advertisement.",
        mark="~",
    )
    boot_index: None = later("number", "Use boot.order.", classic="bootindex=")
    net: Ipv4Network | None = key(
        None, 'type = "user": the subnet.', mark="!", classic="-net user,net=", default_text="10.0.2.0/24"
    )
    dns: Ipv4 | None = key(None, 'type = "user": address of the name server.', mark="!", classic="-net user,dns=")
    hostfwd: tuple[Hostfwd, ...] = key(
        (),
        'type = "user": ports of the host that lead into the guest.',
        mark="!",
        classic="-net user,hostfwd=",
        example='["tcp:127.0.0.1:8080-:80"]',
    )
    tftp: None = later("absolute path", 'type = "user": built-in TFTP server.', mark="!", classic="-net user,tftp=")
    restrict: bool = key(False, 'type = "user": no way out of the guest.', mark="!", classic="-net user,restrict=")
    br: Interface | None = key(
        None,
        'type = "bridge": the bridge to be plugged into; type = "tap": what `helper` is told.',
        mark="!",
        classic="-net bridge,br=",
        example='"br0"',
        default_text="br0",
    )
    ifname: Interface | None = key(
        None,
        'type = "tap": the TAP\'s name. One that is there and free is used as it is; else it is made.',
        mark="!",
        classic="-net tap,ifname=",
        example='"tap7"',
        default_text="a name of kvmd's",
    )
    fd: int | None = key(None, "Refused: a number means nothing to a daemon.", mark="!", classic="-net tap,fd=")
    script: Path | None = key(
        None,
        "type = \"tap\": program of root's that kvmd runs with the TAP's name once it is there.",
        mark="!",
        classic="-net tap,script=",
        example='"/etc/qemu-ifup"',
    )
    downscript: Path | None = key(
        None,
        'type = "tap": the same once the guest has ended, however it did.',
        mark="!",
        classic="-net tap,downscript=",
        example='"/etc/qemu-ifdown"',
    )
    helper: Path | None = key(
        None,
        'type = "tap" or "bridge": program of root\'s that makes the TAP, as qemu-bridge-helper does.',
        mark="!",
        classic="-net tap,helper=",
        example='"/usr/lib/qemu/qemu-bridge-helper"',
    )
    sndbuf: PositiveSize | None = key(
        None,
        "Of the TAP: what a guest may have on its way out before it has to wait.",
        mark="!",
        classic="-net tap,sndbuf=",
        example='"1MiB"',
        default_text="no limit",
    )
    vnet_hdr: bool = key(
        True, 'type = "tap": offloads pass between guest and host.', mark="!", classic="-net tap,vnet_hdr="
    )
    vhost: bool | None = key(
        None,
        "The kernel moves the packets instead of QEMU; true: or the guest does not start.",
        mark="!",
        classic="-net tap,vhost=",
        default_text="where /dev/vhost-net and a virtio card are there",
        example="true",
    )
    vhostfd: int | None = key(None, "Refused, as fd.", mark="!", classic="-net tap,vhostfd=")
    vhostforce: bool = key(
        False, "vhost also for a guest whose card has no MSI-X vectors.", mark="!", classic="-net tap,vhostforce="
    )
    interface: None = later("interface name", 'type = "macvtap": the NIC below.', mark="!")
    macvtap_mode: None = later("text", 'type = "macvtap".', mark="!")
    pool: PoolName | None = key(
        None,
        'type = "vf": the NIC whose free virtual function is taken, [sriov.POOL] in host.toml.',
        mark="!",
        example='"enp59s0f0"',
    )
    pci: PciFunction | None = key(
        None,
        'type = "vf": this virtual function instead of a pool\'s; it must be in passthrough.allow.',
        mark="!",
        example='"0000:3b:02.1"',
    )

    @property
    def has_tap(self) -> bool:
        """Whether a TAP of the host is its other end."""
        return self.network is not None or self.type in ("tap", "bridge")


class Hostdev(Table):
    """[hostdev.NAME]"""

    pci: PciFunction | None = key(
        None,
        "Function of the host, which must be in passthrough.allow of host.toml.",
        mark="!",
        classic="-device vfio-pci,host=",
        needs="vfio-pci",
        example='"0000:3b:00.0"',
    )
    usb: None = later("text", "USB device of the host.", mark="~", classic="-usbdevice host:")
    mdev: None = later("UUID", "Mediated device.", mark="~")
    rom: None = later("absolute path", "Option ROM.", mark="~", classic="romfile=")
    boot_index: None = later("number", "Use boot.order.", classic="bootindex=")


class Display(Table):
    """[display]"""

    type: Literal["none", "vnc"] = key("none", "Graphical console.", mark="!", classic="-vnc", later_values=("spice",))
    listen: Annotated[Literal["unix"], BeforeValidator(_unix_only)] = key(
        "unix",
        "Where it listens: a socket in the guest's run directory.",
        mark="!",
        classic="-vnc",
        later_values=("ADDRESS:DISPLAY",),
    )
    password_file: None = later("absolute path", "Password, never on a command line.", mark="~")
    tls: None = later("table", "Certificates.", mark="!")
    websocket: None = later("number", "Port for browsers.", mark="!")
    keyboard: KeyboardLayout | None = key(
        None, "Keyboard layout of viewers that send no key codes.", mark="!", classic="-k", example='"de"'
    )


class Video(Table):
    """[video]"""

    model: Literal["std", "virtio", "cirrus", "qxl", "vmware", "bochs", "ramfb", "none"] | None = key(
        None,
        "Graphics card.",
        mark="!",
        classic="-vga",
        default_text="std with a display, else none",
        example='"virtio"',
    )
    memory: PositiveSize | None = key(
        None,
        "Of the graphics card; not of virtio and ramfb.",
        mark="!",
        unit="bytes",
        classic="-global VGA.vgamem_mb=",
        default_text="QEMU's, 16 MiB for most",
        example='"32MiB"',
    )


class Serial(Table):
    """[serial.NAME]"""

    type: Literal["unix"] = key(
        "unix",
        "A socket in the guest's run directory.",
        mark="!",
        classic="-serial",
        later_values=("pty", "tcp", "file", "stdio", "telnet"),
    )
    log: bool = key(True, "Keep what the guest writes in the log directory.", mark="!")


class Console(Table):
    """[console.NAME]"""

    type: None = later("text", "A virtio console port.", mark="!", classic="-device virtconsole")
    log: None = later("boolean", "Keep what the guest writes.")


class Agent(Table):
    """[agent]"""

    enabled: bool = key(False, "Channel of the QEMU guest agent.", mark="!", classic="-chardev", example="true")


class Rng(Table):
    """[rng]"""

    source: Literal["builtin", "/dev/urandom"] | None = key(
        None,
        "Randomness for the guest; absent: no device.",
        mark="!",
        classic="-device virtio-rng-pci",
        example='"builtin"',
        later_values=("/dev/random", "/dev/hwrng", "egd"),
    )


class Watchdog(Table):
    """[watchdog]"""

    model: Literal["i6300esb", "ib700"] | None = key(
        None, "Watchdog device; absent: none.", mark="!", classic="-watchdog", example='"i6300esb"'
    )
    action: Literal["reset", "poweroff", "pause", "none", "inject-nmi"] = key(
        "reset", "What happens when the guest does not feed it in time.", mark="!", classic="-watchdog-action"
    )


class Rtc(Table):
    """[rtc]"""

    base: RtcBase | None = key(
        None,
        'Where the guest\'s clock begins: "utc", "localtime", or a date and time.',
        mark="!",
        classic="-rtc base=",
        default_text='utc; localtime with machine.os = "windows"',
        example='"utc"',
    )
    clock: Literal["host", "rt", "vm"] = key(
        "host",
        "What it runs on: the host's clock with its corrections, without them, or guest time.",
        mark="!",
        classic="-rtc clock=",
    )


class Vsock(Table):
    """[vsock]"""

    cid: None = later("number", "Context id.", mark="!", classic="-device vhost-vsock-pci")


class Sound(Table):
    """[sound]"""

    model: Literal["hda", "ac97", "es1370"] | None = key(
        None, "Sound card, which nobody hears; absent: none.", mark="!", classic="-soundhw", example='"hda"'
    )


class Usb(Table):
    """[usb]"""

    controller: Literal["xhci", "none"] | None = key(
        None,
        "USB controller.",
        mark="!",
        classic="-usb",
        default_text="xhci where a device needs one, else none",
        example='"xhci"',
    )
    tablet: bool = key(
        False, "A pointer that follows a viewer's mouse exactly.", mark="!", classic="-usbdevice tablet", example="true"
    )


class Pvpanic(Table):
    """[pvpanic]"""

    enabled: bool = key(False, "The guest's kernel reports its panics.", mark="!", needs="pvpanic-pci", example="true")


class Hyperv(Table):
    """[hyperv]"""

    enabled: bool | None = key(
        None,
        "What makes Windows faster under KVM (QEMU's hv-* features).",
        mark="!",
        classic="-cpu hv_*",
        default_text='true with machine.os = "windows"',
        example="true",
    )


class Share(Table):
    """[share.NAME]"""

    source: None = later("absolute path", "Directory of the host.", mark="!", classic="-virtfs")
    tag: None = later("text", "What the guest mounts.", mark="!")
    readonly: None = later("boolean", "The guest cannot write.", mark="!")


class CloudInit(Table):
    """[cloud_init]"""

    user_data_file: None = later("absolute path", "User data.")
    meta_data: None = later("table", "Meta data.")
    network_config_file: None = later("absolute path", "Network configuration.")
    ssh_keys: None = later("list of text", "Public keys.")
    hostname: None = later("text", "Name inside the guest.")
