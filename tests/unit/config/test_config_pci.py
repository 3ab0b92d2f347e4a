"""PCI functions and spans: written short or long, a span as a subnet of the bus numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from kvmd.config.pci import PciFunction, PciSpan, PciSpanT, function_number

FUNCTION: TypeAdapter[str] = TypeAdapter(PciFunction)
SPAN: TypeAdapter[PciSpan] = TypeAdapter(PciSpanT)


def address(domain: int, bus: int, device: int, function: int) -> str:
    return f"{domain:04x}:{bus:02x}:{device:02x}.{function}"


addresses = st.builds(address, st.integers(0, 3), st.integers(0, 255), st.integers(0, 31), st.integers(0, 7))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3b:00.1", "0000:3b:00.1"),
        ("0000:3B:1f.7", "0000:3b:1f.7"),
        ("10000:e1:00.0", "10000:e1:00.0"),  # behind an Intel VMD
    ],
)
def test_function(text: str, found: str) -> None:
    assert FUNCTION.validate_python(text) == found


@pytest.mark.parametrize(
    "text", ["", "3b", "3b:20.0", "3b:00.8", "0000:3b:00.0 ", "00:3b:00.0", "0000:3b:00.0\n", "g0:00.0"]
)
def test_no_function(text: str) -> None:
    with pytest.raises(ValueError, match="is not a PCI function"):
        FUNCTION.validate_python(text)


@pytest.mark.parametrize(
    ("span", "inside", "outside"),
    [
        ("0000:3b:00.0/24", ["0000:3b:00.0", "0000:3b:1f.7"], ["0000:3c:00.0", "0001:3b:00.0", "0000:3a:1f.7"]),
        ("0000:3b:02.0/29", ["0000:3b:02.0", "0000:3b:02.7"], ["0000:3b:03.0", "0000:3b:01.7"]),
        ("0000:3b:00.0/32", ["0000:3b:00.0"], ["0000:3b:00.1"]),
        ("3b:00.0", ["0000:3b:00.0"], ["0000:3b:00.1"]),
        ("0000:b0:00.0/20", ["0000:b0:00.0", "0000:bf:1f.7"], ["0000:c0:00.0", "0000:af:1f.7"]),
        ("10000:e1:00.0/24", ["10000:e1:00.0"], ["0000:e1:00.0"]),
    ],
)
def test_span(span: str, inside: list[str], outside: list[str]) -> None:
    found = SPAN.validate_python(span)
    assert [text for text in inside if text not in found] == []
    assert [text for text in outside if text in found] == []


@given(addresses, addresses, st.integers(20, 32))
def test_a_span_is_what_shares_its_first_bits(first: str, other: str, prefix: int) -> None:
    bits = function_number(first) >> (32 - prefix) << (32 - prefix)
    start = address(bits >> 16, bits >> 8 & 0xFF, bits >> 3 & 0x1F, bits & 7)
    span = SPAN.validate_python(f"{start}/{prefix}")
    assert first in span
    assert (other in span) == (f"{function_number(other):048b}"[: 16 + prefix] == f"{bits:048b}"[: 16 + prefix])
    assert SPAN.validate_python(str(span)) == span
