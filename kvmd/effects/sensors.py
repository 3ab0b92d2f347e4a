"""What the tuning agent reads from the kernel: memory, paging, stalls, page merging, a process's memory and waiting.

Below a root path, so that recorded trees serve tests. Reads only. Formats: proc(5), Documentation/accounting/psi.rst,
Documentation/admin-guide/mm/ksm.rst.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvmd.effects.tree import Tree
from kvmd.tuning.ksm import KsmSample
from kvmd.tuning.snapshot import HostSample

KSM = "/sys/kernel/mm/ksm"
_CPU_FIELDS = (14 - 3, 15 - 3)  # proc(5): utime and stime, counted from the field behind the command's name


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """One process: resident memory, and how long its threads were ready to run and did not (all threads, summed)."""

    rss_bytes: int
    run_delay_ns: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a QEMU holds: the guest's memory (in swap too), and everything else with its page tables."""

    guest_bytes: int
    other_bytes: int


class HostSensors:
    """All host sensors. Cheap: a few small files a reading."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.tree = Tree(root)
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._ticks_per_s = os.sysconf("SC_CLK_TCK")
        self._ksmd: int | None = None

    def host(self) -> HostSample | None:
        """The host's memory now, None when /proc/meminfo lacks what no decision can do without."""
        memory = _numbers(self.tree.read("/proc/meminfo"), kib=True)
        if "MemTotal" not in memory or "MemAvailable" not in memory:
            return None
        paging = _numbers(self.tree.read("/proc/vmstat"), kib=False)
        some, full = _psi(self.tree.read("/proc/pressure/memory"))
        default_pool = memory.get("HugePages_Total", 0) // 1024 * memory.get("Hugepagesize", 0)
        return HostSample(
            total_bytes=memory["MemTotal"],
            available_bytes=memory["MemAvailable"],
            hugetlb_bytes=memory.get("Hugetlb", default_pool),  # all sizes since 4.20, before it the default one
            swap_total_bytes=memory.get("SwapTotal", 0),
            swap_free_bytes=memory.get("SwapFree", 0),
            swap_in_pages=paging.get("pswpin", 0),
            swap_out_pages=paging.get("pswpout", 0),
            major_faults=paging.get("pgmajfault", 0),
            psi_some=some,
            psi_full=full,
        )

    def rss_bytes(self, pid: int) -> int | None:
        """Resident memory of a process without hugetlb pages, None when it is gone."""
        fields = (self.tree.read(f"/proc/{pid}/statm") or "").split()
        return int(fields[1]) * self._page_bytes if len(fields) > 1 and fields[1].isdigit() else None

    def process(self, pid: int) -> ProcessSample | None:
        """Resident memory and run delay of a process, None when it is gone. A file per thread: not for every tick."""
        rss = self.rss_bytes(pid)
        if rss is None:
            return None
        delay = 0
        for thread in self.tree.names(f"/proc/{pid}/task"):
            fields = (self.tree.read(f"/proc/{pid}/task/{thread}/schedstat") or "").split()
            delay += int(fields[1]) if len(fields) > 1 and fields[1].isdigit() else 0
        return ProcessSample(rss, delay)

    def footprint(self, pid: int, memory_bytes: int) -> Footprint | None:
        """What the QEMU of a guest of that size holds, None when it is gone. Walks its page tables: use a thread.

        The guest's memory is what is kept out of core dumps ("dd", proc(5)) and at least half as large as it.
        """
        text = self.tree.read(f"/proc/{pid}/smaps")
        tables = _numbers(self.tree.read(f"/proc/{pid}/status"), kib=True).get("VmPTE", 0)
        if not text:
            return None
        guest = other = 0
        fields: dict[str, int] = {}
        for line in text.splitlines():
            key, _, value = line.partition(":")
            words = value.split()
            if key != "VmFlags":
                if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
                    fields[key] = int(words[0]) << 10
                continue
            if "dd" in words and fields.get("Size", 0) * 2 >= memory_bytes:
                guest += sum(fields.get(name, 0) for name in ("Rss", "Swap", "Shared_Hugetlb", "Private_Hugetlb"))
            else:
                other += fields.get("Pss", 0) + fields.get("SwapPss", 0)
            fields = {}
        return Footprint(guest, other + tables)

    def ksm(self) -> KsmSample | None:
        """Page merging now, None on a kernel without it."""
        knobs = {name: self.tree.number(f"{KSM}/{name}") for name in ("run", "pages_to_scan", "sleep_millisecs")}
        counters = {name: self.tree.number(f"{KSM}/{name}") or 0 for name in ("full_scans", "pages_sharing")}
        run, pages, sleep_ms = (knobs[name] for name in ("run", "pages_to_scan", "sleep_millisecs"))
        if run is None or pages is None or sleep_ms is None:
            return None
        profit = self.tree.number(f"{KSM}/general_profit")
        merged = counters["pages_sharing"] * self._page_bytes
        return KsmSample(
            run=run,
            pages_to_scan=pages,
            sleep_ms=sleep_ms,
            full_scans=counters["full_scans"],
            pages_sharing=counters["pages_sharing"],
            profit_bytes=merged if profit is None else profit,
            pages_scanned=self.tree.number(f"{KSM}/pages_scanned"),
            advisor=_chosen(self.tree.read(f"{KSM}/advisor_mode")),
            cpu_s=self._ksmd_cpu_s(),
        )

    def _ksmd_cpu_s(self) -> float | None:
        """CPU seconds of the kernel's ksmd thread since boot."""
        if self._ksmd is None or self.tree.read(f"/proc/{self._ksmd}/comm") != "ksmd":
            pids = (int(name) for name in self.tree.names("/proc") if name.isascii() and name.isdigit())
            self._ksmd = next((pid for pid in sorted(pids) if self.tree.read(f"/proc/{pid}/comm") == "ksmd"), None)
        if self._ksmd is None:
            return None
        fields = (self.tree.read(f"/proc/{self._ksmd}/stat") or "").rpartition(")")[2].split()
        ticks = [fields[field] for field in _CPU_FIELDS if field < len(fields)]
        if len(ticks) != len(_CPU_FIELDS) or not all(tick.isdigit() for tick in ticks):
            return None
        return sum(map(int, ticks)) / self._ticks_per_s


def _numbers(text: str | None, *, kib: bool) -> dict[str, int]:
    """Lines of a name and a number. With `kib` everything is taken times 1024, plain counts too."""
    found: dict[str, int] = {}
    for line in (text or "").splitlines():
        fields = line.replace(":", " ").split()
        if len(fields) >= 2 and fields[1].isdigit():
            found[fields[0]] = int(fields[1]) * (1024 if kib else 1)
    return found


def _psi(text: str | None) -> tuple[float | None, float | None]:
    """avg10 of "some" and "full" as shares of one; None where the kernel has no PSI (reading gives EOPNOTSUPP)."""
    shares: dict[str, float] = {}
    for line in (text or "").splitlines():
        kind, _, rest = line.partition(" ")
        for field in rest.split():
            name, _, value = field.partition("=")
            if name == "avg10":
                try:
                    shares[kind] = float(value) / 100
                except ValueError:
                    continue
    return shares.get("some"), shares.get("full")


def _chosen(text: str | None) -> str | None:
    """The bracketed word of "[none] scan-time"."""
    if text is None:
        return None
    return next((word.strip("[]") for word in text.split() if word.startswith("[")), text)
