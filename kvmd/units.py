"""Quantities as people write them, and back: sizes, durations, rates, percents, CPU sets.

Sizes are binary only ("8G" is "8GiB"); a decimal "8GB" or a bare number is refused with the replacement.
Each type's `str()` is a spelling its own `parse` accepts. Standard library only: the client imports this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_SIZE_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE_SPELLINGS = {"K": "KiB", "M": "MiB", "G": "GiB", "T": "TiB"} | {unit: unit for unit in _SIZE_UNITS}
_DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MAX_SIZE = 1 << 62

_DURATION_UNITS = {"ms": 0.001, "s": 1, "sec": 1, "min": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|sec|s|min|h|d)")

_RATE_UNITS = {"bit": 1, "Kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9}
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")

MAX_CPU = 8191  # CONFIG_NR_CPUS's ceiling on x86 (8192)


class Size(int):
    """Bytes. `Size.parse("1.5GiB")`, `str(Size(2 << 20)) == "2MiB"`."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Size:
        """Bytes from "512MiB", "8G", "1.5T". Raises ValueError with the spelling to use instead."""
        found = _SIZE.fullmatch(text.strip())
        if not found:
            raise ValueError(f'"{text}" is not a size: write a number and a unit, for example "512MiB" or "8GiB"')
        number, unit = found[1], found[2]
        if unit in _SIZE_SPELLINGS:
            whole, _, fraction = number.partition(".")
            scaled, rest = divmod(int(whole + fraction) * _SIZE_UNITS[_SIZE_SPELLINGS[unit]], 10 ** len(fraction))
        elif unit == "":
            if float(number) == 0:
                return cls(0)
            raise ValueError(f'"{text}" has no unit: write "{number}MiB" or "{number}GiB"')
        elif unit.upper() in _DECIMAL:
            nearest = cls(round(float(number) * _DECIMAL[unit.upper()]))
            meant = unit[0].upper() + "iB" if len(unit) > 1 else "KiB"
            raise ValueError(f'"{text}" is decimal ({int(nearest)} bytes); sizes are binary: write "{number}{meant}"')
        else:
            raise ValueError(f'"{text}": unknown unit "{unit}"; one of KiB, MiB, GiB, TiB')
        if rest or scaled > MAX_SIZE:
            raise ValueError(f'"{text}" is not a whole number of bytes below 4EiB')
        return cls(scaled)

    def __str__(self) -> str:
        value = int(self)
        for unit in ("TiB", "GiB", "MiB", "KiB"):
            if value and value % _SIZE_UNITS[unit] == 0:
                return f"{value // _SIZE_UNITS[unit]}{unit}"
        if value == 0:
            return "0"
        whole, rest = divmod(value, 1024)
        return f"{whole}.{rest * 10**10 // 1024:010d}".rstrip("0") + "KiB"

    def human(self) -> str:
        """At most one decimal, for people: "1.4 GiB"."""
        value = float(self)
        for unit in ("B", "KiB", "MiB", "GiB"):
            if abs(value) < 1024:
                return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
            value /= 1024
        return f"{value:.1f} TiB"


class Duration(float):
    """Seconds. `Duration.parse("3min") == 180`."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Seconds from "500ms", "30s", "3min", "12h", "90d". Raises ValueError."""
        found = _DURATION.fullmatch(text.strip())
        if not found:
            raise ValueError(f'"{text}" is not a duration: write for example "500ms", "30s", "3min", "12h", "90d"')
        return cls(float(found[1]) * _DURATION_UNITS[found[2]])

    def __str__(self) -> str:
        value = float(self)
        for unit in ("d", "h", "min"):
            if value and value % _DURATION_UNITS[unit] == 0:
                return f"{value / _DURATION_UNITS[unit]:.0f}{unit}"
        return f"{value:g}s" if value >= 1 or value == 0 else f"{value * 1000:g}ms"


class Rate(int):
    """Bits a second. `Rate.parse("100Mbit") == 100_000_000`."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Bits a second from "100Mbit". Raises ValueError."""
        found = _RATE.fullmatch(text.strip())
        if not found or found[2] not in _RATE_UNITS:
            raise ValueError(f'"{text}" is not a bandwidth: write for example "100Mbit" or "2Gbit"')
        return cls(round(float(found[1]) * _RATE_UNITS[found[2]]))

    def __str__(self) -> str:
        value = int(self)
        for unit in ("Gbit", "Mbit", "Kbit"):
            if value and value % _RATE_UNITS[unit] == 0:
                return f"{value // _RATE_UNITS[unit]}{unit}"
        return f"{value}bit"


class Percent(float):
    """A share of one: `Percent.parse("10%") == 0.1`."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Percent:
        """A share from "10%". Raises ValueError."""
        found = _PERCENT.fullmatch(text.strip())
        if not found or float(found[1]) > 100:
            raise ValueError(f'"{text}" is not a percentage: write for example "10%"')
        return cls(float(found[1]) / 100)

    def __str__(self) -> str:
        return f"{float(self) * 100:g}%"


class CpuSet(frozenset[int]):
    """CPU numbers in the kernel's list format: `CpuSet.parse("0-3,8")`, `str()` gives it back sorted."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> CpuSet:
        """CPUs from "0-3,8"; the empty string is the empty set. Raises ValueError.

        The format is that of /sys/devices/system/cpu/online (Documentation/admin-guide/cputopology.rst).
        """
        cpus: set[int] = set()
        for part in filter(None, (piece.strip() for piece in text.strip().split(","))):
            found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
            if not found:
                raise ValueError(f'"{text}" is not a CPU set: write for example "0-3,8"')
            first, last = int(found[1]), int(found[2] or found[1])
            if first > last or last > MAX_CPU:
                raise ValueError(f'"{part}" is not a range of CPUs between 0 and {MAX_CPU}')
            cpus.update(range(first, last + 1))
        return cls(cpus)

    @classmethod
    def of(cls, cpus: Iterable[int]) -> CpuSet:
        """The set of these CPU numbers."""
        return cls(cpus)

    def __str__(self) -> str:
        return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in self._runs())

    def _runs(self) -> Iterator[tuple[int, int]]:
        first = last = -2
        for cpu in sorted(self):
            if cpu != last + 1:
                if first >= 0:
                    yield first, last
                first = cpu
            last = cpu
        if first >= 0:
            yield first, last
