"""What tests/system/test_durability.py runs in processes of their own: to be killed, lied to and starved of space.

`python -m tests.rig.durability SCENARIO DIRECTORY`: each scenario says "ready" when its preparation is done, waits
for a line, does one thing and prints what came of it, as one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from kvmd.effects.files import write_atomic
from kvmd.effects.images import create_image
from kvmd.effects.records import GuestRun
from kvmd.effects.store import Store
from kvmd.errors import KvmdError

OLD, NEW = b"old" * 5000, b"new" * 7000
RUN = GuestRun(name="web", uuid="u", uid=64100, boot_id="b", nonce="n", begun_at=1.0)


def ready() -> None:
    """Wait until the test has attached its tracer."""
    os.write(1, b"ready\n")
    os.read(0, 1)


def attempt(step: Callable[[], object]) -> str:
    """ "done", or the kind of failure and its message."""
    try:
        step()
    except KvmdError as error:
        return f"{type(error).__name__}: {error.message}"
    return "done"


def atomic(directory: Path) -> dict[str, str]:
    """Replace a file."""
    ready()
    return {"first": attempt(lambda: write_atomic(directory / "record", NEW))}


def store(directory: Path) -> dict[str, str]:
    """Two commits to a store that is open; the second shows whether it recovers."""
    opened = Store(directory)
    ready()
    first = attempt(lambda: opened.set_meta("key", "new"))
    return {"first": first, "second": attempt(lambda: opened.set_meta("second", "there"))}


def image(directory: Path) -> dict[str, str]:
    """Make an image."""
    ready()
    path = str(directory / "new.qcow2")
    return {"first": attempt(lambda: create_image(path, format="qcow2", size_bytes=1 << 30, roots=[directory]))}


def fill(directory: Path) -> None:
    """Take all space that is left."""
    fd = os.open(directory / "ballast", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        for size in (65536, 4096, 512, 1):
            try:
                while os.write(fd, bytes(size)):
                    pass
            except OSError:
                continue
    finally:
        os.close(fd)


def full(directory: Path) -> dict[str, object]:
    """Everything on a full disk, then with room again. `directory` is the root of a small tmpfs."""
    record = directory / "record"
    write_atomic(record, OLD)
    opened = Store(directory)
    opened.begin_start(RUN)
    fill(directory)
    found: dict[str, object] = {
        "atomic": attempt(lambda: write_atomic(record, NEW)),
        "kept": record.read_bytes() == OLD,
        "intent": attempt(lambda: opened.journal("knob:/x", "0", "1", "b", "why")),
        "image": attempt(
            lambda: create_image(str(directory / "i"), format="qcow2", size_bytes=1 << 30, roots=[directory])
        ),
        "ended": opened.end_run("web", "guest-poweroff", "", 2.0),
        "runs": len(opened.runs()),
        "files": sorted(entry.name for entry in directory.iterdir() if "state.db" not in entry.name),
    }
    (directory / "ballast").unlink()
    found["again"] = [
        attempt(lambda: write_atomic(record, NEW)),
        attempt(lambda: opened.journal("knob:/x", "0", "1", "b", "why")),
        attempt(lambda: opened.begin_start(RUN)),
    ]
    opened.close()
    reopened = Store(directory)
    end = reopened.last_end("web")
    found["after"] = [reopened.rebuilt, len(reopened.journalled("b")), len(reopened.runs()), end and end.reason]
    return found


def readonly(directory: Path) -> dict[str, object]:
    """A state directory whose file system turned read-only while kvmd was away. `directory` is a mount point."""
    opened = Store(directory)
    opened.begin_start(RUN)
    opened.close()
    remount(directory, "ro")
    found = Store(directory)
    answer: dict[str, object] = {
        "degraded": found.degraded,
        "runs": [run.name for run in found.runs()],
        "write": attempt(lambda: found.set_meta("a", "b")),
    }
    remount(directory, "rw")
    answer["again"] = attempt(lambda: found.set_meta("a", "b"))
    answer["runs again"] = [run.name for run in found.runs()]
    return answer


def remount(directory: Path, mode: str) -> None:
    if os.spawnlp(os.P_WAIT, "mount", "mount", "-o", f"remount,{mode}", str(directory)):
        raise SystemExit(f"cannot remount {directory} {mode}")


SCENARIOS: dict[str, Callable[[Path], object]] = {
    "atomic": atomic,
    "store": store,
    "image": image,
    "full": full,
    "readonly": readonly,
}

if __name__ == "__main__":
    print(json.dumps(SCENARIOS[sys.argv[1]](Path(sys.argv[2]))))
