"""`kvmd doctor`: what this host lacks for the guests its files declare, each with the one thing to do about it.

Works without a daemon, and changes nothing. As another user than root, what cannot be seen is skipped with the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from kvmd.config.desired import Loaded
from kvmd.config.load import load
from kvmd.effects.checkup import Questions, gather
from kvmd.effects.sysfs import HostTree
from kvmd.paths import Paths
from kvmd.plan.checkup import judge
from kvmd.plan.hostreport import Check, Status

__all__ = ["Check", "Status", "examine", "failed"]


async def examine(paths: Paths, *, tree: HostTree | None = None, ask: Questions | None = None) -> tuple[Check, ...]:
    """All checks in the order they are shown. `tree` and `ask` stand in for the host in tests."""
    tree, ask = tree or HostTree(), ask or Questions.live()
    loaded = await asyncio.to_thread(_load, paths, as_root=ask.as_root)
    report = await gather(paths, loaded, tree, ask)
    return judge(report)


def failed(checks: Iterable[Check]) -> bool:
    """Whether the command exits 1."""
    return any(check.status is Status.FAIL for check in checks)


def _load(paths: Paths, *, as_root: bool) -> Loaded:
    """The files as they are now; a guest whose file has a fault is judged by its last good version where we may see it.

    Who owns the files is a check of its own here, so they are read whoever owns them.
    """
    return load(paths.config, last_good_dir=paths.last_good if as_root else None)
