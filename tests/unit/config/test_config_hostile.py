"""Directories and files nobody would write on purpose: a fault each, never an exception."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmd.config.catalogue import catalogue
from kvmd.config.load import check, load

GUEST = '[memory]\nsize = "1GiB"\n[nic.a]\ntype = "user"\n'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "guests.d").mkdir()
    (tmp_path / "guests.d/good.toml").write_text(GUEST)
    return tmp_path


def messages(root: Path, *, require_root_owner: bool = False) -> list[str]:
    loaded = load(root, require_root_owner=require_root_owner)
    if not require_root_owner:
        assert list(loaded.desired.guests) == ["good"], "the others load"
    return [str(fault) for fault in loaded.faults]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"x" * (10 << 20), "has 10485760 bytes; at most 1048576 (1 MiB) are read"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "nested more than 32 deep"),
        (b"a = " + b"{a = " * 3000 + b"1" + b"}" * 3000, "a key of more than 32 parts"),
        (b".".join([b"a"] * 20000) + b" = 1", "a key of more than 32 parts"),
        (b"a = " + b"9" * 5000, "not TOML: a number has too many digits"),
        (
            b"[memory]\nsize = 0x" + b"f" * 50000,
            'wants a size in quotes, for example "8GiB"; this is the number of 200000 bits',
        ),
        (b"\xef\xbb\xbf[memory]\n", "begins with a byte order mark, which TOML does not allow (save it without one)"),
        (b"# \n[memory]\nsize = '\xff'\n", "is not UTF-8: byte 0xff cannot be there"),
        (b"\x00", "not TOML: Invalid statement (column 1)"),
        (b"\xff\xfe[\x00", "is not UTF-8: byte 0xff cannot be there"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_content(root: Path, raw: bytes, message: str) -> None:
    (root / "guests.d/bad.toml").write_bytes(raw)
    found = messages(root)
    assert any(line.startswith("guests.d/bad.toml") and line.endswith(message) for line in found), found


def test_the_line_of_a_bad_byte(root: Path) -> None:
    (root / "guests.d/bad.toml").write_bytes(b"# \n[memory]\nsize = '\xff'\n")
    assert messages(root) == ["guests.d/bad.toml:3: is not UTF-8: byte 0xff cannot be there"]


def test_a_hundred_thousand_unknown_keys_are_counted_not_listed(root: Path) -> None:
    (root / "guests.d/bad.toml").write_text("".join(f"k{number}=1\n" for number in range(100_000)))
    started = time.monotonic()
    found = messages(root)
    assert len(found) == 51
    assert sum("more faults" in line for line in found) == 2, "in this file, and in all"
    assert time.monotonic() - started < 10, "near matches are not looked up for each"


def test_more_than_fifty_faults_in_many_files(root: Path) -> None:
    for number in range(60):
        (root / f"guests.d/bad{number:02}.toml").write_text("[")
    found = messages(root)
    assert len(found) == 51
    assert found[-1] == ".: 10 more faults are not shown"
    assert len(load(root).faulty) == 60


@pytest.mark.parametrize(
    "name", [".web.toml.swp", "web.toml~", ".#web.toml", "#web.toml#", "web.toml.dpkg-old", "web.toml.bak", "README.md"]
)
def test_droppings_are_ignored(root: Path, name: str) -> None:
    (root / f"guests.d/{name}").write_text("[")
    assert messages(root) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Web.toml", 'guests.d/Web.toml: the file\'s name: "Web" is not a name: 1 to 47 of a-z, 0-9 and -'),
        ("a.b.toml", 'guests.d/a.b.toml: the file\'s name: "a.b" is not a name'),
        ("dc_01.toml", 'guests.d/dc_01.toml: the file\'s name: "dc_01" is not a name'),
        ("-a.toml", 'guests.d/-a.toml: the file\'s name: "-a" is not a name'),
        ("a" * 48 + ".toml", "the file's name: \"" + "a" * 48 + '" is not a name'),
        ("web\n.toml", 'guests.d/web\\u000a.toml: the file\'s name: "web\\u000a" is not a name'),
        ("web,x.toml", 'guests.d/web,x.toml: the file\'s name: "web,x" is not a name'),
        (b"web\xff.toml", "guests.d/web\\udcff.toml: the file's name: "),
        (
            "web.tml",
            "guests.d/web.tml: warning: is ignored: the name does not end in .toml (rename it to "
            "web.toml if it is meant)",
        ),
        (
            "web.TOML",
            "guests.d/web.TOML: warning: is ignored: the name does not end in .toml (rename it to "
            "web.toml if it is meant)",
        ),
    ],
)
def test_names(root: Path, name: str | bytes, message: str) -> None:
    (root / "guests.d" / os.fsdecode(name)).write_text(GUEST)
    found = messages(root)
    assert len(found) == 1
    assert message in found[0]
    assert "\n" not in found[0]


def test_a_misspelt_file_is_warned_about(root: Path) -> None:
    (root / "hots.toml").write_text("")
    (root / "guest.d").mkdir()
    assert messages(root) == [
        "guest.d: warning: is not a file kvmd reads (did you mean guests.d?)",
        "hots.toml: warning: is not a file kvmd reads (did you mean host.toml?)",
    ]


def test_what_is_no_file(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "x.toml"
    outside.write_text(GUEST)
    (root / "guests.d/dir.toml").mkdir()
    os.mkfifo(root / "guests.d/fifo.toml")
    (root / "guests.d/away.toml").symlink_to(outside)
    (root / "guests.d/loop.toml").symlink_to("loop.toml")
    (root / "guests.d/nowhere.toml").symlink_to("missing.toml")
    assert [line.partition(": ")[2] for line in messages(root)] == [
        "is a symbolic link that leaves the configuration directory (copy the file instead)",
        "is a directory; a file is wanted",
        "is not a regular file",
        "cannot be read: Too many levels of symbolic links",
        "cannot be read: No such file or directory",
    ]


def test_a_link_inside_is_followed(root: Path) -> None:
    (root / "guests.d/good.toml").rename(root / "kept")
    (root / "guests.d/good.toml").symlink_to("../kept")
    assert [line for line in messages(root) if "kept" not in line] == []


def test_no_directory_at_all(tmp_path: Path) -> None:
    loaded = load(tmp_path / "none")
    assert [fault.message for fault in loaded.faults] == ["cannot be read: No such file or directory"]
    assert loaded.desired.guests == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_others_could_have_written(root: Path) -> None:
    root.chmod(0o755)
    (root / "guests.d").chmod(0o755)
    for name in ("others", "group", "world"):
        (root / f"guests.d/{name}.toml").write_text(GUEST)
    os.chown(root / "guests.d/others.toml", 1234, 0)
    (root / "guests.d/group.toml").chmod(0o664)
    (root / "guests.d/world.toml").chmod(0o646)
    assert messages(root, require_root_owner=True) == [
        "guests.d/group.toml: can be written by others than root (mode 0664)",
        "guests.d/others.toml: belongs to uid 1234, not to root: whoever writes here becomes root",
        "guests.d/world.toml: can be written by others than root (mode 0646)",
    ]
    assert list(load(root, require_root_owner=True).desired.guests) == ["good"]
    assert len(load(root).desired.guests) == 4
    (root / "guests.d").chmod(0o777)
    assert messages(root, require_root_owner=True) == ["guests.d: can be written by others than root (mode 0777)"]


def test_the_format_line_to_paste(root: Path) -> None:
    for name, raw in (("a", b"QFI\xfb\0\0\0\3"), ("b", b"\0" * 512)):
        (root / name).write_bytes(raw)
        (root / f"guests.d/{name}.toml").write_text(GUEST + f'[disk.root]\nfile = "{root / name}"\n')
    assert [line for line in messages(root) if "format" in line] == [
        'guests.d/a.toml:5: disk.root.format: is required (by its first bytes: format = "qcow2")',
        'guests.d/b.toml:5: disk.root.format: is required (by its first bytes: format = "raw")',
    ]


def test_check_warns_about_missing_images(root: Path) -> None:
    text = GUEST + '[disk.root]\nfile = "/srv/vm/nowhere-at-all"\nformat = "raw"\n[boot]\nkernel = "/nowhere/k"\n'
    (root / "guests.d/good.toml").write_text(text)
    assert [str(fault) for fault in check(root).faults] == [
        'guests.d/good.toml:6: warning: disk.root.file: "/srv/vm/nowhere-at-all" does not exist',
        'guests.d/good.toml:9: warning: boot.kernel: "/nowhere/k" does not exist',
    ]


KEYS = st.sampled_from(
    [row.path.replace("NAME", "x").replace("SIZE", '"2MiB"').replace("NIC", "e0") for row in catalogue()]
)
VALUES = st.sampled_from(
    [row.example for row in catalogue() if row.example]
    + [
        '""',
        "0",
        "-1",
        "nan",
        "inf",
        "1e400",
        "[]",
        "{}",
        "[[]]",
        "[{}]",
        "2020-01-01",
        '"\\u0000"',
        '"%"',
        "9" * 30,
        "true",
    ]
)
FILES = st.sampled_from(["kvmd.toml", "host.toml", "networks.d/n.toml", "guests.d/g.toml", "profiles.d/p.toml"])
PLAUSIBLE = st.lists(st.tuples(KEYS, VALUES), max_size=6).map(
    lambda pairs: "\n".join(f"{key} = {value}" for key, value in dict(pairs).items())
)


@given(st.dictionaries(FILES, st.one_of(st.text(), st.binary(max_size=200), PLAUSIBLE), max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_content_makes_loading_raise(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, str | bytes]
) -> None:
    root = tmp_path_factory.mktemp("any")
    for name, text in content.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
    for fault in load(root).faults:
        assert str(fault).isprintable()


def test_loading_a_hundred_guests_parses_each_file_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    for number in range(100):
        (root / f"guests.d/g{number}.toml").write_text(GUEST)
    parsed: list[str] = []
    original = tomllib.loads
    monkeypatch.setattr("kvmd.config.document.tomllib.loads", lambda text: (parsed.append(text), original(text))[1])
    assert len(load(root).desired.guests) == 101
    assert len(parsed) == 101
