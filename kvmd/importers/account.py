"""The account of an import: what became of every word of the command line. Silent drops are defects.

A key taken by nobody turns up at the end as unsupported, so a mapping that forgets one cannot lose it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Fate(StrEnum):
    """What became of an option or of one key of its value."""

    MAPPED = "mapped"  # stands in the file
    DEFAULT = "default"  # what kvmd does anyhow
    DROPPED = "dropped"  # kvmd's own business, or of the old host only
    UNSUPPORTED = "unsupported"  # the guest will not have it


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the account."""

    option: str  # as it was written: "-drive if=none,…", or "-drive cache"
    fate: Fate
    detail: str  # the key of the file, or the reason


@dataclass(slots=True)
class Account:
    """All lines, in the order of the command line."""

    entries: list[Entry] = field(default_factory=list)

    def mapped(self, option: str, key: str) -> None:
        """It stands in the file as this key."""
        self.entries.append(Entry(option, Fate.MAPPED, key))

    def default(self, option: str, why: str) -> None:
        """Nothing has to be written for it."""
        self.entries.append(Entry(option, Fate.DEFAULT, why))

    def dropped(self, option: str, why: str) -> None:
        """It is not for the guest."""
        self.entries.append(Entry(option, Fate.DROPPED, why))

    def unsupported(self, option: str, why: str) -> None:
        """The guest will not have it."""
        self.entries.append(Entry(option, Fate.UNSUPPORTED, why))


class Keys:
    """The keys of one option's value: who takes one answers for it, what is left is unsupported."""

    def __init__(self, option: str, values: dict[str, str], account: Account) -> None:
        self.option = option
        self.account = account
        self._left = dict(values)

    def peek(self, key: str) -> str | None:
        """A value that stays to be taken."""
        return self._left.get(key)

    def take(self, key: str, at: str | None = None) -> str | None:
        """A value; with `at` it is told as mapped to that key of the file."""
        value = self._left.pop(key, None)
        if value is not None and at is not None:
            self.account.mapped(f"{self.option} {key}={value}", at)
        return value

    def drop(self, key: str, why: str) -> None:
        """Take a value for which nothing is written."""
        value = self._left.pop(key, None)
        if value is not None:
            self.account.dropped(f"{self.option} {key}={value}", why)

    def default(self, key: str, expected: tuple[str, ...], why: str) -> None:
        """Take a value that is what kvmd does anyhow; another one stays and will be told as unsupported."""
        value = self._left.get(key)
        if value is not None and value in expected:
            del self._left[key]
            self.account.default(f"{self.option} {key}={value}", why)

    def every(self, key: str, at: str) -> list[str]:
        """All values of a key that may be given several times."""
        names = [name for name in self._left if name.partition("#")[0] == key]
        return [value for name in names if (value := self.take(name, at)) is not None]

    def finish(self, why: str = "no key of kvmd for it") -> None:
        """What nobody took."""
        for key, value in self._left.items():
            self.account.unsupported(f"{self.option} {key}={value}", why)
        self._left.clear()
