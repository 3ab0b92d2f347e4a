"""guests.d/NAME.toml: one guest, every key of it.

The classes only say what a file may contain; what keys mean for each other is in `rules.py`, what files mean
for each other in `cross.py`. Attribute path = key path: `guest.disk["root"].file`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import model_validator

from kvmd.config.devices import (
    Agent,
    CloudInit,
    Console,
    Disk,
    Display,
    Hostdev,
    Hyperv,
    Nic,
    Pvpanic,
    Rng,
    Rtc,
    Serial,
    Share,
    Sound,
    Usb,
    Video,
    Vsock,
    Watchdog,
)
from kvmd.config.key import Table, key, later, named_tables, optional_table, table
from kvmd.config.scalars import (
    AutoDuration,
    BootOrder,
    CpuSetT,
    DurationT,
    Emulator,
    GuestName,
    NodeSetT,
    Path,
    PositiveSize,
    Principal,
    QemuWord,
    SizeT,
    TableName,
    Uuid,
)
from kvmd.units import Duration, Size

DEFAULT_PAGE_SIZE = Size(2 << 20)


class About(Table):
    """[guest]"""

    uuid: Uuid | None = key(
        None,
        "Identity; MAC addresses derive from it. Written by create and import; absent: made at first start.",
        mark="!",
        classic="-uuid",
    )
    description: str = key("", "For people.", max_length=1000, example='"shop front end"')
    owner: Principal | None = key(None, "Whom to ask about this guest.", example='"@web-team"')
    profile: GuestName | None = key(
        None, "profiles.d/PROFILE.toml, whose keys lie below this file's.", example='"linux"'
    )
    tags: tuple[str, ...] = key((), "Free words to select guests by.", example='["shop", "prod"]')
    protect: tuple[Literal["delete", "stop"], ...] = key(
        (), "What is refused until the word is taken out.", example='["delete"]'
    )
    cluster: bool = key(False, "A cluster manager starts and stops this guest; refuses start.auto.")


class Smbios(Table):
    """[machine.smbios]: type 1, what `dmidecode -s system-…` says inside."""

    manufacturer: str | None = key(None, "Maker.", mark="!", classic="-smbios", max_length=64, example='"Example"')
    product: str | None = key(None, "Product.", mark="!", classic="-smbios", max_length=64, example='"Shop server"')
    version: str | None = key(None, "Version.", mark="!", classic="-smbios", max_length=64, example='"2"')
    serial: str | None = key(None, "Serial number.", mark="!", classic="-smbios", max_length=64, example='"A-0017"')
    sku: str | None = key(None, "Order number.", mark="!", classic="-smbios", max_length=64, example='"4711"')
    family: str | None = key(None, "Family.", mark="!", classic="-smbios", max_length=64, example='"shop"')


class Machine(Table):
    """[machine]"""

    type: QemuWord = key(
        "q35", "Machine type, pinned to its version at first start.", mark="!", classic="-M", needs="query-machines"
    )
    accel: Literal["kvm", "tcg", "auto"] = key(
        "kvm",
        '"kvm" refuses to start without usable KVM; "tcg" is emulation, slow and no security boundary.',
        mark="!",
        classic="-enable-kvm",
    )
    emulator: Emulator | None = key(None, "Another QEMU than qemu.emulator of kvmd.toml.", mark="!")
    os: Literal["linux", "windows", "other"] | None = key(
        None,
        'Guest operating system, for defaults: "windows" has its clock in local time and wants [hyperv].',
        mark="!",
        example='"windows"',
    )
    smbios: Smbios | None = optional_table("Strings of the system's SMBIOS table.")
    default_nic: bool = key(
        True, "Without any [nic.NAME]: one user-mode NIC, as QEMU does.", mark="!", classic="-net none"
    )


class Qemu(Table):
    """[qemu]"""

    extra_args: tuple[str, ...] = key(
        (), "Appended to the command line as they are, unmanaged.", mark="!", example='["-global", "isa-fdc.driveA="]'
    )
    sandbox: bool = key(True, "QEMU's seccomp filter.", mark="!", classic="-sandbox", needs="built with seccomp")


class Start(Table):
    """[start]"""

    auto: bool | None = key(None, "Start with the host. Absent: as `enable` and `disable` last said.")
    after: tuple[GuestName, ...] = key((), "Guests that are started before this one.", example='["nas"]')
    ready: None = later("text", "When this guest counts as ready: agent, vsock, tcp:PORT, file, serial, delay.")
    ready_timeout: None = later("duration", "How long to wait for ready.")
    delay: DurationT = key(Duration(0), "Wait before the start.", example='"10s"')
    timeout: AutoDuration = key(
        "auto", 'Deadline of the start; "auto" grows with memory to be preallocated.', example='"2min"'
    )


class Stop(Table):
    """[stop]"""

    method: Literal["acpi"] = key("acpi", "How the guest is asked.", later_values=("agent",))
    timeout: DurationT = key(Duration(180), "How long a stop waits before it gives up.", example='"3min"')
    at_host_shutdown: Literal["stop", "kill"] = key(
        "stop", "What happens when the host goes down.", later_values=("save",)
    )


class On(Table):
    """[on]"""

    crash: Literal["restart", "stay_off"] = key("restart", "QEMU died.")
    panic: Literal["restart", "stay_off"] = key(
        "restart", "The guest's kernel panicked (needs pvpanic).", later_values=("pause",)
    )
    poweroff: Literal["stay_off", "restart"] = key("stay_off", "The guest switched itself off.", classic="-no-shutdown")
    reboot: Literal["reset"] = key("reset", "The guest rebooted itself.", classic="-no-reboot", later_values=("apply",))
    watchdog: None = later("text", "The watchdog device fired.", classic="-watchdog-action")
    hang: Literal["report"] = key("report", "The guest does not answer.", later_values=("reset", "restart"))


class Restart(Table):
    """[restart]"""

    limit: int = key(5, "So many restarts within `within`, then the guest stays off.", ge=0, le=1000)
    within: DurationT = key(Duration(600), "The time restart.limit counts over.", example='"10min"')
    backoff: DurationT = key(Duration(1), "Wait before the first restart; doubles each time.", example='"2s"')


class Topology(NamedTuple):
    """Counts of -smp; their product is the number of vCPUs (`rules.py` refuses anything else)."""

    sockets: int
    dies: int
    cores: int
    threads: int


class Cpu(Table):
    """[cpu]"""

    vcpus: int = key(1, "Virtual CPUs.", mark="!", classic="-smp", ge=1, le=1024, example="4")
    max_vcpus: None = later("number", "Room for CPU hot-plug.", mark="!", classic="-smp maxcpus=")
    sockets: int | None = key(
        None, "Sockets; absent: 1.", mark="!", classic="-smp sockets=", ge=1, le=1024, default_text="1"
    )
    dies: int | None = key(
        None,
        "Dies per socket; absent: 1.",
        mark="!",
        classic="-smp dies=",
        needs="smp-dies of the machine type",
        ge=1,
        le=1024,
        default_text="1",
    )
    cores: int | None = key(
        None,
        "Cores per die; absent: what remains.",
        mark="!",
        classic="-smp cores=",
        ge=1,
        le=1024,
        default_text="what remains",
    )
    threads: int | None = key(
        None, "Threads per core; absent: 1.", mark="!", classic="-smp threads=", ge=1, le=1024, default_text="1"
    )
    model: QemuWord | None = key(
        None,
        'CPU model; absent: "host" under KVM, "max" under TCG.',
        mark="!",
        classic="-cpu",
        needs="query-cpu-definitions",
        example='"host"',
        default_text="host or max",
    )
    features: Mapping[QemuWord, bool] = key(
        {}, "CPU features switched on or off.", mark="!", classic="-cpu MODEL,+F,-F", example='{ "hle" = false }'
    )
    placement: Literal["none", "shared", "dedicated", "manual"] = key(
        "shared",
        "Which host CPUs: the scheduler's choice, the shared set, one CPU per vCPU, or cpu.pin.",
        mark="~",
        classic="taskset",
    )
    isolated: Literal["avoid", "prefer", "require"] = key(
        "prefer", "Whether dedicated CPUs come from isolcpus=.", mark="~", classic="isolcpus="
    )
    smt: Literal["prefer", "require", "isolate"] = key(
        "prefer", "Threads of one core: together, always together, or one per core.", mark="~"
    )
    pin: tuple[int, ...] | None = key(
        None, 'With placement = "manual": vCPU i runs on host CPU pin[i].', mark="~", example="[4, 36, 5, 37]"
    )
    emulator: CpuSetT | None = key(
        None, "CPUs of QEMU's other threads; absent: housekeeping.", mark="~", example='"0-1"'
    )
    nodes: NodeSetT | None = key(
        None,
        "NUMA nodes the vCPUs stay on, and with them the memory.",
        mark="!",
        classic="numactl --cpunodebind=",
        example='"0"',
    )
    allow_overcommit: bool = key(False, "More vCPUs than the host has CPUs: a warning instead of a refusal.")
    weight: None = later("number", "Use limits.cpu_weight.", mark="~")
    quota: None = later("percentage", "Upper bound of CPU time.", mark="~")

    @property
    def topology(self) -> Topology:
        """What -smp gets. Left out: 1 socket, 1 die, 1 thread, as many cores as remain (at least 1)."""
        sockets, dies, threads = self.sockets or 1, self.dies or 1, self.threads or 1
        cores = self.cores or max(1, self.vcpus // (sockets * dies * threads))
        return Topology(sockets, dies, cores, threads)


class Balloon(Table):
    """[memory.balloon]"""

    enabled: bool | None = key(
        None,
        "Absent: on, but not with hugepages or memory.lock.",
        mark="!",
        classic="-balloon",
        default_text="on without hugepages and lock",
    )
    free_page_reporting: bool = key(
        False, "The guest tells which pages it does not use.", mark="!", needs="virtio-balloon free-page-reporting"
    )
    deflate_on_oom: bool = key(
        True, "A guest short of memory takes pages back by itself.", mark="!", needs="virtio-balloon deflate-on-oom"
    )


class Memory(Table):
    """[memory]"""

    size: PositiveSize = key(..., "What the guest has.", mark="!", unit="bytes", classic="-m")
    max_size: None = later("size", "Room for memory hot-plug.", mark="!", classic="-m maxmem=")
    slots: None = later("number", "Slots for memory hot-plug.", mark="!", classic="-m slots=")
    backing: Literal["anonymous", "memfd", "hugepages", "file"] = key(
        "anonymous", "Where the memory comes from.", mark="!", classic="-mem-path"
    )
    page_size: PositiveSize | None = key(
        None,
        'With backing = "hugepages"; with "file": memory.path is a hugetlbfs of such pages.',
        mark="!",
        unit="bytes",
        example='"2MiB"',
        default_text="2MiB with hugepages",
    )
    fallback: Literal["none", "thp"] = key(
        "none", "Too few hugepages: refuse to start, or use transparent ones and say so.", mark="!"
    )
    path: Path | None = key(
        None,
        'With backing = "file": a directory (hugetlbfs, tmpfs or any) for a file without a name, or a file.',
        mark="!",
        classic="-mem-path",
        example='"/dev/hugepages"',
    )
    prealloc: bool | None = key(
        None,
        "Take all memory at start. Absent: with hugepages.",
        mark="!",
        classic="-mem-prealloc",
        default_text="true with hugepages",
    )
    lock: bool = key(
        False, "Keep all memory in RAM: never swapped, never ballooned.", mark="!", classic="-overcommit mem-lock="
    )
    share: bool = key(False, "Other processes may map it.", mark="!", classic="share=")
    nodes: CpuSetT | None = key(
        None, "NUMA nodes of the host the memory comes from.", mark="!", classic="numactl --membind", example='"0"'
    )
    policy: Literal["bind", "preferred", "interleave"] | None = key(
        None,
        "With memory.nodes: only from them, rather from them, or page by page from each.",
        mark="!",
        classic="numactl",
        example='"bind"',
        default_text="bind",
    )
    numa: None = later("list", "Virtual NUMA nodes.", mark="!", classic="-numa")
    ksm_group: TableName | None = key(
        None, "Trust group whose guests may share equal pages; absent: never.", mark="~", example='"web"'
    )
    guaranteed: SizeT | None = key(None, "Ballooning never goes below.", mark="~", unit="bytes", example='"2GiB"')
    shares: int = key(100, "Weight when memory is short.", mark="~", ge=1, le=10000)
    balloon: Balloon = table(Balloon, "The balloon device.")

    @property
    def hugepage_size(self) -> Size | None:
        """Bytes of a hugepage where memory is in them (2 MiB unless page_size says more), else None."""
        if self.backing not in ("hugepages", "file"):
            return None
        return self.page_size or (DEFAULT_PAGE_SIZE if self.backing == "hugepages" else None)

    @property
    def preallocated(self) -> bool:
        """Whether all memory is taken at start."""
        return self.hugepage_size is not None if self.prealloc is None else self.prealloc

    @property
    def ballooned(self) -> bool:
        """Whether the guest gets a balloon device."""
        return not (self.hugepage_size or self.lock) if self.balloon.enabled is None else self.balloon.enabled


class Boot(Table):
    """[boot]"""

    order: BootOrder | None = key(
        None,
        'Devices by name, or the classic letters as in "cn".',
        mark="!",
        classic="-boot order=",
        example='["disk.root", "nic.lan"]',
    )
    once: BootOrder | None = key(
        None,
        "Order of the first boot only; a reset goes back to `order`.",
        mark="!",
        classic="-boot once=",
        example='["disk.cd"]',
    )
    menu: bool = key(False, "The firmware's boot menu.", mark="!", classic="-boot menu=")
    splash: Path | None = key(
        None,
        "Picture shown with the menu: a JPEG, or a BMP of 24 bits.",
        mark="!",
        classic="-boot splash=",
        example='"/srv/vm/logo.jpg"',
    )
    splash_time: DurationT | None = key(
        None, "How long the menu waits.", mark="!", classic="-boot splash-time=", example='"5s"'
    )
    kernel: Path | None = key(None, "Boot this Linux kernel.", mark="!", classic="-kernel", example='"/srv/vm/vmlinuz"')
    initrd: Path | None = key(None, "With boot.kernel.", mark="!", classic="-initrd", example='"/srv/vm/initrd.img"')
    cmdline: str | None = key(
        None, "With boot.kernel.", mark="!", classic="-append", max_length=4096, example='"console=ttyS0 root=/dev/vda"'
    )
    firmware: Literal["bios"] = key("bios", "Firmware.", mark="!", classic="-bios", later_values=("uefi",))
    secure_boot: Literal[False] = key(False, "UEFI Secure Boot.", mark="!", later_values=(True,))
    nvram: None = later("absolute path", "UEFI variables.", mark="!", classic="-pflash")


class Tpm(Table):
    """[tpm]"""

    version: None = later("text", "Trusted platform module.", mark="!", classic="-tpmdev")


class GuestTuning(Table):
    """[tuning]; absent: as host.toml says."""

    mode: Literal["off", "advise", "apply"] | None = key(None, "For both below.", mark="~", default_text="host.toml's")
    balloon: Literal["off", "advise", "apply"] | None = key(
        None, "Memory of this guest.", mark="~", default_text="host.toml's"
    )
    placement: Literal["off", "advise", "apply"] | None = key(
        None, "CPUs of this guest.", mark="~", default_text="host.toml's"
    )


class Limits(Table):
    """[limits]: none by default, since a guessed limit kills the guest."""

    memory_max: PositiveSize | None = key(None, "Of QEMU's cgroup.", mark="~", unit="bytes", example='"10GiB"')
    cpu_weight: int | None = key(None, "Of QEMU's cgroup.", mark="~", ge=1, le=10000, example="200")
    io_weight: int | None = key(None, "Of QEMU's cgroup.", mark="~", ge=1, le=10000, example="200")
    tasks_max: int | None = key(None, "Threads QEMU may have.", mark="~", ge=16, le=1 << 22, example="4096")
    oom_score_adjust: int | None = key(None, "Of QEMU.", mark="~", ge=-1000, le=1000, example="-500")


class Guest(Table):
    """A whole file."""

    schema_: Literal[1] = key(1, "Version of the keys; absent: 1.", alias="schema")
    guest: About = table(About)
    machine: Machine = table(Machine)
    qemu: Qemu = table(Qemu)
    start: Start = table(Start)
    stop: Stop = table(Stop)
    on: On = table(On)
    restart: Restart = table(Restart)
    cpu: Cpu = table(Cpu)
    memory: Memory
    boot: Boot = table(Boot)
    tpm: Tpm = table(Tpm)
    disk: Mapping[TableName, Disk] = named_tables("A disk or a CD drive.")
    nic: Mapping[TableName, Nic] = named_tables("A network card.")
    hostdev: Mapping[TableName, Hostdev] = named_tables("A device of the host.")
    display: Display = table(Display)
    video: Video = table(Video)
    serial: Mapping[TableName, Serial] = named_tables("A serial port.")
    console: Mapping[TableName, Console] = named_tables("A virtio console.", later=True)
    agent: Agent = table(Agent)
    rng: Rng = table(Rng)
    watchdog: Watchdog = table(Watchdog)
    rtc: Rtc = table(Rtc)
    vsock: Vsock = table(Vsock)
    sound: Sound = table(Sound)
    usb: Usb = table(Usb)
    pvpanic: Pvpanic = table(Pvpanic)
    hyperv: Hyperv = table(Hyperv)
    share: Mapping[TableName, Share] = named_tables("A directory of the host (virtiofs).", later=True)
    cloud_init: CloudInit = table(CloudInit)
    tuning: GuestTuning = table(GuestTuning)
    limits: Limits = table(Limits)

    @property
    def passthrough(self) -> tuple[str, ...]:
        """Keys of the devices of the host that it is given: "hostdev.gpu", "nic.fast"."""
        functions = [f"nic.{name}" for name, nic in self.nic.items() if nic.type == "vf"]
        return (*(f"hostdev.{name}" for name in self.hostdev), *functions)

    @property
    def ballooned(self) -> bool:
        """Whether the guest gets a balloon device: what a device of the host may write to cannot be taken away."""
        return self.memory.ballooned and not self.passthrough

    @model_validator(mode="before")
    @classmethod
    def _memory_is_a_table(cls, data: Any) -> Any:
        """Without [memory] the missing key is memory.size, not memory."""
        return {"memory": {}, **data} if isinstance(data, dict) else data
