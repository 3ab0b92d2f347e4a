"""plan, apply, reconcile: the same pass over host and guests, with more or less allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvmd.cli import render
from kvmd.cli.arguments import Parsed
from kvmd.cli.session import Session
from kvmd.errors import ConfigInvalid, PartlyFailed, Refused

SOMETHING_TO_DO = 10  # what `plan` exits with
PASS_PATIENCE_S = 600.0  # cron comes again; a pile of processes behind a pass that hangs helps nobody
_ALL = frozenset({"guest", "network", "host"})


def plan(session: Session, parsed: Parsed) -> int:
    """What apply would do. Exit 10 when there is something, 8 when there is nothing but the files have faults."""
    if parsed.on("--reboot"):
        return _reboot(session)
    found = session.call("host.plan")
    session.result(found, lambda: render.plan(found, on=session.colours))
    _remarks(session, found, grouped=True)
    if not found["actions"] and not session.json:
        session.say("nothing to do")
    return SOMETHING_TO_DO if found["actions"] else _faulty(found)


def _reboot(session: Session) -> int:
    """What a reboot of the host would change."""
    found = session.call("host.plan", reboot=True)
    session.result(found, lambda: render.reboot(found["reboot"], on=session.colours))
    if not found["reboot"] and not session.json:
        session.say("a reboot changes nothing")
    return SOMETHING_TO_DO if found["reboot"] else 0


def apply(session: Session, parsed: Parsed) -> int:
    """Show the plan, ask, and do all of it."""
    prune = parsed.on("--prune")
    found = session.call("host.plan", retake=True)
    actions = found["actions"]
    if session.dry_run:
        session.result(found, lambda: _shown(session, actions))
        _remarks(session, found)
        return _faulty(found)
    if not actions and not prune:
        session.result(_nothing(found), str)
        _remarks(session, found)
        session.say("nothing to do")
        return _faulty(found)
    _ask(session, actions, prune=prune)
    # What --prune will find is in no plan yet: who says yes to it says yes to its disruption.
    allowed = sorted(_ALL if prune else {action["disruption"] for action in actions} - {"none"})
    done = session.call("host.apply", None, allow=allowed, prune=prune)
    code = _finish(session, done, quiet=False)
    _confirm_uplinks(session, done)
    return code


def _confirm_uplinks(session: Session, done: Mapping[str, Any]) -> None:
    """A NIC that went into a bridge is taken out again unless somebody who still sees this says that all is well."""
    if not any(outcome["kind"] == "attach-uplink" and not outcome["error"] for outcome in done["outcomes"]):
        return
    for network in session.call("network.list")["networks"]:
        name = network["name"]
        if network["uplink_state"] != "trial":
            continue
        if session.interactive() and session.asked(f"network {name} has its uplink, on trial. Is all well?"):
            session.call("network.confirm", name=name)
        elif not session.json:
            session.say(f"network {name} has its uplink on trial; if all is well: kvmd-cli network confirm {name}")


def reconcile(session: Session, parsed: Parsed) -> int:
    """What disturbs nobody; silent when there was nothing to do."""
    if session.dry_run:
        found = session.call("host.plan")
        session.result(found, lambda: _shown(session, [a for a in found["actions"] if a["disruption"] == "none"]))
        _remarks(session, found)
        return _faulty(found)
    done = session.call("host.reconcile", PASS_PATIENCE_S)
    quiet = parsed.on("--quiet")
    code = _finish(session, done, quiet=quiet)
    if done["outcomes"] and done["skipped"] and not quiet and not session.json:
        session.say(f"left for `kvmd-cli apply`, as they disturb somebody: {len(done['skipped'])}")
    return code


def _ask(session: Session, actions: Sequence[Mapping[str, Any]], *, prune: bool) -> None:
    """The plan, and a yes to it. Refused without one."""
    disruptive = [action for action in actions if action["disruption"] != "none"]
    if session.yes:
        return
    if not session.interactive():
        if disruptive or prune:
            session.say(_shown(session, actions))
            raise Refused(
                f"{len(disruptive)} of these disturb somebody and nobody is here to be asked"
                if disruptive
                else "--prune removes things and nobody is here to be asked",
                hint="kvmd-cli apply --yes, or kvmd-cli reconcile for what disturbs nobody",
            )
        return
    session.say(_shown(session, actions))
    if not session.confirmed("Do this, and remove what no file mentions any more?" if prune else "Do this?"):
        raise Refused("not confirmed: nothing was done")


def _shown(session: Session, actions: Sequence[Mapping[str, Any]]) -> str:
    return render.actions(actions, on=session.colours)


def _finish(session: Session, done: Mapping[str, Any], *, quiet: bool) -> int:
    """The outcomes; exit 9 when some failed."""
    failed = [one for one in done["outcomes"] if one["error"]]
    shown = failed if quiet else done["outcomes"]
    session.result(done, lambda: render.outcomes(shown, on=session.colours))
    if not quiet:
        _remarks(session, done)
    return PartlyFailed.exit_code if failed else _faulty(done)


def _remarks(session: Session, found: Mapping[str, Any], *, grouped: bool = False) -> None:
    """Faults of the files, what cannot be had, what is left to others, on stderr. `grouped`: a reboot's were shown."""
    if session.json:
        return
    for fault in found["faults"]:
        session.say(render.fault(fault))
    for problem in found["problems"]:
        if not (grouped and problem["needs"] == "reboot"):
            session.say(render.problem(problem))
    for knob in found["yielded"]:
        session.say(render.yielded(knob))


def _faulty(found: Mapping[str, Any]) -> int:
    return ConfigInvalid.exit_code if any(fault["severity"] == "error" for fault in found["faults"]) else 0


def _nothing(found: Mapping[str, Any]) -> dict[str, Any]:
    """The answer host.apply would give when there is nothing to do."""
    return {"outcomes": [], "skipped": [], **{name: found[name] for name in ("problems", "yielded", "faults")}}
