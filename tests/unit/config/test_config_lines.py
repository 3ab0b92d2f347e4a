"""The line map against tomllib: every key tomllib finds has a line, and the line shows the key."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.config.lines import MAX_DEPTH, MAX_PARTS, TooDeep, check_depth, dotted, line_map

BARE = st.text("abcXYZ019_-", min_size=1, max_size=6)
ANY_KEY = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=6)


def basic(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped + '"'


def written(part: str) -> st.SearchStrategy[str]:
    spellings = [basic(part)]
    if part and all(char in "abcXYZ019_-" for char in part):
        spellings.append(part)
    if "'" not in part:
        spellings.append(f"'{part}'")
    return st.sampled_from(spellings)


SCALARS = st.sampled_from(
    [
        "1",
        "0x1F",
        "1_000.5e3",
        "true",
        "1979-05-27T07:32:00Z",
        '"# no comment, [x] = {"',
        r'"a \" b \\"',
        "'C:\\'",
        '"""two\nlines = 3\n# no"""',
        '"""quote at the end"""""',
        '"""escaped \\""" quotes"""',
        "'''[not.a.table]\nx = 1'''",
        '""',
        "''",
    ]
)
KEYS = st.one_of(BARE, ANY_KEY)


@st.composite
def dotted_keys(draw: st.DrawFn) -> str:
    parts = draw(st.lists(KEYS, min_size=1, max_size=3))
    dot = draw(st.sampled_from([".", " . ", "\t."]))
    return dot.join(draw(written(part)) for part in parts)


@st.composite
def inline_tables(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    pairs = draw(st.lists(st.tuples(dotted_keys(), values.filter(lambda value: "\n" not in value)), max_size=3))
    return "{ " + ", ".join(f"{key} = {value}" for key, value in pairs) + " }"


def arrays(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(values, max_size=3).map(lambda items: "[ # first\n" + ",\n".join(items) + "\n]")


VALUES = st.recursive(SCALARS, lambda inner: st.one_of(arrays(inner), inline_tables(inner)), max_leaves=5)


@st.composite
def documents(draw: st.DrawFn) -> str:
    lines: list[str] = []
    for _ in range(draw(st.integers(0, 8))):
        match draw(st.integers(0, 4)):
            case 0:
                lines.append(f"[{draw(dotted_keys())}] # a table")
            case 1:
                lines.append(f"[[ {draw(dotted_keys())} ]]")
            case 2:
                lines.append(draw(st.sampled_from(["", "   ", "# [comment]", "\t# key = 1"])))
            case _:
                lines.append(f"{draw(dotted_keys())} = {draw(VALUES)}  # = {{")
    return draw(st.sampled_from(["\n", "\r\n"])).join(lines)


def paths(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield (*path, key)
            yield from paths(value, (*path, key))
    elif isinstance(data, list):
        for item in data:
            yield from paths(item, path)


@given(documents())
def test_every_key_of_tomllib_has_a_line_that_shows_it(text: str) -> None:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        line_map(text)  # must not raise either
        return
    lines = text.replace("\r\n", "\n").split("\n")
    found = line_map(text)
    for path in paths(data):
        assert path in found, (path, text)
        here = lines[found[path] - 1]
        assert path[-1] in here or basic(path[-1]) in here, (path, here)


@given(st.text())
def test_any_text_ends_without_an_error(text: str) -> None:
    line_map(text)


@given(st.text("[]{}\"'\\=.,# \nab", max_size=200))
def test_any_punctuation_ends_without_an_error(text: str) -> None:
    found = line_map(text)
    assert all(1 <= line <= text.count("\n") + 1 for line in found.values())


def test_places() -> None:
    text = """\
# comment
[disk.root]     # line 2
file = "/a"
throttle = { iops = 1, "b c" = [ { d = 1 } ] }
'q k'.x = '''
y = 1
'''

[disk."data"]
file = "/b"
"""
    found = line_map(text)
    assert found == {
        ("disk",): 2,
        ("disk", "root"): 2,
        ("disk", "root", "file"): 3,
        ("disk", "root", "throttle"): 4,
        ("disk", "root", "throttle", "iops"): 4,
        ("disk", "root", "throttle", "b c"): 4,
        ("disk", "root", "throttle", "b c", "d"): 4,
        ("disk", "root", "q k"): 5,
        ("disk", "root", "q k", "x"): 5,
        ("disk", "data"): 9,
        ("disk", "data", "file"): 10,
    }


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\na = " + "[" * 5000 + "]" * 5000, 2),
        ("a = " + "{a=" * 200 + "1" + "}" * 200, 1),
        ("\n\n" + ".".join(["a"] * 20000) + " = 1", 3),
        ("[" + ".".join(["a"] * 20000) + "]", 1),
    ],
)
def test_too_deep_is_found_before_the_parser_sees_it(text: str, line: int) -> None:
    with pytest.raises(TooDeep) as caught:
        check_depth(text)
    assert caught.value.line == line


def test_what_is_deep_but_legal_passes() -> None:
    check_depth("a = " + "[" * MAX_DEPTH + "]" * MAX_DEPTH)
    check_depth(".".join(["a"] * MAX_PARTS) + " = 1")
    check_depth('cmdline = "' + "." * 500 + "[" * 500 + '"')
    check_depth("a = [" + "[]," * 5000 + "]")


def test_paths_as_people_write_them() -> None:
    assert dotted(("disk", "root", "file")) == "disk.root.file"
    assert dotted(("disk", "a b\n")) == 'disk."a b\\u000a"'
    assert len(dotted(("x" * 50 + " " * 500,))) < 80
