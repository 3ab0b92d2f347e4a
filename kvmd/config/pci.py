"""PCI functions and spans of them, as files name them: "0000:3b:00.1", "0000:3b:00.0/24".

A function's number is domain, bus, device and function side by side: 16, 8, 5 and 3 bits. A span keeps the first so
many of these 32 bits, as a subnet does: /32 is one function, /29 a device with all its functions, /24 a bus.
"""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from pydantic import PlainValidator

from kvmd.config.key import Kind, quote
from kvmd.config.scalars import described, interface_name

# A domain has 16 bits, except behind an Intel VMD, where it starts at 10000 (drivers/pci/controller/vmd.c).
_FUNCTION = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])")
_SPAN = re.compile(r"(\S+)/(\d{1,2})")
_BITS = 32
_WIDEST = 20  # 16 buses; what is wider is no list of devices any more


def function_number(address: str) -> int:
    """Its bits: domain << 16 | bus << 8 | device << 3 | function. ValueError for anything but a full address."""
    found = _FUNCTION.fullmatch(address)
    if found is None or found[1] is None:
        raise ValueError(f"{quote(address)} is not a PCI function")
    domain, bus, device, function = (int(part, 16) for part in found.groups())
    return domain << 16 | bus << 8 | device << 3 | function


class PciSpan(NamedTuple):
    """All functions that share the first `prefix` bits with `first`."""

    first: str
    prefix: int

    def __contains__(self, address: object) -> bool:
        """Whether the function lies in it."""
        if not isinstance(address, str):
            return False
        shift = _BITS - self.prefix
        return function_number(address) >> shift == function_number(self.first) >> shift

    def __str__(self) -> str:
        return self.first if self.prefix == _BITS else f"{self.first}/{self.prefix}"


def _function(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f'wants a PCI function in quotes, for example "0000:3b:00.0"; this is {described(value)}')
    found = _FUNCTION.fullmatch(value.lower())
    if found is None:
        raise ValueError(f'{quote(value)} is not a PCI function: write for example "0000:3b:00.0", as `lspci -D` does')
    return f"{found[1] or '0000'}:{found[2]}:{found[3]}.{found[4]}"


def _span(value: object) -> PciSpan:
    if isinstance(value, PciSpan):
        return value
    found = _SPAN.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return PciSpan(_function(value), _BITS)
    first, prefix = _function(found[1]), int(found[2])
    if not _WIDEST <= prefix <= _BITS:
        raise ValueError(
            f"{quote(value)}: a prefix from /{_WIDEST} to /{_BITS} is wanted (/24 a bus, /29 a device, /32 a function)"
        )
    number, shift = function_number(first), _BITS - prefix
    if number >> shift << shift != number:
        start = _address(number >> shift << shift)
        raise ValueError(f'{quote(value)}: the span begins at {start}; write "{start}/{prefix}"')
    return PciSpan(first, prefix)


def _address(number: int) -> str:
    return f"{number >> 16:04x}:{number >> 8 & 0xFF:02x}:{number >> 3 & 0x1F:02x}.{number & 7}"


def _pool(value: object) -> str:
    """A NIC by its interface, or any device by its address (a storage controller has no interface)."""
    return _function(value) if isinstance(value, str) and ":" in value else interface_name(value)


PciFunction = Annotated[str, PlainValidator(_function), Kind("PCI function", '"0000:3b:00.0"')]
PciSpanT = Annotated[PciSpan, PlainValidator(_span), Kind("PCI function or span", '"0000:3b:00.0/24"')]
PoolName = Annotated[str, PlainValidator(_pool), Kind("interface name or PCI function", '"enp59s0f0"')]
