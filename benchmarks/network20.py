"""A NAT network made from nothing with 20 TAPs in its bridge: bridge, address, rules, forwarding, DNS and DHCP, ports.

By kvmd's own observe, plan and apply in a private namespace (`with`), and by ip(8), nft(8) and dnsmasq(8) called as a
shell script calls them, with the same rules and the same server configuration (`bare`).

    python -m benchmarks.network20
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Series, begin, options, verdict
from kvmd.actions import ReplaceRuleset, StartDnsmasq, StopDnsmasq
from kvmd.plan.links import tap_alias, tap_name
from tests.rig.netns import inside, private_namespace
from tests.rig.networkrig import Rig, nat, network_rig

LIMIT_S = 0.4
TAPS = [tap_name("benchmark", str(number)) for number in range(20)]


def main() -> None:
    """Both sides in turn, each time in a new namespace."""
    chosen = options(__doc__, rounds=5)
    begin("a NAT network with 20 TAPs from nothing")
    ours, bare = Series("kvmd: observe, plan, apply, 20 TAPs"), Series("ip, nft and dnsmasq by a script")
    for warming in range(-1, chosen.rounds):
        with tempfile.TemporaryDirectory(prefix="kvmd-bench-") as directory:
            mine, script = asyncio.run(by_kvmd(Path(directory)))
            theirs = by_script(Path(directory), script)
        if warming >= 0:
            ours.values.append(mine)
            bare.values.append(theirs)
    for series in (ours, bare):
        print(series.line())
    print(f"  ratio of medians {ours.median / bare.median:.2f}")
    verdict("a network with 20 TAPs, median", ours.median, LIMIT_S, "s")


async def by_kvmd(directory: Path) -> tuple[float, tuple[str, str]]:
    """Seconds, and the ruleset and the server's configuration, for the other side."""
    async with network_rig(directory) as rig:
        await rig.netlink.observe_links()  # pyroute2 is loaded at kvmd's first use of it, once in its life
        rig.networks = {"lan": nat()}
        begun = time.perf_counter()
        actions = await rig.plan()
        for action in actions:
            await rig.apply(action)
        opened = await asyncio.gather(*(open_tap(rig, name) for name in TAPS))
        took = time.perf_counter() - begun
        for fds in opened:
            os.close(fds[0])
        ruleset = next(action.text for action in actions if isinstance(action, ReplaceRuleset))
        config = next(action.config for action in actions if isinstance(action, StartDnsmasq))
        await rig.dnsmasqs.stop(StopDnsmasq(network="lan", why="the round ends"))
        return took, (ruleset, config)


async def open_tap(rig: Rig, name: str) -> list[int]:
    """As a guest's start opens it."""
    return await rig.netlink.open_tap(name, bridge="kvlan", mtu=1500, alias=tap_alias("lan", "bench", name))


def by_script(directory: Path, texts: tuple[str, str]) -> float:
    """Seconds of the same by hand: one ip -batch for all links, nft, sysctl, dnsmasq."""
    ruleset, config = texts
    (directory / "bare.conf").write_text(config)
    lines = ["link add kvlan type bridge", "addr add 192.168.50.1/24 dev kvlan", "link set kvlan up"]
    for name in TAPS:
        lines += [f"tuntap add {name} mode tap", f"link set {name} master kvlan mtu 1500 up"]
    with private_namespace("bare") as namespace, inside(namespace):
        begun = time.perf_counter()
        run("ip", "-batch", "-", text="\n".join(lines) + "\n")
        run("nft", "-f", "-", text=ruleset)
        run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        files = {"conf-file": "bare.conf", "pid-file": "bare.pid", "dhcp-leasefile": "bare.leases"}
        run("dnsmasq", *(f"--{key}={directory / name}" for key, name in files.items()))
        return time.perf_counter() - begun


def run(*argv: str, text: str = "") -> None:
    """One program of the script; its failure is the benchmark's."""
    subprocess.run(argv, input=text, text=True, check=True, capture_output=True)


if __name__ == "__main__":
    main()
