"""Every single thing kvmd keeps, changed behind its back: the plan says exactly that, and one pass mends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from kvmd.actions import WriteKnob
from kvmd.facts import GuestUnit, JournalEntry, Link, MemoryPath, Module, Thread
from kvmd.plan.interrupts import DEFAULT as DEFAULT_IRQ
from kvmd.plan.ksm import KSM, SWAPPINESS, THP
from kvmd.plan.links import bridge_alias, bridge_mac, tap_name
from kvmd.plan.network import FORWARDING
from kvmd.plan.ports import tbf_of
from kvmd.units import Rate
from tests.rig.fakewishes import everything
from tests.rig.fakeworld import BOOT, GPU, SWAP_FILE, FakeWorld
from tests.rig.hosts import GIB, MIB


@dataclass(frozen=True)
class Drift:
    """What somebody does, and what a person's plan says of it. A `tuning` knob is left alone by anyone else's."""

    name: str
    do: Callable[[FakeWorld], None]
    lines: tuple[str, ...]
    merging: str = "kvmd"
    tuning: bool = False


def knob(path: str, value: str, ours: str, *, merging: str = "kvmd", tuning: bool = True) -> Drift:
    return Drift(
        path,
        lambda world: world.drift_knob(path, value),
        (f"~ {path}: {value} -> {ours}",),
        merging=merging,
        tuning=tuning,
    )


def link(name: str, line: str, **fields: object) -> Drift:
    return Drift(f"{name} {' '.join(fields)}", lambda world: world.drift_link(name, **fields), (line,))


def pool(node: int, page_bytes: int, total: int, line: str) -> Drift:
    return Drift(f"pool {page_bytes} {node}", lambda world: world.drift_pool(node, page_bytes, total), (line,))


def without_link(name: str) -> Callable[[FakeWorld], None]:
    """`ip link delete name`: a server bound to it serves nobody from then on."""

    def do(world: FakeWorld) -> None:
        gone = next(one for one in world.facts.links if one.name == name)
        network = (gone.alias or "").removeprefix("kvmd:")
        servers = (replace(s, config_sha256="") if s.network == network else s for s in world.facts.dnsmasq)
        world.drift(links=tuple(one for one in world.facts.links if one is not gone), dnsmasq=tuple(servers))

    return do


def pinned(**fields: object) -> Callable[[FakeWorld], None]:
    """`taskset`, on web."""
    return lambda world: world.drift(
        guests=tuple(replace(g, **fields) if g.name == "web" else g for g in world.facts.guests)
    )


def unit(name: str, **fields: object) -> Callable[[FakeWorld], None]:
    """Somebody edits a guest's unit."""

    def do(world: FakeWorld) -> None:
        there = {one.guest: one for one in world.facts.units or ()}
        there[name] = replace(there.get(name, GuestUnit(name)), **fields)
        world.drift(units=tuple(there.values()))

    return do


def swapped_off(path: str) -> Callable[[FakeWorld], None]:
    """`swapoff path`; the file or device stays."""
    return lambda world: world.drift(swaps=tuple(one for one in world.facts.swaps or () if one.path != path))


def added_link(made: Link) -> Callable[[FakeWorld], None]:
    return lambda world: world.drift(links=(*world.facts.links, made))


def served(network: str, digest: str | None) -> Callable[[FakeWorld], None]:
    """The network's dnsmasq ended (None), or runs with another configuration."""

    def do(world: FakeWorld) -> None:
        servers = (replace(s, config_sha256=digest or "") if s.network == network else s for s in world.facts.dnsmasq)
        world.drift(dnsmasq=tuple(s for s in servers if digest is not None or s.network != network))

    return do


KERNEL_WORDS = "isolcpus=managed_irq,domain,1-2 nohz_full=1-2 rcu_nocbs=1-2 irqaffinity=0,4 hugepagesz=1G hugepages=1:2"
DRIFTS = (
    # knobs: what the tuning agent and the files tune
    knob(f"{KSM}/run", "0", "1"),
    knob(f"{KSM}/run", "2", "1"),
    knob(f"{KSM}/pages_to_scan", "5000", "1000"),
    knob(f"{KSM}/sleep_millisecs", "200", "20"),
    knob(f"{KSM}/merge_across_nodes", "1", "0"),
    knob(f"{KSM}/advisor_mode", "none", "scan-time", merging="kernel"),
    knob(f"{KSM}/advisor_max_cpu", "70", "10", merging="kernel"),
    knob(f"{KSM}/advisor_target_scan_time", "60", "200", merging="kernel"),
    knob(f"{THP}/enabled", "always", "madvise"),
    knob(f"{THP}/defrag", "always", "defer"),
    knob(SWAPPINESS, "60", "10"),
    knob(f"{KSM}/smart_scan", "0", "1"),
    knob(f"{KSM}/use_zero_pages", "0", "1"),
    knob(f"{KSM}/max_page_sharing", "256", "512"),
    knob(f"{KSM}/advisor_min_pages_to_scan", "1", "600", merging="kernel"),
    knob(f"{KSM}/advisor_max_pages_to_scan", "9", "20000", merging="kernel"),
    knob(f"{THP}/shmem_enabled", "force", "advise"),
    knob(f"{THP}/khugepaged/defrag", "1", "0"),
    knob(DEFAULT_IRQ, "ff", "11"),
    knob("/proc/irq/24/smp_affinity_list", "0-7", "0,4"),
    # requirements
    knob(FORWARDING, "0", "1", tuning=False),
    pool(0, 2 * MIB, 200, "~ hugepages 2MiB node 0: 200 -> 112 pages"),
    pool(0, 2 * MIB, 64, "~ hugepages 2MiB node 0: 64 -> 112 pages"),
    pool(1, GIB, 0, "~ hugepages 1GiB node 1: 0 -> 2 pages"),
    pool(1, GIB, 3, "~ hugepages 1GiB node 1: 3 -> 2 pages"),
    Drift("swapoff", swapped_off(SWAP_FILE), (f"+ swap file {SWAP_FILE}: 8GiB",)),
    Drift("zram reset", swapped_off("/dev/zram0"), ("+ swap zram: 1GiB",)),
    Drift(
        "unmounted",
        lambda world: world.drift(memory_paths=(MemoryPath("/mnt/pages", "directory"),)),
        ("+ hugetlbfs /mnt/pages: 2MiB pages, at most 64MiB",),
    ),
    Drift(
        "virtual functions gone",
        lambda world: world.drift(pci=tuple(replace(d, vfs=0) for d in world.facts.pci or () if d.parent is None)),
        ("~ eno2: 0 -> 4 virtual functions",),
    ),
    Drift(
        "a guest's device left bound",
        lambda world: world.drift(
            pci=tuple(replace(d, driver="vfio-pci") if d.address == GPU.address else d for d in world.facts.pci or ()),
            reservations={GPU.address: "gone"},
            journal=(*world.facts.journal, JournalEntry(f"vfio:{GPU.address}", "nouveau", "gone", BOOT, "")),
        ),
        (f"~ pci {GPU.address}: back from guest gone",),
    ),
    Drift(
        "drop-in of the boot loader edited",
        lambda world: world.drift(boot=replace(world.facts.boot, drop_in='GRUB_CMDLINE_LINUX="quiet"\n')),
        (f"~ /etc/default/grub.d/50-kvmd.cfg: {KERNEL_WORDS}",),
    ),
    # links
    link("kvlan", "~ bridge kvlan: down -> up", up=False),
    link("kvlan", "~ bridge kvlan: mtu 1400 -> 1500", mtu=1400),
    link("kvlan", "~ bridge kvlan: stp on -> off", stp=True),
    link("kvlan", "~ bridge kvlan: alias none -> kvmd:lan", alias=None),
    link("kvlan", "~ bridge kvlan: address +192.168.50.1/24", addresses=()),
    link(
        "kvlan",
        "~ bridge kvlan: address -10.9.8.7/8",
        addresses=("192.168.50.1/24", "10.9.8.7/8"),
    ),
    link("kvlab", "~ bridge kvlab: mac 02:00:00:00:00:07 -> " + bridge_mac("kvlab"), mac="02:00:00:00:00:07"),
    Drift(
        "bridge deleted",
        without_link("kvspare"),
        ("+ bridge kvspare 192.168.70.1/24", "~ dnsmasq for network spare: restart"),
    ),
    Drift(
        "bridge left over",
        added_link(Link("kvold", 90, kind="bridge", mac=bridge_mac("kvold"), up=True, alias=bridge_alias("old"))),
        ("- bridge kvold",),
    ),
    # rules and servers
    Drift("table deleted", lambda world: world.drift(nft=None), ("+ nft table inet kvmd",)),
    Drift(
        "table edited",
        lambda world: world.drift(nft=f"{world.facts.nft} edited"),
        ("~ nft table inet kvmd: as declared again",),
    ),
    Drift("table replaced", lambda world: world.drift(nft="other"), ("~ nft table inet kvmd: rules differ",)),
    Drift("table of ports deleted", lambda world: world.drift(nft_ports=None), ("+ nft table bridge kvmd",)),
    Drift(
        "table of ports edited",
        lambda world: world.drift(nft_ports=f"{world.facts.nft_ports} edited"),
        ("~ nft table bridge kvmd: as declared again",),
    ),
    link(tap_name("web", "n0"), "~ guest web: nic.n0.rate_in none -> 10Mbit", tbf=None),
    link(tap_name("web", "n0"), "~ guest web: nic.n0.rate_in 1Mbit -> 10Mbit", tbf=tbf_of(Rate.parse("1Mbit"))),
    Drift(
        "cable pulled",
        lambda world: world.drift(
            guests=tuple(replace(g, unplugged=frozenset(g.nics[:1])) for g in world.facts.guests)
        ),
        ("~ guest db: nic.n0.link pulled -> plugged in", "~ guest web: nic.n0.link pulled -> plugged in"),
    ),
    Drift("server killed", served("lan", None), ("+ dnsmasq for network lan",)),
    Drift("server changed", served("lan", "0" * 64), ("~ dnsmasq for network lan: new configuration",)),
    Drift("server on a dead link", served("lab", ""), ("~ dnsmasq for network lab: restart",)),
    # guests
    Drift("guest killed", lambda world: world.end_guest("db"), ("+ guest db: start",)),
    Drift("vCPUs moved", pinned(affinity=("0-7", "0-7")), ("~ guest web: vCPUs on 0-7 0-7 -> 1 2",)),
    Drift(
        "threads moved",
        pinned(others=(Thread(1, "vhost-7", "0-7"),)),
        ("~ guest web: vhost-7 on 0-7 -> 0",),
    ),
    Drift(
        "module gone",
        lambda world: world.drift(modules={**world.facts.modules, "vhost_net": Module("vhost_net", "available")}),
        ("+ module vhost_net",),
    ),
    Drift("drop-in edited", unit("db", drop_in="[Service]\n"), ("~ guest db: drop-in of its unit",)),
    Drift("drop-in made", unit("web", drop_in="[Service]\n"), ("- guest web: drop-in of its unit",)),
    Drift("link removed", unit("web", enabled=False), ("+ guest web: start with the host",)),
)


def settled(merging: str) -> FakeWorld:
    world = FakeWorld()
    world.settle(everything(merging=merging), passes=2)
    assert {problem.needs for problem in world.plan().problems} == {"reboot"}
    return world


def test_there_are_enough() -> None:
    assert len(DRIFTS) >= 30


@pytest.mark.parametrize("drift", DRIFTS, ids=lambda drift: f"{drift.name}: {drift.lines[0]}")
def test_a_drift_is_told_exactly_and_mended_by_one_pass(drift: Drift) -> None:
    world = settled(drift.merging)
    before = world.text()
    drift.do(world)
    drifted = world.text()
    assert tuple(action.line() for action in world.plan(retake=True).actions) == drift.lines
    if drift.tuning:
        # nobody's pass writes it; it is told, and a person's pass takes it back
        assert [knob.path for knob in world.plan().yielded] == [drift.name]
        assert world.reconcile() == () and world.text() == drifted
        assert [knob.told for knob in world.plan().yielded] == [True]
    assert tuple(action.line() for action in world.reconcile(retake=True)) == drift.lines
    assert world.plan().actions == () and world.plan().yielded == ()
    if not drift.name.startswith("guest"):
        assert world.text() == before


def test_a_tuning_knob_is_kvmd_s_again_when_the_file_asks_for_another_value() -> None:
    world = settled("kvmd")
    world.drift_knob(SWAPPINESS, "60")
    assert world.reconcile() == ()
    wish = everything()
    swap = wish.host.swap.model_copy(update={"swappiness": 20})
    other = replace(wish, host=wish.host.model_copy(update={"swap": swap}))
    assert [action.line() for action in world.reconcile(other)] == [f"~ {SWAPPINESS}: 60 -> 20"]
    assert world.plan().yielded == ()


def test_foreign_things_are_in_no_plan_and_no_release() -> None:
    world = FakeWorld()
    foreign = {one.name: one for one in world.facts.links}
    world.settle(everything())
    world.settle(replace(everything(), networks={}, guests={}))
    world.release()
    assert {one.name: one for one in world.facts.links} == foreign
    touched = {action.path for action in world.plan().actions if isinstance(action, WriteKnob)}
    assert touched <= set(world.facts.knobs)
