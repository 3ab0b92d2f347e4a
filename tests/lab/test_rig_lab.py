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


def test_files_and_units_outlive_a_reboot(lab: Lab) -> None:
    before = lab.boot_id
    unit = "[Service]\nExecStart=/bin/sleep 1000\n[Install]\nWantedBy=multi-user.target\n"
    lab.write("/etc/systemd/system/again.service", unit)
    lab.check("systemctl enable --quiet --now again")
    lab.reboot()
    assert lab.boot_id not in ("", before)
    assert lab.check("systemctl is-active again") == "active\n"
    assert len(lab.check("journalctl --list-boots --no-pager").splitlines()) >= 2
    lab.check("systemctl disable --quiet --now again && rm /etc/systemd/system/again.service")
