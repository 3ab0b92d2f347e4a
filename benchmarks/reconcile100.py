"""`host.reconcile` beside 100 running guests when there is nothing to do: what cron, the timer and a link event cost.

Every guest has a NIC on the one NAT network and pins to be looked at. The other side, alternating: a plain script of
the same interpreter that only asks the kernel the main questions (affinity of every thread, the nft table, the links
with addresses) and compares nothing.

    python -m benchmarks.reconcile100
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.harness import (
    Series,
    begin,
    bench_host,
    cpu_seconds,
    environment,
    options,
    running_hundred,
    settle,
    verdict,
)

LIMIT_S = 0.1
PLAIN = """
import os, subprocess, sys
for pid in sys.argv[2:]:
    for tid in os.listdir(f"/proc/{pid}/task"):
        os.sched_getaffinity(int(tid))
for command in (("nft", "-j", "list", "table", "inet", "kvmd"), ("ip", "-j", "-d", "address")):
    subprocess.run(("ip", "netns", "exec", sys.argv[1], *command), stdout=subprocess.DEVNULL, check=True)
"""


def main() -> None:
    """Start the guests, then reconcile and ask plainly by turns."""
    chosen = options(__doc__, guests=100, rounds=20)
    begin(f"a reconcile that changes nothing beside {chosen.guests} guests")
    ours, plain = Series("host.reconcile, nothing to do"), Series("plain script, questions alone")
    with bench_host() as host:
        running_hundred(host, chosen.guests, nic=True)
        host.call("host.apply")
        settle(10)
        pids = [str(guest["pid"]) for guest in host.call("guest.list")["guests"]]
        assert host.call("host.plan")["actions"] == []
        words = [sys.executable, "-I", "-S", "-c", PLAIN, str(host.namespace), *pids]
        before = cpu_seconds(host.pid)
        for warming in range(-2, chosen.rounds):
            with host.client() as client:
                one, other = Series(""), Series("")
                one.time(lambda asked=client: _nothing(asked.call("host.reconcile", {})))
                other.time(lambda: subprocess.run(words, env=environment(), check=True))
            if warming >= 0:
                ours.values += one.values
                plain.values += other.values
        used = (cpu_seconds(host.pid) - before) / (chosen.rounds + 2)
    for series in (ours, plain):
        print(series.line())
    print(f"  kvmd's CPU time per pass: {used * 1e3:.0f} ms; ratio of medians {ours.median / plain.median:.2f}")
    verdict(f"reconcile beside {chosen.guests} guests, median", ours.median, LIMIT_S, "s")


def _nothing(answer: dict[str, list[object]]) -> None:
    assert answer["outcomes"] == [], answer


if __name__ == "__main__":
    main()
