"""Commands that look at the tuning agent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvmd.cli import render
from kvmd.cli.arguments import Parsed, UsageError
from kvmd.cli.session import Session

DECISIONS = 20
MOST_DECISIONS = 1000


def status(session: Session, _parsed: Parsed) -> int:
    """The agent's present picture of host and guests."""
    found = session.call("tune.status")
    session.result(found, lambda: _status(found))
    return 0


def explain(session: Session, parsed: Parsed) -> int:
    """Its decisions about one guest."""
    text = parsed.text("--limit") or str(DECISIONS)
    if not text.isdecimal() or not 1 <= int(text) <= MOST_DECISIONS:
        raise UsageError(f"--limit: a number from 1 to {MOST_DECISIONS}")
    name = parsed.word("NAME")
    found = session.call("tune.explain", name=name, limit=int(text))
    session.result(found, lambda: decisions(found["decisions"]) or f"nothing was decided about {name} yet")
    return 0


def _status(found: Mapping[str, Any]) -> str:
    host = found["host"]
    lines = [f"mode {found['mode']}, host {found['host_state']}" + (f" ({host['why']})" if host.get("why") else "")]
    lines.append(f"{render.size(host['available_bytes'])} to give, {render.size(host['usable_bytes'])} usable in all")
    if found["guests"]:
        rows = [
            (
                guest["name"],
                "pressed" if guest["pressed"] else "yes" if guest["eligible"] else "no",
                *(render.size(guest[f"{key}_bytes"]) for key in ("actual", "used", "available", "target", "floor")),
                guest["reason"] or "",
            )
            for guest in found["guests"]
        ]
        heads = ("GUEST", "MOVABLE", "HAS", "USES", "FREE", "TARGET", "FLOOR", "WHY")
        lines += ["", render.table(heads, rows, right=frozenset({2, 3, 4, 5, 6}))]
    if found["last"]:
        lines += ["", decisions(found["last"])]
    return "\n".join(lines)


def decisions(found: Sequence[Mapping[str, Any]]) -> str:
    """A paragraph for each decision, the newest last."""
    return "\n".join("\n".join(_decision(one)) for one in found)


def _decision(one: Mapping[str, Any]) -> list[str]:
    moved = ""
    if one["from_bytes"] is not None and one["to_bytes"] is not None:
        moved = f": {render.size(one['from_bytes'])} -> {render.size(one['to_bytes'])}"
    done = "" if one["applied"] else "  [advice only]"
    who = f" {one['guest']}" if one["guest"] else ""
    first = f"{render.moment(one['time'])}  {one['action']}{who}{moved}{done}  ({one['why']})"
    rest = [(key, one[key]) for key in ("limited_by", "expected", "seen") if one[key]]
    considered = [("considered", "; ".join(one["considered"]))] if one["considered"] else []
    return [
        render.clean(first),
        *(f"    {key.replace('_', ' ')}: {render.clean(str(v))}" for key, v in considered + rest),
    ]
