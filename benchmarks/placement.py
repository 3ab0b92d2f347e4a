"""How long placement takes for 500 guests on a host of 384 CPUs in 8 nodes, and a whole plan of it.

Pure: no guest is started. A *placement* is one more guest beside all others, as at its start; a *plan* is everything
`kvmd-cli plan` computes once the host has been read. The machine is made up (8 nodes, 3 L3 each, 8 cores behind each),
and so are the guests: a fifth has CPUs of its own as long as there are any, the rest share.

    python -m benchmarks.placement
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from benchmarks.harness import begin, options, verdict
from kvmd.config.desired import Desired
from kvmd.config.guest import Guest
from kvmd.config.host import Host
from kvmd.facts import Facts, GuestLife, Memory, Process, RunningGuest, Thread
from kvmd.plan.cpus import CpuWish, place, place_all, plan_pins
from kvmd.plan.host import plan
from tests.rig.hosts import GIB, topology

PLACEMENT_MS = 50.0
PLAN_S = 1.0
SIZES = (2, 4, 1, 8, 2, 6, 3, 2, 4, 12)  # vCPUs of the dedicated guests, round and round
OTHERS = 6  # threads of a QEMU beside its vCPUs


def main() -> None:
    """All on one machine and one set of guests."""
    chosen = options(__doc__, guests=500, rounds=7)
    begin(f"placement of {chosen.guests} guests on 384 CPUs")
    shape = topology(nodes=8, caches=3, cores=8, threads=2, siblings_last=True, isolated=range(64, 120))
    guests = {f"g{index:03}": guest(index) for index in range(chosen.guests)}
    host = Host()
    wishes = {name: CpuWish.of(each) for name, each in guests.items()}
    answer = place_all(wishes, shape, host.cpu)
    placed = {name: guests[name] for name in answer.of}
    print(f"  {len(placed)} are placed, {len(guests) - len(placed)} dedicated ones find no room")
    taken = {name: found.vcpus for name, found in answer.of.items()}
    beside = {name: wishes[name] for name in placed}
    last = max(name for name in placed if wishes[name].placement == "dedicated")
    others = {name: has for name, has in taken.items() if name != last}
    facts = Facts(
        cpus=shape,
        memory=Memory(total_bytes=4096 * GIB, available_bytes=4000 * GIB),
        guests=tuple(
            RunningGuest(
                name,
                "uuid",
                Process(1, 1),
                GIB,
                affinity=tuple(str(cpus) for cpus in found.vcpus),
                others=tuple(Thread(tid, "worker", str(found.emulator)) for tid in range(OTHERS)),
            )
            for name, found in answer.of.items()
        ),
        lives=tuple(GuestLife(name, alive=True, wanted=True) for name in placed),
    )
    desired = Desired(host=host, guests=placed)
    cold = replace(facts, guests=(), lives=tuple(GuestLife(name, alive=False, wanted=True) for name in placed))
    assert plan_pins(placed, host, facts)[0] == ()

    def whole(seen: Facts) -> Callable[[], object]:
        return lambda: plan(desired, seen, macs={}, uuids={}, originals={})

    one = measure(
        "a dedicated guest beside the others", chosen.rounds, lambda: place(last, beside, shape, host.cpu, taken=others)
    )
    measure(
        "a shared guest beside the others", chosen.rounds, lambda: place("g001", beside, shape, host.cpu, taken=taken)
    )
    measure("all anew, as after a boot", chosen.rounds, lambda: place_all(beside, shape, host.cpu))
    warm = measure("a whole plan, all run", chosen.rounds, whole(facts))
    boot = measure("a whole plan, all to be started", chosen.rounds, whole(cold))
    verdict("one placement, median", one, PLACEMENT_MS, "ms")
    verdict("a whole plan, median", max(warm, boot) / 1000, PLAN_S, "s")


def guest(index: int) -> Guest:
    """Every fifth has CPUs of its own."""
    cpu: dict[str, object] = {"vcpus": 2}
    if index % 5 == 0:
        cpu = {"vcpus": SIZES[index // 5 % len(SIZES)], "placement": "dedicated"}
        cpu["smt"] = ("prefer", "prefer", "require", "isolate")[index // 5 % 4] if cpu["vcpus"] != 1 else "prefer"
        if cpu["smt"] == "require" and cpu["vcpus"] == 3:  # no whole cores
            cpu["smt"] = "prefer"
    return Guest.model_validate({"cpu": cpu, "memory": {"size": "1GiB"}})


def measure(what: str, rounds: int, call: Callable[[], object]) -> float:
    """Milliseconds, the median of `rounds` calls; the quickest is printed beside it."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        times.append((time.perf_counter() - begun) * 1000)
    print(f"  {what:<40} median {statistics.median(times):7.1f} ms   best {min(times):7.1f} ms")
    return statistics.median(times)


if __name__ == "__main__":
    main()
