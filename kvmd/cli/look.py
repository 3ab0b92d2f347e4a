"""explain and argv: where a guest's values come from, and what its QEMU gets."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from kvmd.cli import render
from kvmd.cli.arguments import Parsed
from kvmd.cli.session import Session
from kvmd.errors import KvmdError, Unreachable


def explain(session: Session, parsed: Parsed) -> int:
    """Every value the guest's file leaves to kvmd, with its reason, and what the tuning agent holds of it."""
    name = parsed.word("NAME")
    with session.client() as client:
        found = client.call("guest.explain", {"name": name})
        if session.json:
            session.document(found)
            return 0
        tuned = next((g for g in client.call("tune.status")["guests"] if g["name"] == name), None)
    rows = [(value["key"], value["value"], value["reason"]) for value in found["values"]]
    session.out(render.table(("KEY", "VALUE", "BECAUSE"), rows))
    if tuned:
        session.out(_tuned(tuned))
    return 0


def _tuned(guest: dict[str, Any]) -> str:
    able = "its memory can be moved" if guest["eligible"] else "its memory is left alone"
    floor = f", never below {render.size(guest['floor_bytes'])}" if guest["floor_bytes"] is not None else ""
    why = f" ({render.clean(guest['reason'])})" if guest["reason"] else ""
    return f"\ntuning: {able}{floor}{why}; kvmd-cli tune explain {guest['name']}"


def argv(session: Session, parsed: Parsed) -> int:
    """The command line: of a running guest what it was started with, else what it would get."""
    name = parsed.word("NAME")
    try:
        shown = session.call("guest.show", name=name)
    except Unreachable:
        shown = None
    if shown and shown["argv"]:
        words, which = shown["argv"], f"as it was started, pid {shown['pid']}"
    else:
        words, which = _would_get(session, name)
    session.result({"name": name, "argv": list(words), "which": which}, lambda: shell_lines(words))
    if not session.json:
        session.say(f"# {which}")
    return 0


def _would_get(session: Session, name: str) -> tuple[Sequence[str], str]:
    """Built here from the files; the daemon need not run for that."""
    from kvmd.cli.preview import preview

    try:
        return preview(session, name), "what it would be started with now"
    except PermissionError as error:
        raise KvmdError(f"{name} does not run, and {error.filename} cannot be read", hint="run it as root") from None


def shell_lines(words: Sequence[str]) -> str:
    """A command for a shell: the program, then an option and its value on each line."""
    lines = [shlex.quote(word) for word in words[:1]]
    for before, word in pairwise(words):
        if before.startswith("-") and not word.startswith("-"):
            lines[-1] += f" {shlex.quote(word)}"
        else:
            lines.append(f"  {shlex.quote(word)}")
    return " \\\n".join(lines)
