"""set and edit: changes to a guest's file that are checked before the file is replaced, comments kept."""

from __future__ import annotations

import os
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from kvmd.cli.arguments import Parsed, UsageError
from kvmd.cli.render import clean
from kvmd.cli.session import Session
from kvmd.cli.trial import faulty, guest_file, mode_of, new_errors, with_changes
from kvmd.config.catalogue import KeyInfo, generic, keys_of, literal
from kvmd.config.edit import set_key, unset_key
from kvmd.config.load import check
from kvmd.effects.files import write_atomic
from kvmd.errors import Conflict, HostFailed


def set_value(session: Session, parsed: Parsed) -> int:
    """One key: old -> new, and what it takes to have it."""
    name, key, value = parsed.word("NAME"), parsed.word("KEY"), parsed.words("VALUE")
    if bool(value) == parsed.on("--unset"):
        raise UsageError("set: a VALUE, or --unset", hint=f"kvmd-cli set {name} memory.size 2GiB")
    root = Path(session.config_dir)
    path = guest_file(root, name)
    old = path.read_bytes()
    text = old.decode(errors="strict")
    new = unset_key(text, key) if not value else set_key(text, key, value[0])
    file = f"guests.d/{name}.toml"
    _refuse(root, file, new.encode(), "nothing was changed:")
    info = keys_of("guests.d").get(".".join(generic("guests.d", tuple(key.split(".")))))
    before, after = _value(text, key, info), _value(new, key, info)
    applies = info.applies if info else ""
    line = f"~ {file}: {key}: {before} -> {after}" + (f"  ({applies})" if applies else "")
    if new != text and not session.dry_run:
        write_atomic(path, new.encode(), mode_of(path))
    result = {"file": str(path), "key": key, "old": before, "new": after, "applies": applies}
    session.result(result, lambda: clean(line) if new != text else "")
    if not session.json:
        session.say(_next(name, applies) if new != text else f"{key} is {after} already")
    return 0


def _next(name: str, applies: str) -> str:
    """What makes the change real."""
    match applies:
        case "live":
            return "next: kvmd-cli apply"
        case "restart":
            return f"a running {name} keeps the old value until: kvmd-cli restart {name}"
        case _:
            return "counts from the next time it is looked at"


def _value(text: str, key: str, info: KeyInfo | None) -> str:
    """The key's value as TOML; the default, or "absent", where the file does not have it."""
    here: Any = tomllib.loads(text)
    for part in key.split("."):
        here = here.get(part.strip('"')) if isinstance(here, dict) else None
    if here is None:
        return f"{info.default} (default)" if info and info.default else "absent"
    return _toml(here)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return literal(value)


def edit(session: Session, parsed: Parsed) -> int:
    """$EDITOR on a copy; the file is replaced when the copy checks. A copy with faults can be edited again."""
    name = parsed.word("NAME")
    root = Path(session.config_dir)
    path = guest_file(root, name)
    file = f"guests.d/{name}.toml"
    old = path.read_bytes()
    with tempfile.TemporaryDirectory(prefix="kvmd-edit-") as directory:
        copy = Path(directory) / f"{name}.toml"
        copy.write_bytes(old)
        while True:
            _run_editor(copy)
            new = copy.read_bytes()
            if new == old:
                session.say(f"{name}: not changed")
                return 0
            errors = new_errors(check(root), with_changes(root, {file: new}))
            if not errors:
                break
            if not session.interactive():
                raise faulty(errors, "nothing was changed:")
            session.say("\n".join(clean(str(fault)) for fault in errors))
            if not session.asked("Edit again?"):
                raise faulty(errors, "nothing was changed:")
        _replace(session, path, old, new)
    session.result({"file": str(path), "written": not session.dry_run}, lambda: f"~ {path}")
    session.say("next: kvmd-cli plan")
    return 0


def _replace(session: Session, path: Path, old: bytes, new: bytes) -> None:
    """Unless someone else was faster; then the edited text is kept beside the file."""
    if path.read_bytes() != old:
        kept = path.with_suffix(".toml.orig")
        write_atomic(kept, new, mode_of(path))
        raise Conflict(f"{path} was changed meanwhile", hint=f"your version is {kept}")
    if not session.dry_run:
        write_atomic(path, new, mode_of(path))


def _refuse(root: Path, file: str, new: bytes, what: str) -> None:
    """Raises ConfigInvalid when the new text brings errors."""
    errors = new_errors(check(root), with_changes(root, {file: new}))
    if errors:
        raise faulty(errors, what)


def _run_editor(copy: Path) -> None:
    """VISUAL, EDITOR, else Debian's choice; they may have arguments of their own. Raises HostFailed."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "sensible-editor"
    sys.stdout.flush()
    status = os.spawnvp(os.P_WAIT, "sh", ["sh", "-c", f'{editor} "$1"', "sh", str(copy)])
    if status != 0:
        raise HostFailed(f"{editor} ended with {status}: nothing was changed", hint="EDITOR chooses another editor")
