"""What shall become of a guest and what has: hold, unhold, enable, disable, wait, why."""

from __future__ import annotations

import time
from typing import Any

from kvmd.cli import render
from kvmd.cli.arguments import Parsed
from kvmd.cli.guests import each
from kvmd.cli.session import PATIENCE_S, Session
from kvmd.errors import KvmdError, TimedOut
from kvmd.rpc.client import Client

POLL_S = 60.0  # the daemon is asked anew so often: a client that has gone is waited for no longer


def hold(session: Session, parsed: Parsed) -> int:
    """Hands off."""
    reason = parsed.text("--reason") or ""

    def one(session: Session, _parsed: Parsed, name: str) -> Any:
        return session.call("guest.hold", name=name, reason=reason)

    return each(session, parsed, one, "~", "hold", done="is held")


def unhold(session: Session, parsed: Parsed) -> int:
    """Hands on again."""
    return each(session, parsed, _asking("guest.unhold"), "~", "unhold", done="is not held")


def enable(session: Session, parsed: Parsed) -> int:
    """With the host."""
    return each(session, parsed, _asking("guest.enable"), "~", "enable", done="starts with the host")


def disable(session: Session, parsed: Parsed) -> int:
    """Not with the host."""
    return each(session, parsed, _asking("guest.disable"), "~", "disable", done="does not start with the host")


def wait(session: Session, parsed: Parsed) -> int:
    """Until the guests are up or off."""
    until = parsed.text("--for") or "stopped"
    deadline = None if session.timeout_s is None else time.monotonic() + session.timeout_s

    def one(session: Session, _parsed: Parsed, name: str) -> Any:
        while True:
            left_s = POLL_S if deadline is None else deadline - time.monotonic()
            try:
                with Client(session.socket, POLL_S + PATIENCE_S) as client:
                    params = {"name": name, "until": until, "timeout_s": max(0.05, min(POLL_S, left_s))}
                    return client.call("guest.wait", params)
            except KvmdError as error:
                if error.slug != TimedOut.slug:
                    raise
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimedOut(f"{name} is not {until} after {session.timeout_s:g} s") from None

    return each(session, parsed, one, "~", "wait")


def why(session: Session, parsed: Parsed) -> int:
    """What happened."""
    found = session.call("guest.why", name=parsed.word("NAME"))
    session.result(found, lambda: _story(found, time.time()))
    return 0


def _asking(method: str) -> Any:
    def one(session: Session, _parsed: Parsed, name: str) -> Any:
        return session.call(method, name=name)

    return one


def _story(found: dict[str, Any], now: float) -> str:
    """The answer, then what stands beside it."""
    ago = f", {render.age(now - found['since'])} ago" if found["since"] and found["cause"] else ""
    lines = [f"{render.clean(found['name'])} is {found['state']}{ago}: {render.clean(found['answer'])}"]
    ran = None
    if found["begun_at"]:
        ran = f"{render.moment(found['begun_at'])}"
        if found["ended_at"]:
            ran += f" to {render.moment(found['ended_at'])}"
    wanted = None
    if found["wanted"]:
        wanted = f"{found['wanted']}, by {found['wanted_by']} at {render.moment(found['wanted_at'])}"
        wanted += f" ({found['wanted_because']})" if found["wanted_because"] else ""
    held = f"by {found['held_by']}: {found['held_because'] or 'no reason given'}" if found["held_by"] else None
    crashes = f"{found['crashes']} lately, {found['crashes_allowed']} are restarted" if found["crashes"] else None
    lines += render.fields(
        ("ran", ran), ("wanted", wanted), ("held", held), ("crashes", crashes), ("last words", found["last_words"])
    )
    lines.append(f"  more: kvmd-cli events {found['name']}; kvmd-cli logs --qemu {found['name']}")
    return "\n".join(lines)
