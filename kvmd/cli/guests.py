"""Commands about guests: list, show, and the verbs that change their state."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from kvmd.cli import render
from kvmd.cli.arguments import Parsed
from kvmd.cli.session import Session, tell
from kvmd.errors import KvmdError, PartlyFailed, TimedOut
from kvmd.rpc.client import Client

TYPE_CHECKING = False  # typing itself is 3 ms of every start
if TYPE_CHECKING:
    from typing import Any

    One = Callable[[Session, Parsed, str], Any]

GRACE_S = 10.0  # what the daemon gets on top of the time a guest has, to say that the guest did not obey
BEGUN_S = 1.0  # with --no-wait: long enough for a refusal, not for a stop
_UP = ("starting", "running", "paused", "stopping", "unreachable")


def list_guests(session: Session, _parsed: Parsed) -> int:
    """All guests, from what the daemon knows without asking any QEMU."""
    found = session.call("guest.list")
    session.result(found, lambda: render.guests(found["guests"], now=time.time(), on=session.colours))
    return 0


def show(session: Session, parsed: Parsed) -> int:
    """All about one guest."""
    found = session.call("guest.show", name=parsed.word("NAME"))
    session.result(found, lambda: render.details(found, now=time.time(), on=session.colours))
    return 0


def start(session: Session, parsed: Parsed) -> int:
    """Bring guests to running."""
    return each(session, parsed, _start, "+", "start", needed=lambda state: state not in _UP)


def stop(session: Session, parsed: Parsed) -> int:
    """Ask guests to power off."""
    return each(session, parsed, _stop, "-", "stop", needed=lambda state: state in _UP)


def kill(session: Session, parsed: Parsed) -> int:
    """Pull the plug."""
    return each(session, parsed, _plain("guest.kill"), "-", "kill", needed=lambda state: state in _UP)


def reboot(session: Session, parsed: Parsed) -> int:
    """The guest's own reboot."""
    return each(session, parsed, _plain("guest.reboot"), "~", "reboot")


def reset(session: Session, parsed: Parsed) -> int:
    """The reset button."""
    return each(session, parsed, _plain("guest.reset"), "~", "reset")


def restart(session: Session, parsed: Parsed) -> int:
    """Stop, then start: a new QEMU."""
    return each(session, parsed, _restart, "~", "restart")


def _plain(method: str) -> One:
    def one(session: Session, _parsed: Parsed, name: str) -> Any:
        return session.call(method, 60.0, name=name)

    return one


def _start(session: Session, _parsed: Parsed, name: str) -> Any:
    return session.call("guest.start", None, name=name, wait=session.wait)


def _stop(session: Session, parsed: Parsed, name: str) -> Any:
    params: dict[str, Any] = {"name": name, "force": parsed.on("--force")}
    if session.timeout_s is not None:
        params["timeout_s"] = session.timeout_s
    # The daemon waits for the guest; who asked not to be kept waiting hears of a refusal and leaves.
    patience_s = None if session.timeout_s is None else session.timeout_s + GRACE_S
    with Client(session.socket, patience_s if session.wait else BEGUN_S) as client:
        try:
            return client.call("guest.stop", params)
        except TimedOut:
            if session.wait:
                raise
    return {"name": name, "state": "stopping", "changed": True}


def _restart(session: Session, parsed: Parsed, name: str) -> Any:
    _stop(session, parsed, name)
    return _start(session, parsed, name)


def each(
    session: Session,
    parsed: Parsed,
    one: One,
    sign: str,
    word: str,
    *,
    needed: Callable[[str], bool] = lambda _state: True,
    done: str | None = None,
) -> int:
    """Do it to every guest named; one failure does not stop the others. `done` is said of each, else its state."""
    names = tuple(dict.fromkeys(parsed.words("NAME")))
    if session.dry_run:
        return _dry(session, names, sign, word, needed)
    results: list[Any] = []
    failed: list[KvmdError] = []
    for name in names:
        try:
            result = one(session, parsed, name)
        except KvmdError as error:
            if len(names) == 1:
                raise
            tell(error)
            failed.append(error)
            continue
        results.append(result)
        if not session.json:
            said = done or f"is {result['state']}"
            session.out(f"{result['name']} {said}{'' if result['changed'] else ' already'}")
    if session.json:
        session.document(results[0] if len(names) == 1 else results)
    if not failed:
        return 0
    codes = {error.exit_code for error in failed}
    return codes.pop() if len(codes) == 1 and not results else PartlyFailed.exit_code


def _dry(session: Session, names: Sequence[str], sign: str, word: str, needed: Callable[[str], bool]) -> int:
    """What would be asked for, as plan lines."""
    actions, needing = [], []
    for name in names:
        state = session.call("guest.show", name=name)["state"]
        if needed(state):
            needing.append(name)
            line = f"{sign} guest {name}: {word}"
            why = f"asked for; it is {state}"
            actions.append({"kind": f"{word}-guest", "line": line, "why": why, "disruption": "guest"})
        else:
            session.say(f"{name} is {state}: nothing to do")
    result: dict[str, Any] = {"actions": actions}
    starting = [name for name, action in zip(needing, actions, strict=True) if word == "start" and action]
    if starting:
        result |= session.call("host.admission", names=starting)

    def shown() -> str:
        lines = [render.action(action, on=session.colours) for action in actions]
        return "\n".join(filter(None, (*lines, render.admissions(result.get("admissions", ())))))

    session.result(result, shown)
    return 0
