"""The model table as a list: one row per key of every file, made from the models.

The reference, near matches, completion and the words of type errors all read this; nothing else lists keys.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from kvmd.config.daemon import Daemon
from kvmd.config.guest import Guest
from kvmd.config.host import Host
from kvmd.config.key import Applies, Kind, Table, meta_of
from kvmd.config.lines import KeyPath
from kvmd.config.network import Network
from kvmd.config.scalars import UidRange
from kvmd.units import CpuSet, Duration, Percent, Size

FileKind = Literal["kvmd.toml", "host.toml", "networks.d", "guests.d"]
MODELS: Mapping[FileKind, type[Table]] = {
    "kvmd.toml": Daemon,
    "host.toml": Host,
    "networks.d": Network,
    "guests.d": Guest,
}
_PLACEHOLDERS = {"hugepages": "SIZE", "sriov": "NIC"}
_PLAIN: Mapping[object, tuple[str, str]] = {
    bool: ("boolean", "true"),
    int: ("number", "4"),
    str: ("text", '"..."'),
    float: ("number", "4.0"),
    type(None): ("", ""),
}


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One key of one kind of file. All texts; `default` and `example` are TOML. JSON-able by `asdict`."""

    file: FileKind
    path: str
    type: str
    default: str
    required: bool
    unit: str
    applies: Applies
    classic: str
    needs: str
    example: str
    doc: str
    later: bool
    later_values: tuple[str, ...]


@cache
def catalogue() -> tuple[KeyInfo, ...]:
    """Every key of every file, in the order of the models."""
    return tuple(row for kind, model in MODELS.items() for row in _rows(kind, model, (), later=False))


@cache
def keys_of(kind: FileKind) -> Mapping[str, KeyInfo]:
    """The rows of one kind of file by path."""
    return {row.path: row for row in catalogue() if row.file == kind}


def fields(model: type[Table]) -> Mapping[str, FieldInfo]:
    """The model's fields by the name they have in a file."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def inner(field: FieldInfo) -> tuple[type[Table] | None, bool]:
    """The table class a field holds, and whether it holds it by name (`[disk.NAME]`)."""
    candidates = [field.annotation, *get_args(field.annotation)]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, Table):
            return candidate, get_origin(field.annotation) is Mapping
    return None, False


def generic(kind: FileKind, path: KeyPath) -> KeyPath:
    """`disk.root.file` -> `disk.NAME.file`: the path as the catalogue spells it."""
    model: type[Table] | None = MODELS[kind]
    result: list[str] = []
    rest = list(path)
    while rest:
        part = rest.pop(0)
        result.append(part)
        field = fields(model).get(part) if model else None
        model, by_name = inner(field) if field else (None, False)
        if by_name and rest:
            rest.pop(0)
            result.append(_PLACEHOLDERS.get(part, "NAME"))
    return tuple(result)


def near(kind: FileKind, path: KeyPath) -> str | None:
    """The key probably meant by an unknown one, with the names of `path` filled in. None if nothing is close."""
    wanted = generic(kind, path)
    table, last = wanted[:-1], wanted[-1]
    rows = [row.path for row in keys_of(kind).values() if not row.later]
    siblings = {
        parts[len(table)]
        for parts in (tuple(row.split(".")) for row in rows)
        if parts[: len(table)] == table and len(parts) > len(table)
    }
    same = [row for row in rows if row.rpartition(".")[2] == last]
    if same and not table:  # a key written above the first table
        return same[0]
    if close := difflib.get_close_matches(last, sorted(siblings), n=1, cutoff=0.6):
        return ".".join((*path[:-1], close[0]))
    if same:
        return same[0]
    elsewhere = [row for row in rows if not row.startswith(".".join((*table, "")))]
    close = difflib.get_close_matches(".".join(wanted), elsewhere, n=1, cutoff=0.75)
    return close[0] if close else None


def _rows(kind: FileKind, model: type[Table], prefix: KeyPath, *, later: bool) -> Iterator[KeyInfo]:
    for name, field in fields(model).items():
        meta = meta_of(field)
        table, by_name = inner(field)
        path = (*prefix, name)
        if table is not None:
            below = (*path, _PLACEHOLDERS.get(name, "NAME")) if by_name else path
            yield from _rows(kind, table, below, later=later or meta.later)
            continue
        kind_name, kind_example = _type(field)
        yield KeyInfo(
            file=kind,
            path=".".join(path),
            type=meta.type_text or kind_name,
            default=meta.default_text or ("" if field.is_required() else literal(field.get_default())),
            required=field.is_required(),
            unit=meta.unit,
            applies=meta.applies,
            classic=meta.classic,
            needs=meta.needs,
            example=meta.example or _example(field, kind_example),
            doc=meta.doc,
            later=later or meta.later,
            later_values=tuple(literal(value) for value in meta.later_values),
        )


def _example(field: FieldInfo, of_kind: str) -> str:
    """The default shows the form of a number or a text; a boolean's and a list's own example says more."""
    default = None if field.is_required() else field.get_default()
    return literal(default) if default and not isinstance(default, bool | tuple) else of_kind


def literal(value: object) -> str:
    """A default as TOML; "" for None."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case UidRange():
            return f'"{value.first}-{value.last}"'
        case Size() | Duration() | Percent() | CpuSet() | str():
            return f'"{value}"'
        case tuple():
            return "[" + ", ".join(literal(item) for item in value) + "]"
        case Mapping():
            return "{}"
        case _:
            return str(value)


def _type(field: FieldInfo) -> tuple[str, str]:
    """Name and example of a field's type."""
    for extra in field.metadata:
        if isinstance(extra, Kind):
            return extra.name, extra.example
    return _named(field.annotation)


def _named(annotation: Any) -> tuple[str, str]:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        for extra in args[1:]:
            if isinstance(extra, Kind):
                return extra.name, extra.example
        return _named(args[0])
    if origin in (typing.Union, types.UnionType):
        return _named(next(arg for arg in args if arg is not type(None)))
    if origin is Literal:
        if args == (False,):
            return "boolean", "false"
        return " | ".join(literal(arg) for arg in args), literal(args[-1])
    if origin is tuple:
        name, example = _named(args[0])
        name = f"({name})" if " | " in name else name
        several = name if name.startswith("(") or " or " in name else f"{name}{'es' if name.endswith('s') else 's'}"
        many = f"list of {several}" if Ellipsis in args else f"list of {len(args)} {several}"
        return many, f"[{example}]"
    if origin is Mapping:
        name, example = _named(args[1])
        return f"table of {name}", f"{{ NAME = {example} }}"
    return _PLAIN[annotation]
