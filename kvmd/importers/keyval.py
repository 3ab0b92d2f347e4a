"""QEMU's own syntax for the value of an option: `word,key=value,key=a,,b` or JSON. Pure.

As util/keyval.c and util/qemu-option.c have it: a comma inside a value is doubled, a word without `=` is the implied
key's value when it comes first and `word=on` later (`noword` is `word=off`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_ON, _OFF = frozenset({"on", "yes", "true", "y"}), frozenset({"off", "no", "false", "n"})
_BARE = frozenset({"server", "wait", "readonly", "nodelay", "telnet", "snapshot", "vhost", "ipv4", "ipv6", "password"})
_BARE |= frozenset({"sasl", "tls", "websocket", "lossy", "share", "prealloc", "multifunction", "menu", "strict", "on"})


def split(text: str) -> list[str]:
    """The parts between single commas; a doubled comma is one inside."""
    parts, current, at = [], "", 0
    while at < len(text):
        if text[at] == ",":
            if text[at + 1 : at + 2] == ",":
                current += ","
                at += 2
                continue
            parts.append(current)
            current = ""
        else:
            current += text[at]
        at += 1
    return [*parts, current]


def _add(found: dict[str, str], key: str, value: str) -> None:
    """A key given again is kept beside the first, as key#2: some lists are written so (hostfwd=…,hostfwd=…)."""
    name, number = key, 1
    while name in found:
        number += 1
        name = f"{key}#{number}"
    found[name] = value


def parse(text: str, implied: str | None = None) -> dict[str, str]:
    """Keys in order with their values, as text; one given twice is key and key#2. JSON is flattened (a.b=1).

    ValueError for JSON that is none.
    """
    if text.startswith("{"):
        return flatten(json.loads(text))
    found: dict[str, str] = {}
    for number, part in enumerate(split(text)):
        key, equals, value = part.partition("=")
        if equals:
            _add(found, key.strip(), value)
        elif number == 0 and implied is not None:
            found[implied] = part
        elif part.startswith("no") and part[2:] in _BARE:
            found[part[2:]] = "off"
        elif part:
            found[part] = "on"
    return found


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested JSON as dotted keys; booleans as on and off, lists by number."""
    found: dict[str, str] = {}
    for key, inner in value.items():
        path = f"{prefix}{key}"
        if isinstance(inner, Mapping):
            found |= flatten(inner, f"{path}.")
        elif isinstance(inner, list):
            found |= flatten({str(number): item for number, item in enumerate(inner)}, f"{path}.")
        elif isinstance(inner, bool):
            found[path] = "on" if inner else "off"
        else:
            found[path] = str(inner)
    return found


def boolean(text: str) -> bool:
    """on, yes, true; off, no, false. ValueError for anything else."""
    if text in _ON:
        return True
    if text in _OFF:
        return False
    raise ValueError(f"{text!r} is neither on nor off")
