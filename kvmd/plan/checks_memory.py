"""Judgements about memory: hugepages, swap, merging, limits of locked pages and of asynchronous I/O. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from kvmd.actions import SetHugepages
from kvmd.plan import admission, ksm
from kvmd.plan.entry import candidate, page_needs
from kvmd.plan.hostreport import Finding, HostReport, fail, ok, skip, warn
from kvmd.plan.hugepages import plan_hugepages
from kvmd.plan.vfio import memlock_bytes
from kvmd.units import Size

KSM_DRIVERS = ("ksmtuned", "uksmd")
AIO_MAX = "/proc/sys/fs/aio-max-nr"
AIO_EVENTS_PER_GUEST = 1024  # MAX_EVENTS of QEMU's block/linux-aio.c, once for each event loop
IO_URING_UNLOCKED = (5, 12)  # since then io_uring is counted by memory cgroup, not by RLIMIT_MEMLOCK
IO_URING_BYTES = 1 << 20  # for the rings of one guest


def apply_fix(report: HostReport) -> str:
    """What makes kvmd put the host right."""
    return "kvmd-cli apply" if report.listening else "systemctl start kvmd"


def _reserve(report: HostReport) -> int:
    return admission.reserve_bytes(report.desired.host.memory.reserve, report.facts.memory.total_bytes)


def hugepages(report: HostReport) -> Iterator[Finding]:
    """Pages wanted by host.toml and the guests against the pools, by node and size."""
    wishes, needs = report.desired.host.hugepages, page_needs(report.desired.guests)
    if not wishes and not needs:
        yield skip("neither host.toml nor a guest asks for hugepages")
        return
    actions, problems = plan_hugepages(wishes, needs, report.facts, reserve=_reserve(report))
    for action in actions:
        if isinstance(action, SetHugepages):
            pool = f"{Size(action.page_bytes)} pages on node {action.node}"
            yield warn(f"{pool}: {action.new} wanted, the host has {action.old}", apply_fix(report))
    for problem in problems:
        judged = fail if problem.guests else warn
        yield judged(f"{problem.subject}: {problem.message}", problem.hint or "kvmd-cli host hugepages")
    if not actions and not problems:
        asked = {int(Size.parse(text)) for text in wishes} | {need.page_bytes for need in needs.values()}
        pools = [pool for pool in report.facts.hugepages if pool.page_bytes in asked]
        yield ok(
            "; ".join(
                f"{Size(pool.page_bytes)} node {pool.node}: {pool.total} pages, {pool.free} free" for pool in pools
            )
        )


def swap(report: HostReport) -> Iterator[Finding]:
    """RAM and swap together hold all guests at their full size."""
    memory, wish = report.facts.memory, report.desired.host.memory
    if not memory.total_bytes:
        yield skip("/proc/meminfo cannot be read")
        return
    guests = [candidate(name, guest) for name, guest in report.desired.guests.items()]
    needed = sum(guest.charge_bytes for guest in guests)
    usable = admission.usable_bytes(memory, reserve=_reserve(report))
    short, there = needed - usable, admission.swap_bytes(memory)
    if short <= 0:
        if not memory.swap_total_bytes and report.desired.host.ksm.mode in ("kernel", "kvmd"):
            yield warn("ksm.mode merges pages and there is no swap: pages that part again have nowhere to go", _swap(1))
            return
        yield ok(f"guests may hold {_human(needed)}, RAM leaves {_human(usable)} for them")
        return
    message = f"guests may hold {_human(needed)}, RAM leaves {_human(usable)} for them, swap has {_human(there)}"
    if short > there:
        yield fail(f"{message}: {_human(short - there)} short", _swap(-(-(short - there) // admission.GIB)))
    elif short > wish.swap_factor * there:
        more = int(short - wish.swap_factor * there)
        yield warn(
            f"{message}: more than the {wish.swap_factor:.0%} that memory.swap_factor counts",
            _swap(-(-more // admission.GIB)),
        )
    else:
        yield ok(message)


def _swap(gib: int) -> str:
    return f'[swap.file] with size = "{gib}GiB" in host.toml'


def thp(report: HostReport) -> Iterator[Finding]:
    """Transparent hugepages (Documentation/admin-guide/mm/transhuge.rst); QEMU asks for them by madvise(2)."""
    enabled = report.facts.knobs.get(f"{ksm.THP}/enabled")
    defrag = report.facts.knobs.get(f"{ksm.THP}/defrag")
    wish = report.desired.host.thp
    plain = [name for name, guest in report.desired.guests.items() if guest.memory.backing != "hugepages"]
    if enabled is None:
        yield skip("this kernel has no transparent hugepages")
    elif wish.enabled not in ("keep", enabled):
        yield warn(f"thp.enabled is {wish.enabled} in host.toml, the kernel has {enabled}", apply_fix(report))
    elif enabled == "never" and plain:
        yield warn(
            "transparent hugepages are off: memory of guests without hugepages is in 4 KiB pages",
            'thp.enabled = "madvise" in host.toml',
        )
    elif (enabled, defrag) == ("always", "always"):
        yield warn(
            "every page fault of every program may wait for compaction (enabled and defrag are both always)",
            'thp.defrag = "defer+madvise" in host.toml',
        )
    else:
        yield ok(f"enabled {enabled}, defrag {defrag}")


def merging(report: HostReport) -> Iterator[Finding]:
    """KSM does what host.toml says (Documentation/admin-guide/mm/ksm.rst)."""
    run, mode = report.facts.knobs.get(f"{ksm.KSM}/run"), report.desired.host.ksm.mode
    sharing = [guest for guest in report.desired.guests.values() if guest.memory.ksm_group]
    parties = {(guest.memory.ksm_group, guest.guest.owner) for guest in sharing}
    if run is None:
        yield (
            fail(f"ksm.mode is {mode}, and this kernel has no KSM", 'ksm.mode = "off" in host.toml')
            if mode in ("kernel", "kvmd")
            else ok("this kernel has no KSM")
        )
    elif mode == "off" and run == "1":
        yield warn("pages are being merged though ksm.mode is off in host.toml", apply_fix(report))
    elif mode == "kernel" and f"{ksm.KSM}/advisor_mode" not in report.facts.knobs:
        yield fail("ksm.mode is kernel, and this kernel has no advisor (6.8)", 'ksm.mode = "kvmd" in host.toml')
    elif run == "1" and len(parties) > 1:
        yield warn(
            f"guests of {len(parties)} groups or owners share merged pages, for the kernel knows no groups:"
            " one can tell by timing what another holds",
            'ksm.mode = "off" in host.toml',
        )
    else:
        yield ok(f"ksm.mode is {mode}, run is {run}")


def ksm_owner(report: HostReport) -> Iterator[Finding]:
    """Nobody else turns KSM's knobs while kvmd does."""
    mode = report.desired.host.ksm.mode
    drivers = [name for name in KSM_DRIVERS if name in report.processes]
    if mode == "keep":
        yield skip("ksm.mode is keep: whoever drives page merging is not kvmd's business")
        return
    for name in drivers:
        pid = report.processes[name]
        yield warn(f"{name} (pid {pid}) sets page merging too, and kvmd yields", f"systemctl disable --now {name}")
    if not drivers:
        yield ok("nobody but kvmd drives page merging")


def memlock(report: HostReport) -> Iterator[Finding]:
    """RLIMIT_MEMLOCK, which a QEMU inherits; io_uring counts against it on older kernels (io_uring_setup(2))."""
    limit = report.memlock_bytes
    shown = "unlimited" if limit is None else Size(limit).human()
    users = sorted(
        name for name, guest in report.desired.guests.items() if any(d.aio == "io_uring" for d in guest.disk.values())
    )
    if limit is not None and users and report.kernel_version < IO_URING_UNLOCKED and limit < IO_URING_BYTES:
        yield fail(
            f'{shown} may be locked; aio = "io_uring" of {", ".join(users[:3])} needs more on kernel {report.kernel}',
            "mkdir -p /etc/systemd/system/kvmd-guest@.service.d && printf '[Service]\\nLimitMEMLOCK=infinity\\n'"
            " > /etc/systemd/system/kvmd-guest@.service.d/memlock.conf && systemctl daemon-reload",
        )
    else:
        # a guest with a device of the host has all its memory pinned; kvmd and its unit raise the limit for it
        given = sorted(
            (name, memlock_bytes(guest) or 0) for name, guest in report.desired.guests.items() if guest.passthrough
        )
        raised = "".join(
            f"; {name} gets {Size(amount).human()} for its devices of the host" for name, amount in given[:3]
        )
        yield ok(f"{shown} may be locked, and no guest needs more{raised}")


def aio(report: HostReport) -> Iterator[Finding]:
    """Native asynchronous I/O has one ceiling for the whole host (Documentation/admin-guide/sysctl/fs.rst)."""
    if report.aio_max is None:
        yield skip(f"{AIO_MAX} cannot be read")
        return
    users = [
        name
        for name, guest in report.desired.guests.items()
        if any(disk.aio in (None, "native") for disk in guest.disk.values())
    ]
    needed = AIO_EVENTS_PER_GUEST * len(users)
    if needed > report.aio_max:
        yield warn(
            f"fs.aio-max-nr is {report.aio_max}, {len(users)} guests with native I/O want {needed}: the last fail",
            f"echo 'fs.aio-max-nr = {2 * needed}' > /etc/sysctl.d/60-kvmd.conf && sysctl --system",
        )
    else:
        yield ok(f"fs.aio-max-nr is {report.aio_max}, guests take at most {needed}")


def _human(amount: int) -> str:
    return Size(amount).human() if amount >= 0 else f"-{Size(-amount).human()}"
