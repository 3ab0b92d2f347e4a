"""Drift, walks and kills on the real kernel: each pass is a new kvmd's, and the machine is left as it was found."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmd.plan.ksm import KSM, SWAPPINESS, THP
from kvmd.plan.links import bridge_mac
from kvmd.plan.network import FORWARDING
from tests.rig.machinestate import Memory, Net, differences, machine_lock
from tests.rig.realpass import RealHost, apply, plan, real_host, reconcile, release

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

NAT = """\
[network]
mode = "nat"
[ipv4]
address = "192.168.50.1/24"
[ipv4.dhcp]
range = ["192.168.50.100", "192.168.50.200"]
"""
ISOLATED = """\
[network]
mode = "isolated"
mtu = {mtu}
[ipv4]
address = "192.168.60.1/24"
"""
PAGES = 6
POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"


@pytest.fixture
def real() -> Iterator[RealHost]:
    """A kvmd on this kernel, alone with the machine's pages and knobs, which are as they were at the end."""
    with machine_lock():
        before = Memory.observe()
        try:
            with real_host() as host:
                yield host
        finally:
            after = Memory.observe()
            before.restore()
        assert differences(before, Memory.observe()) == []
        assert after.pages() == before.pages(), "pages were left behind"


def knob(path: str) -> str:
    text = Path(path).read_text().strip()
    return text[text.index("[") + 1 : text.index("]")] if "[" in text else text


def other(value: str, *choices: str) -> str:
    """A choice that is not the present value."""
    return next(choice for choice in choices if choice != value)


def host_toml(*, pages: int, swappiness: str, enabled: str, defrag: str) -> str:
    return (
        f'[hugepages.2MiB]\npages = {pages}\n[ksm]\nmode = "keep"\n[swap]\nswappiness = {swappiness}\n'
        f'[thp]\nenabled = "{enabled}"\ndefrag = "{defrag}"\n'
    )


class Wish:
    """Values that all differ from what the machine has, so that kvmd writes each."""

    def __init__(self) -> None:
        self.pages = Memory.observe().pages() + PAGES
        self.swappiness = other(knob(SWAPPINESS), "41", "42")
        self.enabled = other(knob(f"{THP}/enabled"), "madvise", "always")
        self.defrag = other(knob(f"{THP}/defrag"), "defer", "madvise")

    def write(self, host: RealHost) -> None:
        text = host_toml(pages=self.pages, swappiness=self.swappiness, enabled=self.enabled, defrag=self.defrag)
        host.write("host.toml", text)
        host.write("networks.d/lan.toml", NAT)
        host.write("networks.d/lab.toml", ISOLATED.format(mtu=1500))


def kill_dnsmasq(host: RealHost, network: str) -> None:
    record = json.loads((host.paths.run / "networks" / network / "dnsmasq.json").read_text())
    os.kill(record["pid"], signal.SIGKILL)
    while Path(f"/proc/{record['pid']}").exists() and "Z" not in Path(f"/proc/{record['pid']}/stat").read_text():
        time.sleep(0.01)


def test_each_drift_is_told_exactly_and_mended_by_one_pass(real: RealHost) -> None:
    wish, ip = Wish(), real.namespace.ip
    wish.write(real)
    real.run(apply)
    assert real.run(plan) == {"lines": [], "yielded": [], "problems": []}
    tuned = {
        SWAPPINESS: ("7", wish.swappiness),
        f"{THP}/enabled": ("never", wish.enabled),
        f"{THP}/defrag": ("never", wish.defrag),
    }
    for path, (theirs, ours) in tuned.items():
        Path(path).write_text(theirs)
        assert real.run(plan) == {"lines": [f"~ {path}: {theirs} -> {ours}"], "yielded": [path], "problems": []}
        assert real.run(reconcile) == [] and [kind for kind, _ in real.events] == ["knob.yielded"]
        assert real.run(reconcile) == [] and real.events == [], "it was told, also by an earlier kvmd"
        assert knob(path) == theirs
        assert real.run(apply) == [f"~ {path}: {theirs} -> {ours}"]
        assert knob(path) == ours
    for name, (drift, lines) in required(real, wish).items():
        drift()
        assert real.run(plan) == {"lines": lines, "yielded": [], "problems": []}, name
        assert real.run(reconcile) == lines, name
        assert real.run(plan)["lines"] == [], name
    ip("link set kvlan alias somebody:lan")
    (problem,) = set(real.run(plan)["problems"])
    assert "kvmd did not make" in problem, "a bridge marked as somebody else's is theirs"
    ip("link set kvlan alias kvmd:lan")
    assert real.run(plan)["lines"] == []
    real.run(release)


def required(host: RealHost, wish: Wish) -> dict[str, tuple[Callable[[], object], list[str]]]:
    """What somebody does to what has to be, and what a plan says of it."""
    ip, run = host.namespace.ip, host.namespace.run
    pool = f"hugepages 2MiB node 0: {wish.pages - 2} -> {wish.pages} pages"
    return {
        "pool": (lambda: Path(POOL).write_text(str(wish.pages - 2)), [f"~ {pool}"]),
        "forwarding": (lambda: run("sh", "-c", f"echo 0 > {FORWARDING}"), [f"~ {FORWARDING}: 0 -> 1"]),
        "down": (lambda: ip("link set kvlan down"), ["~ bridge kvlan: down -> up"]),
        "mtu": (lambda: ip("link set kvlan mtu 1400"), ["~ bridge kvlan: mtu 1400 -> 1500"]),
        "stp": (lambda: ip("link set kvlan type bridge stp_state 1"), ["~ bridge kvlan: stp on -> off"]),
        "address gone": (
            lambda: ip("addr del 192.168.50.1/24 dev kvlan"),
            ["~ bridge kvlan: address +192.168.50.1/24"],
        ),
        "address more": (lambda: ip("addr add 10.9.8.7/8 dev kvlan"), ["~ bridge kvlan: address -10.9.8.7/8"]),
        "mac": (
            lambda: ip("link set kvlab address 02:00:00:00:00:07"),
            [f"~ bridge kvlab: mac 02:00:00:00:00:07 -> {bridge_mac('kvlab')}"],
        ),
        "table gone": (lambda: run("nft", "delete table inet kvmd"), ["+ nft table inet kvmd"]),
        "table edited": (
            lambda: run("nft", "add chain inet kvmd mine"),
            ["~ nft table inet kvmd: as declared again"],
        ),
        "server": (lambda: kill_dnsmasq(host, "lan"), ["+ dnsmasq for network lan"]),
        "bridge": (
            lambda: ip("link del kvlab"),
            ["+ bridge kvlab 192.168.60.1/24", "~ dnsmasq for network lab: restart"],
        ),
    }


@pytest.mark.skipif(not Path(f"{KSM}/run").exists(), reason="this kernel has no KSM")
def test_merging_is_yielded_as_a_whole(real: RealHost) -> None:
    real.write("host.toml", '[ksm]\nmode = "kvmd"\n')
    real.run(apply)
    Path(f"{KSM}/pages_to_scan").write_text("777")
    assert real.run(plan)["yielded"] == [f"{KSM}/pages_to_scan"]
    Path(f"{KSM}/run").write_text("0")
    assert real.run(reconcile) == []
    assert real.run(plan)["yielded"] == [f"{KSM}/pages_to_scan", f"{KSM}/run"]
    assert f"~ {KSM}/run: 0 -> 1" in real.run(apply)
    assert real.run(plan) == {"lines": [], "yielded": [], "problems": []}
    real.run(release)


def some_state(chance: random.Random, floor: int) -> dict[str, str | None]:
    """Files of one desired state; a file that shall not be is None."""
    text = host_toml(
        pages=floor + chance.choice([0, 2, 4, 6]),
        swappiness=chance.choice(["10", "41", "60"]),
        enabled=chance.choice(["always", "madvise", "never"]),
        defrag=chance.choice(["defer", "madvise", "never"]),
    )
    return {
        "host.toml": text,
        "networks.d/lan.toml": chance.choice([None, NAT, NAT + "[dns]\nenabled = false\n"]),
        "networks.d/lab.toml": chance.choice([None, ISOLATED.format(mtu=1500), ISOLATED.format(mtu=1400)]),
    }


def arrived(host: RealHost, state: dict[str, str | None]) -> None:
    """The kernel is exactly as the files say, asked without kvmd."""
    text = state["host.toml"] or ""
    for key, path in {"swappiness": SWAPPINESS, "enabled": f"{THP}/enabled", "defrag": f"{THP}/defrag"}.items():
        assert re.search(rf'^{key} = "?([a-z0-9]+)"?$', text, re.MULTILINE)[1] == knob(path)
    assert re.search(r"^pages = (\d+)$", text, re.MULTILINE)[1] == knob(POOL)
    lan, lab = state["networks.d/lan.toml"], state["networks.d/lab.toml"]
    links = json.loads(host.namespace.run("ip", "-j", "-d", "address", "show", "type", "bridge"))
    found = {
        link["ifname"]: (link["mtu"], [a["local"] for a in link["addr_info"] if a["family"] == "inet"])
        for link in links
    }
    wanted = {"kvlan": (1500, ["192.168.50.1"])} if lan else {}
    if lab:
        wanted["kvlab"] = (1400 if "1400" in lab else 1500, ["192.168.60.1"])
    assert found == wanted
    assert ("table inet kvmd" in host.namespace.run("nft", "list", "ruleset")) == bool(lan or lab)
    records = host.paths.run / "networks"
    servers = {path.parent.name for path in records.glob("*/dnsmasq.json")} if records.exists() else set()
    assert servers == {name for name, file in (("lan", lan), ("lab", lab)) if file}


@pytest.mark.parametrize("seed", [1])
def test_a_walk_through_twenty_states_arrives_in_each_and_release_gives_the_beginning_back(
    real: RealHost, seed: int
) -> None:
    chance = random.Random(seed)
    memory, net = Memory.observe(), Net.observe(real.namespace)
    for number in range(20):
        state = some_state(chance, memory.pages())
        for name, text in state.items():
            real.write(name, text)
        real.run(apply)
        assert real.run(plan) == {"lines": [], "yielded": [], "problems": []}, f"state {number} (seed {seed})"
        arrived(real, state)
    real.run(release)
    assert differences(memory, Memory.observe()) == []
    assert differences(net, Net.observe(real.namespace)) == []


def test_a_kill_at_any_step_of_a_pass_or_a_release_is_mended(real: RealHost) -> None:
    """SIGKILL behind each record and each effect; the next kvmd converges, and release gives the beginning back."""
    wish, memory, net = Wish(), Memory.observe(), Net.observe(real.namespace)
    wish.write(real)
    real.write("networks.d/lab.toml", None)
    in_release = 0
    for step in itertools.count(1):
        real.forget()
        in_pass = real.run(apply, dies_at=step) is None
        real.run(reconcile)
        assert real.run(plan) == {"lines": [], "yielded": [], "problems": []}, f"killed at step {step} of a pass"
        if real.run(release, dies_at=step) is None:
            in_release = step
            assert real.run(reconcile) == [], "a host that is being released is left alone"
            real.run(release)
        assert differences(memory, Memory.observe()) == [], f"killed at step {step}"
        assert differences(net, Net.observe(real.namespace)) == [], f"killed at step {step}"
        if not in_pass:
            break
    assert step > 14 and in_release >= 7
