"""Commands about the host and kvmd itself: status, host facts, host release, version."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from kvmd import __version__
from kvmd.cli import render
from kvmd.cli.arguments import Parsed
from kvmd.cli.session import Session
from kvmd.errors import Refused, TimedOut, Unreachable

_DRIFTS = {
    "running": "running otherwise than declared (kvmd-cli apply restarts them)",
    "host": "the host otherwise than declared (kvmd-cli plan)",
    "yielded": "left to whoever changed it (kvmd-cli apply takes it back)",
}


def status(session: Session, _parsed: Parsed) -> int:
    """How kvmd is."""
    found = session.call("daemon.status")
    session.result(found, lambda: _status(found, now=time.time(), on=session.colours))
    return 0


def _status(found: Mapping[str, Any], *, now: float, on: bool) -> str:
    drifts = found["drifts"]
    counts = [f"{kind} {drifts[kind]['count']}" for kind in _DRIFTS if drifts[kind]["count"]]
    lines = [f"kvmd {found['version']}, pid {found['pid']}, up for {render.age(now - found['since'])}"]
    lines += render.fields(
        ("guests", f"{found['guests_running']} of {found['guests_total']} run"),
        ("drift", ", ".join(counts) or "none"),
        ("tuning", found["tuning_mode"]),
        ("supervisor", found["supervisor"]),
    )
    for kind, title in _DRIFTS.items():
        lines += _some(title, drifts[kind])
    if found["networks"]:
        rows = [(n["name"], n["mode"], n["bridge"] or "-", n["state"]) for n in found["networks"]]
        bad = {(number, 3): render.RED for number, row in enumerate(rows) if row[3] != "up"}
        lines += ["", render.table(("NETWORK", "MODE", "BRIDGE", "STATE"), rows, colours=bad, on=on)]
    if found["faults"]:
        lines += ["", *(render.fault(fault) for fault in found["faults"])]
    return "\n".join(lines)


def _some(title: str, kind: Mapping[str, Any]) -> list[str]:
    """One kind of drift: how much, and the first lines."""
    if not kind["count"]:
        return []
    more = kind["count"] - len(kind["first"])
    lines = ["", f"{title}:", *(f"  {render.clean(line)}" for line in kind["first"])]
    return [*lines, f"  and {more} more"] if more else lines


def facts(session: Session, _parsed: Parsed) -> int:
    """The host as it is."""
    found = session.call("host.facts")
    session.result(found, lambda: "\n".join(render.tree(found)))
    return 0


def release(session: Session, parsed: Parsed) -> int:
    """Put the host back as it was."""
    if session.dry_run:
        from pathlib import Path

        from kvmd.cli.journal import undo_lines

        why = "kvmd changed it in this boot"
        undone = [
            {"kind": "undo", "line": line, "why": why, "disruption": "host"}
            for line in undo_lines(Path(session.state_dir))
        ]
        session.result({"actions": undone}, lambda: "\n".join(render.action(a, on=session.colours) for a in undone))
        return 0
    if not session.yes:
        if not session.interactive():
            raise Refused("this takes networks and pages away and nobody is here to be asked", hint="--yes")
        if not session.confirmed("Put back everything kvmd changed on this host in this boot?"):
            raise Refused("not confirmed: nothing was done")
    done = session.call("host.release", 120.0, partial=parsed.on("--partial"))
    session.result(done, lambda: "\n".join(render.clean(line) for line in done["restored"]))
    if not session.json:
        for kept in done["kept"]:
            session.say(f"kept: {render.clean(kept)}")
        if not done["restored"]:
            session.say("nothing to put back")
    return 0


def version(session: Session, _parsed: Parsed) -> int:
    """Of this client and, if it answers, of the daemon."""
    try:
        daemon = session.call("daemon.version", 5.0)["version"]
    except (Unreachable, TimedOut):
        daemon = None
    found = {"client": __version__, "daemon": daemon}
    session.result(found, lambda: f"kvmd-cli {__version__}\nkvmd {daemon or '(does not answer)'}")
    return 0
