"""What a disk image's first bytes say, judged before any QEMU sees them.

An image is untrusted: its header may name files of the host, claim any size, or lead a parser astray. `inspect`
takes the format the administrator declared, never the one the header suggests, and refuses what kvmd does not
want opened. Pure: bytes in, ImageInfo or Refused out.

Layout and limits of qcow2: QEMU docs/interop/qcow2.txt and block/qcow2.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from kvmd.errors import Refused
from kvmd.units import Size

HEADER_BYTES = 65536  # what `inspect` wants of a file: one default cluster holds header, extensions and name
MAX_VIRTUAL_BYTES = 64 << 40

_QCOW_MAGIC = b"QFI\xfb"
_V2_BYTES, _V3_BYTES = 72, 104
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")  # version 2: all of it; version 3: its beginning
_HEADER_V3 = struct.Struct(">QQQII")
_CLUSTER_BITS = range(9, 22)  # MIN_CLUSTER_BITS 9, MAX_CLUSTER_BITS 21
_MAX_L1_BYTES = 32 << 20  # QCOW_MAX_L1_SIZE
_MAX_REFTABLE_BYTES = 8 << 20  # QCOW_MAX_REFTABLE_SIZE
_MAX_SNAPSHOTS = 65536  # QCOW_MAX_SNAPSHOTS
_MAX_BACKING_NAME = 1023  # qcow2.txt, "Backing file name ... must not be longer than 1023 bytes"
_MAX_REFCOUNT_ORDER = 6
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN_INCOMPATIBLE = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2
_CUT_OFF = "the file was cut off: restore it"
_EXTENSION_END, _EXTENSION_DATA_FILE = 0, 0x44415441

# (offset, magic, what it is); the sources are the formats' own documents and QEMU's block/*.c probes.
_MAGICS = (
    (0, _QCOW_MAGIC, "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vhd"),
    (0, b"QED\0", "qed"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"LUKS\xba\xbe", "luks"),
    (32769, b"CD001", "iso9660"),
)
_PLAIN_CONTENT = ("raw", "iso9660", "luks")  # what a raw disk may well hold


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What is known of an image that passed."""

    format: str  # as declared: "raw" or "qcow2"
    virtual_bytes: int  # what the guest sees
    content: str  # what the header looks like, whatever was declared: "raw", "qcow2", "iso9660", "vmdk", ...
    backing_file: str | None = None  # only one that was declared passes
    cluster_bytes: int = 0
    version: int = 0  # of qcow2: 2 or 3
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Qcow2:
    """The header's fields by the names of qcow2.txt."""

    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible: int = 0
    refcount_order: int = 4
    header_length: int = _V2_BYTES


def detect(header: bytes) -> str:
    """What the first HEADER_BYTES look like: "qcow2", "iso9660", "vmdk", ...; "raw" when nothing is recognised.

    For messages and suggestions only. No image may ever be opened by this answer: a guest writes its own disk.
    """
    for offset, magic, name in _MAGICS:
        if header[offset : offset + len(magic)] == magic:
            if name == "qcow2" and header[4:8] == b"\0\0\0\1":
                return "qcow"
            return name
    return "raw"


def inspect(header: bytes, file_bytes: int, declared_format: str, *, backing: str | None = None) -> ImageInfo:
    """Judge an image by its first HEADER_BYTES bytes (fewer if the file is smaller) and its size in bytes.

    `backing` is the one backing file name the configuration declares; any other is refused. Raises Refused with
    the reason; the caller adds the path.
    """
    if declared_format == "raw":
        return _inspect_raw(header, file_bytes)
    if declared_format == "qcow2":
        return _inspect_qcow2(header, file_bytes, backing)
    raise Refused(
        f'format "{declared_format}" is not one kvmd opens', hint='use "raw" or "qcow2", or convert the image'
    )


def _inspect_raw(header: bytes, file_bytes: int) -> ImageInfo:
    _check_virtual_size(file_bytes)
    content = detect(header)
    warnings = []
    if content not in _PLAIN_CONTENT:
        warnings.append(f'begins with a {content} header, but format = "raw" was declared: the guest sees the header')
    if file_bytes == 0:
        warnings.append("is empty: the guest sees a disk without a single sector")
    return ImageInfo("raw", file_bytes, content, warnings=tuple(warnings))


def _inspect_qcow2(header: bytes, file_bytes: int, backing: str | None) -> ImageInfo:
    fields = _parse_qcow2(header)
    _check_features(fields)
    _check_layout(fields, file_bytes)
    _check_extensions(fields, header)
    backing_file = _backing_name(fields, header)
    if backing_file is not None and backing_file != backing:
        hint = (
            "flatten it with `qemu-img convert -f qcow2 -O qcow2`, or declare exactly this file as the disk's backing"
        )
        raise Refused(f"has the backing file {_shown(backing_file)}, which is not declared", hint=hint)
    if backing is not None and backing_file is None:
        raise Refused(f"has no backing file, but {_shown(backing)} is declared", hint="remove the disk's backing key")
    warnings = []
    if fields.incompatible & _DIRTY:
        warnings.append("was not closed cleanly: its reference counts are rebuilt at the first opening")
    if fields.nb_snapshots:
        warnings.append(f"holds {fields.nb_snapshots} internal snapshots, which kvmd does not manage")
    return ImageInfo(
        "qcow2", fields.size, "qcow2", backing_file, 1 << fields.cluster_bits, fields.version, tuple(warnings)
    )


def _parse_qcow2(header: bytes) -> _Qcow2:
    content = detect(header)
    if content != "qcow2":
        found = "there is no qcow2 header" if content in _PLAIN_CONTENT else f"it is a {content} image"
        hint = 'format = "raw" if it is a plain disk or ISO image' if content in _PLAIN_CONTENT else None
        raise Refused(
            f"is declared qcow2, but {found}", hint=hint or f"convert it: qemu-img convert -f {content} -O qcow2"
        )
    if len(header) < _V2_BYTES:
        raise Refused(f"ends inside the qcow2 header, after {len(header)} bytes", hint=_CUT_OFF)
    _magic, version, *rest = _HEADER.unpack_from(header)
    if version not in (2, 3):
        raise Refused(f"is qcow2 version {version}; kvmd knows versions 2 and 3")
    fields = _Qcow2(version, *rest)
    if version == 2:
        return fields
    if len(header) < _V3_BYTES:
        raise Refused(f"ends inside the qcow2 header, after {len(header)} bytes", hint=_CUT_OFF)
    incompatible, _compatible, _autoclear, order, length = _HEADER_V3.unpack_from(header, _V2_BYTES)
    return replace(fields, incompatible=incompatible, refcount_order=order, header_length=length)


def _check_features(fields: _Qcow2) -> None:
    if fields.crypt_method:
        method = {1: "AES", 2: "LUKS"}.get(fields.crypt_method, f"method {fields.crypt_method}")
        raise Refused(
            f"is encrypted ({method}), which kvmd does not open yet", hint="convert it to an unencrypted image"
        )
    if fields.incompatible & _DATA_FILE:
        hint = "merge it with `qemu-img convert -f qcow2 -O qcow2` where the data file is known to be yours"
        raise Refused("keeps its data in an external file that its header names", hint=hint)
    if fields.incompatible & _CORRUPT:
        raise Refused("is marked corrupt", hint="copy it, then `qemu-img check -r all -f qcow2` on the copy")
    if unknown := fields.incompatible & ~_KNOWN_INCOMPATIBLE:
        raise Refused(f"needs qcow2 features kvmd does not know (incompatible bits {unknown:#x})")


def _check_layout(fields: _Qcow2, file_bytes: int) -> None:
    if fields.cluster_bits not in _CLUSTER_BITS:
        raise Refused(f"claims clusters of 2^{fields.cluster_bits} bytes; 2^9 to 2^21 exist")
    cluster = 1 << fields.cluster_bits
    if fields.version == 3 and not _V3_BYTES <= fields.header_length <= cluster:
        raise Refused(f"claims a header of {fields.header_length} bytes; {_V3_BYTES} to {cluster} are possible")
    if fields.refcount_order > _MAX_REFCOUNT_ORDER:
        raise Refused(f"claims reference counts of 2^{fields.refcount_order} bits; 2^{_MAX_REFCOUNT_ORDER} is the most")
    _check_virtual_size(fields.size)
    # An L2 table fills a cluster; its entries are 16 bytes with extended L2 (subclusters), else 8.
    l2_entry_bytes = 16 if fields.incompatible & _EXTENDED_L2 else 8
    bytes_per_l1_entry = cluster * (cluster // l2_entry_bytes)
    needed = -(-fields.size // bytes_per_l1_entry)
    if fields.l1_size * 8 > _MAX_L1_BYTES:
        raise Refused(f"claims an L1 table of {fields.l1_size} entries; {_MAX_L1_BYTES // 8} is the most")
    if fields.l1_size < needed:
        raise Refused(f"claims an L1 table of {fields.l1_size} entries where its size needs {needed}")
    if fields.nb_snapshots > _MAX_SNAPSHOTS:
        raise Refused(f"claims {fields.nb_snapshots} snapshots; {_MAX_SNAPSHOTS} is the most")
    reftable_bytes = fields.refcount_table_clusters * cluster
    if not 0 < reftable_bytes <= _MAX_REFTABLE_BYTES:
        raise Refused(
            f"claims a reference count table of {reftable_bytes} bytes; up to {_MAX_REFTABLE_BYTES} is possible"
        )
    _check_table("L1 table", fields.l1_table_offset, fields.l1_size * 8, cluster, file_bytes)
    # Only its first entry must exist: QEMU leaves the rest of a new image's last cluster unwritten.
    _check_table("reference count table", fields.refcount_table_offset, 8, cluster, file_bytes)
    if fields.nb_snapshots:
        _check_table("snapshot table", fields.snapshots_offset, 8, cluster, file_bytes)


def _check_table(what: str, offset: int, size: int, cluster: int, file_bytes: int) -> None:
    if not size:
        return
    if offset % cluster or offset < cluster or offset + size > file_bytes:
        where = f"at byte {offset} of a file of {file_bytes}"
        raise Refused(f"has its {what} {where}, where it cannot be", hint="the file is cut off or forged: restore it")


def _check_virtual_size(size: int) -> None:
    if size > MAX_VIRTUAL_BYTES:
        raise Refused(f"has a size of {size} bytes; kvmd opens up to {Size(MAX_VIRTUAL_BYTES)}")


def _check_extensions(fields: _Qcow2, header: bytes) -> None:
    """Walk the header extensions as far as they were read; their lengths may not leave the first cluster."""
    end = 1 << fields.cluster_bits
    if fields.backing_file_offset:
        end = min(end, fields.backing_file_offset)
    offset = fields.header_length
    while offset + 8 <= min(end, len(header)):
        kind, length = struct.unpack_from(">II", header, offset)
        if kind == _EXTENSION_END:
            return
        if length > end - offset - 8:
            raise Refused(f"has a header extension {kind:#010x} of {length} bytes, longer than its place")
        if kind == _EXTENSION_DATA_FILE:
            raise Refused("names an external data file in its header")
        offset += 8 + (length + 7) // 8 * 8


def _backing_name(fields: _Qcow2, header: bytes) -> str | None:
    if not fields.backing_file_offset:
        return None
    offset, size = fields.backing_file_offset, fields.backing_file_size
    if size > _MAX_BACKING_NAME or offset < fields.header_length or offset + size > (1 << fields.cluster_bits):
        raise Refused(f"claims a backing file name of {size} bytes at byte {offset}, where it cannot be")
    name = header[offset : offset + size]
    if len(name) != size or not name:
        raise Refused("has a backing file name kvmd cannot read", hint="flatten it with qemu-img convert")
    return name.decode("utf-8", "backslashreplace")


def _shown(text: str) -> str:
    """Quoted, control characters escaped: a header must not write to a terminal."""
    return '"' + text.encode("unicode_escape").decode("ascii")[:200] + '"'


def empty_qcow2(virtual_bytes: int) -> bytes:
    """The content of a new, empty qcow2 version 3 image of that size (bytes, a multiple of 512).

    64 KiB clusters, 16-bit reference counts, no extensions: header, reference count table, one reference count
    block, L1 table. Raises Refused above MAX_VIRTUAL_BYTES or for a size that is no whole number of sectors.
    """
    if virtual_bytes <= 0 or virtual_bytes % 512:
        raise Refused(f"a disk of {virtual_bytes} bytes is not a whole number of 512-byte sectors")
    _check_virtual_size(virtual_bytes)
    cluster_bits = 16
    cluster = 1 << cluster_bits
    l1_entries = -(-virtual_bytes // (cluster * cluster // 8))
    l1_clusters = -(-l1_entries * 8 // cluster)
    used = 3 + l1_clusters  # at most 19, so one reference count block (32,768 clusters) is enough
    first = _HEADER.pack(
        _QCOW_MAGIC, 3, 0, 0, cluster_bits, virtual_bytes, 0, l1_entries, 3 * cluster, cluster, 1, 0, 0
    )
    header = first + _HEADER_V3.pack(0, 0, 0, 4, _V3_BYTES)
    refcount_table = struct.pack(">Q", 2 * cluster)
    refcount_block = struct.pack(">H", 1) * used
    return b"".join(
        part.ljust(clusters * cluster, b"\0")
        for part, clusters in ((header, 1), (refcount_table, 1), (refcount_block, 1), (b"", l1_clusters))
    )
