"""argv of a guest's memory: one memory object, and the board that is told to use it.

Where the file says so the object is a file that kvmd opened, and its pages come from the NUMA nodes it names; QEMU
sets the policy before it touches the first page.

Merging and dumping are off on the board *and* on the object: QEMU's default for both is on, which would let a host's
KSM mix guests' pages and a core file hold a guest's secrets.
"""

from __future__ import annotations

from kvmd.config.guest import Guest
from kvmd.errors import NotSupported, Refused
from kvmd.qemu.caps import Capabilities
from kvmd.qemu.fds import FdTable, OpenMemory
from kvmd.qemu.text import to_json
from kvmd.units import Size

BACKEND = "ram0"  # id of the memory object: /objects/ram0
MOST_PREALLOC_THREADS = 16  # beyond this the kernel's page clearing is bound by memory, not by threads
_GRAIN = 1 << 20


def memory(
    name: str,
    guest: Guest,
    caps: Capabilities,
    fds: FdTable,
    *,
    hugepages: bool,
    nodes: tuple[int, ...],
    threads: int,
) -> tuple[list[str], list[str]]:
    """Arguments, and warnings. `hugepages` False: the pool is short, fall back where the file allows it.

    `nodes` are the host's NUMA nodes for the memory where the file names none (all when empty): hugepages are bound to
    them, other memory goes there as long as there is some; `threads` how many preallocate.
    Raises Refused (sizes, no fallback) and NotSupported (what this QEMU lacks).
    """
    size, page = guest.memory.size, guest.memory.hugepage_size
    warnings: list[str] = []
    if page and not hugepages:
        if guest.memory.fallback != "thp":
            raise Refused(
                f"guest {name}: {size} of {page} hugepages are wanted and not to be had",
                hint='reserve more in host.toml ([hugepages]), or set memory.fallback = "thp"',
            )
        warnings.append(f"runs on transparent hugepages: {size} of {page} pages were not to be had")
        page = None
    if size % (page or _GRAIN):
        raise Refused(f"guest {name}: memory.size = {size} is not a multiple of {page or Size(_GRAIN)}")
    if guest.memory.hugepage_size and guest.memory.balloon.enabled:
        raise Refused(
            f"guest {name}: memory.balloon.enabled with hugepages: the balloon would take from the guest and give "
            "the host nothing",
            hint="take memory.balloon.enabled out",
        )
    backend = _backend(guest, page, fds, fallen_back=bool(warnings))
    if guest.memory.preallocated:
        backend |= {"prealloc": True, "prealloc-threads": max(1, min(threads, MOST_PREALLOC_THREADS))}
    backend |= _numa(guest, page, nodes)
    if backend["qom-type"] not in caps.object_types:
        raise NotSupported(f"guest {name}: this QEMU {caps.version_text} has no {backend['qom-type']}")
    locked = ["-overcommit", "mem-lock=on"] if guest.memory.lock else []
    return ["-m", f"size={size // 1024}k", "-object", to_json(backend), *locked], warnings


def _backend(guest: Guest, page: Size | None, fds: FdTable, *, fallen_back: bool) -> dict[str, object]:
    kind = "memfd" if page or guest.memory.backing == "memfd" else "ram"
    if guest.memory.backing == "file" and not fallen_back:
        kind = "file"
    anonymous = kind == "ram"
    found: dict[str, object] = {
        "qom-type": f"memory-backend-{kind}",
        "id": BACKEND,
        "size": int(guest.memory.size),
        # A private mapping of a file would hold pages twice, in the file and copied (QEMU's default for a memfd too).
        "share": guest.memory.share or not anonymous,
        "merge": guest.memory.ksm_group is not None,
        "dump": False,
    }
    if kind == "file":
        # not an fdset: QEMU opens mem-path by open(2) itself (system/physmem.c, file_ram_open)
        request = OpenMemory(fds.next_fd, guest.memory.path or "", int(guest.memory.size), page and int(page))
        found["mem-path"] = f"/proc/self/fd/{fds.add(request)}"
    elif page:
        found |= {"hugetlb": True, "hugetlbsize": int(page)}
    return found


def _numa(guest: Guest, page: Size | None, nodes: tuple[int, ...]) -> dict[str, object]:
    if guest.memory.nodes:
        return {"host-nodes": sorted(guest.memory.nodes), "policy": guest.memory.policy or "bind"}
    if nodes and page:
        return {"host-nodes": sorted(nodes), "policy": "bind"}
    # bound, a full node would end the guest; on several nodes the first touch by a vCPU does what is wanted
    return {"host-nodes": list(nodes), "policy": "preferred"} if len(nodes) == 1 else {}


def machine_options(guest: Guest) -> str:
    """The part of -machine that is about memory."""
    merge = "on" if guest.memory.ksm_group is not None else "off"
    return f"memory-backend={BACKEND},mem-merge={merge},dump-guest-core=off"
