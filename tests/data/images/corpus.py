"""Evil disk images, byte for byte what an attacker could leave on a disk; no tool is needed to make them.

`EVIL` maps a name to (bytes, part of the message that must refuse it when declared qcow2). `SECRET` is the content
of a canary file: it must never come out anywhere.
"""

from __future__ import annotations

import struct

from kvmd.qemu.imageheader import empty_qcow2

SECRET = b"canary-6b1f-never-to-be-seen"
CANARY = "/tmp/kvmd-canary"
MIB = 1 << 20

# Field name -> (offset, struct format): QEMU docs/interop/qcow2.txt
FIELDS = {
    "version": (4, ">I"),
    "backing_file_offset": (8, ">Q"),
    "backing_file_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "crypt_method": (32, ">I"),
    "l1_size": (36, ">I"),
    "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"),
    "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible_features": (72, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
}


def qcow2(*, disk_bytes: int = 16 * MIB, **fields: int) -> bytes:
    """A sound image with some header fields overwritten."""
    image = bytearray(empty_qcow2(disk_bytes))
    for name, value in fields.items():
        offset, form = FIELDS[name]
        struct.pack_into(form, image, offset, value)
    return bytes(image)


def with_backing(name: bytes, **fields: int) -> bytes:
    """An image whose header names a backing file."""
    image = bytearray(qcow2(backing_file_offset=512, backing_file_size=len(name), **fields))
    image[512 : 512 + len(name)] = name
    return bytes(image)


def with_extension(kind: int, length: int, content: bytes = b"", **fields: int) -> bytes:
    """An image with one header extension that claims `length` bytes."""
    image = bytearray(qcow2(**fields))
    struct.pack_into(">II", image, 104, kind, length)
    image[112 : 112 + len(content)] = content
    return bytes(image)


def vdi() -> bytes:
    return b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe" + bytes(4096)


EVIL: dict[str, tuple[bytes, str]] = {
    "backing-file": (with_backing(CANARY.encode()), "backing file"),
    "backing-nbd": (with_backing(b"nbd://192.0.2.1:10809/x"), "backing file"),
    "backing-json": (with_backing(b'json:{"driver":"ssh","host":"192.0.2.1"}'), "backing file"),
    "backing-terminal": (with_backing(b"\x1b[2J\x07/etc/shadow"), r"\x1b[2J"),
    "backing-name-too-long": (qcow2(backing_file_offset=512, backing_file_size=1024), "where it cannot be"),
    "backing-name-in-header": (qcow2(backing_file_offset=8, backing_file_size=16), "where it cannot be"),
    "backing-name-outside": (qcow2(backing_file_offset=1 << 62, backing_file_size=16), "where it cannot be"),
    "data-file": (
        with_extension(0x44415441, len(CANARY), CANARY.encode(), incompatible_features=4),
        "external file",
    ),
    "data-file-without-bit": (with_extension(0x44415441, len(CANARY), CANARY.encode()), "external data file"),
    "extension-endless": (with_extension(0x6803F857, 0xFFFFFFF8), "longer than its place"),
    "one-exbibyte": (qcow2(size=1 << 60), "64TiB"),
    "size-all-ones": (qcow2(size=(1 << 64) - 1), "64TiB"),
    "header-length-huge": (qcow2(header_length=0xFFFFFFFF), "header of 4294967295 bytes"),
    "header-length-tiny": (qcow2(header_length=8), "header of 8 bytes"),
    "l1-overflow": (qcow2(l1_size=0xFFFFFFFF), "L1 table of 4294967295 entries"),
    "l1-too-small": (qcow2(disk_bytes=1 << 40, l1_size=1), "needs 2048"),
    "l1-offset-outside": (qcow2(l1_table_offset=1 << 63), "L1 table at byte"),
    "l1-on-the-header": (qcow2(l1_table_offset=0), "L1 table at byte"),
    "l1-unaligned": (qcow2(l1_table_offset=(3 << 16) + 8), "L1 table at byte"),
    "cluster-bits-0": (qcow2(cluster_bits=0), "2^0 bytes"),
    "cluster-bits-63": (qcow2(cluster_bits=63), "2^63 bytes"),
    "refcount-table-none": (qcow2(refcount_table_clusters=0), "reference count table of 0 bytes"),
    "refcount-table-huge": (qcow2(refcount_table_clusters=0xFFFFFFFF), "reference count table of"),
    "refcount-order": (qcow2(refcount_order=64), "2^64 bits"),
    "snapshots-many": (qcow2(nb_snapshots=0xFFFFFFFF), "4294967295 snapshots"),
    "snapshots-outside": (qcow2(nb_snapshots=1, snapshots_offset=1 << 40), "snapshot table at byte"),
    "truncated-72": (qcow2()[:71], "after 71 bytes"),
    "truncated-104": (qcow2()[:103], "after 103 bytes"),
    "truncated-tables": (qcow2()[: 3 << 16], "L1 table at byte"),
    "magic-only": (b"QFI\xfb", "after 4 bytes"),
    "version-99": (qcow2(version=99), "version 99"),
    "version-1": (qcow2(version=1), "a qcow image"),
    "corrupt-bit": (qcow2(incompatible_features=2), "marked corrupt"),
    "unknown-feature": (qcow2(incompatible_features=1 << 40), "0x10000000000"),
    "encrypted-aes": (qcow2(crypt_method=1), "AES"),
    "encrypted-luks": (qcow2(crypt_method=2), "LUKS"),
    "luks": (b"LUKS\xba\xbe\x00\x01".ljust(4096, b"\0"), "no qcow2 header"),
    "vmdk": (b"KDMV".ljust(4096, b"\0"), "a vmdk image"),
    "vmdk-descriptor": (b'# Disk DescriptorFile\nversion=1\nRW 1 FLAT "/etc/shadow" 0\n', "a vmdk image"),
    "vhdx": (b"vhdxfile".ljust(4096, b"\0"), "a vhdx image"),
    "vhd": (b"conectix".ljust(4096, b"\0"), "a vhd image"),
    "qed": (b"QED\0".ljust(4096, b"\0"), "a qed image"),
    "vdi": (vdi(), "a vdi image"),
    "parallels": (b"WithoutFreeSpace".ljust(4096, b"\0"), "a parallels image"),
    "zeros": (bytes(4096), "no qcow2 header"),
    "nothing": (b"", "no qcow2 header"),
}
