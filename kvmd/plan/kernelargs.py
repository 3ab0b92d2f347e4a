"""Words the kernel's command line should have for the guests that are declared: computed, compared, and one drop-in.

CPUs that guests have to themselves are best isolated at boot: `isolcpus=` (nobody is balanced onto them, and managed
interrupts stay off where they can), `nohz_full=` (no tick while one thread runs), `rcu_nocbs=` (no callbacks),
`irqaffinity=` (interrupts to come), all of Documentation/admin-guide/kernel-parameters.txt. Pages of 1 GiB are sure to
be had at boot alone: `hugepagesz=1G hugepages=`. What is there and enough is left as it is. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from kvmd.actions import Action, Disruption, Problem, WriteKernelArgs
from kvmd.config.desired import Desired
from kvmd.config.host import PAGE_SIZES, Host
from kvmd.errors import NotSupported, Refused
from kvmd.facts import BootLine, CpuTopology, Facts
from kvmd.plan.assignment import CpuWish, usable_cpus
from kvmd.plan.cores import Machine
from kvmd.plan.cpus import place_all, taken_by
from kvmd.units import CpuSet

DROP_IN = "/etc/default/grub.d/50-kvmd.cfg"
HEADER = """\
# Written by kvmd for the guests it is told of (kvmd-cli host kernel-args), and replaced as a whole. In force after
# update-grub and a reboot. `kvmd-cli host kernel-args --remove` takes it away.
"""
GIB = 1 << 30
ISOLATION = frozenset({"isolcpus", "nohz_full", "rcu_nocbs"})

# What makes the boot loader take it, by kind of loader; only Debian's GRUB has a place for a file of ours.
COMMANDS: Mapping[str, str] = {
    "grub": "update-grub",
    "grubby": "grubby --update-kernel=ALL --args='{words}'",
    "kernel-install": "add them to /etc/kernel/cmdline, then: kernel-install add $(uname -r) /boot/vmlinuz-$(uname -r)",
    "": "add them where this host's boot loader takes the kernel's command line from",
}


@dataclass(frozen=True, slots=True)
class KernelWord:
    """One parameter. `wanted` is the whole word ("nohz_full=4-7"); `present` what the running kernel was given."""

    key: str
    wanted: str
    present: str | None
    why: str
    enough: bool  # what is present serves: it stays as it is


@dataclass(frozen=True, slots=True)
class KernelArguments:
    """What is there, what is wanted, and the drop-in that would make it so."""

    words: tuple[KernelWord, ...]
    drop_in: str  # text of DROP_IN as it should be, "" for none
    problems: tuple[Problem, ...]

    @property
    def missing(self) -> tuple[KernelWord, ...]:
        """Words the running kernel was not given."""
        return tuple(word for word in self.words if not word.enough)


def kernel_arguments(desired: Desired, facts: Facts, also: Iterable[KernelWord] = ()) -> KernelArguments:
    """`also`: words that other planners ask for (an IOMMU's)."""
    ours = {word.partition("=")[0] for word in parse_drop_in(facts.boot.drop_in or "")}
    isolated, whose = _to_isolate(desired, facts)
    words = [*_cpu_words(isolated, whose, ours, desired, facts), *_page_words(desired, facts.boot)]
    words += [*_iommu_words(desired, facts), *also]
    clashing = [word for word in words if not word.enough and word.present is not None and word.key not in ours]
    problems = [
        Problem(
            "kernel arguments",
            f"{word.wanted} is wanted ({word.why}), and {word.present} comes from elsewhere: of two, the kernel heeds "
            "one",
            f"change it where it is set, mostly /etc/default/grub: {word.wanted}",
        )
        for word in clashing
    ]
    # the lists of isolcpus= and nohz_full= must be equal (kernel/sched/isolation.c): all of them or none
    blocked = ISOLATION if any(word.key in ISOLATION for word in clashing) else frozenset()
    written = [
        word.wanted
        for word in words
        if word not in clashing and word.key not in blocked and (word.key in ours or not word.enough)
    ]
    return KernelArguments(tuple(words), _drop_in(written), tuple(problems))


def plan_kernel_args(desired: Desired, facts: Facts) -> tuple[tuple[Action, ...], tuple[Problem, ...]]:
    """With cpu.kernel_args = "write": the drop-in as it should be. Always: what only a reboot would bring."""
    if desired.host.cpu.kernel_args != "write" and not _is_any_wanted(desired):
        return (), ()
    found = kernel_arguments(desired, facts)
    if desired.host.cpu.kernel_args != "write":
        return (), tuple(_advice(found, desired, facts))
    problems = [*found.problems]
    if facts.boot.loader != "grub":
        if found.missing:
            words = " ".join(word.wanted for word in found.missing)
            problems.append(
                Problem(
                    "kernel arguments",
                    f"cpu.kernel_args is write, and this host's boot loader has no place for a file of kvmd's: {words}",
                    command(facts.boot.loader, words),
                )
            )
        return (), tuple(problems)
    action = write_action(found, facts.boot, "cpu.kernel_args is write")
    waiting = " ".join(word.wanted for word in found.missing if word.wanted in found.drop_in)
    if waiting and action is None:
        problems.append(
            Problem(
                "kernel arguments",
                f"{waiting} wait for a reboot",
                f"{COMMANDS['grub']}, then reboot the host",
                needs="reboot",
            )
        )
    return ((action,) if action else ()), tuple(problems)


def _is_any_wanted(desired: Desired) -> bool:
    """Whether a reboot may have to be advised; finding out places every guest, which nobody should pay for in vain."""
    return _is_isolation_required(desired) or any(PAGE_SIZES[text] == GIB for text in desired.host.hugepages)


def _is_isolation_required(desired: Desired) -> bool:
    """Whether some guest cannot do without; "prefer" is content with what the running kernel has."""
    return any(guest.cpu.isolated == "require" for guest in desired.guests.values())


def _advice(found: KernelArguments, desired: Desired, facts: Facts) -> Iterator[Problem]:
    """What is missing and cannot be had while the host runs. Pages that are there need no word of the kernel's."""
    pages = sum(pool.total for pool in facts.hugepages if pool.page_bytes == GIB)
    for word in found.missing:
        if word.key == "hugepages":
            counts = word.wanted.rpartition("=")[2].split(",")
            if pages >= sum(int(count.rpartition(":")[2]) for count in counts):
                continue
        elif not _is_isolation_required(desired):
            continue
        yield Problem(
            "kernel arguments",
            f"{word.wanted} would do it: {word.why}",
            "kvmd-cli host kernel-args --write, then reboot the host",
            needs="reboot",
        )


def write_action(found: KernelArguments, line: BootLine, why: str) -> WriteKernelArgs | None:
    """What makes the drop-in so; None when it is."""
    if (line.drop_in or "") == found.drop_in:
        return None
    return WriteKernelArgs(
        path=DROP_IN,
        old=line.drop_in or "",
        new=found.drop_in,
        words=" ".join(parse_drop_in(found.drop_in)),
        why=why,
        disruption=Disruption.HOST,
    )


def remove_action(line: BootLine, why: str) -> WriteKernelArgs | None:
    """What takes the drop-in away; None when there is none."""
    return write_action(KernelArguments((), "", ()), line, why)


def asked_for(found: KernelArguments, line: BootLine, host: Host, why: str, *, remove: bool) -> WriteKernelArgs | None:
    """What a person's --write or --remove means now. Refused and NotSupported say why it cannot be."""
    if remove:
        if host.cpu.kernel_args == "write":
            raise Refused(
                'cpu.kernel_args is "write": the next apply would write it again',
                hint='cpu.kernel_args = "advise" in host.toml, then again',
            )
        return remove_action(line, why)
    if line.loader != "grub":
        words = " ".join(word.wanted for word in found.missing)
        raise NotSupported("this host's boot loader takes no file of kvmd's", hint=command(line.loader, words))
    if found.problems:
        raise Refused(found.problems[0].message, hint=found.problems[0].hint)
    return write_action(found, line, why)


def command(loader: str, words: str) -> str:
    """How this host's boot loader is made to give the kernel these words."""
    return COMMANDS.get(loader, COMMANDS[""]).format(words=words)


def parse_drop_in(text: str) -> tuple[str, ...]:
    """The words of a drop-in of ours."""
    for line in text.splitlines():
        if line.startswith("GRUB_CMDLINE_LINUX="):
            return tuple(line.partition("$GRUB_CMDLINE_LINUX")[2].strip().strip('"').split())
    return ()


def _drop_in(words: Iterable[str]) -> str:
    joined = " ".join(words)
    return f'{HEADER}GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {joined}"\n' if joined else ""


def _to_isolate(desired: Desired, facts: Facts) -> tuple[CpuSet, tuple[str, ...]]:
    """CPUs that declared guests want isolated, whether they run or not, and the guests."""
    asking = {
        name: CpuWish.of(guest)
        for name, guest in desired.guests.items()
        if guest.cpu.placement in ("dedicated", "manual") and guest.cpu.isolated != "avoid"
    }
    # as if isolation were no condition: this is about what should be isolated
    wishes = {
        name: replace(CpuWish.of(guest), isolated="prefer" if name in asking else guest.cpu.isolated)
        for name, guest in desired.guests.items()
    }
    taken = {name: has for name, has in taken_by(facts).items() if name in wishes}
    for topology in (facts.cpus, replace(facts.cpus, isolated=CpuSet())):
        placed = place_all(wishes, topology, desired.host.cpu, taken=taken)
        found = _with_siblings(topology, {name: placed.of[name].cpus for name in asking if name in placed.of}, wishes)
        found = CpuSet(found - placed.housekeeping)
        if found <= facts.cpus.isolated:
            break
    return found, tuple(sorted(name for name in asking if name in placed.of))


def _with_siblings(topology: CpuTopology, of: Mapping[str, CpuSet], wishes: Mapping[str, CpuWish]) -> CpuSet:
    """These CPUs, and the siblings that smt = "isolate" keeps empty."""
    machine = Machine.of(topology)
    found: set[int] = set()
    for name, cpus in of.items():
        found |= cpus
        if wishes[name].smt == "isolate":
            found |= {other for cpu in cpus for other in machine.threads[machine.by_id[cpu].core]}
    return CpuSet(found)


def _cpu_words(
    needed: CpuSet, whose: tuple[str, ...], ours: Collection[str], desired: Desired, facts: Facts
) -> list[KernelWord]:
    if not needed:
        return []
    line, last = facts.boot.words(), max(facts.cpus.online | facts.cpus.offline)
    shown = ", ".join(whose[:3]) + (f" and {len(whose) - 3} more" if len(whose) > 3 else "")
    why = f"{shown} {'has CPUs of its' if len(whose) == 1 else 'have CPUs of their'} own: {needed}"
    # a list somebody else has set and that serves is the list for all
    isolated = needed
    for key, there in (("nohz_full", facts.cpus.nohz_full), ("isolcpus", facts.cpus.isolated)):
        if key in line and key not in ours and needed <= there:
            isolated = CpuSet(there)
    keeps = CpuSet(usable_cpus(facts.cpus) - isolated)
    given = _cpu_list(line.get("irqaffinity"), last)
    nocbs = _cpu_list(line.get("rcu_nocbs"), last) or CpuSet()
    return [
        KernelWord(
            "isolcpus",
            f"isolcpus=managed_irq,domain,{isolated}",
            _word("isolcpus", line),
            why,
            enough=isolated <= facts.cpus.isolated,
        ),
        KernelWord(
            "nohz_full", f"nohz_full={isolated}", _word("nohz_full", line), why, enough=isolated <= facts.cpus.nohz_full
        ),
        KernelWord(
            "rcu_nocbs",
            f"rcu_nocbs={isolated}",
            _word("rcu_nocbs", line),
            why,
            enough=isolated <= nocbs | facts.cpus.nohz_full,  # which offloads its CPUs by itself
        ),
        KernelWord(
            "irqaffinity",
            f"irqaffinity={_irq_cpus(desired, facts, keeps)}",
            _word("irqaffinity", line),
            "interrupts stay off them",
            enough=bool(given) and not (given or CpuSet()) & isolated,
        ),
    ]


def _irq_cpus(desired: Desired, facts: Facts, keeps: CpuSet) -> CpuSet:
    if desired.host.cpu.irq_affinity != "housekeeping":
        return keeps
    return place_all({}, facts.cpus, desired.host.cpu).housekeeping


def _page_words(desired: Desired, line: BootLine) -> list[KernelWord]:
    """1 GiB pages that host.toml declares; smaller ones can be had while the host runs."""
    text = next((text for text in desired.host.hugepages if PAGE_SIZES[text] == GIB), None)
    if text is None:
        return []
    pool = desired.host.hugepages[text]
    if isinstance(pool.pages, int):
        count, wanted = pool.pages, str(pool.pages)
    elif isinstance(pool.pages, Mapping):
        count = sum(pool.pages.values())
        nodes = sorted(pool.pages.items(), key=lambda item: int(item[0].removeprefix("node")))
        wanted = ",".join(f"{node.removeprefix('node')}:{pages}" for node, pages in nodes)
    else:
        needs = [guest.memory.size for guest in desired.guests.values() if guest.memory.hugepage_size == GIB]
        count = sum(-(-need // GIB) for need in needs) + -(-pool.spare // GIB)
        wanted = str(count)
    if not count:
        return []
    present, given = line.gib_pages()
    return [
        KernelWord(
            "hugepages",
            f"hugepagesz=1G hugepages={wanted}",
            present,
            f"[hugepages.{text}] wants {count} pages, which memory in use may not have left in one piece",
            enough=given >= count,
        )
    ]


def _iommu_words(desired: Desired, facts: Facts) -> list[KernelWord]:
    """Intel's IOMMU is off unless asked for; AMD's is on where the firmware has it on."""
    guests = sorted(name for name, guest in desired.guests.items() if guest.passthrough)
    if not guests or facts.iommu.vendor != "intel":
        return []
    line = facts.boot.words()
    present = _word("intel_iommu", line)
    on = line.get("intel_iommu", "").startswith("on")
    why = f"{', '.join(guests[:3])} {'has a device' if len(guests) == 1 else 'have devices'} of the host"
    return [KernelWord("intel_iommu", "intel_iommu=on", present, why, enough=on or facts.iommu.groups > 0)]


def _word(key: str, line: Mapping[str, str]) -> str | None:
    return f"{key}={line[key]}" if key in line else None


def _cpu_list(text: str | None, last: int) -> CpuSet | None:
    """CPUs of a list as the kernel takes it ("0-3,8", "4-N", "all"); None when absent or of a rarer form."""
    if text is None:
        return None
    try:
        return CpuSet.parse(text.replace("all", f"0-{last}").replace("N", str(last)))
    except ValueError:
        return None
