"""Doctor's checks of memory, each broken on a directory that looks like a host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmd.plan.ksm import KSM, THP
from tests.rig.doctorhost import GUEST, DoctorHost, doctor_host, expect

PLAIN = GUEST.replace('backing = "hugepages"\n', "")
POOL = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB"


@pytest.fixture
def box() -> Iterator[DoctorHost]:
    with doctor_host() as found:
        yield found


def test_fewer_hugepages_than_declared(box: DoctorHost) -> None:
    box.config("host.toml", "[hugepages.2MiB]\npages = 64\n")
    expect(box, "hugepages", "warn", "2MiB pages on node 0: 64 wanted, the host has 16", fix="kvmd-cli apply")
    box.close()  # nobody answers any more
    expect(box, "hugepages", "warn", "64 wanted", fix="systemctl start kvmd")


def test_a_guest_for_whom_there_are_no_pages(box: DoctorHost) -> None:
    box.config("host.toml", "[hugepages.2MiB]\npages = 16\n")
    box.guest("db", GUEST.replace("web.raw", "db.raw").replace("32MiB", "4GiB"))
    expect(box, "hugepages", "fail", "db")


def test_a_page_size_this_host_has_not(box: DoctorHost) -> None:
    box.config("host.toml", "[hugepages.2MiB]\npages = 16\n[hugepages.16MiB]\npages = 4\n")
    expect(box, "hugepages", "warn", "16MiB")


def test_hugepages_that_nobody_wants_are_no_matter(box: DoctorHost) -> None:
    box.config("host.toml", "")
    box.guest("web", PLAIN)
    expect(box, "hugepages", "skip")


def _memory(box: DoctorHost, total_kib: int, swap_kib: int) -> None:
    box.write(
        "/proc/meminfo",
        f"MemTotal: {total_kib} kB\nMemFree: {total_kib} kB\nMemAvailable: {total_kib} kB\n"
        f"SwapTotal: {swap_kib} kB\nSwapFree: {swap_kib} kB\nHugetlb: 32768 kB\n",
    )


def test_guests_that_neither_ram_nor_swap_can_hold(box: DoctorHost) -> None:
    box.guest("web", PLAIN.replace("32MiB", "15400MiB"))
    expect(box, "swap", "fail", "swap has 0 B", "short", fix="[swap.file] with size =")
    _memory(box, 16 << 20, 800 << 10)  # enough if every byte of it counted
    expect(box, "swap", "warn", "80%")
    _memory(box, 16 << 20, 8 << 20)
    expect(box, "swap", "ok", "swap has 8 GiB")


def test_merging_without_swap(box: DoctorHost) -> None:
    box.config("host.toml", '[ksm]\nmode = "kvmd"\n[hugepages.2MiB]\npages = 16\n')
    expect(box, "swap", "warn", "no swap", fix='size = "1GiB" in host.toml')


def test_transparent_hugepages(box: DoctorHost) -> None:
    box.write(f"{THP}/defrag", "[always] defer defer+madvise madvise never\n")
    expect(box, "thp", "warn", "compaction", fix='thp.defrag = "defer+madvise"')
    box.write(f"{THP}/enabled", "always madvise [never]\n")
    expect(box, "thp", "ok")  # its memory is in hugepages
    box.guest("web", PLAIN)
    expect(box, "thp", "warn", "4 KiB pages", fix='thp.enabled = "madvise"')
    box.config("host.toml", '[thp]\nenabled = "madvise"\n')
    expect(box, "thp", "warn", "the kernel has never", fix="kvmd-cli apply")
    box.remove(THP)
    expect(box, "thp", "skip")


def test_merging_against_the_file(box: DoctorHost) -> None:
    box.write(f"{KSM}/run", "1\n")
    expect(box, "ksm", "warn", "ksm.mode is off", fix="kvmd-cli apply")


def test_merging_between_owners(box: DoctorHost) -> None:
    box.write(f"{KSM}/run", "1\n")
    box.config("host.toml", '[ksm]\nmode = "kvmd"\n[hugepages.2MiB]\npages = 16\n')
    expect(box, "ksm", "ok")
    shared = PLAIN.replace('size = "32MiB"', 'size = "32MiB"\nksm_group = "trusted"')
    box.guest("web", shared + '[guest]\nowner = "alice"\n')
    box.guest("alone", PLAIN.replace("web.raw", "alone.raw") + '[guest]\nowner = "carol"\n')
    expect(box, "ksm", "ok")  # whoever has no group merges nothing
    box.guest("db", shared.replace("web.raw", "db.raw") + '[guest]\nowner = "bob"\n')
    expect(box, "ksm", "warn", "2 groups or owners", fix='ksm.mode = "off"')


def test_merging_this_kernel_cannot_do(box: DoctorHost) -> None:
    box.config("host.toml", '[ksm]\nmode = "kernel"\n')
    expect(box, "ksm", "fail", "no advisor", fix='ksm.mode = "kvmd"')
    box.remove(KSM)
    expect(box, "ksm", "fail", "no KSM", fix='ksm.mode = "off"')


def test_somebody_else_drives_merging(box: DoctorHost) -> None:
    box.process(700, "ksmtuned")
    expect(box, "ksm-owner", "warn", "ksmtuned (pid 700)", fix="systemctl disable --now ksmtuned")
    box.config("host.toml", '[ksm]\nmode = "keep"\n')
    expect(box, "ksm-owner", "skip")


def test_io_uring_under_a_small_limit(box: DoctorHost) -> None:
    box.write("/proc/900/limits", "Max locked memory         65536                65536                bytes\n")
    box.write("/proc/sys/kernel/osrelease", "5.10.0-30-amd64\n")
    expect(box, "memlock", "ok", "64 KiB")
    box.guest("web", GUEST.replace('"threads"', '"io_uring"'))
    expect(box, "memlock", "fail", "64 KiB", "web", fix="LimitMEMLOCK=infinity")
    box.write("/proc/900/limits", "Max locked memory         unlimited            unlimited            bytes\n")
    expect(box, "memlock", "ok", "unlimited")


def test_native_io_for_more_guests_than_the_host_allows(box: DoctorHost) -> None:
    box.write("/proc/sys/fs/aio-max-nr", "1000\n")
    expect(box, "aio", "ok")
    box.guest("web", GUEST.replace('"threads"', '"native"').replace('"writeback"', '"none"'))
    expect(box, "aio", "warn", "1000", "1024", fix="fs.aio-max-nr = 2048")
