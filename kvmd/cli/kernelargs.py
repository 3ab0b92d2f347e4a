"""`host kernel-args`: what the kernel's command line has and should have, and the drop-in that makes it so."""

from __future__ import annotations

import os
from collections.abc import Mapping

from kvmd.cli import render
from kvmd.cli.arguments import Parsed, UsageError
from kvmd.cli.session import Session
from kvmd.errors import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SOMETHING_MISSING = 10  # as `plan` does


def show(session: Session, parsed: Parsed) -> int:
    """Without an option only look: exit 10 when words are missing. Otherwise write or remove the drop-in."""
    write, remove, update = (parsed.on(name) for name in ("--write", "--remove", "--update"))
    if write and remove:
        raise UsageError("--write or --remove, not both")
    if update and not (write or remove):
        raise UsageError("--update goes with --write or --remove")
    found = session.call("host.kernel_args")
    if not (write or remove) or session.dry_run:
        session.result(found, lambda: draw(found, on=session.colours))
        return SOMETHING_MISSING if any(not word["enough"] for word in found["words"]) else 0
    return _change(session, found, remove=remove, update=update)


def _change(session: Session, found: Mapping[str, Any], *, remove: bool, update: bool) -> int:
    if not session.json and not remove:
        session.say(draw(found, on=False))
    if not session.confirmed(f"{'Remove' if remove else 'Write'} {found['path'] or 'it'}?"):
        if session.interactive():
            raise Refused("not confirmed: nothing was done")
        raise Refused("this changes how the host boots and nobody is here to be asked", hint="--yes")
    done = session.call("host.write_kernel_args", remove=remove)
    session.result(done, lambda: render.clean(done["line"] or "nothing to do: it is so already"))
    if update and done["command"] == "update-grub":
        session.flush()
        os.execvp("update-grub", ["update-grub"])  # by the caller: the daemon may not write to /boot
    if done["line"] and not session.json:
        session.say(f"then: {render.clean(done['command'])}, and a reboot")
    return 0


def draw(found: Mapping[str, Any], *, on: bool) -> str:
    """The table of words, the state of the drop-in, what to do next."""
    if not found["words"]:
        lines = ["no guest asks anything of the kernel's command line"]
    else:
        rows = [
            (word["wanted"], word["present"] or "-", "there" if word["enough"] else "missing", word["why"])
            for word in found["words"]
        ]
        colours = {(number, 2): render.GREEN if row[2] == "there" else render.RED for number, row in enumerate(rows)}
        lines = [render.table(("WANTED", "NOW", "STATE", "WHY"), rows, colours=colours, on=on)]
    missing = any(not word["enough"] for word in found["words"])
    lines += ["", f"now: {render.clean(found['cmdline']) or '(nothing)'}"]
    if found["path"] and (found["text"] or found["now"]):
        state = "as it should be" if (found["now"] or "") == found["text"] else "to be written (--write)"
        if not found["text"]:
            state = "no longer needed (--remove)"
        lines.append(f"{render.clean(found['path'])}: {state}")
    if missing:
        lines.append(f"to make it so: {render.clean(found['command'])}, and a reboot")
    for problem in found["problems"]:
        lines.append(f"! {render.clean(problem['message'])}")
        if problem["hint"]:
            lines.append(f"  {render.clean(problem['hint'])}")
    return "\n".join(lines)
