"""Every thread of a process is found, pinned and read back: the real scheduler, a process of our own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmd.effects import threads
from kvmd.effects.proc import observe_threads
from kvmd.effects.tree import Tree
from kvmd.errors import HostFailed
from kvmd.units import CpuSet
from tests.rig.hosts import write_tree

# Names its threads as QEMU does and makes one more for each line it reads.
ACTOR = """
import sys, threading
def idle(name):
    open(f"/proc/self/task/{threading.get_native_id()}/comm", "w").write(name)
    ready.release()
    threading.Event().wait()
def thread(name):
    threading.Thread(target=idle, args=(name,), daemon=True).start()
    ready.acquire()
ready = threading.Semaphore(0)
for name in ("CPU 1/TCG", "CPU 0/TCG", "IO iothread0"):
    thread(name)
print("ready", flush=True)
for line in sys.stdin:
    thread(line.strip())
    print("made", flush=True)
"""


@pytest.fixture
def actor() -> Iterator[subprocess.Popen[str]]:
    """A process with two vCPU threads and an I/O thread, free to run anywhere."""
    with subprocess.Popen(
        [sys.executable, "-c", ACTOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        os.sched_setaffinity(child.pid, os.sched_getaffinity(0))
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
        child.kill()


def vcpu_tids(pid: int) -> list[int]:
    by_name = {Path(f"/proc/{pid}/task/{tid}/comm").read_text().strip(): tid for tid in observe_threads(Tree(), pid)}
    return [by_name["CPU 0/TCG"], by_name["CPU 1/TCG"]]


def test_all_threads_go_where_they_shall_and_late_ones_are_found(actor: subprocess.Popen[str]) -> None:
    everywhere = CpuSet(os.sched_getaffinity(0))
    first, last = CpuSet([min(everywhere)]), CpuSet([max(everywhere)])
    tids = vcpu_tids(actor.pid)
    assert threads.named_vcpus(actor.pid) == tuple(tids), "vCPU 0 first, whichever thread is older"
    for _ in range(2):  # twice is the same as once
        threads.pin("web", actor.pid, tids, [first, last], last)
        assert [threads.affinity(tid) for tid in tids] == [first, last]
        found = threads.observe_others(actor.pid, tids, {})
        assert [(thread.name, thread.cpus) for thread in found] == [
            (found[0].name, str(last)),
            ("IO iothread0", str(last)),
        ]
        assert found[0].tid == actor.pid
    # one that came late and strayed: found by looking, mended by pinning again
    assert actor.stdin is not None
    assert actor.stdout is not None
    actor.stdin.write("worker\n")
    actor.stdin.flush()
    assert actor.stdout.readline() == "made\n"
    late = next(thread for thread in threads.observe_others(actor.pid, tids, {}) if thread.name == "worker")
    assert late.cpus == str(last), "it has its maker's mask"
    os.sched_setaffinity(late.tid, everywhere)
    assert str(everywhere) in {thread.cpus for thread in threads.observe_others(actor.pid, tids, {})}
    threads.pin("web", actor.pid, tids, [first, last], last)
    assert {thread.cpus for thread in threads.observe_others(actor.pid, tids, {})} == {str(last)}


def test_a_cpu_that_is_not_there_is_a_clear_failure_and_a_dead_thread_none(actor: subprocess.Popen[str]) -> None:
    tids = vcpu_tids(actor.pid)
    gone = CpuSet([8000])
    with pytest.raises(HostFailed, match=f"guest web: cannot pin thread {tids[0]} to CPUs 8000"):
        threads.pin("web", actor.pid, tids, [gone, gone], gone)
    actor.kill()
    actor.wait()
    deadline = time.monotonic() + 10
    while any(threads.affinity(tid) for tid in tids) and time.monotonic() < deadline:
        time.sleep(0.01)
    threads.pin("web", actor.pid, tids, [gone, gone], gone)
    assert threads.observe_others(actor.pid, tids, {}) == ()


def test_kernel_threads_that_serve_a_qemu_are_its_own(tmp_path: Path) -> None:
    """Names as drivers/vhost/vhost.c before 6.4 and arch/x86/kvm/i8254.c give them."""
    comm = {
        2: "kthreadd",
        11: "kworker/0:1",
        21: "vhost-700",
        22: "vhost-700",
        23: "kvm-pit/700",
        24: "vhost-70",
        25: "vhost-x",
    }
    files = {f"/proc/{pid}/comm": f"{name}\n" for pid, name in comm.items()}
    write_tree(files, tmp_path / "without")
    write_tree(files | {"/proc/2/task/2/children": "11 21 22 23 24 "}, tmp_path / "with")
    for root in ("with", "without"):
        assert threads.kernel_workers(Tree(tmp_path / root)) == {700: (21, 22, 23), 70: (24,)}
