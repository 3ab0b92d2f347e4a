"""The Linux guest of kvmd's tests: Debian's cloud kernel with a busybox initramfs, and a boot sector for cheap guests.

Built once into the cache (KVMD_CACHE, default /var/cache/kvmd-test) by `scripts/setup guest`; `guest_kernel()` only
returns paths afterwards. Standard library only: setup runs this with the distribution's Python before any
environment exists (`python3 -m tests.rig.guestimage`). What the guest says and understands is in tests/rig/guest/init.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

SOURCES = Path(__file__).resolve().parent / "guest"
BUSYBOX = Path("/usr/bin/busybox")
PROGRAMS = ("memactor", "loadmodules")

# In loading order; each one's own dependencies are put before it.
MODULES = (
    "virtio_pci",
    "virtio_balloon",
    "virtio_net",
    "virtio_blk",
    "virtio_console",
    "virtio-rng",
    "evdev",
    "button",
    "pvpanic-pci",
    # The cloud kernel has no ahci: a cdrom is reached by virtio-scsi.
    "virtio_scsi",
    "ata_piix",
    "sd_mod",
    "sr_mod",
    "isofs",
)


def cache() -> Path:
    """The directory outside git where everything built or downloaded for the tests is kept."""
    return Path(os.environ.get("KVMD_CACHE", "/var/cache/kvmd-test"))


def kernel_tree() -> Path:
    """The unpacked linux-image package: boot/vmlinuz-VERSION and lib/modules/VERSION with modules.dep."""
    return cache() / "kernel"


def kernel_image() -> Path:
    """The newest vmlinuz of the unpacked package; FileNotFoundError with the remedy when there is none."""
    images = sorted(kernel_tree().glob("boot/vmlinuz-*"))
    if not images:
        raise FileNotFoundError(f"no guest kernel in {kernel_tree()}: run scripts/setup guest as root")
    return images[-1]


def guest_kernel() -> tuple[Path, Path]:
    """(vmlinuz, initramfs), plain files owned by whoever ran setup; builds the initramfs when its sources changed."""
    kernel = kernel_image()
    initrd = cache() / "guest" / f"initrd-{_inputs_hash(kernel)}.cpio"
    if not initrd.exists():
        _build(kernel, initrd)
    return kernel, initrd


def bitmap(width: int, height: int, colour: tuple[int, int, int]) -> bytes:
    """A BMP of one colour (red, green, blue), 24 bits a pixel, as SeaBIOS takes it for a splash picture."""
    row = bytes(reversed(colour)) * width
    rows = row.ljust(-(-len(row) // 4) * 4, b"\0") * height
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, len(rows), 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(rows), 0, 0, 14 + len(header)) + header + rows


def bootsector(
    path: Path, text: str = "hello from a boot sector\n", *, then: Literal["halt", "reboot", "poweroff"] = "halt"
) -> Path:
    """Write a 1 MiB raw image whose boot sector prints `text` (ASCII, at most 400 bytes) to COM1, then halts.

    "reboot" pulses the keyboard controller's reset line, "poweroff" writes SLP_EN to the PM1a control register where
    SeaBIOS puts it on pc and q35 (0x604). Runs in real mode, so it also runs where KVM cannot boot Linux.
    """
    message = text.encode("ascii")
    if len(message) > 400 or b"\0" in message:
        raise ValueError("the text must be at most 400 ASCII bytes without NUL")
    ending = {
        "halt": b"",
        "reboot": bytes.fromhex("b0fe e664"),  # mov al,0xfe; out 0x64,al
        "poweroff": bytes.fromhex("ba0406 b80020 ef"),  # mov dx,0x604; mov ax,0x2000; out dx,ax
    }[then]
    head = bytes.fromhex("fa 31c0 8ed8")  # cli; xor ax,ax; mov ds,ax
    loop = bytes.fromhex(
        "ac 84c0 7411"  # next: lodsb; test al,al; jz done
        "88c4 bafd03"  # mov ah,al; mov dx,0x3fd
        "ec a820 74fb"  # wait: in al,dx; test al,0x20; jz wait
        "88e0 baf803 ee"  # mov al,ah; mov dx,0x3f8; out dx,al
        "ebe8"  # jmp next
    )
    loop = loop[:4] + bytes([len(loop) - 5]) + loop[5:-1] + bytes([256 - len(loop)])
    stop = bytes.fromhex("f4 ebfd")  # hlt; jmp to the hlt
    address = 0x7C00 + len(head) + 3 + len(loop) + len(ending) + len(stop)
    code = head + b"\xbe" + address.to_bytes(2, "little") + loop + ending + stop + message + b"\0"
    with path.open("wb") as image:
        image.write(code.ljust(510, b"\0") + b"\x55\xaa")
        image.truncate(1024 * 1024)
    return path


def _inputs_hash(kernel: Path) -> str:
    digest = hashlib.sha256(kernel.name.encode())
    for source in (*sorted(SOURCES.iterdir()), Path(__file__), BUSYBOX):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _module_files(modules_dir: Path) -> Iterator[Path]:
    """Relative paths below modules_dir, dependencies first, each once."""
    needs: dict[str, tuple[str, list[str]]] = {}
    for line in (modules_dir / "modules.dep").read_text().splitlines():
        path, _, listed = line.partition(":")
        needs[Path(path).name.partition(".")[0]] = (path, listed.split())
    seen: set[str] = set()
    for module in MODULES:
        if module not in needs:
            raise LookupError(f"module {module} is not in {modules_dir}")
        path, dependencies = needs[module]
        # modules.dep lists the nearest dependency first; insmod wants the farthest first.
        for name in (*reversed(dependencies), path):
            if name not in seen:
                seen.add(name)
                yield Path(name)


def _copy_module(source: Path, target: Path) -> None:
    unpack = {".ko": None, ".xz": "xz", ".zst": "zstd", ".gz": "gzip"}[source.suffix]
    if unpack is None:
        shutil.copyfile(source, target)
        return
    with target.open("wb") as out:
        subprocess.run([unpack, "-dc", str(source)], stdout=out, check=True)


def _populate(root: Path, kernel: Path) -> None:
    for directory in ("bin", "sbin", "dev", "proc", "sys", "run", "root", "tmp", "etc/acpi/PWRF", "modules"):
        (root / directory).mkdir(parents=True)
    shutil.copyfile(BUSYBOX, root / "bin/busybox")
    listed = subprocess.run([str(BUSYBOX), "--list"], capture_output=True, text=True, check=True).stdout
    for applet in listed.split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    shutil.copyfile(SOURCES / "init", root / "init")
    shutil.copyfile(SOURCES / "udhcpc.script", root / "etc/udhcpc.script")
    shutil.copyfile(SOURCES / "powerbutton", root / "etc/acpi/PWRF/00000080")
    for program in PROGRAMS:
        source, binary = SOURCES / f"{program}.c", root / "bin" / program
        subprocess.run(["gcc", "-static", "-O2", "-Wall", "-Werror", "-s", "-o", binary, source], check=True)
    for script in ("init", "etc/udhcpc.script", "etc/acpi/PWRF/00000080", "bin/busybox"):
        (root / script).chmod(0o755)
    modules_dir = kernel_tree() / "lib/modules" / kernel.name.removeprefix("vmlinuz-")
    order = []
    for module in _module_files(modules_dir):
        name = module.name.partition(".ko")[0] + ".ko"
        _copy_module(modules_dir / module, root / "modules" / name)
        order.append(name)
    (root / "modules/order").write_text("".join(f"{name}\n" for name in order))


def _build(kernel: Path, initrd: Path) -> None:
    """Pack the initramfs reproducibly (sorted names, root's ids, epoch times) and put it in place by one rename."""
    initrd.parent.mkdir(parents=True, exist_ok=True)
    with (initrd.parent / "lock").open("w") as lock, tempfile.TemporaryDirectory(dir=initrd.parent) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if initrd.exists():
            return
        root = Path(scratch) / "root"
        root.mkdir()
        _populate(root, kernel)
        paths = sorted(root.rglob("*"))
        for path in paths:
            os.utime(path, (0, 0), follow_symlinks=False)
        names = "\0".join(str(path.relative_to(root)) for path in paths)
        packed = Path(scratch) / "initrd"
        with packed.open("wb") as out:
            subprocess.run(
                ["cpio", "-0", "-o", "-H", "newc", "--reproducible", "-R", "0:0", "--quiet"],
                input=names.encode(),
                stdout=out,
                cwd=root,
                check=True,
            )
        packed.chmod(0o644)
        for old in initrd.parent.glob("initrd-*.cpio"):
            old.unlink()
        packed.rename(initrd)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    kernel, initrd = guest_kernel()
    print(f"{kernel}\n{initrd}")


if __name__ == "__main__":
    main()
