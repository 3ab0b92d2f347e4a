"""The host under /sys and /proc, read and written through one root path.

`HostTree()` is this machine; `HostTree(directory)` a recorded one, which is how everything that reads a host is
tested. All calls block; those that may take long (set_hugepages) belong in a thread.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from kvmd.effects import hugepages, proc, topology
from kvmd.effects.tree import Tree
from kvmd.errors import HostFailed
from kvmd.facts import CpuTopology, FreeBlocks, HugepagePool, Memory, Process

KVM_MODULES = ("kvm_intel", "kvm_amd")


class HostTree(Tree):
    """What kvmd knows of and does to the host below one root."""

    def observe_cpus(self) -> CpuTopology:
        """Online CPUs, isolation, distances, and the CPUs we may use."""
        return topology.observe_topology(self)

    def observe_memory(self) -> Memory:
        """/proc/meminfo and the nodes' own, in bytes; 0 where the kernel does not say.

        With memory that is initialised late the nodes' totals lag behind MemTotal.
        """
        host = _meminfo(self.read("/proc/meminfo") or "")
        nodes = {
            node: _meminfo(self.read(f"{topology.NODE}/node{node}/meminfo") or "")
            for node in self.numbered(topology.NODE, "node")
        }
        pools = hugepages.observe_pools(self)
        node_totals = {node: found["MemTotal"] for node, found in nodes.items() if "MemTotal" in found}
        return Memory(
            total_bytes=host.get("MemTotal", sum(node_totals.values())),
            # kernels before 3.14 have no MemAvailable: free memory is then the only safe answer
            available_bytes=host.get("MemAvailable", host.get("MemFree", 0)),
            swap_total_bytes=host.get("SwapTotal", 0),
            swap_free_bytes=host.get("SwapFree", 0),
            zram_bytes=_zram_bytes(self.read("/proc/swaps") or ""),
            hugetlb_bytes=host.get("Hugetlb", sum(pool.total * pool.page_bytes for pool in pools)),
            node_total_bytes=node_totals,
            node_free_bytes={node: found["MemFree"] for node, found in nodes.items() if "MemFree" in found},
        )

    def observe_hugepages(self) -> tuple[HugepagePool, ...]:
        """All pools, by node and page size."""
        return hugepages.observe_pools(self)

    def observe_blocks(self) -> tuple[FreeBlocks, ...]:
        """Free memory by node and size of its pieces."""
        return hugepages.observe_blocks(self)

    def observe_knobs(self, paths: Iterable[str]) -> Mapping[str, str]:
        """Content of those of `paths` that exist; of a choice ("always [madvise] never") the chosen word."""
        return {path: chosen(text) for path in sorted(set(paths)) if (text := self.read(path)) is not None}

    def write_knob(self, path: str, value: str) -> None:
        """Write one knob and read it back. Raises HostFailed when the kernel refuses or keeps something else."""
        self.write(path, value)
        found = self.read(path)
        if found is None or chosen(found) != value:
            raise HostFailed(
                f'wrote "{value}" to {path}, it reads "{found}"',
                hint="the kernel or another program holds it at that value",
                path=path,
                value=value,
            )

    def set_hugepages(self, node: int, page_bytes: int, count: int, *, compact: bool = True) -> int:
        """See `effects.hugepages.set_pool`: read back, compacted once, rolled back with HostFailed when short."""
        return hugepages.set_pool(self, node, page_bytes, count, compact=compact)

    def boot_id(self) -> str:
        """Random id of this boot, "" when the kernel does not say."""
        return self.read("/proc/sys/kernel/random/boot_id") or ""

    def kernel(self) -> str:
        """Release of the running kernel ("6.1.0-56-amd64"), "" when unknown."""
        return self.read("/proc/sys/kernel/osrelease") or ""

    def has_psi(self) -> bool:
        """True when /proc/pressure/memory answers (it exists and gives EOPNOTSUPP when PSI is off)."""
        return bool(self.read("/proc/pressure/memory"))

    def kvm_module(self) -> str | None:
        """kvm_intel or kvm_amd, whichever is loaded or built in; None: /dev/kvm, if any, proves nothing."""
        return next((name for name in KVM_MODULES if self.exists(f"/sys/module/{name}")), None)

    def process(self, pid: int) -> Process | None:
        """The process of that pid with its start time, None when there is none or only a zombie."""
        return proc.observe_process(self, pid)

    def qemus(self) -> tuple[proc.QemuProcess, ...]:
        """All QEMU processes, for adoption: compare uuid, and start time with the record, before believing."""
        return proc.observe_qemus(self)

    def threads(self, pid: int) -> tuple[int, ...]:
        """Thread ids of a process, ascending; () when it is gone."""
        return proc.observe_threads(self, pid)

    def foreign_qemu(self, known_pids: Collection[int]) -> int:
        """Bytes of RSS in QEMUs that are not ours."""
        return proc.foreign_qemu_bytes(self, frozenset(known_pids))


def chosen(text: str) -> str:
    """The value in force: the bracketed word of a choice, else the text itself."""
    _, opened, behind = text.partition("[")
    word, closed, _ = behind.partition("]")
    return word if opened and closed else text


def _zram_bytes(swaps: str) -> int:
    """What of /proc/swaps is zram, by its name."""
    fields = (line.split() for line in swaps.splitlines())
    sizes = (f[2] for f in fields if len(f) == 5 and f[0].rpartition("/")[2].startswith("zram"))
    return sum(int(size) << 10 for size in sizes if size.isdigit())


def _meminfo(text: str) -> dict[str, int]:
    """Bytes by key, of the host's file and of a node's ("Node 0 MemTotal:  1 kB"); page counts are left out."""
    found = {}
    for line in text.splitlines():
        head, _, tail = line.partition(":")
        amount = tail.split()
        if head and len(amount) == 2 and amount[0].isdigit() and amount[1] == "kB":
            found[head.split()[-1]] = int(amount[0]) * 1024
    return found
