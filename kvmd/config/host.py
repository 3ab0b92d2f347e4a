"""host.toml: what this machine gives to its guests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, PlainValidator

from kvmd.config.key import Kind, Table, key, later, named_tables, optional_table, quote, table
from kvmd.config.pci import PciSpanT, PoolName
from kvmd.config.scalars import (
    MAX_NODE,
    AutoCpuSet,
    AutoSize,
    DurationT,
    ModuleName,
    Number,
    Path,
    PercentT,
    PositiveSize,
    QemuWord,
    SizeT,
    Swappiness,
    described,
)
from kvmd.units import Duration, Percent, Size

# Sizes some architecture has (Documentation/admin-guide/mm/hugetlbpage.rst); which of them this host has is
# the planner's question.
PAGE_SIZES: Mapping[str, Size] = {
    text: Size.parse(text) for text in ("64KiB", "1MiB", "2MiB", "16MiB", "32MiB", "512MiB", "1GiB", "16GiB")
}
_MAX_PAGES = 1 << 40


def _page_size(text: str) -> str:
    if text not in PAGE_SIZES:
        raise ValueError(f"{quote(text)} is not a page size: write [hugepages.2MiB] or [hugepages.1GiB]")
    return text


def _one_count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f'wants "auto", a number of pages or {{ node0 = 512 }}; this is {described(value)}')
    if not 0 <= value <= _MAX_PAGES:
        raise ValueError(f"{quote(value)} is not a number of pages")
    return value


def _pages(value: object) -> object:
    if value == "auto" and isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        return _one_count(value)
    if not value:
        raise ValueError("is an empty table; write for example { node0 = 512, node1 = 512 }")
    for node in value:
        number = node.removeprefix("node") if isinstance(node, str) and node.startswith("node") else ""
        if not (number.isascii() and number.isdigit() and str(int(number)) == number and int(number) <= MAX_NODE):
            raise ValueError(f"{quote(node)} is not a node: write for example node0")
    return {node: _one_count(count) for node, count in value.items()}


Pages = Annotated[
    Literal["auto"] | int | Mapping[str, int],
    PlainValidator(_pages),
    Kind('"auto", number or table node to number', "{ node0 = 512 }"),
]
PageSize = Annotated[str, AfterValidator(_page_size), Kind("page size", "2MiB")]


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{quote(value)} is outside 0 to 1")
    return value


def _ratio(value: float) -> float:
    if not 0 < value <= 1000:
        raise ValueError(f"{quote(value)} is outside 0 to 1000")
    return value


class HostCpu(Table):
    """[cpu]"""

    housekeeping: AutoCpuSet = key(
        "auto",
        'CPUs for the host and for QEMU\'s own threads, never for a dedicated vCPU; "auto": first core of each node.',
        mark="~",
    )
    irq_affinity: Literal["keep", "housekeeping"] = key(
        "keep", "Where devices' interrupts go.", mark="~", classic="irqaffinity=", example='"housekeeping"'
    )
    kernel_args: Literal["advise", "write"] = key(
        "advise",
        'Kernel command line for isolation and 1 GiB pages: shown by `host kernel-args`; "write": apply keeps the boot '
        "loader's drop-in so.",
        classic="isolcpus=",
        example='"write"',
    )
    overcommit_ratio: Annotated[Number, AfterValidator(_ratio)] = key(
        4.0, "Warn above so many vCPUs per host CPU.", mark="~"
    )


class HostMemory(Table):
    """[memory]"""

    reserve: AutoSize = key("auto", 'For the host itself; "auto": 1 GiB and 2 % of RAM.', mark="~", unit="bytes")
    admission: Literal["strict", "swap_backed", "statistical"] = key(
        "swap_backed", "How much may be promised to guests.", mark="~"
    )
    swap_factor: Annotated[Number, AfterValidator(_share)] = key(
        0.8, "Share of swap that backs promises.", mark="~", example="0.8"
    )


class HugepagePoolConfig(Table):
    """[hugepages.SIZE]"""

    pages: Pages = key(
        "auto",
        'Pages to reserve; "auto": the sum of the guests\' needs.',
        mark="~",
        unit="pages",
        classic="vm.nr_hugepages",
    )
    spare: SizeT = key(Size(0), 'With "auto": kept free for the next guest.', mark="~", unit="bytes", example='"1GiB"')
    compact: bool = key(True, "Compact memory once when pages are short.", mark="~")


class Thp(Table):
    """[thp]"""

    enabled: Literal["keep", "always", "madvise", "never"] = key("keep", "Transparent hugepages.", mark="~")
    defrag: Literal["keep", "always", "defer", "defer+madvise", "madvise", "never"] = key(
        "keep", "What an allocation does to get one.", mark="~"
    )
    khugepaged_defrag: bool | None = key(
        None, "Whether khugepaged compacts memory for them.", mark="~", example="true", default_text="as it is"
    )
    shmem_enabled: Literal["keep", "always", "within_size", "advise", "never", "deny", "force"] = key(
        "keep", 'The same for shared memory: guests with backing = "memfd".', mark="~"
    )


class Ksm(Table):
    """[ksm]"""

    mode: Literal["keep", "off", "kernel", "kvmd"] = key(
        "off", "Who drives page merging: nobody touches it, off, the kernel's advisor, kvmd by profit.", mark="~"
    )
    max_cpu: PercentT = key(Percent(0.1), "Of one CPU.", mark="~")
    across_nodes: bool = key(False, "Merge pages of different NUMA nodes.", mark="~")
    scan_target: DurationT = key(
        Duration(200), "The kernel's advisor: time of one full scan.", mark="~", example='"200s"'
    )
    sleep: DurationT = key(
        Duration(0.02), "Pause of the scanner between two batches.", mark="~", classic="sleep_millisecs"
    )
    smart_scan: bool | None = key(
        None, "Skip pages that did not merge before (kernel 6.7).", mark="~", example="true", default_text="as it is"
    )
    use_zero_pages: bool | None = key(
        None, "Empty pages become the kernel's zero page.", mark="~", example="true", default_text="as it is"
    )
    max_page_sharing: int | None = key(
        None,
        "So many may share one page; changed only while nothing is merged.",
        mark="~",
        ge=2,
        le=1 << 20,
        example="256",
        default_text="as it is",
    )
    min_pages: int | None = key(
        None, "The kernel's advisor: least pages a batch.", mark="~", ge=1, le=1 << 30, default_text="as it is"
    )
    max_pages: int | None = key(
        None, "The kernel's advisor: most pages a batch.", mark="~", ge=1, le=1 << 30, default_text="as it is"
    )


class SwapFile(Table):
    """[swap.file]"""

    path: Path = key("/var/lib/kvmd/swap", "Swap file kvmd makes, uses and removes; never one that is there.", mark="~")
    size: PositiveSize = key(..., "Of the swap file.", mark="~", unit="bytes", example='"32GiB"')


class SwapZram(Table):
    """[swap.zram]"""

    size: PositiveSize = key(
        ..., "What may be swapped into it, before compression.", mark="~", unit="bytes", example='"4GiB"'
    )


class Swap(Table):
    """[swap]"""

    swappiness: Swappiness = key("keep", "vm.swappiness.", mark="~", classic="vm.swappiness", example="10")
    file: SwapFile | None = optional_table("A swap file.")
    zram: SwapZram | None = optional_table("Compressed swap.")


class HostTuning(Table):
    """[tuning]"""

    mode: Literal["off", "advise", "apply"] = key("advise", "For the three below.", mark="~")
    balloon: Literal["off", "advise", "apply"] | None = key(
        None, "Move memory between guests.", mark="~", default_text="tuning.mode"
    )
    ksm: Literal["off", "advise", "apply"] | None = key(None, "Page merging.", mark="~", default_text="tuning.mode")
    placement: Literal["off", "advise", "apply"] | None = key(
        None, "vCPU placement.", mark="~", default_text="tuning.mode"
    )


class Modules(Table):
    """[modules]"""

    load: tuple[ModuleName, ...] = key(
        (),
        "Kernel modules that have to be there; loaded without options (those belong in /etc/modprobe.d).",
        mark="~",
        classic="modprobe",
        example='["tun", "vhost_net"]',
    )


class Sriov(Table):
    """[sriov.NIC]"""

    vfs: int = key(
        ...,
        "Virtual functions there are to be; changed only while none is in use. They are the guests' "
        "(passthrough.allow need not name them), so no driver of the host takes them.",
        mark="~",
        classic="sriov_numvfs",
        ge=0,
        le=65535,
        example="8",
    )


class Passthrough(Table):
    """[passthrough]"""

    allow: tuple[PciSpanT, ...] = key(
        (),
        "Devices that may be given to guests; no other is ever unbound from its driver. A prefix covers several: "
        "/24 a bus, /29 a device with all its functions, /32 (or none) one function.",
        mark="~",
        example='["0000:3b:00.0/24", "0000:af:00.0"]',
    )


class CpuModel(Table):
    """[cpu_model.NAME]"""

    base: None = later("text", "QEMU's model it starts from.", classic="[cpudef]")
    features: None = later("table", "Features switched on or off.", classic="[cpudef]")


class Host(Table):
    """A whole file."""

    schema_: Literal[1] = key(1, "Version of the keys; absent: 1.", alias="schema")
    cpu: HostCpu = table(HostCpu)
    memory: HostMemory = table(HostMemory)
    hugepages: Mapping[PageSize, HugepagePoolConfig] = named_tables("A pool of pages of one size.")
    thp: Thp = table(Thp)
    ksm: Ksm = table(Ksm)
    swap: Swap = table(Swap)
    tuning: HostTuning = table(HostTuning)
    modules: Modules = table(Modules)
    sriov: Mapping[PoolName, Sriov] = named_tables("Virtual functions of a NIC, or of a device given by address.")
    passthrough: Passthrough = table(Passthrough)
    cpu_model: Mapping[QemuWord, CpuModel] = named_tables("A CPU model of this host's own.", later=True)
