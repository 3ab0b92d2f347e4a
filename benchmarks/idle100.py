"""What kvmd costs while 100 guests run and nothing happens: CPU over a minute, and resident memory.

The other side is a Python of the same interpreter with only asyncio and pydantic loaded.

    python -m benchmarks.idle100
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.harness import (
    BenchHost,
    begin,
    bench_host,
    cpu_seconds,
    environment,
    options,
    rss_bytes,
    running_hundred,
    verdict,
)

CPU_PERCENT = 1.0
RSS_MIB = 70.0
WARM_S = 20.0  # adoption, the boot pass and the agent's first rounds are over


def main() -> None:
    """A kvmd that started the guests, then one that adopted them."""
    chosen = options(__doc__, guests=100, seconds=60)
    begin(f"kvmd idle beside {chosen.guests} guests")
    bare = bare_rss_mib()
    with bench_host() as host:
        running_hundred(host, chosen.guests)
        report("kvmd that started them", host, chosen.seconds, bare)
        host.restart()
        percent, mib = report("kvmd that adopted them", host, chosen.seconds, bare)
    verdict("CPU of one core", percent, CPU_PERCENT, "%")
    verdict("resident memory", mib, RSS_MIB, "MiB")


def report(what: str, host: BenchHost, seconds: int, bare: float) -> tuple[float, float]:
    """Percent of a core over the time, and MiB at its end."""
    time.sleep(WARM_S)
    before = cpu_seconds(host.pid)
    time.sleep(seconds)
    percent = (cpu_seconds(host.pid) - before) / seconds * 100
    mib = rss_bytes(host.pid) / (1 << 20)
    print(f"  {what}: {percent:.2f} % of a core over {seconds} s, {mib:.1f} MiB ({mib / bare:.1f} x bare Python)")
    return percent, mib


def bare_rss_mib() -> float:
    """An interpreter with asyncio and pydantic."""
    code = "import asyncio, pydantic; s = open('/proc/self/status').read(); print(s.partition('VmRSS:')[2].split()[0])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    mib = int(done.stdout) / 1024
    print(f"  bare Python with asyncio and pydantic: {mib:.1f} MiB")
    return mib


if __name__ == "__main__":
    main()
