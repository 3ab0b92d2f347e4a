"""What every command has: the common flags, the daemon, and the rule that stdout is the result and stderr the talk."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

from kvmd.cli.arguments import Parsed, UsageError
from kvmd.errors import KvmdError
from kvmd.rpc.client import Client

TYPE_CHECKING = False  # typing itself is 3 ms of every start
if TYPE_CHECKING:
    from typing import Any

PATIENCE_S = 30.0  # for a question the daemon answers from what it knows


class Session:
    """One run of `kvmd-cli`."""

    def __init__(self, parsed: Parsed) -> None:
        self.config_dir = parsed.text("--config-dir") or "/etc/kvmd"
        self.state_dir = parsed.text("--state-dir") or "/var/lib/kvmd"
        self.run_dir = parsed.text("--run-dir") or "/run/kvmd"
        self.socket = (
            parsed.text("--socket")
            or (f"{self.run_dir}/kvmd.sock" if parsed.text("--run-dir") else None)
            or os.environ.get("KVMD_SOCKET")
            or f"{self.run_dir}/kvmd.sock"
        )
        self.json = parsed.on("--json")
        self.dry_run = parsed.on("--dry-run")
        self.yes = parsed.on("--yes")
        self.wait = not parsed.on("--no-wait")
        self.timeout_s = _seconds(parsed.text("--timeout"))
        self.colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def client(self, patience_s: float | None = PATIENCE_S) -> Client:
        """The daemon; each call waits as long as --timeout says, else `patience_s` (None: for ever)."""
        return Client(self.socket, self.timeout_s if self.timeout_s is not None else patience_s)

    def call(self, method: str, patience_s: float | None = PATIENCE_S, **params: Any) -> Any:
        """One call on a connection of its own."""
        with self.client(patience_s) as client:
            return client.call(method, params)

    def result(self, value: Any, text: Callable[[], str]) -> None:
        """The result: the value as one JSON document, or the text made of it."""
        if self.json:
            self.document(value)
            return
        shown = text()
        if shown:
            self.out(shown)

    def document(self, value: Any) -> None:
        """A JSON document: indented for people, one line for a pipe."""
        tty = sys.stdout.isatty()
        self.out(json.dumps(value, indent=2 if tty else None, separators=None if tty else (",", ":")))

    def out(self, text: str) -> None:
        """A line, or lines, of the result."""
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")

    def say(self, text: str) -> None:
        """Talk."""
        sys.stdout.flush()
        sys.stderr.write(text if text.endswith("\n") else f"{text}\n")

    def flush(self) -> None:
        """Let a reader at the other end of a pipe have what there is."""
        sys.stdout.flush()

    def interactive(self) -> bool:
        """Whether there is somebody to be asked."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def confirmed(self, question: str) -> bool:
        """Whether --yes, or a person on the terminal, said yes. Without a terminal the answer is no."""
        return self.yes or self.asked(question)

    def asked(self, question: str) -> bool:
        """Whether a person on the terminal says yes."""
        if not self.interactive():
            return False
        sys.stdout.flush()
        sys.stderr.write(f"{question} [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")


def tell(error: KvmdError) -> None:
    """Say on stderr what went wrong and what to do next."""
    from kvmd.cli.render import clean

    sys.stdout.flush()
    sys.stderr.write(f"kvmd-cli: {clean(error.message)}\n")
    for fault in error.details.get("faults", ()) if error.slug == "config-invalid" else ():
        if str(fault) not in error.message:
            sys.stderr.write(f"  {clean(str(fault))}\n")
    if error.hint:
        sys.stderr.write(f"  hint: {clean(error.hint)}\n")


def _seconds(text: str | None) -> float | None:
    """--timeout's value."""
    if text is None:
        return None
    from kvmd.units import Duration

    try:
        value = float(text) if text.replace(".", "", 1).isdigit() else float(Duration.parse(text))
    except ValueError as error:
        raise UsageError(f"--timeout: {error}") from None
    if not 0 < value <= 86_400:
        raise UsageError("--timeout: more than nothing and at most a day")
    return value
