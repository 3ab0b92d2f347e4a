"""20 guests with start.auto from the daemon's exec until all run, against 20 bare QEMUs started two at a time.

Meanwhile another client asks daemon.ping all the time: its longest wait is printed.

    python -m benchmarks.boot20
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks.bare import Bare
from benchmarks.harness import BareQemu, BenchHost, Series, begin, bench_host, options, settle, verdict
from kvmd.effects.descriptors import Descriptors
from kvmd.errors import KvmdError

RATIO = 1.5
ANSWER_MS = 250.0
AT_A_TIME = 2


def main() -> None:
    """A fresh kvmd and state for each round, and the bare side after it on the same files."""
    chosen = options(__doc__, guests=20, rounds=3)
    begin(f"{chosen.guests} autostart guests from exec until all run")
    ours, bare_side, api = Series("kvmd, exec until all run"), Series("bare QEMUs, two at a time"), Series("API answer")
    for warming in range(-1, chosen.rounds):
        with bench_host() as host:
            names = host.boot_guests(chosen.guests, nic=True, extra="[start]\nauto = true\n")
            host.launch()  # identities, capabilities and bytecode are there at every boot but the first
            all_running(host, Series(""))
            for name in names:
                host.call("guest.kill", name=name)
            host.terminate()
            forget_boot(host)
            settle(5)
            waits = Series("")
            begun = time.perf_counter()
            host.launch()
            all_running(host, waits)
            seconds = time.perf_counter() - begun
            for name in names:
                host.call("guest.kill", name=name)
            host.terminate()
            bare_seconds = start_bare(host, names)
            if warming >= 0:
                ours.values.append(seconds)
                bare_side.values.append(bare_seconds)
                api.values += waits.values
    for series in (ours, bare_side, api):
        print(series.line())
    ratios = sorted(a / b for a, b in zip(ours.values, bare_side.values, strict=True))
    verdict("kvmd over bare QEMUs, median of pairs", ratios[len(ratios) // 2], RATIO, "x")
    verdict("longest wait for an API answer", max(api.values) * 1e3, ANSWER_MS, "ms")


def all_running(host: BenchHost, waits: Series) -> None:
    """Ask until every guest runs; each answer's time once the API is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with host.client(10) as client:
                while time.monotonic() < deadline:
                    begun = time.perf_counter()
                    states = {guest["state"] for guest in client.call("guest.list", {})["guests"]}
                    waits.values.append(time.perf_counter() - begun)
                    if states == {"running"}:
                        return
                    time.sleep(0.02)
        except KvmdError:
            time.sleep(0.01)
    raise AssertionError(host.log.read_text()[-4000:])


def forget_boot(host: BenchHost) -> None:
    """As after a reboot: another boot id on record, so that start.auto decides again."""
    from kvmd.effects.store import Store

    store = Store(host.state)
    store.set_meta("boot_id", "an earlier boot")
    store.close()


def start_bare(host: BenchHost, names: list[str]) -> float:
    """All of them with everything opened beforehand, two at a time, until each runs."""
    bare = Bare(host)
    prepared = {name: bare.prepare(name) for name in names}
    begun = time.perf_counter()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        running = list(pool.map(lambda name: start_one(bare, name, *prepared[name]), names))
    seconds = time.perf_counter() - begun
    for qemu in running:
        qemu.end()
    for _, descriptors in prepared.values():
        descriptors.close()
    return seconds


def start_one(bare: Bare, name: str, argv: tuple[str, ...], descriptors: Descriptors) -> BareQemu:
    """A guest that runs: its firmware competes with the QEMUs that start after it, as under kvmd."""
    qemu = bare.start(name, argv, descriptors)
    qemu.cont()
    return qemu


if __name__ == "__main__":
    main()
