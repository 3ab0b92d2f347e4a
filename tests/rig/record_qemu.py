"""Record what the QEMU of this machine answers to kvmd's probe, for the unit tests: tests/data/qemu/replies-X.Y.json.

The schema's 800 types are cut down to those `caps.parse` walks; all else is as QEMU said it. Run
it as `python -m tests.rig.record_qemu` when the distribution's QEMU changes, then scripts/regen.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from kvmd.effects.probe import ask
from tests.rig.golden_argv import DATA
from tests.rig.qemu_process import EMULATOR


def trimmed(schema: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All commands, and the types behind the three that are walked."""
    types = {entry["name"]: entry for entry in schema}
    kept = {types[command]["arg-type"] for command in ("netdev_add", "blockdev-add")}
    kept.add(types["query-display-options"]["ret-type"])
    file = next(case["type"] for case in types[types["blockdev-add"]["arg-type"]]["variants"] if case["case"] == "file")
    kept |= {file, next(member["type"] for member in types[file]["members"] if member["name"] == "aio")}
    return [entry for entry in schema if entry["meta-type"] == "command" or entry["name"] in kept]


def main() -> None:
    """Ask and write."""
    replies = asyncio.run(ask(Path(EMULATOR), "tcg"))
    replies["query-qmp-schema"] = trimmed(replies["query-qmp-schema"])
    version = replies["query-version"]["qemu"]
    path = DATA / f"replies-{version['major']}.{version['minor']}.json"
    lines = (f"{json.dumps(label)}: {json.dumps(reply, sort_keys=True)}" for label, reply in replies.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    sys.stdout.write(f"{path}: {path.stat().st_size >> 10} KiB\n")


if __name__ == "__main__":
    main()
