"""What one import collects: the guest's tables to be, the account, and the parts that options refer to by id."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from kvmd.importers.account import Account

Dialect = Literal["qemu", "qemu-kvm"]
Tables = dict[str, Any]
Look = Callable[[str], str | None]  # an image's path -> its format, as far as it can be seen

_NAME = re.compile(r"[a-z0-9]([a-z0-9_-]{0,18}[a-z0-9])?")


@dataclass(slots=True)
class Draft:
    """One guest in the making."""

    name: str
    dialect: Dialect
    look: Look
    base: str = ""  # what relative paths are relative to; "" leaves them as they are
    tables: Tables = field(default_factory=dict)
    account: Account = field(default_factory=Account)
    remarks: list[str] = field(default_factory=list)  # for people, beside the account
    backends: dict[str, dict[str, str]] = field(
        default_factory=dict
    )  # "drive:ID", "netdev:ID", "chardev:ID", "object:ID"
    machine: str = "pc"

    def put(self, table: str, key: str, value: object) -> None:
        """Set `[table] key`; tables are made in the order in which they are first needed."""
        here = self.tables
        for part in table.split("."):
            here = here.setdefault(part, {})
        here[key] = value

    def claim(self, key: str, by: str) -> dict[str, str] | None:
        """Take a backend ("netdev:net0"): the device `by` uses it, and the account says so. None if there is none."""
        found = self.backends.pop(key, None)
        if found is not None:
            kind, _, ident = key.partition(":")
            self.account.mapped(f"-{'blockdev' if kind == 'node' else kind} {ident}", f"goes into {by}")
        return found

    def path(self, text: str) -> str:
        """A path as a file has it: absolute. What only a shell could expand stays as it is, and will not check."""
        if text.startswith(("/", "$", "~")) or not self.base:
            return text
        return posixpath.normpath(f"{self.base}/{text}")

    def has(self, table: str) -> bool:
        """Whether something stands in `[table]`."""
        here: Any = self.tables
        for part in table.split("."):
            if part not in here:
                return False
            here = here[part]
        return True

    @property
    def is_q35(self) -> bool:
        """Whether the board is q35."""
        return "q35" in self.machine

    def fresh(self, kind: str, wanted: str | None, default: str) -> str:
        """A table's NAME nobody has in `[kind]`: what the command line called it where that is one, else `default`."""
        taken = self.tables.get(kind, {})
        base = re.sub(r"[^a-z0-9_-]+", "-", (wanted or "").lower()).strip("-_")[:20]
        for prefix in ("drive-", f"{kind}-", f"{kind}_"):
            base = base.removeprefix(prefix)
        if not _NAME.fullmatch(base) or base in taken:
            base = default
        name, number = base, 1
        while name in taken:
            number += 1
            name = f"{base}{number}"
        return name
