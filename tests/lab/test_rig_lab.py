"""The lab itself: what kvmd's lab tests rely on it to be."""

import pytest

from tests.rig.guestimage import cache, guest_kernel
from tests.rig.lab import Lab, LabFailed

pytestmark = [pytest.mark.lab, pytest.mark.timeout(420)]


def test_the_lab_is_a_systemd_host_with_cgroup_v2_and_isolated_cpus(lab: Lab) -> None:
    assert lab.check("cat /proc/1/comm") == "systemd\n"
    assert lab.check("systemctl --failed --no-legend") == ""
    assert lab.check("stat -f -c %T /sys/fs/cgroup") == "cgroup2fs\n"
    controllers = lab.check("cat /sys/fs/cgroup/cgroup.controllers").split()
    assert {"cpu", "cpuset", "io", "memory", "hugetlb"} <= set(controllers)
    assert lab.check("cat /sys/devices/system/cpu/isolated").strip() == "2-3"
    assert lab.check("test -e /proc/pressure/memory && test -c /dev/vhost-net && test -c /dev/net/tun") == ""
    with pytest.raises(LabFailed, match="status 3"):
        lab.check("exit 3")


def test_the_checkout_the_environment_and_the_wheels_are_in_it(lab: Lab) -> None:
    assert "constraints.txt" in lab.check("ls /src/kvmd").split()
    lab.check([cache() / "venv/bin/python", "-c", "import pydantic, pyroute2, systemd.daemon, kvmd"])
    assert "pydantic_core" in lab.check("ls /opt/kvmd-wheels")
    assert lab.check("cat", stdin="passed in") == "passed in"


def test_a_limit_is_enforced(lab: Lab) -> None:
    """What the booted tree cannot show: memory limits that bite."""
    hungry = ["systemd-run", "--wait", "--pipe", "--quiet", "-pMemorySwapMax=0", "-pMemoryMax=40M"]
    eat = ["/usr/bin/python3", "-c", "b'x' * (200 << 20)"]
    assert lab.run([*hungry, *eat], timeout_s=120).returncode != 0
    assert lab.run([*hungry[:-1], "-pMemoryMax=400M", *eat], timeout_s=120).returncode == 0


@pytest.mark.long  # kvmd's own tests boot one under it in every run
def test_linux_boots_under_its_kvm_with_the_hosts_processor(lab: Lab) -> None:
    lab.check("test -d /sys/module/kvm_amd")
    kernel, initrd = guest_kernel()
    lab.check(
        "systemd-run --unit=probe --quiet qemu-system-x86_64 -nodefaults -no-user-config -display none -M q35"
        f" -accel kvm -cpu host -m 192 -kernel {kernel} -initrd {initrd} -serial file:/run/probe.log"
        " -append 'console=ttyS0 quiet mitigations=off kvmd.ip=none kvmd.role=probe'"
    )
    try:
        lab.wait_for("grep -q 'KVMD-GUEST READY role=probe' /run/probe.log", timeout_s=240)
    finally:
        lab.run("systemctl stop probe")


def test_two_nodes_with_threads_and_a_gigantic_page_each(lab_numa: Lab) -> None:
    nodes = "/sys/devices/system/node"
    assert lab_numa.check(f"cat {nodes}/node0/cpulist {nodes}/node1/cpulist") == "0-3\n4-7\n"
    siblings = lab_numa.check("cat /sys/devices/system/cpu/cpu[0-7]/topology/thread_siblings_list").split()
    assert siblings == ["0-1", "0-1", "2-3", "2-3", "4-5", "4-5", "6-7", "6-7"]
    assert lab_numa.check(f"cat {nodes}/node*/hugepages/hugepages-1048576kB/nr_hugepages").split() == ["1", "1"]
    lab_numa.check("test -d /sys/module/kvm_amd")


def test_an_iommu_with_virtual_functions_and_a_group_of_two(lab_iommu: Lab) -> None:
    devices = "/sys/bus/pci/devices"
    (physical,) = lab_iommu.check(f"dirname {devices}/*/sriov_totalvfs").split()
    assert lab_iommu.check(f"cat {physical}/sriov_totalvfs") == "4\n"
    lab_iommu.check(f"echo 2 >{physical}/sriov_numvfs")
    try:
        groups = lab_iommu.check(f"readlink -f {physical}/iommu_group {physical}/virtfn[01]/iommu_group").split()
        assert len(set(groups)) == 3
    finally:
        lab_iommu.check(f"echo 0 >{physical}/sriov_numvfs")
    # A test device without a driver, and the random number generator behind the same bridge.
    (shared,) = lab_iommu.check(f"grep -l 0x1b36 {devices}/0000:03:*/vendor").split()
    group = lab_iommu.check(f"ls $(dirname {shared})/iommu_group/devices").split()
    assert len(group) == 3, "the bridge and two devices"
    lab_iommu.check("modprobe vfio-pci && test -c /dev/vfio/vfio")
    lab_iommu.check("test -d /sys/module/kvm_amd")
