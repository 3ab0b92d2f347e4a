"""One file's text made into a table, with its faults placed at file and line. Pure."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvmd.config.desired import Fault
from kvmd.config.faults import Complaint, present
from kvmd.config.files import shown
from kvmd.config.lines import KeyPath, TooDeep, check_depth, dotted, line_map

_TUPLE = re.compile(r"\((?:'[^']*',? ?)+\)")  # how tomllib writes a key
_WHERE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


@dataclass(slots=True)
class Document:
    """A file that parsed. The line map is made when the first fault asks for it: a clean file never pays."""

    file: str
    raw: bytes
    text: str
    data: dict[str, Any]
    _lines: Mapping[KeyPath, int] | None = field(default=None, repr=False)

    def line(self, path: KeyPath) -> int | None:
        """Line of the key, or of the nearest table round it; None if the file has none of them."""
        if self._lines is None:
            self._lines = line_map(self.text)
        for length in range(len(path), 0, -1):
            if (found := self._lines.get(path[:length])) is not None:
                return found
        return None

    def fault(self, complaint: Complaint, below: Document | None = None) -> Fault:
        """The complaint with its place. `below` is the profile: the fault is there if the key is only there."""
        owner = self
        if below is not None and complaint.given and complaint.path:
            in_profile = present(below.data, complaint.path) and not present(self.data, complaint.path)
            owner = below if in_profile else self
        return Fault(
            file=shown(owner.file),
            line=owner.line(complaint.path),
            key=dotted(complaint.path) or None,
            message=complaint.message if owner is self else f"{complaint.message}, with {shown(self.file)}",
            hint=complaint.hint,
            severity=complaint.severity,
        )


def parse(file: str, raw: bytes) -> Document | Fault:
    """The file as a table, or the one fault that says why it is none."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return Fault(shown(file), line, None, f"is not UTF-8: byte 0x{raw[error.start]:02x} cannot be there")
    if text.startswith("\ufeff"):
        hint = "save it without one"
        return Fault(shown(file), 1, None, "begins with a byte order mark, which TOML does not allow", hint)
    try:
        check_depth(text)
        return Document(file, raw, text, tomllib.loads(text))
    except TooDeep as error:
        return Fault(shown(file), error.line, None, error.message)
    except RecursionError:
        return Fault(shown(file), None, None, "is nested too deeply")
    except ValueError as error:
        return _syntax(file, text, str(error))


def _syntax(file: str, text: str, message: str) -> Fault:
    """tomllib's message with its place taken out and put in front; a column is a character."""
    place = _WHERE.search(message)
    if place is None:
        short = "a number has too many digits" if "integer string conversion" in message else message
        return Fault(shown(file), None, None, f"not TOML: {short}")
    line = int(place[1]) if place[1] else text.count("\n", 0, len(text.rstrip("\n"))) + 1
    column = f" (column {place[2]})" if place[2] else " (end of the file)"
    plain = _TUPLE.sub(lambda found: dotted(tuple(re.findall("'([^']*)'", found[0]))), message[: place.start()])
    return Fault(shown(file), line, None, f"not TOML: {plain}{column}")


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`: tables are merged key by key, everything else is replaced."""
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        result[key] = merged(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return result


def faults(document: Document, complaints: Iterable[Complaint], below: Document | None = None) -> list[Fault]:
    """All complaints placed."""
    return [document.fault(complaint, below) for complaint in complaints]
