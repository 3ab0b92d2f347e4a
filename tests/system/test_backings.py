"""Where a guest's memory comes from on this machine: files, a hugetlbfs of kvmd's, locked, from a node; pages of 1 GiB.

Pages belong to the whole machine: a few of them, alone with the lock, and what was found is restored.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmd.effects.proc import locked_bytes
from kvmd.effects.sysfs import HostTree
from kvmd.effects.tree import Tree
from kvmd.errors import HostFailed
from kvmd.rpc.client import RemoteError
from tests.rig.guestfiles import tiny
from tests.rig.kvmdhost import KvmdHost
from tests.rig.machinestate import Memory, differences, machine_lock

pytestmark = pytest.mark.system

MIB, P2, P1 = 1 << 20, 2 << 20, 1 << 30
PAGES = 16  # of one guest


@pytest.fixture
def machine() -> Iterator[Memory]:
    """This machine's memory as it was and shall be again; named before `host` in a test, so that guests end first."""
    with machine_lock():
        memory = Memory.observe()
        yield memory
        memory.restore()
        assert differences(memory, Memory.observe()) == []


def maps(pid: int, size: int) -> list[str]:
    """What the kernel calls the mappings of exactly that size."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in span.split("-"))
        found += [" ".join(name)] if high - low == size else []
    return found


def numa_policy(pid: int, name: str) -> str:
    """The memory policy of the mapping of that file."""
    lines = [line for line in Path(f"/proc/{pid}/numa_maps").read_text().splitlines() if name in line]
    assert len(lines) == 1, lines
    return lines[0].split()[1]


def test_memory_in_a_file_of_a_directory_and_in_a_named_one(host: KvmdHost, life: str) -> None:
    """QEMU is given a descriptor: it may not even look into the directory, and the file has no name there."""
    directory = host.base / "ram"
    directory.mkdir(mode=0o700)
    named = directory / "named.ram"
    host.guest("web", tiny(host, "web", memory=f'backing = "file"\npath = "{directory}"\nnodes = "0"\n'))
    host.guest("db", tiny(host, "db", memory=f'backing = "file"\npath = "{named}"\nprealloc = true\n'))
    host.start()
    for name in ("web", "db"):
        host.call("guest.start", name=name)
        host.wait_serial(name, f"{name} is up")
    if life == "adopted":
        host.restart()
    pids = {name: host.show(name)["pid"] for name in ("web", "db")}
    (web,) = [name for name in maps(pids["web"], 32 * MIB) if str(directory) in name]
    assert web.endswith("(deleted)")
    assert re.fullmatch(r"bind:0|bind=static:0", numa_policy(pids["web"], str(directory)))
    assert str(named) in maps(pids["db"], 32 * MIB)
    assert [path.name for path in directory.iterdir()] == ["named.ram"]
    assert (named.stat().st_uid, named.stat().st_mode & 0o777) == (Path(f"/proc/{pids['db']}").stat().st_uid, 0o600)
    host.guest("thief", tiny(host, "thief", memory=f'backing = "file"\npath = "{named}"\n'))
    with pytest.raises(RemoteError, match="is the memory of a guest that runs"):
        host.call("guest.start", name="thief")
    for name in pids:
        host.call("guest.kill", name=name)


def test_a_hugetlbfs_is_mounted_for_a_path_used_and_taken_away(machine: Memory, host: KvmdHost) -> None:
    path = host.base / "pages"
    memory = f'backing = "file"\npath = "{path}"\npage_size = "2MiB"\n'
    host.guest("web", tiny(host, "web", size=f"{PAGES * 2}MiB", memory=memory))
    host.write("host.toml", "[hugepages.2MiB]\n")
    host.start()
    host.call("host.apply")
    mounted = [line for line in _mounts(host) if str(path) in line]
    assert len(mounted) == 1
    assert "pagesize=2M,size=33554432" in mounted[0]
    assert Memory.observe().pages() == machine.pages() + PAGES
    host.call("guest.start", name="web")
    host.wait_serial("web", "web is up")
    pid = host.show("web")["pid"]
    (name,) = [name for name in maps(pid, PAGES * P2) if str(path) in name]
    assert name.endswith("(deleted)")
    assert _huge_bytes(pid) == PAGES * P2
    assert host.call("host.plan")["actions"] == []

    # a second guest there: the mount grows in the old one's place, the first keeps its file
    host.guest("db", tiny(host, "db", size=f"{PAGES * 2}MiB", memory=memory))
    lines = [action["line"] for action in host.call("host.plan")["actions"]]
    assert f"~ hugetlbfs {path}: 2MiB pages, at most 64MiB (another size)" in lines
    host.restart()
    host.call("host.apply")
    host.call("guest.start", name="db")
    assert _huge_bytes(pid) == PAGES * P2
    for guest in ("web", "db"):
        host.call("guest.kill", name=guest)
    assert f"- hugetlbfs {path}" in host.call("host.release")["restored"]
    assert not path.exists()
    assert not any(str(path) in line for line in _mounts(host))


def test_a_start_fetches_pages_an_automatic_pool_lacks_and_two_never_share_them(
    machine: Memory, host: KvmdHost
) -> None:
    """Nobody applied anything since the file was written: `start` alone reserves what the guest needs."""
    host.write("host.toml", "[hugepages.2MiB]\n")
    host.start()
    huge = 'backing = "hugepages"\n'
    for name in ("a", "b"):
        host.guest(name, tiny(host, name, size=f"{PAGES * 2}MiB", memory=huge))
    for name in ("a", "b"):
        host.call("guest.start", name=name, wait=False)
    for name in ("a", "b"):
        host.wait_state(name, "running")
        assert _huge_bytes(host.show(name)["pid"]) == PAGES * P2
    assert Memory.observe().pages() == machine.pages() + 2 * PAGES
    assert host.call("host.plan")["actions"] == []
    for name in ("a", "b"):
        host.call("guest.kill", name=name)
    host.call("host.release")


def test_locked_memory_is_locked_and_never_ballooned(host: KvmdHost, life: str) -> None:
    """Where kvmd may raise the limit; without CAP_SYS_RESOURCE the start is refused and says so."""
    host.guest("web", tiny(host, "web", memory="lock = true\n"))
    host.start()
    try:
        host.call("guest.start", name="web")
    except RemoteError as error:
        assert not _may_raise_limits()
        assert "cannot raise RLIMIT_MEMLOCK, which memory.lock" in error.message
        assert "CAP_SYS_RESOURCE" in (error.hint or "")
        assert host.show("web")["pid"] is None
        return
    host.wait_serial("web", "web is up")
    if life == "adopted":
        host.restart()
    shown = host.show("web")
    assert locked_bytes(Tree(), shown["pid"]) >= 32 * MIB
    assert not any("VmLck" in warning for warning in shown["warnings"])
    assert shown["balloon_bytes"] is None, "it has no balloon"
    host.call("guest.kill", name="web")


def test_a_page_of_1_gib_is_had_or_given_back(machine: Memory) -> None:
    """Which of the two is the machine's: either exactly the pages asked for, or an error with both numbers and none."""
    tree = HostTree()
    pool = next((pool for pool in machine.pools if (pool.node, pool.page_bytes) == (0, P1)), None)
    if pool is None:
        with pytest.raises(Exception, match="has no pool of 1GiB pages"):
            tree.set_hugepages(0, P1, 1)
        return
    wanted = pool.total + 2
    free_before = tree.observe_memory().available_bytes
    try:
        got = tree.set_hugepages(0, P1, wanted)
    except HostFailed as error:
        assert re.fullmatch(
            rf"asked {wanted} pages of 1GiB on node 0, the host gave {error.details['got']}; back to {pool.total}.*",
            error.message,
            re.DOTALL,
        )
        assert pool.total <= error.details["got"] < wanted
        assert "hugepagesz=1G" in (error.hint or "")
        now = next(p for p in tree.observe_hugepages() if (p.node, p.page_bytes) == (0, P1))
        assert now.total == pool.total
        return
    assert got == wanted
    now = next(p for p in tree.observe_hugepages() if (p.node, p.page_bytes) == (0, P1))
    assert (now.total, now.free) == (wanted, pool.free + 2)
    assert free_before - tree.observe_memory().available_bytes > P1, "they are really taken"
    assert tree.set_hugepages(0, P1, pool.total) == pool.total


def _mounts(host: KvmdHost) -> list[str]:
    """Mounts as the daemon sees them: it may have a mount namespace of its own."""
    return host.inside("cat", f"/proc/{host.call('daemon.status')['pid']}/mountinfo").stdout.splitlines()


def _huge_bytes(pid: int) -> int:
    """Bytes a process has in pages of 2 MiB."""
    found = re.findall(r"^(?:Shared|Private)_Hugetlb:\s+(\d+) kB", Path(f"/proc/{pid}/smaps").read_text(), re.MULTILINE)
    return sum(map(int, found)) * 1024


def _may_raise_limits() -> bool:
    """CAP_SYS_RESOURCE (24) is among what we may do, or there is no limit to raise."""
    (effective,) = re.findall(r"^CapEff:\s+([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    unlimited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] == resource.RLIM_INFINITY
    return unlimited or bool(int(effective, 16) >> 24 & 1)
