"""kvmd killed with SIGKILL beside 100 running guests, and started again: how soon are all 100 states known anew?

From exec to a guest.list in which QEMU itself confirmed each guest's state after that exec (observed_at), the same
pids as before. The other side: a plain script of the same interpreter that asks the 100 monitors one after the other.

    python -m benchmarks.adopt100
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import (
    BenchHost,
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
from kvmd.errors import KvmdError

LIMIT_S = 0.8
PLAIN = """
import json, socket, sys
for path in sys.argv[1:]:
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(path)
    peer.send(b'{"execute":"qmp_capabilities"}{"execute":"query-status"}')
    seen = b""
    while b'"status"' not in seen:
        seen += peer.recv(65536)
"""


def main() -> None:
    """Kill, start, ask; several times, with the plain script between."""
    chosen = options(__doc__, guests=100, rounds=5)
    begin(f"kvmd killed beside {chosen.guests} guests and started again")
    ours, plain, used = Series("exec until all states were read again"), Series("plain script, all asked"), []
    with bench_host() as host:
        names = running_hundred(host, chosen.guests)
        pids = {guest["name"]: guest["pid"] for guest in host.call("guest.list")["guests"]}
        for warming in range(-1, chosen.rounds):
            host.kill()
            settle(5)
            one, other = Series(""), Series("")
            other.time(lambda: ask_plainly([host.run / f"guests/{name}/rescue.sock" for name in names]))
            one.values.append(known_again(host, pids))
            if warming >= 0:
                ours.values += one.values
                plain.values += other.values
                used.append(cpu_seconds(host.pid))
    for series in (ours, plain):
        print(series.line())
    print(f"  kvmd's own CPU time until then: {min(used):.2f} s at best, median {sorted(used)[len(used) // 2]:.2f} s")
    print(f"  ratio of medians {ours.median / plain.median:.2f}")
    verdict("until every state was read again, median", ours.median, LIMIT_S, "s")


def known_again(host: BenchHost, pids: dict[str, int]) -> float:
    """Seconds from exec until every guest was confirmed by its QEMU after it."""
    begun, start = time.time(), time.perf_counter()
    host.launch()
    while True:
        try:
            with host.client(5) as client:
                while True:
                    guests = client.call("guest.list", {})["guests"]
                    fresh = [g for g in guests if g["state"] == "running" and (g["observed_at"] or 0) >= begun]
                    if len(fresh) == len(pids):
                        seconds = time.perf_counter() - start
                        assert {g["name"]: g["pid"] for g in guests} == pids
                        return seconds
                    time.sleep(0.005)
        except KvmdError:
            time.sleep(0.005)
        if time.perf_counter() - start > 30:
            raise AssertionError(host.log.read_text()[-4000:])


def ask_plainly(sockets: list[Path]) -> None:
    """What a script without kvmd would take, over the guests' second monitors."""
    subprocess.run([sys.executable, "-I", "-S", "-c", PLAIN, *map(os.fspath, sockets)], env=environment(), check=True)


if __name__ == "__main__":
    main()
