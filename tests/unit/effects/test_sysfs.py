"""The host read from trees: recorded, made up, and (where they lie beside the repository) of real machines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmd.effects.sysfs import HostTree, chosen
from kvmd.errors import HostFailed, NotSupported
from kvmd.facts import HugepagePool, Process
from kvmd.units import CpuSet
from tests.rig.hosts import DATA, GIB, HWLOC, MIB, StingyHost, hwloc_names, load, unpack_hwloc, write_tree

NODE0 = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB"
GLOBAL = "/sys/kernel/mm/hugepages/hugepages-2048kB"


def test_recorded_flat_host(tmp_path: Path) -> None:
    host = load("flat-2cpu", tmp_path)
    found = host.observe_cpus()
    assert [(cpu.id, cpu.node, cpu.core, cpu.l3, cpu.capacity) for cpu in found.cpus] == [
        (0, 0, 0, 0, 1024),
        (1, 0, 1, 0, 1024),
    ]
    assert (found.isolated, found.allowed, found.distances) == (CpuSet(), CpuSet([0, 1]), ((10,),))
    memory = host.observe_memory()
    assert memory.total_bytes == 24684096 << 10
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert (memory.swap_total_bytes, memory.hugetlb_bytes) == (0, 0)
    assert memory.node_total_bytes[0] < memory.total_bytes, "this machine initialises memory late"
    assert [(pool.node, pool.page_bytes, pool.total) for pool in host.observe_hugepages()] == [
        (0, 2 * MIB, 0),
        (0, GIB, 0),
    ]
    assert (host.kernel(), host.has_psi(), host.kvm_module()) == ("6.18.44", True, None)
    assert re.fullmatch(r"[0-9a-f-]{36}", host.boot_id())


def test_synthetic_numa_host(tmp_path: Path) -> None:
    host = load("synthetic-2node-smt", tmp_path)
    found = host.observe_cpus()
    by_id = {cpu.id: cpu for cpu in found.cpus}
    assert len(by_id) == 31, "32 threads, one offline"
    assert 17 not in by_id
    assert (by_id[1].core, by_id[16].core, by_id[0].core) == (1, 0, 0)
    assert {cpu.node for cpu in found.cpus} == {0, 1}
    assert (by_id[5].l3, by_id[12].l3, by_id[31].l3) == (4, 12, 12)
    assert str(found.isolated) == "4-7,12-15,20-23,28-31"
    assert found.nohz_full == found.isolated
    assert found.distances == ((10, 21), (21, 10))
    assert len(host.observe_hugepages()) == 4
    assert host.kvm_module() == "kvm_amd"
    assert not host.has_psi()


def test_everything_absent_is_an_answer(tmp_path: Path) -> None:
    host = HostTree(tmp_path)
    assert [cpu.id for cpu in host.observe_cpus().cpus] == [0]
    assert host.observe_memory().total_bytes == 0
    assert host.observe_hugepages() == ()
    assert host.observe_knobs(["/sys/kernel/mm/ksm/run"]) == {}
    assert (host.boot_id(), host.kernel(), host.kvm_module()) == ("", "", None)
    assert (host.process(1), host.qemus(), host.foreign_qemu([])) == (None, (), 0)


def test_the_machine_itself() -> None:
    host = HostTree()
    found = host.observe_cpus()
    assert found.allowed
    assert found.allowed <= found.online
    assert host.observe_memory().total_bytes > 64 * MIB
    assert host.process(1) is not None


# ---- odd kernels ------------------------------------------------------------------------------------------------


def test_masks_instead_of_lists_and_no_online_file(tmp_path: Path) -> None:
    cpu = "/sys/devices/system/cpu"
    write_tree(
        {
            f"{cpu}/cpu0/topology/thread_siblings": "00000000,00000005\n",
            f"{cpu}/cpu2/topology/thread_siblings": "00000000,00000005\n",
            f"{cpu}/cpu1/online": "0\n",
            f"{cpu}/cpu35/online": "1\n",
            f"{cpu}/cpu35/cache/index2/level": "2\n",
            f"{cpu}/cpu35/cache/index2/shared_cpu_map": "8,00000004\n",
            "/sys/devices/system/node/node1/cpumap": "8,00000000\n",
        },
        tmp_path,
    )
    cpus = {each.id: each for each in HostTree(tmp_path).observe_cpus().cpus}
    assert set(cpus) == {0, 2, 35}
    assert cpus[2].core == 0
    assert (cpus[35].core, cpus[35].node, cpus[35].l3) == (35, 1, 2)


def test_a_list_that_ends_in_nul(tmp_path: Path) -> None:
    files = {"/sys/devices/system/cpu/online": "0-1\n", "/sys/devices/system/node/node3/cpulist": "0-1\n\0"}
    write_tree(files, tmp_path)
    assert {cpu.node for cpu in HostTree(tmp_path).observe_cpus().cpus} == {3}


def test_null_isolation_and_malformed_numbers(tmp_path: Path) -> None:
    files = {
        "/sys/devices/system/cpu/online": "0-1\n",
        "/sys/devices/system/cpu/nohz_full": "  (null)\n",
        "/sys/devices/system/cpu/isolated": "\n",
        "/sys/devices/system/cpu/cpu0/cpu_capacity": "fast\n",
        "/sys/devices/system/cpu/cpu1/topology/die_id": "-1\n",
        "/proc/meminfo": "MemTotal: lots kB\nnonsense\nMemFree: 12 kB\n",
    }
    write_tree(files, tmp_path)
    host = HostTree(tmp_path)
    found = host.observe_cpus()
    assert (found.nohz_full, found.isolated) == (CpuSet(), CpuSet())
    assert {(cpu.capacity, cpu.die) for cpu in found.cpus} == {(1024, 0)}
    assert host.observe_memory().available_bytes == 12 << 10


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        (
            {
                "/proc/self/cgroup": "0::/a/b\n",
                "/proc/self/mounts": "x /sys/fs/cgroup cgroup2 rw 0 0\n",
                "/sys/fs/cgroup/a/cpuset.cpus.effective": "2-3\n",
                "/sys/fs/cgroup/cpuset.cpus.effective": "0-3\n",
            },
            "2-3",
        ),
        (
            {
                "/proc/self/cgroup": "4:cpuset,cpu:/torque/7\n0::/\n",
                "/proc/mounts": "none /dev/cpuset cgroup rw,cpuset,noprefix 0 0\n",
                "/dev/cpuset/torque/7/cpus": "1\n",
            },
            "1",
        ),
        (
            {
                "/proc/self/cgroup": "0::/system.slice/kvmd.service\n",
                "/proc/self/mounts": "x /sys/fs/cgroup cgroup2 rw 0 0\n",
                "/sys/fs/cgroup/system.slice/cpuset.cpus.effective": "0\n",
                "/sys/fs/cgroup/machine.slice/cpuset.cpus.effective": "1-3\n",
                "/sys/fs/cgroup/cpuset.cpus.effective": "0-3\n",
            },
            "1-3",
        ),
        (
            {
                "/proc/self/cpuset": "/job\n",
                "/proc/mounts": "x /cgroup cgroup2 rw 0 0\n",
                "/cgroup/job/cpuset.cpus.effective": "2\n",
            },
            "2",
        ),
        ({"/proc/self/cgroup": "0::/../../elsewhere\n", "/proc/self/mounts": "short line\n"}, "0-3"),
    ],
)
def test_cpuset_of_our_cgroup(tmp_path: Path, files: dict[str, str], allowed: str) -> None:
    write_tree({"/sys/devices/system/cpu/online": "0-3\n", **files}, tmp_path)
    assert str(HostTree(tmp_path).observe_cpus().allowed) == allowed


@pytest.mark.parametrize("name", hwloc_names())
def test_real_machines(tmp_path: Path, name: str) -> None:
    """Threads, cores and nodes as hwloc itself counted them on that machine."""
    host = unpack_hwloc(name, tmp_path)
    found = host.observe_cpus()
    console = HWLOC / f"{name}.console"
    if console.exists():
        text = console.read_text()
        threads = {int(number) for number in re.findall(r"PU L#\d+ \(P#(\d+)", text)}
        assert found.online >= threads
        cores = len(re.findall(r"Core L#\d+", text))
        if name == "64amd64-4s2n4ca2co":
            cores //= 2  # Bulldozer modules: two integer cores behind one front end, which the kernel calls threads
        assert len({cpu.core for cpu in found.cpus if cpu.id in threads}) == (cores or len(threads))
        nodes = {int(number) for number in re.findall(r"NUMANode L#\d+ \(P#(\d+)", text)}
        assert {cpu.node for cpu in found.cpus if cpu.id in threads} <= nodes | {0}
    assert found.allowed
    assert found.allowed <= found.online
    for cpu in found.cpus:
        assert cpu.core in found.online
        assert cpu.l3 in found.online
    assert host.observe_memory().total_bytes > 0


# ---- processes --------------------------------------------------------------------------------------------------

STAT = "{pid} ({comm}) {state} 1 1 1 0 -1 4194304 99 0 0 0 0 0 0 0 20 0 1 0 {start} 2998272 393\n"


def _process(pid: int, comm: str = "qemu", state: str = "S", start: int = 500) -> dict[str, str]:
    return {f"/proc/{pid}/stat": STAT.format(pid=pid, comm=comm, state=state, start=start)}


@pytest.mark.parametrize("comm", ["qemu", "a b", "evil) S 1 1 1", ") (", "x\ny"])
def test_start_time_behind_any_command_name(tmp_path: Path, comm: str) -> None:
    write_tree(_process(42, comm, start=102819), tmp_path)
    assert HostTree(tmp_path).process(42) == Process(42, 102819)


def test_a_zombie_and_half_a_line_are_no_process(tmp_path: Path) -> None:
    write_tree(_process(42, state="Z") | {"/proc/43/stat": "43 (qemu) S 1 1"}, tmp_path)
    host = HostTree(tmp_path)
    assert (host.process(42), host.process(43), host.process(44)) == (None, None, None)


def test_qemus_are_found_by_name_or_uuid_and_foreign_memory_is_theirs(tmp_path: Path) -> None:
    uuid = "6F0D2C6E-9a0f-4a57-8a0c-3b3f7b6f7a11"
    ours = ["/usr/bin/qemu-system-x86_64", "-name", "guest=web,process=x", "-uuid", uuid]
    commands = {
        10: ours,
        11: ["/usr/bin/kvm", "-m", "1024"],
        12: ["/opt/renamed", "-uuid", uuid.lower(), "-name", "db"],
        13: ["/usr/bin/python3", "qemu-system-x86_64", "-uuid", "not-a-uuid"],
        14: [],
    }
    files: dict[str, str] = {}
    for pid, argv in commands.items():
        files |= _process(pid, start=pid)
        files[f"/proc/{pid}/cmdline"] = "".join(f"{word}\0" for word in argv)
        files[f"/proc/{pid}/status"] = f"Name:\tq\nVmRSS:\t{pid * 1024} kB\n"
    write_tree(files | {"/proc/uptime": "1 1\n"}, tmp_path)
    host = HostTree(tmp_path)
    found = host.qemus()
    assert [(each.process.pid, each.name, each.uuid) for each in found] == [
        (10, "web", uuid.lower()),
        (11, None, None),
        (12, "db", uuid.lower()),
    ]
    assert found[0].argv == tuple(ours)
    assert host.foreign_qemu([10, 12]) == 11 * MIB
    assert host.foreign_qemu({99}) == 33 * MIB


# ---- knobs ------------------------------------------------------------------------------------------------------


def test_knobs_of_choice_read_as_the_chosen_word(tmp_path: Path) -> None:
    host = load("flat-2cpu", tmp_path)
    path = "/sys/kernel/mm/transparent_hugepage/enabled"
    assert host.observe_knobs([path, "/sys/none"]) == {path: "madvise"}
    assert [chosen(text) for text in ("0", "", "[none] scan-time", "a [b", "b] c")] == ["0", "", "none", "a [b", "b] c"]


def test_write_knob_reads_back_and_says_what_the_kernel_made_of_it(tmp_path: Path) -> None:
    class Deaf(HostTree):
        def write(self, path: str, value: str) -> None:
            pass

    load("flat-2cpu", tmp_path)
    path = "/proc/sys/vm/swappiness"
    HostTree(tmp_path).write_knob(path, "10")
    assert HostTree(tmp_path).read(path) == "10"
    with pytest.raises(HostFailed, match=r'wrote "20" to /proc/sys/vm/swappiness, it reads "10"'):
        Deaf(tmp_path).write_knob(path, "20")
    with pytest.raises(HostFailed, match="No such file") as caught:
        HostTree(tmp_path).write_knob("/sys/kernel/mm/ksm/none", "1")
    assert caught.value.hint
    assert not (tmp_path / "sys/kernel/mm/ksm/none").exists(), "a knob is never created"


# ---- hugepages --------------------------------------------------------------------------------------------------


def _pools(host: HostTree, page_bytes: int = 2 * MIB) -> list[HugepagePool]:
    return [pool for pool in host.observe_hugepages() if pool.page_bytes == page_bytes]


def _stingy(tmp_path: Path, **numbers: int) -> StingyHost:
    load("flat-2cpu", tmp_path)
    host = StingyHost(tmp_path, room=numbers.pop("room"), compacted=numbers.pop("compacted", None))
    for name, value in numbers.items():
        (tmp_path / f"{NODE0}/{name}_hugepages".lstrip("/")).write_text(str(value))
    return host


def test_pages_that_are_there(tmp_path: Path) -> None:
    host = _stingy(tmp_path, room=1000)
    assert host.set_hugepages(0, 2 * MIB, 512) == 512
    assert _pools(host) == [HugepagePool(0, 2 * MIB, total=512, free=512)]
    assert host.set_hugepages(0, 2 * MIB, 512) == 512
    assert [path for path, _ in host.writes] == [f"{NODE0}/nr_hugepages"], "nothing is written when nothing changes"


def test_compaction_gets_the_rest(tmp_path: Path) -> None:
    host = _stingy(tmp_path, room=300, compacted=600)
    assert host.set_hugepages(0, 2 * MIB, 512) == 512
    assert [path.rpartition("/")[2] for path, _ in host.writes] == ["nr_hugepages", "compact", "nr_hugepages"]


def test_too_few_pages_are_given_back_with_both_numbers(tmp_path: Path) -> None:
    host = _stingy(tmp_path, room=300, nr=64, free=64)
    with pytest.raises(HostFailed, match="asked 512 pages of 2MiB on node 0, the host gave 300; back to 64") as caught:
        host.set_hugepages(0, 2 * MIB, 512)
    assert caught.value.details["got"] == 300
    assert _pools(host)[0].total == 64
    assert [value for path, value in host.writes if path.endswith("nr_hugepages")] == ["512", "512", "64"]


def test_without_compaction_when_told_so(tmp_path: Path) -> None:
    host = _stingy(tmp_path, room=300, compacted=600)
    with pytest.raises(HostFailed):
        host.set_hugepages(0, 2 * MIB, 512, compact=False)
    assert not [path for path, _ in host.writes if path.endswith("compact")]


BUDDYINFO = """Node 0, zone      DMA      9      9      9
Node 0, zone    DMA32      1      2      3
Node 0, zone   Normal     10     20     30
Node 1, zone   Normal      5      6      7
nonsense
"""


def test_free_memory_by_the_size_of_its_pieces(tmp_path: Path) -> None:
    assert HostTree(tmp_path).observe_blocks() == ()
    write_tree({"/proc/buddyinfo": BUDDYINFO}, tmp_path)
    assert [(found.node, found.counts) for found in HostTree(tmp_path).observe_blocks()] == [
        (0, (11, 22, 33)),
        (1, (5, 6, 7)),
    ]


def test_a_shortfall_is_explained_by_the_pieces_memory_is_in(tmp_path: Path) -> None:
    host = _stingy(tmp_path, room=300)
    write_tree({"/proc/buddyinfo": "Node 0, zone   Normal   0 0 0 0 0 0 0 0 0 4 1\n"}, tmp_path)
    with pytest.raises(HostFailed) as caught:
        host.set_hugepages(0, 2 * MIB, 512)
    assert "6 pages of 2MiB in one piece, at most 0 more by compaction besides these 300" in caught.value.message
    assert '"hugepagesz=2M hugepages=512" on the kernel command line' in (caught.value.hint or "")


def test_gigantic_pages_name_the_kernel_command_line(tmp_path: Path) -> None:
    host = _stingy(tmp_path, room=0)
    with pytest.raises(HostFailed) as caught:
        host.set_hugepages(0, GIB, 4)
    assert caught.value.hint
    assert "hugepagesz=1G hugepages=4" in caught.value.hint

    def refuse(path: str) -> None:
        raise HostFailed(f"cannot write to {path}: Invalid argument")

    host.refuse = refuse
    with pytest.raises(HostFailed, match="Invalid argument") as caught:
        host.set_hugepages(0, GIB, 4)
    assert caught.value.hint
    assert "hugepagesz=1G hugepages=4" in caught.value.hint


def test_shrinking_stops_at_what_is_in_use(tmp_path: Path) -> None:
    host = _stingy(tmp_path, room=1000, nr=512, free=100)
    assert host.set_hugepages(0, 2 * MIB, 10) == 412
    assert _pools(host) == [HugepagePool(0, 2 * MIB, total=412, free=0, surplus=0)]


def test_surplus_pages_are_not_counted_as_had(tmp_path: Path) -> None:
    host = _stingy(tmp_path, room=1000, nr=100, free=0, surplus=40)
    assert host.set_hugepages(0, 2 * MIB, 100) == 100
    assert _pools(host)[0].surplus == 0


def test_without_node_directories_the_pool_of_the_host(tmp_path: Path) -> None:
    write_tree({f"{GLOBAL}/{name}_hugepages": "0\n" for name in ("nr", "free", "surplus", "resv")}, tmp_path)
    host = StingyHost(tmp_path, room=1000)
    assert host.set_hugepages(0, 2 * MIB, 8) == 8
    assert host.observe_hugepages() == (HugepagePool(0, 2 * MIB, total=8, free=8),)
    with pytest.raises(NotSupported, match="node 1"):
        host.set_hugepages(1, 2 * MIB, 8)
    with pytest.raises(NotSupported, match="1GiB"):
        host.set_hugepages(0, GIB, 1)


def test_reservations_are_shown_where_free_pages_are(tmp_path: Path) -> None:
    host = load("synthetic-2node-smt", tmp_path)
    node1 = NODE0.replace("node0", "node1")
    values = {f"{NODE0}/nr": 4, f"{NODE0}/free": 3, f"{node1}/nr": 8, f"{node1}/free": 8, f"{GLOBAL}/resv": 5}
    write_tree({f"{path}_hugepages": f"{value}\n" for path, value in values.items()}, tmp_path)
    assert [(pool.used, pool.reserved) for pool in _pools(host)] == [(1, 3), (0, 2)]


def test_recordings_hold_no_names() -> None:
    for path in DATA.glob("*.json"):
        assert not re.search(r"serial|uuid|hostname", path.read_text(), re.IGNORECASE)
