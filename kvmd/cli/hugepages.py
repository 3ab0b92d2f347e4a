"""`host hugepages`: the pools by size and node, who wants pages, and what would reserve them at boot."""

from __future__ import annotations

from collections.abc import Mapping

from kvmd.cli import render
from kvmd.cli.arguments import Parsed
from kvmd.cli.session import Session
from kvmd.units import Size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_POOLS = ("PAGE", "NODE", "TOTAL", "USED", "RESERVED", "FREE", "WANTED", "ONE PIECE", "COMPACTED")
_GUESTS = ("GUEST", "PAGE", "PAGES", "NODES", "NOW")


def hugepages(session: Session, _parsed: Parsed) -> int:
    """The pools, the guests, and what cannot be had."""
    found = session.call("host.hugepages")
    session.result(found, lambda: draw(found, on=session.colours))
    return 0


def draw(found: Mapping[str, Any], *, on: bool = False) -> str:
    """Text of the whole answer."""
    rows = [
        (
            str(Size(pool["page_bytes"])),
            *(str(pool[key]) for key in ("node", "total", "used", "reserved", "free", "wanted")),
            *("-" if pool[key] is None else str(pool[key]) for key in ("in_one_piece", "by_compaction")),
        )
        for pool in found["pools"]
    ]
    short = {(n, 6): render.YELLOW for n, pool in enumerate(found["pools"]) if pool["wanted"] != pool["total"]}
    lines = [render.table(_POOLS, rows, right=frozenset(range(1, len(_POOLS))), colours=short, on=on)]
    if found["guests"]:
        guests = [
            (
                guest["name"],
                str(Size(guest["page_bytes"])),
                str(guest["pages"]),
                f"{guest['nodes']} {guest['policy']}".strip() or "any",
                ("runs in them" if guest["has_pages"] else "runs without") if guest["running"] else "off",
            )
            for guest in found["guests"]
        ]
        lines += ["", render.table(_GUESTS, guests, right=frozenset({2}), on=on)]
    if found["boot"]:
        lines += ["", f"at boot: {render.clean(' '.join(found['boot']))}"]
    for problem in found["problems"]:
        lines += ["", render.problem(problem)]
    return "\n".join(lines)
