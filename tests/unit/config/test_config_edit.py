"""Edits keep what a person wrote; new guests check clean."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.config.edit import NewGuest, new_guest, set_key, unset_key
from kvmd.config.load import load
from kvmd.errors import ConfigInvalid
from kvmd.units import Size

TEXT = """\
# the shop
[memory]   # RAM
size = "1GiB"    # enough

[disk.root]
file = "/srv/vm/a.img"
throttle = { iops = 1 }
"""


def test_a_value_is_replaced_and_its_comment_stays() -> None:
    assert set_key(TEXT, "memory.size", '"2GiB"') == TEXT.replace('"1GiB"', '"2GiB"')


def test_words_need_no_quotes() -> None:
    assert set_key(TEXT, "memory.size", "2GiB") == TEXT.replace('"1GiB"', '"2GiB"')


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("cpu.vcpus", "4", 4),
        ("start.auto", "true", True),
        ("start.after", '["a", "b"]', ["a", "b"]),
        ("memory.balloon.enabled", "false", False),
        ("disk.data.file", "/srv/vm/b.img", "/srv/vm/b.img"),
        ("disk.root.throttle.iops", "7", 7),
        ("schema", "1", 1),
        ("cpu.emulator", "0-3", "0-3"),
        (("disk", "a b", "x.y"), "1", 1),
    ],
)
def test_set(path: str | tuple[str, ...], value: str, expected: object) -> None:
    result = set_key(TEXT, path, value)
    here: object = tomllib.loads(result)
    for part in path.split(".") if isinstance(path, str) else path:
        assert isinstance(here, dict)
        here = here[part]
    assert here == expected
    for line in TEXT.splitlines():
        if "throttle" not in line:
            assert line in result.splitlines(), "nothing else changed"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (TEXT, "memory"),
        (TEXT, "memory.size.x"),
        (TEXT, "a b"),
        (TEXT, ""),
        (TEXT, "x = 1\ny"),
        ("[", "memory.size"),
    ],
)
def test_refused(text: str, path: str) -> None:
    with pytest.raises(ConfigInvalid):
        set_key(text, path, "1")


def test_unset() -> None:
    assert "size" not in unset_key(TEXT, "memory.size")
    assert "disk" not in unset_key(TEXT, "disk.root")
    with pytest.raises(ConfigInvalid, match=r"no cpu\.vcpus"):
        unset_key(TEXT, "cpu.vcpus")


@given(st.text(max_size=40))
def test_any_text_survives_as_a_value(value: str) -> None:
    quoted = '"' + "".join(f"\\U{ord(char):08x}" for char in value if not 0xD800 <= ord(char) < 0xE000) + '"'
    result = set_key(TEXT, "guest.description", quoted)
    assert tomllib.loads(result)["guest"]["description"] == tomllib.loads(f"x = {quoted}")["x"]


@pytest.mark.parametrize(
    "wanted",
    [
        {"image": '/srv/vm/a "b".img', "image_format": "qcow2", "network": "lan", "auto": True},
        {"kernel": "/boot/vmlinuz", "initrd": "/boot/initrd", "cmdline": 'console=ttyS0 x="y"', "accel": "auto"},
        {"image": "/srv/vm/a.img", "image_format": "raw", "cdrom": "/srv/vm/b.iso", "description": "web"},
    ],
)
def test_a_new_guest_checks_clean(tmp_path: Path, wanted: dict[str, object]) -> None:
    (tmp_path / "guests.d").mkdir()
    (tmp_path / "networks.d").mkdir()
    (tmp_path / "networks.d/lan.toml").write_text('[network]\nmode = "isolated"\n')
    uuid = "6f0d2c6e-9a0f-4a57-8a0c-3b3f7b6f7a11"
    text = new_guest(NewGuest(uuid=uuid, memory=Size(1 << 30), vcpus=2, **wanted))  # type: ignore[arg-type]
    (tmp_path / "guests.d/web.toml").write_text(text)

    loaded = load(tmp_path)

    assert loaded.errors == ()
    guest = loaded.desired.guests["web"]
    assert (guest.guest.uuid, guest.memory.size, guest.cpu.vcpus) == (uuid, 1 << 30, 2)
    assert guest.boot.kernel == wanted.get("kernel")
    assert guest.boot.cmdline == wanted.get("cmdline")
    assert guest.disk["root"].file == wanted["image"] if "image" in wanted else not guest.disk
    assert guest.start.auto == wanted.get("auto")
