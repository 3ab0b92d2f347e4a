"""docs/reference.md: every key of every file, made from the model table. `scripts/regen` writes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from kvmd.config.catalogue import FileKind, KeyInfo, catalogue

_INTRO = """\
# Reference: every key

Made by `scripts/regen` from the models in `kvmd/config/`; do not edit.

- Sizes are binary and have a unit: `"512MiB"`, `"8GiB"`. Durations: `"30s"`, `"3min"`, `"12h"`. CPU sets: `"0-3,8"`.
- *Applies*: **live** changes while the guest runs (or at the next `apply`, for the host), **restart** needs a new
  QEMU; without a word the key has no running meaning.
- *Classic*: how the qemu-kvm command line or the kernel spells it; "ours" has no such spelling.
- **later**: known, and refused with "not supported yet" until this version can do it. Single values that are refused
  the same way stand after the type.
"""
_TITLES: Mapping[FileKind, str] = {
    "kvmd.toml": "kvmd.toml: the daemon",
    "host.toml": "host.toml: the host",
    "networks.d": "networks.d/NAME.toml: a network",
    "guests.d": "guests.d/NAME.toml: a guest",
}
_NOTES: Mapping[FileKind, str] = {
    "guests.d": "`profiles.d/NAME.toml` takes the same keys except `guest.uuid` and `guest.profile`; a guest's own "
    "keys win over its profile's.\n",
}
_HEAD = "| key | type | default | applies | classic | example | what it does |\n|---|---|---|---|---|---|---|"


def render_reference() -> str:
    """The whole page, ending in one newline."""
    return "\n".join(_page()).rstrip("\n") + "\n"


def _page() -> Iterator[str]:
    yield _INTRO
    for kind, rows in groupby(catalogue(), key=lambda row: row.file):
        yield f"## {_TITLES[kind]}\n"
        if note := _NOTES.get(kind):
            yield note
        yield from _tables(rows)


def _tables(rows: Iterable[KeyInfo]) -> Iterator[str]:
    for table, keys in groupby(rows, key=lambda row: row.path.rpartition(".")[0]):
        yield f"### [{table}]\n" if table else "### (above all tables)\n"
        yield _HEAD
        for row in keys:
            yield _line(row)
        yield ""


def _line(row: KeyInfo) -> str:
    name = row.path.rpartition(".")[2]
    cells = [
        f"`{name}`",
        _type(row),
        _default(row),
        row.applies,
        _code(row.classic) if row.classic != "ours" else "ours",
        "" if row.later else _code(row.example),
        _doc(row),
    ]
    return "| " + " | ".join(cells) + " |"


def _type(row: KeyInfo) -> str:
    unit = f" ({row.unit})" if row.unit else ""
    refused = f"; later: {_code(', '.join(row.later_values))}" if row.later_values else ""
    return f"{_cell(row.type)}{unit}{refused}"


def _default(row: KeyInfo) -> str:
    if row.later:
        return "**later**"
    return "required" if row.required else _code(row.default) if row.default else "absent"


def _doc(row: KeyInfo) -> str:
    needs = f" Needs: {row.needs}." if row.needs else ""
    return _cell(f"{row.doc}{needs}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text else ""
