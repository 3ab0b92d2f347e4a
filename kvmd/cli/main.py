"""`kvmd-cli`: finds the command, runs it, and turns what goes wrong into a message and an exit code.

Starts on the standard library and little of that: what a command needs is imported when it is run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence

from kvmd import __version__
from kvmd.cli.arguments import Parsed, Verb, parse
from kvmd.cli.session import Session, tell
from kvmd.cli.verbs import GRAMMAR
from kvmd.errors import Denied, KvmdError, NotFound

INTERRUPTED = 130  # 128 + SIGINT, as a shell has it
_NOT_FOUND = (FileNotFoundError, NotADirectoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. The exit code; see docs/cli.md."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(errors="backslashreplace")  # a name that is no text must not be a traceback
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except KvmdError as error:
        return report(error, as_json="--json" in arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does. Python would complain when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        return report(_translated(error), as_json="--json" in arguments)
    return code


def report(error: KvmdError, *, as_json: bool) -> int:
    """Say what went wrong: for people on stderr; with --json also as a JSON-RPC error object on stdout."""
    if as_json:
        body = {"code": error.rpc_code, "message": error.message, "data": error.to_data()}
        sys.stdout.write(json.dumps({"error": body}) + "\n")
    tell(error)
    return error.exit_code


def _run(arguments: list[str]) -> int:
    parsed = parse(GRAMMAR, arguments)
    if parsed.on("--version") and parsed.verb is None:
        sys.stdout.write(f"kvmd-cli {__version__}\n")
        return 0
    if parsed.on("--help") or parsed.verb is None:
        from kvmd.cli.help import page

        sys.stdout.write(page(parsed.verb))
        return 0
    return _handler(parsed.verb)(Session(parsed), parsed)


def _handler(verb: Verb) -> Callable[[Session, Parsed], int]:
    module, _, function = verb.run.partition(":")
    __import__(module)  # importlib's own function costs a millisecond to be had
    handler: Callable[[Session, Parsed], int] = getattr(sys.modules[module], function)
    return handler


def _translated(error: OSError) -> KvmdError:
    """A file that cannot be had, in our words."""
    reason = error.strerror or str(error)
    text = f"{error.filename}: {reason}" if error.filename else reason
    if isinstance(error, PermissionError):
        return Denied(text, hint=None if os.geteuid() == 0 else "run it as root")
    return NotFound(text) if isinstance(error, _NOT_FOUND) else KvmdError(text)


if __name__ == "__main__":
    sys.exit(main())
