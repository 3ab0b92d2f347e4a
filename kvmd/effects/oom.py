"""Whether the kernel has lately killed for lack of memory: what tells such an end of a QEMU from a `kill -9`."""

from __future__ import annotations

from kvmd.effects.tree import Tree

_LATELY_S = 30.0  # `look` is called more often than that


class OomWatch:
    """Counts of /proc/vmstat's oom_kill, of memory cgroups and of the whole host alike (kernel 4.13 and later)."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._count = self._read()
        self._grew_at_s: float | None = None

    def look(self, now_s: float) -> bool:
        """Look, and say whether anything was killed within the last half minute. `now_s` is any steady clock."""
        count = self._read()
        if count > self._count:
            self._grew_at_s = now_s
        self._count = count
        return self._grew_at_s is not None and now_s - self._grew_at_s < _LATELY_S

    def _read(self) -> int:
        for line in (self._tree.read("/proc/vmstat") or "").splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return 0
