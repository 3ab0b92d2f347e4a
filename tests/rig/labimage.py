"""Builds the root disk of the lab VM: the cached Debian tree with a kernel's modules, the harness's agent, the Python
environment, kvmd's wheels and the test guest. Standard library only; `scripts/setup lab` runs it.

The disk is a pristine raw image; each lab writes to a copy-on-write layer of its own. It lies on NVMe, whose driver is
built into Debian's cloud kernel, so the VM needs no initramfs. It has one partition, which the kernel command line can
name: where there is a second NVMe controller, which one is nvme0 is a race.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import time
from pathlib import Path

from tests.rig.guestimage import cache, guest_kernel, kernel_image, kernel_tree
from tests.rig.tree import tree_path

AGENT = Path(__file__).with_name("labagent.py")
OTHERS_KEPT_S = 24 * 3600.0
DISK_BYTES = 6 * 1024**3
PARTITION_AT = 1024**2
_DISK_ID = 0x6B766D64
# root= of the kernel command line.
ROOT = f"PARTUUID={_DISK_ID:08x}-01"

FILES = {
    "etc/hostname": "lab\n",
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 lab\n::1 localhost\n",
    "etc/resolv.conf": "nameserver 10.0.2.3\n",
    "etc/fstab": "/dev/disk/by-id/virtio-src /src ext4 nofail,x-systemd.device-timeout=600 0 0\n",
    # nested=0: the processor that TCG emulates has SVM, and not what a second level needs.
    "etc/modprobe.d/kvmd-lab.conf": "options kvm-amd nested=0\n",
    "etc/modules-load.d/kvmd-lab.conf": "virtio_console\n",
    # Patching the calls of KVM takes the emulated CPUs seconds, which need not hold up the rest of the boot.
    "etc/systemd/system/kvmd-lab-kvm.service": (
        "[Unit]\nDescription=KVM, as udev would load it\nDefaultDependencies=no\nBefore=kvmd.service\n\n"
        "[Service]\nType=oneshot\nExecStart=/sbin/modprobe -a kvm-amd vhost_net tun\nRemainAfterExit=yes\n"
    ),
    "etc/systemd/network/20-lab.network": "[Match]\nName=en* eth*\n\n[Network]\nDHCP=yes\nLinkLocalAddressing=no\n",
    # kvmd installs here without any index: everything it needs is beside it.
    "etc/pip.conf": "[global]\nno-index = true\nfind-links = /opt/kvmd-wheels\ndisable-pip-version-check = true\n",
    # Coldplug what the lab needs and not each of a hundred terminals and memory blocks: seconds under TCG.
    "etc/systemd/system/systemd-udev-trigger.service.d/lab.conf": (
        "[Service]\nExecStart=\n"
        "ExecStart=-udevadm trigger --type=subsystems --action=add\n"
        "ExecStart=-udevadm trigger --type=devices --action=add --subsystem-match=block --subsystem-match=net"
        " --subsystem-match=pci --subsystem-match=virtio --subsystem-match=virtio-ports --subsystem-match=misc"
        " --subsystem-match=nvme\n"
        "ExecStart=-udevadm trigger --type=devices --action=add --sysname-match=ttyS0\n"
    ),
    "etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=persistent\nSystemMaxUse=64M\n",
    "etc/systemd/system/serial-getty@ttyS0.service.d/lab.conf": (
        "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --noclear %I 115200 linux\n"
    ),
    "etc/systemd/system/kvmd-lab.service": (
        "[Unit]\nDescription=commands for the host of this lab\nDefaultDependencies=no\nAfter=local-fs.target\n\n"
        "[Service]\nExecStart=/usr/bin/python3 -I /usr/local/lib/kvmd-lab/agent.py\nRestart=always\n"
        "Environment=HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin\n"
        # What the harness starts is not the harness's: a restart of the agent must not end it.
        "KillMode=process\n\n[Install]\nWantedBy=multi-user.target\n"
    ),
}
LINKS = {
    "etc/systemd/system/multi-user.target.wants/kvmd-lab-kvm.service": "/etc/systemd/system/kvmd-lab-kvm.service",
    "etc/systemd/system/multi-user.target.wants/kvmd-lab.service": "/etc/systemd/system/kvmd-lab.service",
    "etc/systemd/system/multi-user.target.wants/systemd-networkd.service": (
        "/usr/lib/systemd/system/systemd-networkd.service"
    ),
    "etc/systemd/system/systemd-networkd-wait-online.service": "/dev/null",
    "etc/systemd/system/systemd-timesyncd.service": "/dev/null",
    "etc/systemd/system/systemd-pstore.service": "/dev/null",
    "etc/systemd/system/systemd-binfmt.service": "/dev/null",
    "etc/systemd/system/proc-sys-fs-binfmt_misc.automount": "/dev/null",
    "etc/systemd/system/systemd-udev-settle.service": "/dev/null",
}


def lab_disk() -> Path:
    """The pristine root disk, built when one of its parts changed (about 20 s). Needs root."""
    disk = cache() / "lab" / f"root-{_inputs_hash()}.img"
    if not disk.exists():
        _build(disk)
    disk.touch()
    return disk


def _inputs_hash() -> str:
    digest = hashlib.sha256(str(guest_kernel()).encode())
    for stamp in ("tree", "kernel", "wheels"):
        digest.update((cache() / "stamps" / stamp).read_bytes())
    digest.update(str((cache() / "venv").resolve()).encode())
    for source in (AGENT, Path(__file__)):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _populate(extra: Path) -> None:
    for name, content in FILES.items():
        (extra / name).parent.mkdir(parents=True, exist_ok=True)
        (extra / name).write_text(content)
    for name, target in LINKS.items():
        (extra / name).parent.mkdir(parents=True, exist_ok=True)
        (extra / name).symlink_to(target)
    (extra / "var/log/journal").mkdir(parents=True)
    (extra / "src").mkdir(parents=True)
    (extra / "usr/local/lib/kvmd-lab").mkdir(parents=True)
    shutil.copyfile(AGENT, extra / "usr/local/lib/kvmd-lab/agent.py")
    shutil.copytree(kernel_tree() / "lib/modules", extra / "usr/lib/modules", symlinks=True)
    shutil.copytree(cache() / "wheels", extra / "opt/kvmd-wheels")
    # The environment and the guest lie at the same paths as on the host, so the same code finds them.
    environment = (cache() / "venv").resolve()
    inside = extra / str(cache()).lstrip("/")
    shutil.copytree(environment, inside / environment.name, symlinks=True)
    (inside / "venv").symlink_to(environment.name)
    for image in guest_kernel():
        copy = inside / image.relative_to(cache())
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, copy)


def _build(disk: Path) -> None:
    scratch = disk.parent / "build"
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "root").mkdir(parents=True)
    extra = scratch / "extra"
    extra.mkdir()
    _populate(extra)
    # One overlay of two read-only layers, mounted where only this command sees it, saves copying the tree.
    script = (
        'mount -t overlay overlay -o "lowerdir=$1:$2" "$3/root" && '
        'mkfs.ext4 -q -F -L labroot -m 0 -E "offset=$5,lazy_itable_init=1,lazy_journal_init=1"'
        ' -d "$3/root" "$3/disk" "$4"'
    )
    size_kib = (DISK_BYTES - PARTITION_AT) // 1024
    arguments = [str(extra), str(tree_path()), str(scratch), f"{size_kib}k", str(PARTITION_AT)]
    subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script, "sh", *arguments], check=True
    )
    with (scratch / "disk").open("r+b") as image:
        image.truncate(DISK_BYTES)
        image.seek(440)
        image.write(_partition_table())
    # Other checkouts share the cache, and a lab of theirs opens its disk again when it reboots.
    for old in disk.parent.glob("root-*.img"):
        if old.stat().st_mtime < time.time() - OTHERS_KEPT_S:
            old.unlink()
    (scratch / "disk").rename(disk)
    shutil.rmtree(scratch)


def _partition_table() -> bytes:
    """What an MBR has from byte 440 on: the disk's id, and one Linux partition from PARTITION_AT to the end."""
    first, count = PARTITION_AT // 512, (DISK_BYTES - PARTITION_AT) // 512
    entry = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", first, count)
    return struct.pack("<IH", _DISK_ID, 0) + entry + bytes(48) + b"\x55\xaa"


def main() -> None:
    print(kernel_image(), lab_disk())


if __name__ == "__main__":
    main()
