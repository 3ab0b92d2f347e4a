"""Devices of the host for guests, on a host with an IOMMU: modules, virtual functions, vfio-pci, what is refused.

The devices are emulated and everything else is real: the kernel's VFIO and SR-IOV, the unit's sandbox, KVM, a guest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rig.lab import Lab, LabFailed
from tests.rig.labhost import LabHost, kvmd_in
from tests.rig.labkill import DIED, UID

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

DEVICES = "/sys/bus/pci/devices"
CARD, FUNCTION, SPARE, TESTDEV, RNG = "0000:01:00.0", "0000:01:00.1", "0000:02:00.0", "0000:03:01.0", "0000:03:02.0"
NVME = "0x010802"
HOST = f"""
[modules]
load = ["nbd"]
[sriov."{CARD}"]
vfs = 4
[passthrough]
allow = ["{SPARE}", "0000:01:00.0/24", "{TESTDEV}"]
"""
GUEST = """
[machine]
accel = "kvm"
default_nic = false
[cpu]
model = "host"
[memory]
size = "192MiB"
[boot]
kernel = "/srv/vm/vmlinuz"
initrd = "/srv/vm/initrd"
cmdline = "console=ttyS0 quiet mitigations=off kvmd.ip=none kvmd.role=ROLE"
[serial.console]
log = true
[hostdev.given]
pci = "ADDRESS"
"""
# Run in the lab: what the guest's kernel sees on its PCI bus.
LOOK = """
import sys
from pathlib import Path
from tests.rig.guestconsole import GuestConsole
with GuestConsole(Path(sys.argv[1])) as guest:
    print(guest.check("cd /sys/bus/pci/devices && for d in *; do echo $d $(cat $d/class); done"))
"""
# Virtualization Management of NVMe (NVM Express base specification 2.0, 5.20): a function of this emulated card can do
# nothing before it has queues and vectors and was switched on, which is the card's administrator's to do.
ONLINE = """
import fcntl, os, struct, sys
path = "/dev/" + os.listdir("/sys/bus/pci/devices/CARD/nvme")[0]
for resource, action, number in ((1, 8, 1), (0, 8, 2), (0, 9, 0)):
    command = bytearray(72)
    command[0] = 0x1C
    struct.pack_into("<II", command, 40, action | resource << 8 | int(sys.argv[1]) << 16, number)
    fd = os.open(path, os.O_RDWR)
    assert fcntl.ioctl(fd, 0xC0484E41, command) == 0
    os.close(fd)
""".replace("CARD", CARD)


@pytest.fixture(scope="module")
def host(lab_iommu: Lab) -> Iterator[LabHost]:
    with kvmd_in(lab_iommu, host=HOST) as host:
        host.guest("idle", '[machine]\ndefault_nic = false\n[memory]\nsize = "64MiB"\n')
        yield host
        # units of guests that were killed stay on record, and the timer leaves its lock
        host.lab.run("systemctl stop kvmd-reconcile.timer; systemctl reset-failed 'kvmd-guest@*'")
        host.lab.run("rm -f /run/lock/kvmd-reconcile.lock")
    # what kvmd made of the host went with `host release`
    assert lab_iommu.check(f"cat {DEVICES}/{CARD}/sriov_numvfs {DEVICES}/{CARD}/sriov_drivers_autoprobe").split() == [
        "0",
        "1",
    ]
    assert driver(lab_iommu, SPARE) == "nvme"
    assert lab_iommu.run("lsmod | grep -E '^(nbd|vfio_pci) '").stdout == ""


def driver(lab: Lab, address: str) -> str:
    return lab.check(f"basename $(readlink {DEVICES}/{address}/driver || echo none)").strip()


def nodes(lab: Lab) -> list[str]:
    """IOMMU groups that can be opened, with who owns each."""
    return lab.check("cd /dev/vfio && stat -c '%n %u %a' [0-9]* 2>/dev/null || true").splitlines()


def group(lab: Lab, address: str) -> str:
    return lab.check(f"basename $(readlink {DEVICES}/{address}/iommu_group)").strip()


def given(host: LabHost, name: str, address: str) -> None:
    host.guest(name, GUEST.replace("ADDRESS", address).replace("ROLE", name))


def stopped(host: LabHost, name: str, address: str, back: str) -> None:
    """The guest is off, and its device on the driver it had."""
    host.lab.check(f"kvmd-cli kill {name}", timeout_s=60)
    host.lab.wait_for(f'test "$(basename $(readlink {DEVICES}/{address}/driver || echo none))" = {back}', timeout_s=60)
    host.lab.wait_for(f"! test -e /dev/vfio/{group(host.lab, address)}", timeout_s=30)


def remove(host: LabHost, name: str) -> None:
    """Its file is gone; one guest is always left, for an empty directory is a fault and not a wish."""
    host.lab.check(f"rm /etc/kvmd/guests.d/{name}.toml")


def problems(plan: Any) -> str:
    return json.dumps(plan["problems"])


def test_modules_are_loaded_and_virtual_functions_made_without_a_driver(host: LabHost) -> None:
    lab = host.lab
    lab.check("grep -q '^nbd ' /proc/modules && test -b /dev/nbd0")
    assert lab.check(f"cat {DEVICES}/{CARD}/sriov_numvfs").strip() == "4"
    assert driver(lab, FUNCTION) == "none"
    plan = host.plan()
    assert (plan["actions"], plan["problems"]) == ([], [])


def test_a_guest_under_kvm_has_the_device_and_gives_it_back(host: LabHost) -> None:
    lab = host.lab
    given(host, "web", SPARE)
    try:
        lab.check("kvmd-cli start web", timeout_s=180)
        assert driver(lab, SPARE) == "vfio-pci"
        (node,) = nodes(lab)
        uid = lab.check("stat -c %u /proc/$(systemctl show -P MainPID kvmd-guest@web)").strip()
        assert node == f"{group(lab, SPARE)} {uid} 600"
        assert int(uid) >= 64100
        status = lab.check("cat /proc/$(systemctl show -P MainPID kvmd-guest@web)/status")
        locked = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmLck:"))
        assert locked >= 192 * 1024, "all of its memory is pinned"
        assert "CapEff:\t0000000000000000" in status
        host.wait_serial("web", "KVMD-GUEST READY role=web")
        seen = lab.check(["python3", "-c", LOOK, "/run/kvmd/guests/web/serial-console.sock"], timeout_s=120)
        assert [line for line in seen.splitlines() if line.endswith(NVME)] == [f"0000:01:00.0 {NVME}"]  # its root port
        assert host.plan()["actions"] == []
        host.restart()  # a kvmd that was killed finds its guest, and the guest its device
        assert host.show("web")["state"] == "running"
        assert driver(lab, SPARE) == "vfio-pci"
        assert host.plan()["actions"] == []
    finally:
        stopped(host, "web", SPARE, "nvme")
        remove(host, "web")
    assert lab.check(f"ls {DEVICES}/{SPARE}/nvme").strip().startswith("nvme")  # the host has its disk again


def test_a_virtual_function_that_the_host_used_goes_back_to_its_driver_and_override(host: LabHost) -> None:
    lab = host.lab
    lab.check(["python3", "-c", ONLINE, "1"])
    lab.check(f"echo nvme >{DEVICES}/{FUNCTION}/driver_override && echo {FUNCTION} >/sys/bus/pci/drivers_probe")
    lab.wait_for(f"ls {DEVICES}/{FUNCTION}/nvme/nvme*", timeout_s=60)
    given(host, "vf", FUNCTION)
    try:
        lab.check("kvmd-cli start vf", timeout_s=180)
        assert driver(lab, FUNCTION) == "vfio-pci"
        # a pool is not changed while one of its functions is a guest's
        host.host(HOST.replace("vfs = 4", "vfs = 2"))
        said = problems(host.plan())
        assert f"2 virtual functions are wanted, 4 are there and 1 of them in use ({FUNCTION} by guest vf)" in said
        host.wait_serial("vf", "KVMD-GUEST READY role=vf")
        seen = lab.check(["python3", "-c", LOOK, "/run/kvmd/guests/vf/serial-console.sock"], timeout_s=120)
        assert f"0000:01:00.0 {NVME}" in seen.splitlines()
    finally:
        host.host(HOST)
        stopped(host, "vf", FUNCTION, "nvme")
        remove(host, "vf")
    assert lab.check(f"cat {DEVICES}/{FUNCTION}/driver_override").strip() == "nvme"
    lab.check(f"echo {FUNCTION} >{DEVICES}/{FUNCTION}/driver/unbind; echo >{DEVICES}/{FUNCTION}/driver_override")


def test_a_guest_that_ended_while_kvmd_was_dead_has_its_device_taken_back(host: LabHost) -> None:
    lab = host.lab
    given(host, "orphan", SPARE)
    try:
        lab.check("kvmd-cli start orphan", timeout_s=180)
        lab.check("systemctl stop kvmd.socket kvmd-launch.socket kvmd", timeout_s=60)
        lab.check("systemctl kill --signal=SIGKILL kvmd-guest@orphan")
        assert driver(lab, SPARE) == "vfio-pci"
        lab.check("systemctl start kvmd.socket kvmd-launch.socket kvmd", timeout_s=180)
    finally:
        stopped(host, "orphan", SPARE, "nvme")
        remove(host, "orphan")


def test_what_would_go_with_a_device_is_said_before_anything_is_touched(host: LabHost) -> None:
    lab = host.lab
    given(host, "greedy", TESTDEV)
    given(host, "forbidden", "0000:00:04.0")
    try:
        said = problems(host.plan())
        assert f"IOMMU group {group(lab, TESTDEV)} of {TESTDEV} also holds {RNG}" in said
        assert "is not in passthrough.allow" in said
        host.host(HOST.replace("allow = [", 'allow = ["0000:00:04.0", '))
        said = problems(host.plan())
        assert "mounted at /" in said  # the lab's own disk, even when somebody allows it
        for name in ("greedy", "forbidden"):
            with pytest.raises(LabFailed, match=r"hostdev\.given"):
                lab.check(f"kvmd-cli start {name}", timeout_s=60)
        assert (driver(lab, TESTDEV), driver(lab, RNG), driver(lab, "0000:00:04.0")) == ("none", "virtio-pci", "nvme")
    finally:
        host.host(HOST)
        remove(host, "greedy")
        remove(host, "forbidden")


@pytest.mark.parametrize(("verb", "changes"), [("take", 4), ("give", 4)])
def test_killed_before_any_change_the_next_one_mends_it(host: LabHost, verb: str, changes: int) -> None:
    """driver_override, unbind, probe, owner of the group; and back."""
    lab, number = host.lab, group(host.lab, SPARE)

    def once(what: str, most: int) -> int:
        line = f"/opt/kvmd/venv/bin/python -m tests.rig.labkill {what} /root/labkill {SPARE} {number} {most}"
        ran = lab.run(f"cd /src/kvmd && {line}", timeout_s=120)
        assert ran.returncode in (0, DIED), ran.stderr
        return ran.returncode

    for most in range(changes + 1):
        if verb == "give":
            assert once("take", 99) == 0
            assert nodes(lab) == [f"{number} {UID} 600"]
        assert once(verb, most) == (DIED if most < changes else 0), f"{verb} with {most} changes"
        assert once("give", 99) == 0
        assert driver(lab, SPARE) == "nvme"
        assert lab.check(f"cat {DEVICES}/{SPARE}/driver_override").strip() == "(null)"
        assert nodes(lab) == []
    lab.check("rm -r /root/labkill")
