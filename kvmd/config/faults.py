"""pydantic's findings in kvmd's words: what was given, what is wanted, an example, the near match."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kvmd.config.catalogue import MODELS, FileKind, KeyInfo, fields, generic, inner, keys_of, near
from kvmd.config.desired import Severity
from kvmd.config.key import LATER, quote
from kvmd.config.lines import KeyPath, dotted
from kvmd.config.scalars import described

H = TypeVar("H", bound=Hashable)

MAX_SHOWN = 50
_SUGGESTED = 20  # near matches looked up per file: they cost about a millisecond each


@dataclass(frozen=True, slots=True)
class Complaint:
    """A fault before its file and line are known. `given` is False for a key that is missing."""

    path: KeyPath
    message: str
    hint: str | None = None
    severity: Severity = "error"
    given: bool = True


def complaints(kind: FileKind, error: ValidationError) -> list[Complaint]:
    """All findings of one validation, at most MAX_SHOWN and one that counts the rest."""
    details = error.errors(include_url=False)
    found = [_complaint(kind, detail, suggest=number < _SUGGESTED) for number, detail in enumerate(details[:MAX_SHOWN])]
    if len(details) > MAX_SHOWN:
        found.append(Complaint((), f"{len(details) - MAX_SHOWN} more faults in this file are not shown"))
    return found


def _complaint(kind: FileKind, detail: ErrorDetails, *, suggest: bool) -> Complaint:
    loc = detail["loc"]
    if loc and loc[-1] == "[key]":
        return Complaint(_strings(loc[:-1]), _own_words(detail))
    path = _strings(loc)
    info = keys_of(kind).get(".".join(generic(kind, path)))
    if info is None and len(path) > 1:  # an entry of a table without a model, such as cpu.features
        info = keys_of(kind).get(".".join(generic(kind, path[:-1])))
    match detail["type"]:
        case "extra_forbidden":
            meant = near(kind, path) if suggest else None
            return Complaint(path, "unknown key", f"did you mean {meant}?" if meant else None)
        case "missing" if isinstance(loc[-1], str):
            return _missing(kind, path, info)
        case kind_of if kind_of == LATER:
            return _later(path, info, detail["ctx"]["what"])
        case _:
            return Complaint(path, _message(kind, path, info, detail), _hint(info, detail))


def _strings(loc: tuple[int | str, ...]) -> KeyPath:
    """The key path; positions in lists are left out, since the key's line is the list's."""
    return tuple(part for part in loc if isinstance(part, str))


def _own_words(detail: ErrorDetails) -> str:
    error = detail.get("ctx", {}).get("error")
    return str(error) if isinstance(error, ValueError) else detail["msg"]


def _missing(kind: FileKind, path: KeyPath, info: KeyInfo | None) -> Complaint:
    if info is not None:
        return Complaint(path, "is required", f"for example {path[-1]} = {info.example}", given=False)
    prefix = ".".join(generic(kind, path)) + "."
    needed = [row for name, row in keys_of(kind).items() if name.startswith(prefix) and row.required]
    inside = " and ".join(f"{row.path.removeprefix(prefix)} = {row.example}" for row in needed)
    return Complaint(path, f"the table [{dotted(path)}] is required", f"with {inside}" if inside else None, given=False)


def _later(path: KeyPath, info: KeyInfo | None, what: str) -> Complaint:
    if not what:
        return Complaint(path, "not supported yet")
    now = f"supported: {info.type.replace(' | ', ', ')}" if info is not None and info.type.startswith('"') else None
    return Complaint(path, f"{what} is not supported yet", now)


def _message(kind: FileKind, path: KeyPath, info: KeyInfo | None, detail: ErrorDetails) -> str:
    given, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "value_error":
            return _own_words(detail)
        case "literal_error" if isinstance(given, str) or (info is not None and " | " not in info.type):
            return _not_among(_shown(given), info)
        case "greater_than_equal" | "less_than_equal":
            bound = f"at least {context['ge']}" if "ge" in context else f"at most {context['le']}"
            return f"{_shown(given)} is out of range: {bound}"
        case "string_too_long":
            return f"has {len(given)} characters; at most {context['max_length']}"
        case "model_type" | "model_attributes_type" | "mapping_type" | "dict_type":
            return f"is a table, not {described(given)}: write [{dotted(_table_header(kind, path))}] and its keys below"
        case _ if info is None:
            return f"wants something else than {described(given)}"
        case _:
            return f"wants {_wanted(info)}, for example {info.example}; {_given(detail)}"


def _given(detail: ErrorDetails) -> str:
    """What was found instead, and where in a list."""
    given, place = detail["input"], detail["loc"][-1]
    if isinstance(given, list | tuple):
        return f"this list has {len(given)}" if detail["type"] in ("missing", "too_long") else "this is a list"
    return f"item {place + 1} is {described(given)}" if isinstance(place, int) else f"this is {described(given)}"


def _table_header(kind: FileKind, path: KeyPath) -> KeyPath:
    """`disk` itself is no table to be written, `disk.NAME` is."""
    model, by_name = MODELS[kind], False
    for part in generic(kind, path):
        if by_name:
            by_name = False
            continue
        field = fields(model).get(part)
        table, by_name = inner(field) if field is not None else (None, False)
        if table is None:
            return path
        model = table
    return (*path, "NAME") if by_name else path


def _options(info: KeyInfo | None) -> list[str]:
    return info.type.removeprefix("list of (").removesuffix(")").split(" | ") if info is not None else []


def _not_among(given: str, info: KeyInfo | None) -> str:
    options = _options(info)
    if len(options) == 1:
        return f"{given} is not supported; the only value is {options[0]}"
    return f"{given} is not one of {', '.join(options)}"


def _wanted(info: KeyInfo) -> str:
    match info.type:
        case "number":
            return "a whole number"
        case "boolean":
            return "true or false, without quotes"
        case "text":
            return "text in quotes"
        case "table of boolean":
            return "a table of names with true or false"
        case choice if choice.startswith('"') and " | " in choice:
            return f"one of {choice.replace(' | ', ', ')}"
        case other if other.startswith("list"):
            return f"a {other}"
        case other:
            return other


def _shown(value: Any) -> str:
    return quote(value) if isinstance(value, str | int | float) else described(value)


def _hint(info: KeyInfo | None, detail: ErrorDetails) -> str | None:
    given = detail["input"]
    if info is None or detail["type"] != "literal_error" or not isinstance(given, str):
        return None
    options = [option.strip('"') for option in _options(info)]
    close = difflib.get_close_matches(given[:60].lower(), options, n=1)
    return f'did you mean "{close[0]}"?' if close else None


def present(data: Mapping[str, Any], path: KeyPath) -> bool:
    """Whether the file's data has this key."""
    here: object = data
    for part in path:
        if not isinstance(here, Mapping) or part not in here:
            return False
        here = here[part]
    return True


def at_most(found: Iterator[Complaint]) -> list[Complaint]:
    """What a rule set found, cut like `complaints`."""
    every = list(found)
    rest = len(every) - MAX_SHOWN
    return every if rest <= 0 else [*every[:MAX_SHOWN], Complaint((), f"{rest} more faults in this file are not shown")]


def twice(items: Iterable[tuple[str, H | None]]) -> Iterator[tuple[str, str, H]]:
    """(later name, earlier name, value) of each value that several have; None does not count."""
    names: dict[H, list[str]] = defaultdict(list)
    for name, value in items:
        if value is not None:
            names[value].append(name)
    for value, having in names.items():
        for name in having[1:]:
            yield name, having[0], value
