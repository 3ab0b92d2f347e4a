"""Commands that need no daemon: check and doctor. They run in the daemon's environment, also as `kvmd VERB`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kvmd.cli import render
from kvmd.cli.arguments import Parsed, UsageError
from kvmd.cli.session import Session
from kvmd.cli.verbs import VERBS
from kvmd.config.load import check as check_directory
from kvmd.errors import ConfigInvalid, NotFound
from kvmd.paths import Paths

_MARKS = {
    "ok": ("ok  ", render.GREEN),
    "warn": ("warn", render.YELLOW),
    "fail": ("FAIL", render.RED),
    "skip": ("skip", render.DIM),
}


def main(argv: Sequence[str] | None = None) -> int:
    """`kvmd VERB ...`: the same command line as the client's, for the commands that need no daemon."""
    from kvmd.cli import main as client

    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = VERBS.get(arguments[0]) if arguments else None
    if verb is not None and not verb.offline:
        error = UsageError(f"{verb.name} asks the daemon", hint=f"kvmd-cli {' '.join(arguments)}")
        return client.report(error, as_json=False)
    return client.main(arguments)


def check(session: Session, parsed: Parsed) -> int:
    """Every fault of every file: errors on stdout and exit 8, warnings on stderr."""
    directory = Path(parsed.word("DIR") or session.config_dir)
    if not directory.is_dir():
        raise NotFound(f"{directory} is not a directory", hint="kvmd-cli init makes one")
    loaded = check_directory(directory)
    errors = loaded.errors
    if session.json:
        session.document({"faults": [asdict(fault) for fault in loaded.faults]})
    else:
        for fault in loaded.faults:
            line = render.clean(str(fault))
            session.out(line) if fault.severity == "error" else session.say(line)
        if not errors:
            desired = loaded.desired
            session.say(f"{len(loaded.sources)} files, {len(desired.guests)} guests: no errors")
    return ConfigInvalid.exit_code if errors else 0


def doctor(session: Session, _parsed: Parsed) -> int:
    """A line for each thing looked at, with a fix where something is wrong. Exit 1 when something must be mended."""
    from kvmd.doctor import examine

    checks = asyncio.run(examine(paths_of(session)))
    if session.json:
        session.document({"checks": [asdict(one) for one in checks]})
    else:
        for one in checks:
            mark, colour = _MARKS[one.status]
            session.out(f"{render.paint(mark, colour, on=session.colours)}  {one.name}: {render.clean(one.message)}")
            if one.fix and one.status in ("warn", "fail"):
                session.out(f"      fix: {render.clean(one.fix)}")
        if os.geteuid() != 0:
            session.say("not run as root: some of this could only be guessed")
    return 1 if any(one.status == "fail" for one in checks) else 0


def paths_of(session: Session) -> Paths:
    """Where this kvmd's things are."""
    return Paths.of(Path(session.config_dir), Path(session.state_dir), Path(session.run_dir), None)


if __name__ == "__main__":
    sys.exit(main())
