"""What kvmd's journal says it changed on this host in this boot: for `host release --dry-run`. Only reads."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from kvmd.errors import Denied, NotFound

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def undo_lines(state_dir: Path) -> tuple[str, ...]:
    """A plan line for each journalled effect, in the order they would be undone. Denied, NotFound."""
    path = state_dir / "state.db"
    try:
        path.stat()
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as db:
            boot_id = _BOOT_ID.read_text().strip()
            rows = db.execute(
                "SELECT key, original, new FROM journal WHERE boot_id = ? ORDER BY id DESC", (boot_id,)
            ).fetchall()
    except PermissionError:
        raise Denied(f"{path} is root's", hint="run it as root") from None
    except (FileNotFoundError, sqlite3.OperationalError) as error:
        raise NotFound(f"{path} cannot be read: {error}", hint="was kvmd ever started here?") from None
    return tuple(_line(*row) for row in rows if not row[0].startswith("fixed-irq:"))  # nothing was changed there


def _line(key: str, original: str, new: str) -> str:
    kind, _, subject = key.partition(":")
    match kind:
        case "knob":
            return f"~ {subject}: {new} -> {original}"
        case "hugepages":
            node, _, page_bytes = subject.partition(":")
            return f"~ hugepages {int(page_bytes) >> 20}MiB node {node}: {new} -> {original} pages"
        case "kernel-args":
            return f"{'~' if original else '-'} {subject}"
        case "bridge":
            return f"- bridge {subject}"
        case "hugetlbfs":
            return f"- hugetlbfs {subject}"
        case "swapfile":
            return f"- swap file {subject}"
        case "zram":
            return f"- swap zram{new}"
        case "uplink":
            return f"- uplink {subject} out of {new}"
        case "ruleset":
            return f"- nft table {subject}"
        case "dnsmasq":
            return f"- dnsmasq for network {subject}"
        case _:
            return f"- {key}"
