"""How much later a guest runs when kvmd starts it than when its QEMU is exec'ed by hand (q35, one disk, one NIC).

python -m benchmarks.start            kvmd spawns the launcher itself; bare QEMU with the same argv and descriptors
python -m benchmarks.start --tree     in a booted Debian tree with kvmd installed: bare, launcher and hardened unit
python -m benchmarks.start --unit N   inside a machine where kvmd runs as kvmd.service: starts and kills guest N
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.bare import Bare
from benchmarks.harness import Series, begin, bench_host, differences, verdict
from kvmd.rpc.client import Client
from tests.rig.guestfiles import LAN

DIRECT_MS = 45.0
UNIT_MS = 120.0


def main() -> None:
    """Pairs of starts, alternating."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--unit", metavar="GUEST", help="a guest of the kvmd.service that runs here")
    parser.add_argument("--socket", type=Path, default=Path("/run/kvmd/kvmd.sock"))
    parser.add_argument("--tree", action="store_true", help="boot a tree, install kvmd there, and do both in it")
    chosen = parser.parse_args()
    if chosen.tree:
        in_tree(chosen.rounds)
    elif chosen.unit:
        through_unit(chosen.socket, chosen.unit, chosen.rounds)
    else:
        direct(chosen.rounds)


def direct(rounds: int) -> None:
    """kvmd spawning the launcher, against bare QEMU."""
    begin("start of one guest: kvmd's own launcher against bare QEMU")
    ours, bare_side = Series("guest.start until running"), Series("bare QEMU until it answers QMP")
    with bench_host() as host:
        (name,) = host.boot_guests(1, nic=True)
        host.start()
        host.call("host.apply")
        bare = Bare(host)
        with host.client() as client:
            for warming in range(-2, rounds):
                one = Series("")
                one.time(lambda: client.call("guest.start", {"name": name}))
                client.call("guest.kill", {"name": name})
                argv, descriptors = bare.prepare(name)
                other = Series("")
                begun: list[object] = []
                other.time(lambda: begun.append(bare.start(name, argv, descriptors)))  # noqa: B023
                descriptors.close()
                begun[0].end()  # type: ignore[attr-defined]
                if warming >= 0:
                    ours.values += one.values
                    bare_side.values += other.values
    extra = differences(ours, bare_side)
    for series in (ours, bare_side, extra):
        print(series.line())
    print(f"  ratio of medians {ours.median / bare_side.median:.2f}")
    verdict("start over bare QEMU, median of pairs", extra.median * 1e3, DIRECT_MS, "ms")


def through_unit(socket: Path, name: str, rounds: int) -> None:
    """The hardened unit, in a machine with systemd: the start alone."""
    begin("start of one guest through kvmd-guest@.service")
    series = Series("guest.start until running")
    with Client(socket, 120) as client:
        for _ in range(rounds):
            series.time(lambda: client.call("guest.start", {"name": name}))
            client.call("guest.kill", {"name": name})
    print(series.line())
    print(f"  at most {UNIT_MS:g} ms over the bare QEMU of `benchmarks.start` on the same machine are wanted")


def in_tree(rounds: int) -> None:
    """Both sides in one booted tree: `direct`, then the unit of a guest with the same devices."""
    from tests.rig.installedtree import installed_tree

    with installed_tree() as inside:
        inside.tree.write("/etc/kvmd/networks.d/lan.toml", LAN)
        inside.tiny("web", '[nic.lan]\nnetwork = "lan"\n')
        inside.tree.check("systemctl enable --now kvmd", timeout_s=120)
        inside.cli("apply", "--yes")
        for words in (("--rounds", str(rounds)), ("--rounds", str(rounds), "--unit", "web")):
            argv = [sys.executable, "-m", "benchmarks.start", *words]
            print(inside.tree.check(["env", "-C", "/src/kvmd", *argv], timeout_s=900), end="", flush=True)


if __name__ == "__main__":
    main()
