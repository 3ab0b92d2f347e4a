"""`logs NAME`: what a guest wrote to its serial ports, or its QEMU to stderr. Reads files; the daemon may be away."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from kvmd.cli.arguments import Parsed, UsageError
from kvmd.cli.render import clean
from kvmd.cli.session import Session
from kvmd.errors import Denied, NotFound, Unreachable

FOLLOW_S = 0.2  # a file on disk has no event that costs less to wait for than this look
_TAIL_LINES = 20  # shown first with -f, where nobody wants all
_CHUNK = 1 << 16


def logs(session: Session, parsed: Parsed) -> int:
    """Print the logs, oldest first; with -f go on until interrupted."""
    name, port, qemu = parsed.word("NAME"), parsed.text("--serial"), parsed.on("--qemu")
    if qemu and port:
        raise UsageError("logs: --qemu or --serial, not both")
    lines = _count(parsed.text("--lines"))
    follow = parsed.on("--follow")
    files = find(_directory(session, name), name, "qemu.log" if qemu else f"serial-{port}.log" if port else None)
    if lines is None and follow:
        lines = _TAIL_LINES
    if session.json:
        texts = {file.name: _tail(file.read_bytes(), lines).decode(errors="replace") for file in files}
        session.document({"name": name, "logs": texts})
        return 0
    places = [_print(file, lines, head=len(files) > 1) for file in files]
    while follow:
        time.sleep(FOLLOW_S)
        places = [_more(file, place) for file, place in zip(files, places, strict=True)]
    return 0


def find(directory: Path, name: str, wanted: str | None) -> list[Path]:
    """The log files asked for; all serial ports without a wish. NotFound, Denied."""
    try:
        there = sorted(entry.name for entry in directory.iterdir())
    except PermissionError:
        raise Denied(f"{directory}: only root and its group may read logs", hint="run it as root") from None
    except OSError:
        there = []
    names = [entry for entry in there if entry == wanted or (wanted is None and entry.startswith("serial-"))]
    if not names:
        what = wanted or "log of a serial port"
        hint = f"there is: {', '.join(there)}" if there else f"{directory} is empty: it was never started here"
        raise NotFound(f"guest {name} has no {what}", hint=hint)
    return [directory / entry for entry in names if entry.endswith(".log")]


def _directory(session: Session, name: str) -> Path:
    """Where the guest's logs are: as the daemon says, else where they would be."""
    try:
        return Path(session.call("guest.show", name=name)["log_dir"])
    except Unreachable:
        from kvmd.paths import Paths

        return Paths.of(Path(session.config_dir), Path(session.state_dir), Path(session.run_dir), None).guest_log(name)


def _count(text: str | None) -> int | None:
    if text is not None and not text.isdecimal():
        raise UsageError("--lines: a number")
    return None if text is None else int(text)


def _tail(data: bytes, lines: int | None) -> bytes:
    """The last `lines` lines, all for None."""
    return data if lines is None else b"".join(data.splitlines(keepends=True)[-lines:] if lines else ())


def _print(file: Path, lines: int | None, *, head: bool) -> int:
    """Print a file; the place where the next look begins."""
    data = file.read_bytes()
    if head:
        _write(f"==> {file.name} <==\n".encode())
    _write(_tail(data, lines))
    return len(data)


def _more(file: Path, place: int) -> int:
    """Print what came since; a log that was cut begins anew."""
    size = file.stat().st_size
    if size < place:
        place = 0
    with file.open("rb") as log:
        log.seek(place)
        while data := log.read(_CHUNK):
            _write(data)
            place += len(data)
    return place


def _write(data: bytes) -> None:
    """To a terminal without what it would obey, to a pipe or file as it is."""
    if sys.stdout.isatty():
        data = clean(data.decode(errors="replace").replace("\r\n", "\n"), keep="\n\t").encode()
    sys.stdout.buffer.write(data)
    sys.stdout.flush()
