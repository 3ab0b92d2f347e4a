"""Changing a file a person wrote, and writing one a person will read. Pure: text in, text out.

The only user of tomlkit, which keeps comments, order and spacing. What comes out is not checked here: the caller
loads it and shows the faults before anything is replaced.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import InlineTable, Item

from kvmd.config.lines import KeyPath, dotted
from kvmd.errors import ConfigInvalid
from kvmd.units import Size

Path = str | KeyPath


def set_key(text: str, key_path: Path, value_text: str) -> str:
    """`text` with the key set, comments kept. Raises ConfigInvalid.

    `value_text` is a TOML value (`4`, `true`, `["a"]`, `"8GiB"`); what is none is taken as text, so that
    `memory.size=8GiB` can be typed without quotes.
    """
    path = _path(key_path)
    document = _parsed(text)
    table: MutableMapping[str, Any] = document
    for depth, part in enumerate(path[:-1]):
        if part not in table:
            # Between [disk] and [disk.root] nothing is written: the outer table has no keys of its own.
            table[part] = _table_for(table, super_table=depth < len(path) - 2)
        below = table[part]
        if not isinstance(below, MutableMapping):
            raise ConfigInvalid(f"{dotted(path[: depth + 1])} is a value, not a table")
        table = below
    if isinstance(table.get(path[-1]), MutableMapping) and not isinstance(table[path[-1]], InlineTable):
        raise ConfigInvalid(f"{dotted(path)} is a table", hint=f"set one of its keys: {dotted(path)}.KEY")
    table[path[-1]] = _value(value_text)
    return _verified(tomlkit.dumps(document), path)


def unset_key(text: str, key_path: Path) -> str:
    """`text` without the key or table. Raises ConfigInvalid when it is not there."""
    path = _path(key_path)
    document = _parsed(text)
    table: Any = document
    for part in path[:-1]:
        table = table.get(part) if isinstance(table, MutableMapping) else None
    if not isinstance(table, MutableMapping) or path[-1] not in table:
        raise ConfigInvalid(f"there is no {dotted(path)} to be removed")
    del table[path[-1]]
    return tomlkit.dumps(document)


def _path(key_path: Path) -> KeyPath:
    if not isinstance(key_path, str):
        return key_path
    try:
        here: Any = tomllib.loads(f"{key_path} = 0")
    except ValueError:
        raise ConfigInvalid(f"{key_path!r} is not a key", hint="write for example memory.size") from None
    path: list[str] = []
    while isinstance(here, dict):
        if len(here) != 1:
            raise ConfigInvalid(f"{key_path!r} is not one key")
        (part,) = here
        path.append(part)
        here = here[part]
    return tuple(path)


def _parsed(text: str) -> tomlkit.TOMLDocument:
    try:
        return tomlkit.parse(text)
    except (TOMLKitError, RecursionError) as error:
        raise ConfigInvalid(f"the file is not TOML: {error}", hint="run `kvmd-cli check`") from None


def _table_for(outer: MutableMapping[str, Any], *, super_table: bool) -> Item:
    if isinstance(outer, InlineTable):
        return tomlkit.inline_table()
    return tomlkit.table(is_super_table=super_table)


def _value(value_text: str) -> Item:
    try:
        return tomlkit.value(value_text.strip())
    except (TOMLKitError, ValueError):
        return tomlkit.string(value_text.strip())


def _verified(text: str, path: KeyPath) -> str:
    """tomlkit has written wrong TOML before: what comes out must parse and have the key."""
    try:
        here: Any = tomllib.loads(text)
        for part in path:
            here = here[part]
    except (ValueError, KeyError, TypeError):
        raise ConfigInvalid(f"{dotted(path)} cannot be set in this file", hint="edit it with `kvmd-cli edit`") from None
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class NewGuest:
    """What `create` was told. Either `image` and `image_format`, or `kernel`, or both."""

    uuid: str
    memory: Size
    vcpus: int = 1
    description: str = ""
    accel: str = "kvm"
    image: str | None = None
    image_format: str | None = None
    kernel: str | None = None
    initrd: str | None = None
    cmdline: str | None = None
    cdrom: str | None = None
    network: str | None = None
    auto: bool | None = None


def new_guest(wanted: NewGuest) -> str:
    """guests.d/NAME.toml as a person would write it."""
    return "\n".join(_guest_lines(wanted)) + "\n"


def _guest_lines(wanted: NewGuest) -> Iterator[str]:
    yield "# A guest of kvmd; it is called what this file is called. All keys: docs/reference.md."
    yield from ("", "[guest]")
    yield f'uuid = "{wanted.uuid}"  # who it is: MAC addresses derive from it'
    if wanted.description:
        yield f"description = {_quoted(wanted.description)}"
    yield from ("", "[machine]")
    yield f"accel = {_quoted(wanted.accel)}  # kvm | tcg | auto"
    yield from ("", "[cpu]", f"vcpus = {wanted.vcpus}")
    yield from ("", "[memory]", f'size = "{wanted.memory}"')
    if wanted.kernel is not None:
        yield from ("", "[boot]", f"kernel = {_quoted(wanted.kernel)}")
        for key, value in (("initrd", wanted.initrd), ("cmdline", wanted.cmdline)):
            if value is not None:
                yield f"{key} = {_quoted(value)}"
    if wanted.image is not None:
        yield from ("", "[disk.root]", f"file = {_quoted(wanted.image)}")
        yield f"format = {_quoted(wanted.image_format or 'raw')}  # never guessed: a guest can write any header"
    if wanted.cdrom is not None:
        yield from ("", "[disk.cdrom]", f"file = {_quoted(wanted.cdrom)}", 'format = "raw"', 'media = "cdrom"')
    yield from ("", "[nic.lan]" if wanted.network is not None else "[nic.net0]")
    if wanted.network is not None:
        yield f"network = {_quoted(wanted.network)}  # networks.d/{wanted.network}.toml"
    else:
        yield 'type = "user"  # NAT inside QEMU: out, but nothing comes in'
    yield from ("", "[serial.console]", "log = true  # kvmd-cli console NAME, kvmd-cli logs NAME")
    if wanted.auto is not None:
        yield from ("", "[start]", f"auto = {'true' if wanted.auto else 'false'}  # with the host")


def _quoted(text: str) -> str:
    return tomlkit.string(text).as_string()
