"""The agent's host sensors on made-up kernels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmd.effects.sensors import Footprint, HostSensors, ProcessSample

MEMINFO = """MemTotal:       24684096 kB
MemFree:        20000000 kB
MemAvailable:   21000000 kB
SwapTotal:       1048576 kB
SwapFree:         524288 kB
HugePages_Total:     512
Hugepagesize:       2048 kB
Hugetlb:         3145728 kB
"""
VMSTAT = "pgmajfault 2059\npswpin 12\npswpout 34\n"
PSI = "some avg10=1.50 avg60=0.25 avg300=0.19 total=8526452\nfull avg10=0.75 avg60=0.00 avg300=0.00 total=0\n"
PAGE = os.sysconf("SC_PAGE_SIZE")


def write(root: Path, files: dict[str, str]) -> HostSensors:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return HostSensors(root)


def test_host(tmp_path: Path) -> None:
    found = write(tmp_path, {"proc/meminfo": MEMINFO, "proc/vmstat": VMSTAT, "proc/pressure/memory": PSI}).host()
    assert found is not None
    assert (found.total_bytes, found.available_bytes) == (24684096 << 10, 21000000 << 10)
    assert found.hugetlb_bytes == 3 << 30, "all page sizes, not the default one alone"
    assert (found.swap_total_bytes, found.swap_free_bytes) == (1 << 30, 1 << 29)
    assert (found.swap_in_pages, found.swap_out_pages, found.major_faults) == (12, 34, 2059)
    assert (found.psi_some, found.psi_full) == (0.015, 0.0075)


def test_old_kernel_without_psi_and_hugetlb_line(tmp_path: Path) -> None:
    old = MEMINFO.replace("Hugetlb:         3145728 kB\n", "")
    found = write(tmp_path, {"proc/meminfo": old}).host()
    assert found is not None
    assert found.hugetlb_bytes == 1 << 30
    assert found.psi_full is None
    assert found.major_faults == 0


@pytest.mark.parametrize("text", ["", "MemTotal: 1 kB\n", "garbage\n:::\nMemTotal\nMemAvailable: x kB\n"])
def test_no_memory_figures_is_none(tmp_path: Path, text: str) -> None:
    assert write(tmp_path, {"proc/meminfo": text}).host() is None


def test_psi_switched_off_reads_as_unknown(tmp_path: Path) -> None:
    found = write(tmp_path, {"proc/meminfo": MEMINFO, "proc/pressure/memory": "some avg10=x\n"}).host()
    assert found is not None
    assert found.psi_some is None


def test_process(tmp_path: Path) -> None:
    sensors = write(
        tmp_path,
        {
            "proc/42/statm": "765 434 406 5 0 123 0",
            "proc/42/task/42/schedstat": "10 100 1",
            "proc/42/task/43/schedstat": "10 50 1",
        },
    )
    assert sensors.process(42) == ProcessSample(434 * PAGE, 150)
    assert sensors.process(43) is None
    assert sensors.rss_bytes(43) is None


def test_ksm(tmp_path: Path) -> None:
    ksm = "sys/kernel/mm/ksm"
    ticks = os.sysconf("SC_CLK_TCK")
    fields = " ".join(["S", *["0"] * 10, str(3 * ticks), str(ticks), *["0"] * 30])
    sensors = write(
        tmp_path,
        {
            f"{ksm}/run": "1\n",
            f"{ksm}/pages_to_scan": "100\n",
            f"{ksm}/sleep_millisecs": "20\n",
            f"{ksm}/full_scans": "7\n",
            f"{ksm}/pages_sharing": "10\n",
            f"{ksm}/general_profit": "-64\n",
            f"{ksm}/advisor_mode": "[none] scan-time\n",
            "proc/5/comm": "kthreadd\n",
            "proc/36/comm": "ksmd\n",
            "proc/36/stat": f"36 (ksmd) {fields}",
        },
    )
    found = sensors.ksm()
    assert found is not None
    assert (found.run, found.pages_to_scan, found.full_scans, found.advisor) == (1, 100, 7, "none")
    assert found.profit_bytes == -64
    assert found.cpu_s == 4.0
    assert found.pages_scanned is None


def test_ksm_of_a_kernel_without_profit_or_without_any(tmp_path: Path) -> None:
    ksm = "sys/kernel/mm/ksm"
    files = {f"{ksm}/run": "0", f"{ksm}/pages_to_scan": "1", f"{ksm}/sleep_millisecs": "2", f"{ksm}/pages_sharing": "3"}
    found = write(tmp_path / "old", files).ksm()
    assert found is not None
    assert found.profit_bytes == 3 * PAGE
    assert found.cpu_s is None
    assert HostSensors(tmp_path / "none").ksm() is None


def test_this_machine() -> None:
    found = HostSensors().host()
    assert found is not None
    assert 0 < found.available_bytes < found.total_bytes
    assert (HostSensors().rss_bytes(os.getpid()) or 0) > 1 << 20


SMAPS = """7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Size:             262144 kB
Rss:              100000 kB
Pss:              100000 kB
Swap:               2000 kB
SwapPss:            2000 kB
VmFlags: rd wr mr mw me dd ac hg
7f0020000000-7f0020400000 rw-p 00000000 00:00 0
Size:              16384 kB
Rss:               16000 kB
Pss:               16000 kB
Swap:                  0 kB
SwapPss:               0 kB
VmFlags: rd wr mr mw me dd ac
7f0030000000-7f0030400000 r-xp 00000000 08:01 7  /usr/bin/qemu-system-x86_64
Size:               8192 kB
Rss:                4000 kB
Pss:                1000 kB
Swap:                  0 kB
SwapPss:              24 kB
VmFlags: rd ex mr mw me
"""


def test_what_a_qemu_holds_beside_its_guest(tmp_path: Path) -> None:
    """The screen's memory is kept out of core dumps as well, and is no memory of the guest's."""
    sensors = write(tmp_path, {"proc/7/smaps": SMAPS, "proc/7/status": "VmRSS: 1 kB\nVmPTE:\t 500 kB\n"})
    assert sensors.footprint(7, 256 << 20) == Footprint(102000 << 10, (16000 + 1000 + 24 + 500) << 10)
    assert sensors.footprint(8, 256 << 20) is None
