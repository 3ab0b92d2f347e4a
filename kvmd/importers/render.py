"""An import as a file a person will read: keys in the order of the reference, the same bytes each time."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tomlkit

from kvmd.config.catalogue import generic, keys_of


def to_toml(tables: Mapping[str, Any], remarks: Sequence[str], origin: str) -> str:
    """The text. `remarks` become comments at the head: what a person should look at."""
    lines = [f"# Made by kvmd-cli import from {origin}. All keys: docs/reference.md."]
    for remark in ("".join(char if char.isprintable() else "?" for char in text) for text in remarks):
        lines += textwrap.wrap(f"Look at this: {remark}", 117, initial_indent="# ", subsequent_indent="#   ")
    order = {path: number for number, path in enumerate(keys_of("guests.d"))}
    for path, table in sorted(_tables(tables), key=lambda item: _rank(item[0], item[1], order)):
        lines += ["", f"[{'.'.join(path)}]"]
        lines += [f"{key} = {_value(table[key])}" for key in sorted(table, key=lambda key: _place((*path, key), order))]
    return "\n".join(lines) + "\n"


def _tables(
    tables: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """(path, its own keys) of every table that has some."""
    plain = {key: value for key, value in tables.items() if not isinstance(value, Mapping) or key == "features"}
    if plain:
        yield path, plain
    for key, value in tables.items():
        if key not in plain:
            yield from _tables(value, (*path, key))


def _rank(path: tuple[str, ...], table: Mapping[str, Any], order: Mapping[str, int]) -> int:
    return min(_place((*path, key), order) for key in table)


def _place(path: tuple[str, ...], order: Mapping[str, int]) -> int:
    return order.get(".".join(generic("guests.d", path)), len(order))


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = tomlkit.inline_table()
        inner.update(value)
        return str(inner.as_string())
    return str(tomlkit.item(value).as_string())
