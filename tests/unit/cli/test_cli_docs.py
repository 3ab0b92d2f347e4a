"""docs/cli.md, --help and the completion script have every command; the static script is what the client prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmd.cli.arguments import Verb
from kvmd.cli.completion import script
from kvmd.cli.main import main
from kvmd.cli.passes import SOMETHING_TO_DO
from kvmd.cli.verbs import ALIASES, COMMON, LATER, VERBS
from kvmd.errors import KvmdError

REPO = Path(__file__).resolve().parents[3]
PAGE = (REPO / "docs/cli.md").read_text()


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_every_command_is_documented(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    row = re.search(rf"^\| `{verb.name}[ `].*$", PAGE, re.MULTILINE)
    assert row, f"docs/cli.md has no row for {verb.name}"
    for option in verb.options:
        if not option.hidden:
            assert option.name in row[0], f"docs/cli.md: {verb.name}: {option.name}"
    if verb.offline:
        assert row[0].endswith("| files |")
    assert main([*verb.name.split(), "--help"]) == 0
    page = capsys.readouterr().out
    assert verb.summary in page
    assert all(option.about for option in verb.options if not option.hidden)
    assert main(["--json", "help", *verb.name.split()]) == 0
    assert capsys.readouterr().out == page


def test_the_page_names_no_command_that_is_none() -> None:
    rows = re.findall(r"^\| `([a-z][a-z -]*?)(?: [A-Z\[].*?)?` \|", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(VERBS)


def test_the_rest_of_the_page() -> None:
    for option in COMMON:
        assert re.search(rf"^\| `{option.name}[ `]", PAGE, re.MULTILINE), option.name
    codes = {kind.exit_code for kind in (KvmdError, *KvmdError.__subclasses__())} | {0, SOMETHING_TO_DO, 130}
    for code in codes:
        assert re.search(rf"^\| {code} \|", PAGE, re.MULTILINE), code
    for name in (*ALIASES, *LATER):
        assert f"`{name}`" in PAGE, name


def test_the_overview_has_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    for verb in VERBS.values():
        assert re.search(rf"^  {verb.name} +{re.escape(verb.summary)}$", page, re.MULTILINE)
    for option in COMMON:
        assert option.name in page


def test_the_static_completion_is_current() -> None:
    """Made again by `kvmd-cli completion > etc/bash-completion.d/kvmd-cli`."""
    assert (REPO / "etc/bash-completion.d/kvmd-cli").read_text() == script()


def test_completion_is_for_bash(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion"]) == 0
    assert capsys.readouterr().out == script()
    assert main(["completion", "zsh"]) == 2
