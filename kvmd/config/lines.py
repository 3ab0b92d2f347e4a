"""On which line of a TOML file each key stands, and whether the file is nested too deeply to be parsed.

tomllib tells neither. This scanner follows the grammar of TOML 1.0 (toml.io/en/v1.0.0) as far as needed to find
keys; it accepts more than the grammar does, never raises on any text, and always ends.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping
from contextlib import suppress

KeyPath = tuple[str, ...]

MAX_DEPTH = 32  # the deepest legal file of kvmd has 4
MAX_PARTS = 32

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"[ \t]*")
_BLANK_LINES = re.compile(r"(?:[ \t\n]+|#[^\n]*)*")
_SCALAR = re.compile(r"[^,\]}\n#]*")
_REST = re.compile(r"[^\n]*")
_BASIC = re.compile(r'"((?:[^"\\\n]|\\[^\n])*)"')
_LITERAL = re.compile(r"'([^'\n]*)'")
_BASIC_LINES = re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}', re.DOTALL)
_LITERAL_LINES = re.compile(r"'''.*?'{3,5}", re.DOTALL)
_ESCAPE = re.compile(r"\\(u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)")
_ESCAPES = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", '"': '"', "\\": "\\"}


class TooDeep(Exception):
    """Nested beyond MAX_DEPTH, or a key of more than MAX_PARTS parts; `line` says where."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


def check_depth(text: str) -> None:
    """Raises TooDeep for a text that could exhaust the parser's stack.

    Almost every file passes by counting brackets and dots alone; only the others are scanned.
    """
    if text.count("[") + text.count("{") > MAX_DEPTH or any(line.count(".") > MAX_PARTS for line in text.split("\n")):
        _Scanner(text).run()


def line_map(text: str) -> Mapping[KeyPath, int]:
    """Line (from 1) of the first mention of every key and table. Elements of arrays have no number in the path."""
    scanner = _Scanner(text)
    with suppress(TooDeep):  # what was found before is still right
        scanner.run()
    return scanner.found


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", "\n")
        self.pos = 0
        self.found: dict[KeyPath, int] = {}
        self._newlines = [match.start() for match in re.finditer("\n", self.text)]

    def run(self) -> None:
        """Fills `found`. Raises TooDeep."""
        table: KeyPath = ()
        while True:
            self._skip(_BLANK_LINES)
            if self.pos >= len(self.text):
                return
            if self._peek() == "[":
                while self._peek() == "[":
                    self.pos += 1
                table = self._key(()) or table
                self._skip(_REST)
            else:
                self._pair(table, 0)
                self._skip(_REST)

    def _pair(self, table: KeyPath, depth: int) -> None:
        """`key = value`, or nothing recognisable: then the position does not move beyond the key."""
        path = self._key(table)
        self._skip(_BLANK)
        if path is not None and self._peek() == "=":
            self.pos += 1
            self._skip(_BLANK)
            self._value(path, depth)

    def _key(self, table: KeyPath) -> KeyPath | None:
        """A dotted key, recorded with each of its prefixes. None if there is none."""
        path = table
        while True:
            self._skip(_BLANK)
            start = self.pos
            part = self._part()
            if part is None:
                return None
            path = (*path, part)
            self.found.setdefault(path, self._line(start))
            if len(path) > MAX_PARTS:
                raise TooDeep(self._line(start), f"a key of more than {MAX_PARTS} parts")
            self._skip(_BLANK)
            if self._peek() != ".":
                return path
            self.pos += 1

    def _part(self) -> str | None:
        if (bare := _BARE.match(self.text, self.pos)) is not None:
            self.pos = bare.end()
            return bare[0]
        if (literal := _LITERAL.match(self.text, self.pos)) is not None:
            self.pos = literal.end()
            return literal[1]
        if (basic := _BASIC.match(self.text, self.pos)) is not None:
            self.pos = basic.end()
            return _ESCAPE.sub(_unescape, basic[1])
        return None

    def _value(self, path: KeyPath, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise TooDeep(self._line(self.pos), f"nested more than {MAX_DEPTH} deep")
        match self._peek():
            case '"' | "'":
                self._string()
            case "[":
                self._array(path, depth)
            case "{":
                self._inline_table(path, depth)
            case _:
                self._skip(_SCALAR)

    def _string(self) -> None:
        for pattern in (_BASIC_LINES, _LITERAL_LINES, _BASIC, _LITERAL):
            if (found := pattern.match(self.text, self.pos)) is not None:
                self.pos = found.end()
                return
        self._skip(_REST)

    def _array(self, path: KeyPath, depth: int) -> None:
        self.pos += 1
        while self.pos < len(self.text):
            self._skip(_BLANK_LINES)
            match self._peek():
                case "]":
                    self.pos += 1
                    return
                case ",":
                    self.pos += 1
                case "}":
                    return
                case _:
                    before = self.pos
                    self._value(path, depth + 1)
                    if self.pos == before:
                        return

    def _inline_table(self, path: KeyPath, depth: int) -> None:
        self.pos += 1
        while self.pos < len(self.text):
            self._skip(_BLANK)
            match self._peek():
                case "}":
                    self.pos += 1
                    return
                case ",":
                    self.pos += 1
                case _:
                    before = self.pos
                    self._pair(path, depth + 1)
                    if self.pos == before:
                        return

    def _peek(self) -> str:
        return self.text[self.pos : self.pos + 1]

    def _skip(self, pattern: re.Pattern[str]) -> None:
        found = pattern.match(self.text, self.pos)
        if found is not None:
            self.pos = found.end()

    def _line(self, pos: int) -> int:
        return bisect_left(self._newlines, pos) + 1


def _unescape(found: re.Match[str]) -> str:
    code = found[1]
    if code[0] in "uU" and len(code) > 1:
        number = int(code[1:], 16)
        return chr(number) if number < 0x110000 else ""
    return _ESCAPES.get(code, "")


def dotted(path: KeyPath) -> str:
    """The path as one would write it: bare parts as they are, others quoted with what is unprintable escaped."""
    return ".".join(part if _BARE.fullmatch(part) else _quoted(part) for part in path)


def _quoted(part: str) -> str:
    shown = part if len(part) <= 60 else part[:60] + "..."
    escaped = "".join(char if char.isprintable() and char != '"' else f"\\u{ord(char):04x}" for char in shown)
    return f'"{escaped}"'
