"""Guest files for tests: a Linux guest of the rig's kernel, and a boot sector that costs next to nothing."""

from __future__ import annotations

from pathlib import Path

from tests.rig.guestimage import bootsector, guest_kernel
from tests.rig.kvmdhost import KvmdHost

LAN = """
[network]
mode = "nat"
bridge = "kvlan"
[ipv4]
address = "192.168.50.1/24"
[ipv4.dhcp]
range = ["192.168.50.100", "192.168.50.200"]
[dns]
domain = "lan.test"
"""


def linux(
    role: str,
    *,
    size: str = "224MiB",
    network: str | None = "lan",
    memory: str = "",
    extra: str = "",
    cmdline: str = "",
) -> str:
    """A Linux guest: one vCPU under TCG, a console with a log, one NIC on `network` (None: none)."""
    kernel, initrd = guest_kernel()
    nic = f'[nic.lan]\nnetwork = "{network}"\n' if network else ""
    return f"""
[machine]
accel = "tcg"
default_nic = false
[memory]
size = "{size}"
{memory}
[boot]
kernel = "{kernel}"
initrd = "{initrd}"
cmdline = "console=ttyS0 quiet kvmd.role={role} {cmdline}"
[serial.console]
log = true
{nic}
{extra}
"""


def tiny(host: KvmdHost, name: str, *, size: str = "32MiB", memory: str = "", extra: str = "") -> str:
    """A guest that is one boot sector: prints "NAME is up" on the console and halts. Its image is made."""
    image = bootsector(host.images / f"{name}.img", f"{name} is up\n")
    return tiny_on(image, size=size, memory=memory, extra=extra)


def tiny_on(image: Path, *, size: str = "32MiB", memory: str = "", extra: str = "") -> str:
    """The same on an image that exists."""
    return f"""
[machine]
accel = "tcg"
default_nic = false
[memory]
size = "{size}"
{memory}
[disk.root]
file = "{image}"
format = "raw"
cache = "writeback"
[serial.console]
log = true
{extra}
"""
