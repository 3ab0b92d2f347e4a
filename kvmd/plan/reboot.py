"""What a reboot of the host would change: the world as it will be then, planned for as boot will plan. Pure.

Runtime state (pages, knobs, bridges, rules, swap) ends with the boot and kvmd makes it again; what no file asks for
any more ends for good. Guests start because `start.auto` or their link says so, not because they run now.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from kvmd.actions import Action, GuestAction, Problem, WriteKnob
from kvmd.config.desired import Desired
from kvmd.facts import EMPTY, Facts, GuestLife, HugepagePool, Interrupt, JournalEntry, Link, Module, PciDevice
from kvmd.plan.host import plan
from kvmd.plan.links import ALIAS
from kvmd.units import CpuSet

_OF_EACH_BOOT = ("BOOT_IMAGE", "initrd")  # the loader's own words


@dataclass(frozen=True, slots=True)
class NextBoot:
    """The kernel's command line, now and at the next boot. `configured` is None when it cannot be known."""

    running: str
    configured: str | None = None
    source: str | None = None  # the file that was read for it


class Change(StrEnum):
    """What kind of difference it is."""

    GUEST = "guest"  # starts, or does not come back
    PENDING = "pending"  # a change of a file that comes with the reboot
    KERNEL = "kernel"  # the command line
    REMADE = "remade"  # ends with the boot, and kvmd makes it again
    GONE = "gone"  # ends with the boot
    PROBLEM = "problem"  # cannot be had then either, or not known


@dataclass(frozen=True, slots=True)
class Difference:
    """One line of `plan --reboot`."""

    kind: Change
    line: str
    why: str


def after_reboot(
    desired: Desired,
    facts: Facts,
    boot: NextBoot,
    *,
    macs: Mapping[tuple[str, str], str],
    uuids: Mapping[str, str],
) -> tuple[Difference, ...]:
    """Everything that will differ, by kind. `facts` is the host now."""
    then = booted(desired, facts)
    planned = plan(desired, then, macs=macs, uuids=uuids, originals=EMPTY)
    remade = [action for action in planned.actions if not isinstance(action, GuestAction)]
    return (
        *_guests(facts, then),
        *_kernel(boot),
        *(Difference(Change.REMADE, action.line(), action.why) for action in remade),
        *_gone(facts, remade),
        *_problems(planned.problems, boot),
    )


def booted(desired: Desired, facts: Facts) -> Facts:
    """The world when kvmd comes up after a reboot: the kernel's and the distribution's own, and nothing of ours.

    For each thing kvmd changed that is what the journal says was there before; for the rest, what is there now.
    """
    was = {entry.key: entry.original for entry in facts.journal}
    loaded = {entry.subject for entry in facts.journal if entry.kind == "module"}
    made = {entry.subject for entry in facts.journal if entry.kind in ("bridge", "vlan")}
    ours = {zram.path for zram in facts.zrams or () if zram.ours}
    ours |= {file.path for file in facts.swap_files if file.ours}
    pools = tuple(_pool(pool, was) for pool in facts.hugepages)
    return replace(
        facts,
        boot_id="",
        memory=replace(facts.memory, available_bytes=_available(facts, pools)),
        knobs={path: was.get(f"knob:{path}", value) for path, value in facts.knobs.items()},
        hugepages=pools,
        interrupts=tuple(_interrupt(each, was) for each in facts.interrupts),
        links=tuple(_links(facts, made)),
        nft=None,
        nft_ports=None,
        dnsmasq=(),
        modules={
            name: Module(found.name, "available") if name in loaded and found.state == "loaded" else found
            for name, found in facts.modules.items()
        },
        memory_paths=tuple(
            replace(path, kind=was.get(f"hugetlbfs:{path.path}", path.kind), page_bytes=None, limit_bytes=None,
                    ours=False) if path.ours else path
            for path in facts.memory_paths
        ),
        pci=None if facts.pci is None else tuple(_devices(facts)),
        reservations=EMPTY,
        vfs_before=EMPTY,
        zrams=None if facts.zrams is None else tuple(zram for zram in facts.zrams if not zram.ours),
        swaps=None if facts.swaps is None else tuple(area for area in facts.swaps if area.path not in ours),
        guests=(),
        lives=tuple(_life(name, desired, facts) for name in sorted(desired.guests)),
        foreign_qemu_bytes=0,
        journal=(),
        tuned=(),
    )  # fmt: skip


def _devices(facts: Facts) -> Iterator[PciDevice]:
    """Each function with the driver the host gives it, and as many virtual ones as before kvmd."""
    drivers = {entry.subject: entry.original or None for entry in facts.journal if entry.kind == "vfio"}
    for device in facts.pci or ():
        if device.parent in facts.vfs_before:
            continue
        given = replace(device, vfs=facts.vfs_before.get(device.address, device.vfs))
        taken = device.address in drivers
        yield replace(given, driver=drivers[device.address], override=None) if taken else given


def _interrupt(found: Interrupt, was: Mapping[str, str]) -> Interrupt:
    before = was.get(f"knob:/proc/irq/{found.number}/smp_affinity_list")
    return found if before is None else replace(found, affinity=CpuSet.parse(before), effective=None)


def _links(facts: Facts, made: Collection[str]) -> Iterator[Link]:
    """The links of others, out of the bridges of ours."""
    gone = {link.name for link in facts.links if _is_ours(link) or link.name in made}
    for link in facts.links:
        if link.name not in gone:
            yield replace(link, master=None) if link.master in gone else link


def _is_ours(link: Link) -> bool:
    return bool(link.alias and link.alias.startswith(ALIAS))


def _pool(pool: HugepagePool, was: Mapping[str, str]) -> HugepagePool:
    total = int(was.get(f"hugepages:{pool.node}:{pool.page_bytes}", pool.total - pool.surplus))
    return replace(pool, total=total, free=total, surplus=0, reserved=0)


def _available(facts: Facts, then: Sequence[HugepagePool]) -> int:
    """About: what is available now, and what guests and the pools' growth give back."""
    guests = sum(guest.memory_bytes for guest in facts.guests if guest.page_bytes is None)
    pages = sum(pool.total * pool.page_bytes for pool in facts.hugepages)
    pages_then = sum(pool.total * pool.page_bytes for pool in then)
    return min(facts.memory.total_bytes - pages_then, facts.memory.available_bytes + guests + pages - pages_then)


def _life(name: str, desired: Desired, facts: Facts) -> GuestLife:
    """As a new boot gives it (`Roster`): start.auto, else the link of its unit."""
    auto = desired.guests[name].start.auto
    if auto is None:
        auto = any(unit.guest == name and unit.enabled for unit in facts.units or ())
    held = next((life.held for life in facts.lives if life.name == name and not life.alive), None)
    return GuestLife(name, alive=False, wanted=auto, held=held)


def _guests(facts: Facts, then: Facts) -> Iterator[Difference]:
    now = {life.name: life for life in facts.lives}
    for life in then.lives:
        before = now.get(life.name, GuestLife(life.name, alive=False, wanted=False))
        if life.wanted and not life.held and not before.alive:
            yield Difference(Change.GUEST, f"+ guest {life.name}: starts", "start.auto; it is off now")
        elif before.alive and not life.wanted:
            yield Difference(Change.GUEST, f"- guest {life.name}: stays off", "it runs now, and start.auto is not set")
        elif before.alive and before.pending:
            change = f"~ guest {life.name}: {', '.join(before.pending)}"
            yield Difference(Change.PENDING, change, "its file changed since it was started")
    for name in sorted(now.keys() - {life.name for life in then.lives}):
        if now[name].alive:
            yield Difference(Change.GUEST, f"- guest {name}: stays off", "it runs now, and its file is gone")


def _kernel(boot: NextBoot) -> Iterator[Difference]:
    if boot.configured is None:
        return
    running, configured = _words(boot.running), _words(boot.configured)
    for word in configured:
        if word not in running:
            yield Difference(Change.KERNEL, f"+ kernel argument {word}", f"{boot.source} has it, /proc/cmdline has not")
    for word in running:
        if word not in configured:
            yield Difference(Change.KERNEL, f"- kernel argument {word}", f"/proc/cmdline has it, {boot.source} has not")


def _words(line: str) -> list[str]:
    """Each word once, in order; what the loader adds by itself left out."""
    return [word for word in dict.fromkeys(line.split()) if word.partition("=")[0] not in _OF_EACH_BOOT]


def _gone(facts: Facts, remade: Sequence[Action]) -> Iterator[Difference]:
    """What is there through kvmd (or in spite of it) and nobody makes again."""
    again = {action.path for action in remade if isinstance(action, WriteKnob)}
    for entry in facts.journal:
        now = facts.knobs.get(entry.subject)
        if entry.kind == "knob" and entry.subject not in again and now not in (None, entry.original):
            line = f"~ {entry.subject}: {now} -> {entry.original}"
            yield Difference(Change.GONE, line, f"its value before kvmd; {_left(entry)}")
    for knob in facts.tuned:
        now = facts.knobs.get(knob.path)
        if knob.path in again and now != knob.ours:
            line = f"~ {knob.path}: {now} of somebody else's ends"
            yield Difference(Change.GONE, line, "what was yielded is kvmd's again at boot")


def _left(entry: JournalEntry) -> str:
    return f"kvmd wrote {entry.new}, which no file asks for now"


def _problems(then: Sequence[Problem], boot: NextBoot) -> Iterator[Difference]:
    if boot.configured is None:
        yield Difference(
            Change.PROBLEM, "? kernel arguments", "no file of a boot loader that kvmd can read: compare them yourself"
        )
    for problem in then:
        yield Difference(Change.PROBLEM, f"! {problem.subject}: {problem.message}", problem.hint or "")
