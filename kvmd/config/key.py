"""One row of the model table: what is known about a key besides its Python type.

`key(...)` is how every configuration key is declared; its metadata travels in the pydantic field and is read
back by `catalogue.py` (reference, near matches, completion) and `faults.py` (error messages). `Table` is the
base of every table: frozen, strict, closed, and the place where keys of a later capability are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

# C0, DEL, C1 and the two Unicode line separators: none of them can be meant, each can break an argv, a log line
# or a terminal.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")

LATER = "kvmd_later"

Applies = Literal["live", "restart", ""]
_APPLIES: dict[str, Applies] = {"~": "live", "!": "restart", "": ""}
_META = "kvmd"


@dataclass(frozen=True, slots=True)
class Kind:
    """Put into `Annotated` types of `scalars.py`: the type's name in the reference, and one example of it."""

    name: str
    example: str


@dataclass(frozen=True, slots=True)
class KeyMeta:
    """What `key()` was told. `type_text` overrides the name derived from the annotation."""

    doc: str = ""
    mark: str = ""
    unit: str = ""
    classic: str = "ours"
    needs: str = ""
    example: str = ""
    later: bool = False
    later_values: tuple[Any, ...] = ()
    type_text: str = ""
    default_text: str = ""

    @property
    def applies(self) -> Applies:
        """When a change takes effect on a running guest; "" where that has no meaning."""
        return _APPLIES[self.mark]


def key(
    default: Any = ...,
    doc: str = "",
    *,
    mark: str = "",
    unit: str = "",
    classic: str = "ours",
    needs: str = "",
    example: str = "",
    later_values: tuple[Any, ...] = (),
    default_text: str = "",
    alias: str | None = None,
    **limits: Any,
) -> Any:
    """A supported key. `default=...` makes it required.

    `mark` is config.md's: "!" needs a new QEMU, "~" live, "" no running meaning. `later_values` are values of
    this key that a later version will take. `limits` goes to pydantic (ge, le, max_length, ...).
    """
    meta = KeyMeta(
        doc=doc,
        mark=mark,
        unit=unit,
        classic=classic,
        needs=needs,
        example=example,
        later_values=later_values,
        default_text=default_text,
    )
    return Field(default, alias=alias, json_schema_extra={_META: meta}, **limits)  # type: ignore[dict-item]


def later(type_text: str, doc: str, *, mark: str = "", alias: str | None = None, **meta: Any) -> Any:
    """A key of a later capability: known by name and type, refused with "not supported yet" when it is set."""
    row = KeyMeta(doc=doc, mark=mark, later=True, type_text=type_text, **meta)
    return Field(None, alias=alias, json_schema_extra={_META: row})  # type: ignore[dict-item]


def table(kind: type[BaseModel], doc: str = "") -> Any:
    """A table that is there even if the file does not have it: all defaults."""
    return Field(default_factory=kind, json_schema_extra={_META: KeyMeta(doc=doc)})  # type: ignore[dict-item]


def optional_table(doc: str) -> Any:
    """A table whose absence means something: None."""
    return Field(None, json_schema_extra={_META: KeyMeta(doc=doc)})  # type: ignore[dict-item]


def named_tables(doc: str, *, later: bool = False) -> Any:
    """`[disk.NAME]` and the like; empty when absent."""
    return Field(default_factory=dict, json_schema_extra={_META: KeyMeta(doc=doc, later=later)})  # type: ignore[dict-item]


def meta_of(field: FieldInfo) -> KeyMeta:
    """The metadata `key()` and its relatives left in a pydantic field."""
    extra = field.json_schema_extra
    found = extra.get(_META) if isinstance(extra, dict) else None
    return found if isinstance(found, KeyMeta) else KeyMeta()


def not_yet(what: str = "") -> PydanticCustomError:
    """The error for a key or value that belongs to a later capability. `what` names the value, if it is one."""
    return PydanticCustomError(LATER, "{what}", {"what": what})


def quote(value: object) -> str:
    """A TOML value as a message shows it: `"nat"`, `8`, `true`; cut at 60 characters, controls escaped."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        shown = "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in value[:60])
        return f'"{shown}..."' if len(value) > 60 else f'"{shown}"'
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to print what is very long
        return f"of {value.bit_length()} bits"
    return str(value) if isinstance(value, int | float) else type(value).__name__


class Table(BaseModel):
    """Base of all tables. Unknown keys, wrong types and later keys are errors; nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse(cls, value: object, info: ValidationInfo) -> object:
        """Refuses later keys and values, and control characters in any text."""
        meta = meta_of(cls.model_fields[info.field_name or ""])
        if meta.later:
            raise not_yet()
        if meta.later_values and isinstance(value, str | bool) and value in meta.later_values:
            raise not_yet(quote(value))
        if isinstance(value, list):
            value = tuple(value)  # TOML's arrays are Python lists, the models hold tuples
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and (found := CONTROL.search(text)):
                raise ValueError(f"holds a control character (U+{ord(found[0]):04X}); one line of plain text is wanted")
        return value
