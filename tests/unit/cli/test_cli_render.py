"""Text for people: widths, units, and nothing a terminal would obey."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.cli import render
from kvmd.cli.look import shell_lines
from kvmd.rpc import results

ROWS = st.lists(st.lists(st.text(max_size=12), min_size=3, max_size=3), max_size=5)


@given(ROWS)
def test_columns_stand_under_each_other_whatever_is_in_them(rows: list[list[str]]) -> None:
    lines = render.table(("A", "B", "C"), [[*row[:2], f"|{row[2]}"] for row in rows]).split("\n")
    assert len(lines) == len(rows) + 1
    starts = {
        render.width(line[: line.rindex("|" + render.clean(row[2]).rstrip())])
        for line, row in zip(lines[1:], rows, strict=True)
    }
    assert len(starts) <= 1


@given(st.text())
def test_clean_leaves_nothing_a_terminal_obeys(text: str) -> None:
    assert render.clean(text).isprintable()
    assert len(render.clean(text)) == len(text)
    if text.isprintable():
        assert render.clean(text) == text


def test_colours_do_not_count_as_width() -> None:
    plain = render.table(("A", "B"), [("x", "y")])
    coloured = render.table(("A", "B"), [("x", "y")], colours={(0, 0): render.RED}, on=True)
    assert coloured.replace("\x1b[31m", "").replace("\x1b[0m", "") == plain
    assert "\x1b[31mx" in coloured
    assert "\x1b" not in render.table(("A",), [("x",)], colours={(0, 0): render.RED}, on=False)


def test_wide_characters_take_two_columns() -> None:
    lines = render.table(("A", "B"), [("日本", "x"), ("abcd", "y"), ("e\u0301", "z")]).split("\n")
    assert lines[1:] == ["日本  x", "abcd  y", "e\u0301     z"]


def test_numbers_stand_right() -> None:
    assert render.table(("N",), [("1",), ("100",)], right=frozenset({0})) == "  N\n  1\n100"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1 << 20, "1 MiB"),
        (3 << 29, "1.5 GiB"),
        ((1 << 30) - 1, "1024.0 MiB"),
        (5 << 40, "5120 GiB"),
    ],
)
def test_sizes(count: int | None, text: str) -> None:
    assert render.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"),
        (0.9, "0s"),
        (59, "59s"),
        (60, "1min"),
        (3599, "59min"),
        (3600, "1h"),
        (86_399, "23h"),
        (86_400, "1d"),
    ],
)
def test_ages(seconds: float, text: str) -> None:
    assert render.age(seconds) == text


def summary(**changes: object) -> dict[str, object]:
    base: dict[str, object] = {
        "name": "web",
        "state": "running",
        "reason": None,
        "uuid": None,
        "pid": 7,
        "vcpus": 2,
        "memory_bytes": 2 << 30,
        "balloon_bytes": None,
        "wanted": "running",
        "since": 100.0,
        "pending": [],
        "stale": False,
        "held": None,
        "observed_at": 100.0,
    }
    return results.GuestSummary.model_validate(base | changes, strict=False).model_dump(mode="json")


def test_the_list_of_guests() -> None:
    text = render.guests(
        [
            summary(balloon_bytes=1 << 30),
            summary(name="db", state="failed", pid=None, reason="QEMU\x1b[2J died", since=None, vcpus=16),
        ],
        now=160.0,
        on=False,
    )
    assert text.split("\n") == [
        "NAME  STATE    SINCE  VCPUS       MEMORY  PID  NOTES",
        "web   running   1min      2  1 GiB/2 GiB    7",
        "db    failed       -     16        2 GiB    -  QEMU\ufffd[2J died; wanted running",
    ]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({}, None),
        ({"wanted": "stopped"}, "wanted stopped"),
        ({"state": "stopped", "reason": "powered off by the guest", "wanted": "stopped"}, "powered off by the guest"),
        ({"pending": ["memory.size", "cpu.vcpus"]}, "pending: memory.size, cpu.vcpus"),
        ({"held": "backup at night"}, "held: backup at night"),
        ({"stale": True}, "its file has faults, the last good one counts"),
        ({"reason": "kept from an earlier state"}, None),
    ],
)
def test_notes(changes: dict[str, object], note: str | None) -> None:
    assert render.notes(summary(**changes)) == ([note] if note else [])


def test_no_guests_says_what_next() -> None:
    assert "kvmd-cli create" in render.guests([], now=0, on=False)


def test_plan_lines_are_grouped_by_whom_they_disturb() -> None:
    knob = {"line": "~ /sys/kernel/mm/ksm/run: 0 -> 1", "why": "memory pressure 22 %", "disruption": "none"}
    stop = {"line": "- guest web: stop", "why": "it is wanted stopped", "disruption": "guest"}
    assert render.actions([stop, knob], on=False).split("\n") == [
        "now, disturbs nobody:",
        "  ~ /sys/kernel/mm/ksm/run: 0 -> 1  (memory pressure 22 %)",
        "stops or restarts guests:",
        "  - guest web: stop  (it is wanted stopped)",
    ]
    assert render.actions([knob], on=True).split("\n")[1].startswith("  \x1b[33m~ /sys")


def test_every_disruption_has_its_group() -> None:
    from kvmd.actions import Disruption

    assert set(render.DISRUPTIONS) == {word.value for word in Disruption}


def test_faults_look_as_in_check() -> None:
    from dataclasses import asdict

    from kvmd.config.desired import Fault

    for fault in (
        Fault("guests.d/web.toml", 14, "memory.sise", "unknown key", "did you mean memory.size?"),
        Fault("host.toml", None, None, "cannot be read", None, "warning"),
    ):
        assert render.fault(asdict(fault)) == str(fault)


def test_any_json_can_be_shown() -> None:
    value = {
        "a_bytes": 1 << 20,
        "b": [{"x": 1, "y_bytes": None}, {"x": 2, "y_bytes": 5}],
        "c": {"d": [1, 2]},
        "e": [],
        "f": True,
    }
    assert render.tree(value) == [
        "a_bytes: 1 MiB",
        "b:",
        "  x  y_bytes",
        "  1  -",
        "  2  5 B",
        "c:",
        "  d:",
        "    - 1",
        "    - 2",
        "e: -",
        "f: yes",
    ]


def test_argv_is_a_shell_command() -> None:
    words = ["/usr/bin/qemu", "-S", "-name", "guest=a b", "-device", '{"driver":"x"}', "-nodefaults", "odd"]
    text = shell_lines(words)
    assert text.split(" \\\n") == [
        "/usr/bin/qemu", "  -S", "  -name 'guest=a b'", "  -device '{\"driver\":\"x\"}'", "  -nodefaults odd"
    ]  # fmt: skip
    import shlex

    assert shlex.split(text.replace("\\\n", " ")) == words


@given(st.lists(st.text(), min_size=1, max_size=8))
def test_a_shell_gets_back_every_word(words: list[str]) -> None:
    import shlex

    assert shlex.split(shell_lines(words).replace(" \\\n", " ")) == words
