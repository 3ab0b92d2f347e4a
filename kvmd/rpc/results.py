"""What the API takes and gives, method by method: the shapes clients rely on. Frozen; unknown names are refused.

Sizes are bytes, times are seconds since the epoch unless a name says otherwise. A name without a value is null and
never left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, StringConstraints

GuestName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?$")]
EventType = Annotated[str, StringConstraints(min_length=1, max_length=64)]
State = Literal["stopped", "starting", "running", "paused", "stopping", "unreachable", "failed"]
DisruptionName = Literal["none", "guest", "network", "host"]
WhenName = Literal["now", "network", "guest-restart", "host", "reboot"]
_DAY_S = 86_400


class Shape(BaseModel):
    """Common rules of everything here."""

    # Deferred: a shape is built at its first use, which most never see before kvmd has answered its first client.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


# -- guests


class GuestParams(Shape):
    """One guest."""

    name: GuestName


class GuestVerbParams(GuestParams):
    """One guest, and how long and how hard to try."""

    force: bool = Field(default=False, description="go on to the means that may lose data")
    timeout_s: float | None = Field(default=None, gt=0, le=_DAY_S, description="null: the guest's own setting")
    wait: bool = Field(default=True, description="answer when it is done, not when it has begun")


class HoldParams(GuestParams):
    """One guest, and why nobody shall touch it."""

    reason: str = Field(default="", max_length=500)


class WaitParams(GuestParams):
    """One guest, and what to wait for."""

    until: Literal["running", "stopped"] = Field(default="stopped", description='"stopped": off, however it ended')
    timeout_s: float = Field(default=60.0, gt=0, le=600)


class Why(Shape):
    """What happened to a guest. Everything about its end is null while it is alive."""

    name: str
    state: State
    since: float | None = Field(description="when it came into this state")
    answer: str = Field(description="for people")
    cause: str | None = Field(
        description="guest-poweroff, guest-panic, admin-stop, admin-kill, qemu-crash, out-of-memory, start-failed,"
        " host-shutdown, vanished; null: it is alive or never ran"
    )
    begun_at: float | None = Field(description="of its present or last run")
    ended_at: float | None
    wanted: str | None
    wanted_by: str | None
    wanted_because: str | None
    wanted_at: float | None
    held_by: str | None
    held_because: str | None
    crashes: int = Field(description="within its restart.within")
    crashes_allowed: int
    last_words: str | None = Field(description="of its QEMU")


class GuestVerbResult(Shape):
    """Where the guest is now, and whether that needed doing."""

    name: str
    state: State
    changed: bool


class GuestSummary(Shape):
    """One line of a list of guests."""

    name: str
    state: State
    reason: str | None = Field(description="why it is in that state")
    uuid: str | None
    pid: int | None = Field(description="of its QEMU")
    vcpus: int
    memory_bytes: int
    balloon_bytes: int | None = Field(description="what the balloon leaves it now")
    wanted: str | None = Field(description="the state kvmd works towards")
    held: str | None = Field(description="why automatic hands are kept off it")
    since: float | None = Field(description="when it came into this state")
    pending: tuple[str, ...] = Field(description="keys of its file that differ from what runs")
    stale: bool = Field(description="its file does not check; the last good one counts")
    observed_at: float = Field(description="when this was true")


class GuestList(Shape):
    """All guests, by name."""

    guests: tuple[GuestSummary, ...]


class Disk(Shape):
    """A guest's disk."""

    name: str
    file: str
    format: str
    size_bytes: int | None


class Nic(Shape):
    """A guest's network interface."""

    name: str
    network: str | None = Field(description="null: user mode")
    mac: str
    ipv4: str | None
    tap: str | None


class PlacementShape(Shape):
    """The CPUs each vCPU, and everything else of a QEMU, may run on."""

    vcpus: tuple[str, ...]
    emulator: str


class GuestDetail(GuestSummary):
    """All about one guest."""

    description: str | None
    owner: str | None
    tags: tuple[str, ...]
    machine: str | None
    accel: str | None
    display: str | None
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    placement: PlacementShape | None
    warnings: tuple[str, ...]
    argv: tuple[str, ...] = Field(description="what its QEMU was, or would be, started with")
    log_dir: str


class DerivedValue(Shape):
    """One value kvmd decided: the key that would set it, what it is, and why."""

    key: str
    value: str
    reason: str


class Derived(Shape):
    """All values a guest's file leaves to kvmd."""

    values: tuple[DerivedValue, ...]


# -- the host


class ActionShape(Shape):
    """One thing to do."""

    kind: str
    line: str = Field(description="as a plan shows it")
    why: str
    disruption: DisruptionName = Field(description="whom it disturbs")
    when: WhenName = Field(description="the group of a plan it belongs to")


class OutcomeShape(ActionShape):
    """One thing done, or not: then `error` says why."""

    error: str | None


class ProblemShape(Shape):
    """Something asked for that cannot be had; `guests` do not start because of it."""

    subject: str
    message: str
    hint: str | None
    guests: tuple[str, ...]
    needs: Literal["reboot"] | None = Field(description="what would bring it; null: see the hint")


class YieldedShape(Shape):
    """A tuning knob somebody else changed after kvmd wrote it: left to them until `host.apply`."""

    path: str
    ours: str
    theirs: str
    why: str = Field(description="what the file wishes")


class FaultShape(Shape):
    """Something wrong in a file."""

    file: str
    line: int | None
    key: str | None
    message: str
    hint: str | None
    severity: Literal["error", "warning"]


class AdmissionShape(Shape):
    """Whether a guest may start, as a sum: what it and the others count against what the host can back."""

    guest: str
    rule: str = Field(description="strict, swap_backed or statistical: the one that decides")
    own_bytes: int
    others_bytes: int = Field(description="of guests that run, and of those that start before it")
    others: int
    limit_bytes: int
    remaining_bytes: int = Field(description="when it runs; negative: so much is missing")
    terms: str = Field(description="how the limit is made up")
    note: str | None = Field(description="why another rule than the declared one decided")
    admitted: bool
    line: str = Field(description="all of it for people")


class AdmissionParams(Shape):
    """Guests to be started one after the other."""

    names: tuple[GuestName, ...] = Field(min_length=1, max_length=1000)


class Admissions(Shape):
    """One sum for each guest asked for, in that order; who is refused does not count for the next."""

    admissions: tuple[AdmissionShape, ...]


class PlanParams(Shape):
    """Whose plan: of `host.reconcile`, or with `retake` of `host.apply`."""

    retake: bool = Field(default=False, description="also write tuning knobs that somebody else changed")
    reboot: bool = Field(default=False, description="also say what a reboot of the host would change")


class DifferenceShape(Shape):
    """One thing that will differ after a reboot of the host."""

    kind: Literal["guest", "pending", "kernel", "remade", "gone", "problem"]
    line: str = Field(description="as a plan shows it")
    why: str


class Plan(Shape):
    """What would be done, what cannot be, and what is left to others."""

    actions: tuple[ActionShape, ...]
    problems: tuple[ProblemShape, ...]
    yielded: tuple[YieldedShape, ...]
    admissions: tuple[AdmissionShape, ...] = Field(description="of the guests that would be started")
    faults: tuple[FaultShape, ...]
    reboot: tuple[DifferenceShape, ...] | None = Field(
        default=None, description="what a reboot would change; null when that was not asked"
    )


class ApplyParams(Shape):
    """What `host.apply` may do. Without `allow`: what disturbs nobody."""

    allow: tuple[Literal["guest", "network", "host"], ...] = Field(default=(), max_length=3)
    prune: bool = Field(default=False, description="also remove what no file mentions any more")


class Applied(Shape):
    """What was done, what was left because it was not allowed, and what cannot be."""

    outcomes: tuple[OutcomeShape, ...]
    skipped: tuple[ActionShape, ...]
    problems: tuple[ProblemShape, ...]
    yielded: tuple[YieldedShape, ...]
    faults: tuple[FaultShape, ...]


class ReleaseParams(Shape):
    """What to do about what running guests need: refuse, or leave it."""

    partial: bool = Field(default=False, description="put back only what no running guest needs")


class Released(Shape):
    """What `host.release` put back, and what it kept and why: changed by someone since, in use, needed."""

    restored: tuple[str, ...]
    kept: tuple[str, ...]


class HostFacts(RootModel[dict[str, Any]]):
    """The host as last observed; for people and tools that look, not a stable shape."""

    model_config = ConfigDict(frozen=True)


class KernelWordShape(Shape):
    """One parameter of the kernel's command line that the guests' files ask for."""

    key: str
    wanted: str
    present: str | None = Field(description="what the running kernel was given")
    why: str
    enough: bool = Field(description="what is present serves")


class KernelArgs(Shape):
    """What the kernel was given, what it should be given, and the file by which kvmd would see to it."""

    cmdline: str
    words: tuple[KernelWordShape, ...]
    loader: Literal["grub", "grubby", "kernel-install", ""]
    path: str | None = Field(description="kvmd's own file; null: this boot loader takes none")
    now: str | None = Field(description="its text, null when there is none")
    text: str = Field(description="its text as it should be; empty: none")
    command: str = Field(description="what makes the boot loader take it; then a reboot")
    problems: tuple[ProblemShape, ...]


class KernelArgsParams(Shape):
    """Write the file as it should be, or take it away."""

    remove: bool = False


class KernelArgsWritten(Shape):
    """What was done; `line` is null when nothing had to be."""

    line: str | None
    path: str
    command: str = Field(description="what makes the boot loader take it; then a reboot")


class CpuShape(Shape):
    """One CPU of the host; `roles` of an ordinary one is empty. What the kernel does not tell is null."""

    id: int
    node: int | None
    package: int | None
    l3: int | None = Field(description="lowest CPU that shares the last-level cache")
    core: int | None = Field(description="lowest CPU of the core")
    capacity: int | None = Field(description="1024: the fastest core of this host")
    roles: tuple[Literal["housekeeping", "isolated", "nohz_full", "forbidden", "offline"], ...]
    vcpus: tuple[str, ...] = Field(description="GUEST:VCPU of those that may run here and nowhere else")


class ThreadShape(Shape):
    """A thread of a guest that is no vCPU, and where it may run."""

    name: str
    cpus: str


class GuestCpus(Shape):
    """Where a running guest's threads may run, and where they belong (null: refused, or its file is gone)."""

    name: str
    placement: str
    nodes: str | None
    vcpus: tuple[str, ...]
    threads: tuple[ThreadShape, ...]
    wanted_vcpus: tuple[str, ...] | None
    wanted_others: str | None
    placed: bool


class IrqShape(Shape):
    """One interrupt of a device: where it may arrive and where it does."""

    number: int
    device: str
    cpus: str
    arrives: str
    kept: bool = Field(description="the kernel lets nobody move it")


class PoolShape(Shape):
    """One node's pool of one size of hugepages, in pages."""

    node: int
    page_bytes: int
    total: int
    used: int
    reserved: int = Field(description="promised to a mapping that has not touched them yet")
    free: int = Field(description="and not reserved")
    wanted: int = Field(description="what the pool shall hold")
    in_one_piece: int | None = Field(description="further pages that are free memory as it is")
    by_compaction: int | None = Field(description="and at most so many more")


class PageGuestShape(Shape):
    """A guest whose file asks for hugepages."""

    name: str
    page_bytes: int
    pages: int
    nodes: str = Field(description="empty: any")
    policy: str
    fallback: bool
    running: bool
    has_pages: bool


class HostHugepages(Shape):
    """All pools, who wants pages, what would reserve them at boot, and what cannot be had."""

    pools: tuple[PoolShape, ...]
    guests: tuple[PageGuestShape, ...]
    boot: tuple[str, ...] = Field(description="words for the kernel command line, one group for each size")
    problems: tuple[ProblemShape, ...]


class HostCpus(Shape):
    """Who sits where."""

    housekeeping: str
    cpus: tuple[CpuShape, ...]
    guests: tuple[GuestCpus, ...]
    interrupts: tuple[IrqShape, ...] = Field(description="read while cpu.irq_affinity is housekeeping")
    problems: tuple[ProblemShape, ...]


# -- tuning


class TuneHost(BaseModel):
    """The host's memory as the agent sees it; more members may come."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    available_bytes: int
    usable_bytes: int


class TuneGuest(Shape):
    """One guest as the agent sees it."""

    name: str
    eligible: bool
    reason: str | None = Field(description="why it is not eligible, or what was decided last")
    actual_bytes: int | None
    used_bytes: int | None
    available_bytes: int | None
    target_bytes: int | None
    floor_bytes: int | None
    pressed: bool


class Decision(Shape):
    """One decision with its reasons, and what came of it."""

    time: float
    action: str
    guest: str | None
    from_bytes: int | None
    to_bytes: int | None
    why: str
    considered: tuple[str, ...]
    limited_by: str | None
    expected: str | None
    seen: str | None
    applied: bool


class TuneStatus(Shape):
    """The agent's present picture."""

    mode: str
    host_state: str
    host: TuneHost
    guests: tuple[TuneGuest, ...]
    last: tuple[Decision, ...]


class ExplainParams(GuestParams):
    """Whose decisions, and how many."""

    limit: int = Field(default=20, ge=1, le=1000)


class Explained(Shape):
    """Decisions, the newest last."""

    decisions: tuple[Decision, ...]


# -- events, the daemon, the API


class SubscribeParams(Shape):
    """Which events: types by name ("guest.started") or noun ("guest.*"); null means all."""

    since: int | None = Field(default=None, ge=0, description="the last cursor seen; null: only what comes")
    types: tuple[EventType, ...] | None = Field(default=None, max_length=64)


class SubscribeResult(Shape):
    """The subscription's name and the cursor of the newest event there is."""

    subscription: str
    cursor: int


class NetworkShape(Shape):
    """One network in the daemon's status."""

    name: str
    mode: str
    bridge: str | None
    state: str


class DriftKind(Shape):
    """How much of one kind of drift there is, and the first of it."""

    count: int
    first: tuple[str, ...] = Field(description="at most 5 lines")


class Drift(Shape):
    """Three kinds of drift, told apart."""

    running: DriftKind = Field(description="guests that run otherwise than their files say: only a restart mends it")
    host: DriftKind = Field(description="what a pass would do")
    yielded: DriftKind = Field(description="tuning knobs left to whoever changed them")


class DaemonStatus(Shape):
    """How kvmd itself is."""

    version: str
    pid: int
    since: float
    supervisor: str
    guests_total: int
    guests_running: int
    faults: tuple[FaultShape, ...]
    networks: tuple[NetworkShape, ...]
    drift: int = Field(description="actions a plan would have now")
    drifts: Drift
    tuning_mode: str


class DaemonVersion(Shape):
    """The version of the daemon that answers."""

    version: str


class Pong(Shape):
    """It answers."""

    time: float


class OpenRpcDocument(RootModel[dict[str, Any]]):
    """An OpenRPC document; see https://spec.open-rpc.org/."""

    model_config = ConfigDict(frozen=True)
