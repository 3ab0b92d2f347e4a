"""Text on QEMU's command line: JSON where QEMU takes it, doubled commas where it does not.

No string from a file may become another option. JSON needs no quoting rules of ours; in key=value syntax a comma
inside a value is written twice (QEMU's manual page, "-name").
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from kvmd.qemu.caps import Capabilities

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def to_json(value: Mapping[str, object]) -> str:
    """One line of JSON, keys in the order given."""
    return _ENCODER.encode(value)


def double(text: str) -> str:
    """A text as one value in key=value syntax."""
    return text.replace(",", ",,")


def device_args(caps: Capabilities, key: str, device: Mapping[str, object]) -> list[str]:
    """One -device, for `key` of the file. Raises NotSupported when this QEMU lacks the device or a property of it."""
    caps.require_device(device, key)
    return ["-device", to_json(device)]
