"""Doctor's checks of the machine, each broken on a directory that looks like a host."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmd.qemu.caps import Kvm
from tests.rig import golden_argv, hosts
from tests.rig.doctorhost import GUEST, DoctorHost, doctor_host, expect

# Replays a recorded dialogue: the answers to each command in the order they were recorded.
FAKE_QEMU = """\
#!{python} -IS
import json, sys
queues = {{}}
for label, reply in json.load(open({replies!r})).items():
    queues.setdefault(label.partition(":")[0], []).append(reply)
print(json.dumps({{"QMP": {{"version": {{}}, "capabilities": []}}}}), flush=True)
for line in sys.stdin:
    queue = queues.get(json.loads(line)["execute"])
    print(json.dumps({{"return": queue.pop(0) if queue else {{}}}}), flush=True)
"""


@pytest.fixture
def box() -> Iterator[DoctorHost]:
    with doctor_host() as found:
        yield found


def test_kernel_too_old(box: DoctorHost) -> None:
    box.write("/proc/sys/kernel/osrelease", "5.4.0-26-generic\n")
    expect(box, "kernel", "fail", "5.4.0-26-generic", "5.6", fix="apt-get install linux-image")


def test_kvm_module_is_not_loaded(box: DoctorHost) -> None:
    box.kvm = None  # ask as the daemon does, of this tree
    box.remove("/sys/module/kvm_amd")
    expect(box, "kvm", "fail", "kvm_intel nor kvm_amd", "web", fix="modprobe")


def test_kvm_device_is_missing(box: DoctorHost) -> None:
    box.kvm = None
    box.remove("/dev/kvm")
    expect(box, "kvm", "fail", "/dev/kvm", "No such file")
    expect(box, "kvm-device", "skip", "no /dev/kvm")


def test_kvm_that_no_guest_needs_is_a_warning(box: DoctorHost) -> None:
    box.kvm = Kvm(usable=False, reason="QEMU says no", fix="run `kvmd-cli doctor`")
    box.guest("web", GUEST + '[machine]\naccel = "tcg"\n')
    assert "doctor" not in (expect(box, "kvm", "warn", "QEMU says no", "emulated").fix or "")


def test_kvm_device_is_closed_to_guests(box: DoctorHost) -> None:
    (box.root / "dev/kvm").chmod(0o600)
    expect(box, "kvm-device", "fail", "mode 0600", fix="chgrp kvm /dev/kvm && chmod 0660 /dev/kvm")


def test_kvm_device_of_another_group(box: DoctorHost) -> None:
    gid = (box.root / "dev/kvm").stat().st_gid
    box.write("/etc/group", f"root:x:0:\nkvm:x:{gid + 1}:\n")
    expect(box, "kvm-device", "fail", f"group {gid}", f"kvm is {gid + 1}")


def test_kvm_device_without_the_group(box: DoctorHost) -> None:
    box.write("/etc/group", "root:x:0:\n")
    expect(box, "kvm-device", "fail", "no group kvm", fix="groupadd --system kvm")


def test_a_virtual_machine_that_was_given_no_kvm(box: DoctorHost) -> None:
    box.write("/proc/cpuinfo", "processor : 0\nflags : fpu hypervisor\n")
    expect(box, "nested", "ok", "nested, and slower")
    box.kvm = None
    box.remove("/sys/module/kvm_amd")
    expect(box, "nested", "warn", "itself a virtual machine", fix="nested=1")


def test_guests_may_be_hosts(box: DoctorHost) -> None:
    box.write("/sys/module/kvm_amd/parameters/nested", "1\n")
    expect(box, "nested", "ok", "of their own")


def test_vhost_net_is_missing(box: DoctorHost) -> None:
    box.remove("/dev/vhost-net")
    expect(box, "vhost-net", "warn", "/dev/vhost-net", fix="modprobe vhost_net")


def test_tun_is_missing(box: DoctorHost) -> None:
    box.remove("/dev/net/tun")
    expect(box, "tun", "fail", "web", fix="modprobe tun")
    box.guest("web", GUEST.replace('network = "lan"', 'type = "user"'))
    expect(box, "tun", "warn", "no guest can be on a network")


def _fake_qemu(box: DoctorHost, tmp_path: Path, **changes: object) -> None:
    """An emulator that answers with the recorded replies, changed; asked by the real probe."""
    replies = json.loads((golden_argv.DATA / "replies-7.2.json").read_text()) | changes
    (tmp_path / "replies.json").write_text(json.dumps(replies))
    emulator = tmp_path / "qemu-fake"
    emulator.write_text(FAKE_QEMU.format(python=sys.executable, replies=str(tmp_path / "replies.json")))
    emulator.chmod(0o755)
    box.daemon(f'[qemu]\nemulator = "{emulator}"\n')
    box.real_probe = True


def test_qemu_is_not_installed(box: DoctorHost) -> None:
    box.daemon('[qemu]\nemulator = "/nowhere/qemu"\n')
    box.real_probe = True
    expect(box, "qemu", "fail", "/nowhere/qemu", fix="apt")
    expect(box, "qemu-sandbox", "skip")


def test_qemu_is_too_old(box: DoctorHost, tmp_path: Path) -> None:
    _fake_qemu(box, tmp_path)
    expect(box, "qemu", "ok", "qemu-fake is QEMU 7.2")
    version = {"qemu": {"major": 6, "minor": 2, "micro": 0}, "package": ""}
    _fake_qemu(box, tmp_path, **{"query-version": version})
    expect(box, "qemu", "fail", "6.2.0", "older than 7.2")


def test_qemu_without_seccomp(box: DoctorHost, tmp_path: Path) -> None:
    replies = json.loads((golden_argv.DATA / "replies-7.2.json").read_text())
    label = next(name for name in replies if name.startswith("query-command-line-options"))
    options = [option for option in replies[label] if option["option"] != "sandbox"]
    assert len(options) < len(replies[label])
    _fake_qemu(box, tmp_path, **{label: options})
    expect(box, "qemu-sandbox", "fail", "without -sandbox")


def test_sandbox_is_switched_off(box: DoctorHost) -> None:
    box.daemon("[qemu]\nsandbox = false\n")
    expect(box, "qemu-sandbox", "warn", "qemu.sandbox is false", fix="qemu.sandbox = true")


def test_a_dedicated_guest_without_isolated_cpus(box: DoctorHost) -> None:
    shape = hosts.topology(cores=4)
    hosts.write_tree(hosts.synthetic(shape, total=16 * hosts.GIB, kernel="6.1.0", advisor=False), box.root)
    expect(box, "isolcpus", "warn", "web has CPUs of its own", fix="kvmd-cli host kernel-args --write")


def test_isolated_cpus_that_nobody_uses(box: DoctorHost) -> None:
    box.guest("web", GUEST.replace("vcpus = 2", "vcpus = 1"))
    found = expect(box, "isolcpus", "warn", "isolated and no guest")
    assert "CPUs 2 " in found.message or "CPUs 3 " in found.message
    box.guest("web", GUEST.replace("dedicated", "shared"))
    expect(box, "isolcpus", "warn", "CPUs 2-3 are isolated")


def test_a_pin_to_an_offline_cpu(box: DoctorHost) -> None:
    box.guest("web", GUEST.replace('"dedicated"', '"manual"\npin = [2, 7]'))
    expect(box, "pins", "fail", "web", "7")


def test_more_dedicated_vcpus_than_cpus(box: DoctorHost) -> None:
    box.guest("web", GUEST.replace("vcpus = 2", "vcpus = 9"))
    expect(box, "pins", "fail", "web", "9")


def test_housekeeping_that_is_not_online(box: DoctorHost) -> None:
    box.config("host.toml", '[cpu]\nhousekeeping = "0-1,32-33"\n[hugepages.2MiB]\npages = 16\n')
    expect(box, "pins", "fail", "32-33", "not online", fix='cpu.housekeeping = "0-1"')


def test_no_pressure_figures(box: DoctorHost) -> None:
    box.remove("/proc/pressure")
    expect(box, "psi", "warn", "/proc/pressure", fix="psi=1")


@pytest.mark.parametrize(
    ("mounts", "version"),
    [
        ("tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n", "v1"),
        ("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n", "hybrid"),
    ],
)
def test_cgroup_is_not_the_second_version(box: DoctorHost, mounts: str, version: str) -> None:
    box.write("/proc/self/mounts", mounts)
    expect(box, "cgroup", "warn", f"cgroup {version}", fix="systemd.unified_cgroup_hierarchy=1")
    box.guest("web", GUEST + "[limits]\ncpu_weight = 200\n")
    expect(box, "cgroup", "fail", "web")
    box.guest("web", GUEST + "[limits]\noom_score_adjust = 5\n")  # of the process, not of its cgroup
    expect(box, "cgroup", "warn")
