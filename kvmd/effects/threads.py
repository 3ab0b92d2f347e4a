"""Every thread that works for a guest: where it may run now, and putting it where the placement says.

One thread in the wrong place spoils an isolated CPU, so all are looked at, again at each pass: vCPUs, QEMU's main
loop, its I/O and worker threads, and the kernel's threads that serve it. vhost's workers are threads of QEMU itself
since kernel 6.4 (vhost: use vhost_tasks for worker threads) and before that kernel threads called vhost-TID; the
emulated timer's is kvm-pit/PID (arch/x86/kvm/i8254.c) on any kernel.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping

from kvmd.effects.proc import observe_threads
from kvmd.effects.tree import Tree
from kvmd.errors import HostFailed
from kvmd.facts import Thread
from kvmd.units import CpuSet

_WORKER = re.compile(r"(?:vhost-|kvm-pit/)(\d+)")
_VCPU = re.compile(r"CPU (\d+)/")  # QEMU names its threads so with debug-threads=on
_KTHREADD_CHILDREN = "/proc/2/task/2/children"
PIN_ROUNDS = 5  # a thread may be born while its siblings are pinned; it is found in the next round

Workers = Mapping[int, tuple[int, ...]]  # thread or process served -> kernel threads that serve it
_TREE = Tree()


def affinity(tid: int) -> CpuSet:
    """CPUs a thread may run on; empty when it is gone."""
    try:
        return CpuSet(os.sched_getaffinity(tid))
    except OSError:
        return CpuSet()


def kernel_workers(tree: Tree = _TREE) -> Workers:
    """All kernel threads that serve some QEMU, by the pid or tid in their name."""
    listed = tree.read(_KTHREADD_CHILDREN)
    pids = listed.split() if listed else [name for name in tree.names("/proc") if name.isdigit()]
    found: dict[int, tuple[int, ...]] = {}
    for pid in pids:
        served = _WORKER.fullmatch(tree.read(f"/proc/{pid}/comm") or "")
        if served:
            found[int(served[1])] = (*found.get(int(served[1]), ()), int(pid))
    return found


def observe_others(pid: int, vcpu_tids: Collection[int], workers: Workers) -> tuple[Thread, ...]:
    """All threads of a guest but its vCPUs', the main thread first; those that end meanwhile are left out."""
    tids = _others(pid, vcpu_tids, workers)
    return tuple(
        Thread(tid, _TREE.read(f"/proc/{tid}/comm") or "", str(cpus)) for tid in tids if (cpus := affinity(tid))
    )


def named_vcpus(pid: int) -> tuple[int, ...]:
    """The vCPU threads of a QEMU that does not answer, in vCPU order, by their names."""
    found = {}
    for tid in observe_threads(_TREE, pid):
        named = _VCPU.match(_TREE.read(f"/proc/{pid}/task/{tid}/comm") or "")
        if named:
            found[int(named[1])] = tid
    return tuple(found[index] for index in sorted(found))


def pin(guest: str, pid: int, vcpu_tids: Iterable[int], vcpus: Iterable[CpuSet], emulator: CpuSet) -> None:
    """Put each vCPU thread on its CPUs and every other thread of the guest on `emulator`; read back. HostFailed.

    Doing it twice is the same as once. A thread that is made later has the mask of the one that made it, which is
    right unless that was a vCPU: the next pass finds it.
    """
    own = dict(zip(vcpu_tids, vcpus, strict=True))
    workers = kernel_workers()
    done: set[int] = set()
    for _ in range(PIN_ROUNDS):
        new = [tid for tid in (*own, *_others(pid, own, workers)) if tid not in done]
        if not new:
            return
        for tid in new:
            _put(guest, tid, own.get(tid, emulator))
        done.update(new)


def _others(pid: int, vcpu_tids: Collection[int], workers: Workers) -> list[int]:
    tids = observe_threads(_TREE, pid)
    serving = [worker for tid in tids for worker in workers.get(tid, ())]
    return [tid for tid in (*tids, *serving) if tid not in vcpu_tids]


def _put(guest: str, tid: int, cpus: CpuSet) -> None:
    now = affinity(tid)
    if now in (cpus, CpuSet()):
        return
    try:
        os.sched_setaffinity(tid, cpus)
    except ProcessLookupError:
        return  # a worker thread that has ended
    except OSError as error:
        raise HostFailed(
            f"guest {guest}: cannot pin thread {tid} to CPUs {cpus}: {error.strerror}",
            hint="these CPUs went offline, or the guest's cpuset leaves them out; kvmd-cli host cpus",
        ) from None
    if affinity(tid) not in (cpus, CpuSet()):
        raise HostFailed(f"guest {guest}: thread {tid} was to run on {cpus}, the kernel gave {affinity(tid)}")
