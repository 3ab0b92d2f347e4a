import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.errors import Refused
from kvmd.qemu.imageheader import HEADER_BYTES, MAX_VIRTUAL_BYTES, detect, empty_qcow2, inspect
from tests.data.images import corpus

ISO = bytes(32769) + b"CD001" + bytes(2048)


def judge(image: bytes, declared: str = "qcow2", backing: str | None = None):
    return inspect(image[:HEADER_BYTES], len(image), declared, backing=backing)


@pytest.mark.parametrize("name", corpus.EVIL)
def test_evil_image_is_refused_as_qcow2_with_its_reason(name):
    image, reason = corpus.EVIL[name]
    with pytest.raises(Refused) as refused:
        judge(image)
    assert reason in refused.value.message
    assert refused.value.message.isprintable()


@pytest.mark.parametrize("name", corpus.EVIL)
def test_declared_raw_is_raw_whatever_the_header_says(name):
    image, _ = corpus.EVIL[name]
    info = judge(image, "raw")
    assert (info.format, info.virtual_bytes, info.backing_file) == ("raw", len(image), None)


def test_raw_with_a_foreign_header_warns_and_plain_content_does_not():
    assert "qcow2 header" in judge(corpus.qcow2(), "raw").warnings[0]
    assert "vmdk header" in judge(corpus.EVIL["vmdk"][0], "raw").warnings[0]
    assert judge(ISO, "raw").warnings == ()
    assert judge(ISO, "raw").content == "iso9660"
    assert judge(corpus.EVIL["luks"][0], "raw").warnings == ()  # a guest may encrypt its whole disk
    assert "empty" in judge(b"", "raw").warnings[0]


def test_an_iso_declared_qcow2_is_refused_with_the_right_format():
    with pytest.raises(Refused) as refused:
        judge(ISO)
    assert 'format = "raw"' in refused.value.hint


def test_raw_above_the_limit_is_refused():
    with pytest.raises(Refused, match="64TiB"):
        inspect(b"", MAX_VIRTUAL_BYTES + 512, "raw")
    assert inspect(b"", MAX_VIRTUAL_BYTES, "raw").virtual_bytes == MAX_VIRTUAL_BYTES


@pytest.mark.parametrize("declared", ["vmdk", "vhdx", "auto", "", "RAW"])
def test_other_formats_are_refused(declared):
    with pytest.raises(Refused, match="format"):
        judge(bytes(4096), declared)


def test_declared_backing_file_passes_only_if_it_is_exactly_that():
    image = corpus.with_backing(b"base.qcow2")
    assert judge(image, backing="base.qcow2").backing_file == "base.qcow2"
    for other in ("base.qcow", "./base.qcow2", "base.qcow2\0", ""):
        with pytest.raises(Refused, match="not declared"):
            judge(image, backing=other)
    with pytest.raises(Refused, match="no backing file"):
        judge(corpus.qcow2(), backing="base.qcow2")


def test_dirty_and_snapshots_are_told_not_refused():
    info = judge(corpus.qcow2(incompatible_features=1, nb_snapshots=2, snapshots_offset=1 << 16))
    assert ["not closed cleanly" in info.warnings[0], "2 internal snapshots" in info.warnings[1]] == [True, True]


def test_version_2_is_read_without_the_fields_it_does_not_have():
    image = bytearray(corpus.qcow2(version=2))
    image[72:104] = bytes(32)  # in version 2, extensions begin at 72: type 0 ends them
    assert judge(bytes(image)).version == 2


@given(sectors=st.integers(min_value=1, max_value=(1 << 40) // 512))
def test_a_new_image_passes_its_own_inspection(sectors):
    image = empty_qcow2(sectors * 512)
    info = judge(image)
    assert (info.virtual_bytes, info.version, info.warnings) == (sectors * 512, 3, ())


@pytest.mark.parametrize("size", [0, -512, 1, 513, MAX_VIRTUAL_BYTES + 512])
def test_no_image_of_an_impossible_size_is_made(size):
    with pytest.raises(Refused):
        empty_qcow2(size)


@given(st.binary(max_size=2048), st.integers(min_value=0, max_value=1 << 64), st.sampled_from(["raw", "qcow2"]))
def test_any_bytes_are_judged_or_refused_never_anything_else(header, size, declared):
    try:
        info = inspect(header, size, declared)
    except Refused as refused:
        assert refused.message.isprintable()
        return
    assert 0 <= info.virtual_bytes <= MAX_VIRTUAL_BYTES


@given(st.dictionaries(st.sampled_from(sorted(corpus.FIELDS)), st.integers(min_value=0, max_value=(1 << 64) - 1)))
def test_any_header_fields_are_judged_or_refused(fields):
    image = bytearray(corpus.qcow2())
    for name, value in fields.items():
        offset, form = corpus.FIELDS[name]
        struct.pack_into(form, image, offset, value & ((1 << 8 * struct.calcsize(form)) - 1))
    try:
        info = judge(bytes(image))
    except Refused as refused:
        assert refused.message.isprintable()
        return
    assert info.virtual_bytes <= MAX_VIRTUAL_BYTES
    assert info.backing_file is None


@given(st.binary(max_size=100))
def test_detect_never_fails(header):
    assert detect(header)
