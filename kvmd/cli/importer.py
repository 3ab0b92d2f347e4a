"""`import qemu`: a QEMU command line, or a script that holds one, as a guest's file, with an account of every word."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kvmd.cli import render
from kvmd.cli.arguments import LONGEST_NAME, Parsed, UsageError
from kvmd.cli.create import write_new
from kvmd.cli.session import Session
from kvmd.cli.trial import with_changes
from kvmd.config.files import guess_format
from kvmd.errors import ConfigInvalid, NotFound
from kvmd.importers.account import Fate
from kvmd.importers.qemu import import_qemu
from kvmd.importers.shell import CommandLine, command_lines, of_argv

_COLOURS = {Fate.MAPPED: render.GREEN, Fate.UNSUPPORTED: render.RED}


def qemu(session: Session, parsed: Parsed) -> int:
    """The file on stdout, the account on stderr; --write puts it into guests.d. Exit 9 when something is left out."""
    calls, origin = _calls(parsed)
    if len(calls) > 1:
        session.say(f"{origin} calls QEMU {len(calls)} times; this is the first: {' '.join(calls[0].arguments[:6])} …")
    dialect = parsed.text("--dialect")
    found = import_qemu(
        calls[0],
        name=parsed.text("--name"),
        dialect="qemu-kvm" if dialect == "qemu-kvm" else "qemu" if dialect else None,
        look=_look,
        base=str(Path.cwd()),
    )
    name = guest_name(found.name)
    if name != found.name:
        session.say(f"the guest is called {name}: {found.name!r} is no host name")
    root, file = Path(session.config_dir), f"guests.d/{name}.toml"
    faults = [str(fault) for fault in with_changes(root, {file: found.text.encode()}).errors if fault.file == file]
    written = None
    if parsed.on("--write"):
        if faults:
            raise ConfigInvalid(
                f"what came out does not check: {faults[0]}", hint="without --write it can be looked at", faults=faults
            )
        written = root / file
        if not session.dry_run:
            written.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            write_new(written, found.text)
    entries = [asdict(entry) for entry in found.entries]
    document = {"name": name, "text": found.text, "account": entries, "remarks": list(found.remarks), "faults": faults}
    session.result(document, lambda: f"+ {written}" if written else found.text.rstrip())
    if not session.json:
        for entry in found.entries:
            mark = render.paint(f"{entry.fate.value:11}", _COLOURS.get(entry.fate, render.DIM), on=session.colours)
            session.say(f"{mark} {render.clean(entry.option)}: {render.clean(entry.detail)}")
        for fault in faults:
            session.say(f"to be mended: {fault}")
    return 9 if faults or any(entry.fate is Fate.UNSUPPORTED for entry in found.entries) else 0


def _calls(parsed: Parsed) -> tuple[Sequence[CommandLine], str]:
    words = parsed.words("FILE")
    if len(words) > 1:
        return (of_argv(words),), words[0]
    if not words:
        raise UsageError("import qemu: from what?", hint="a FILE, - for standard input, or `-- qemu-system-x86_64 …`")
    if words[0] == "-":
        return command_lines(sys.stdin.read()), "standard input"
    try:
        text = Path(words[0]).read_text(errors="surrogateescape")
    except FileNotFoundError:
        raise NotFound(f"{words[0]} does not exist") from None
    return command_lines(text), words[0]


def guest_name(text: str) -> str:
    """The nearest name a guest can have: DC_01 is dc-01."""
    name = re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")[:LONGEST_NAME].strip("-")
    return name or "imported"


def _look(path: str) -> str | None:
    return guess_format(path) if path.startswith("/") else None
