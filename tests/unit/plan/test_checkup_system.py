"""Doctor's checks of kvmd's files, unit, accounts, rivals and the clock, each broken on a directory like a host."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvmd.effects.checkup_system import is_synchronized
from kvmd.plan.checks_system import RIVALS
from kvmd.plan.hostreport import Unseen
from tests.rig.doctorhost import GUEST, DoctorHost, doctor_host, expect


@pytest.fixture
def box() -> Iterator[DoctorHost]:
    with doctor_host() as found:
        yield found


def test_a_fault_in_a_file(box: DoctorHost) -> None:
    box.guest("web", GUEST.replace("size =", "sise ="))
    path = box.paths.config / "guests.d/web.toml"
    expect(box, "config", "fail", "guests.d/web.toml:5", "memory.sise", fix=f"editor +5 {path}")


def test_no_configuration_at_all(box: DoctorHost) -> None:
    box.remove("/etc/kvmd")
    expect(box, "config", "fail", "cannot be read", fix="kvmd-cli init")
    expect(box, "config-rights", "skip")


def test_a_file_nobody_reads(box: DoctorHost) -> None:
    box.config("guest.d", "")
    expect(box, "config", "warn", "guest.d", fix="ls -ld")


def test_a_guest_that_runs_from_its_last_good_version(box: DoctorHost) -> None:
    copy = box.paths.last_good / "guests.d/web.toml"
    copy.parent.mkdir(parents=True)
    copy.write_text((box.paths.config / "guests.d/web.toml").read_text())
    box.guest("web", "not toml")
    expect(box, "config", "warn", "web runs from its last good version", fix="kvmd-cli check")


def test_a_file_others_can_write(box: DoctorHost) -> None:
    path = box.paths.config / "guests.d/web.toml"
    path.chmod(0o664)
    expect(box, "config-rights", "fail", str(path), "0664", fix=f"chmod go-w {path}")


def test_a_directory_others_can_write(box: DoctorHost) -> None:
    path = box.paths.config / "guests.d"
    path.chmod(0o777)
    expect(box, "config-rights", "fail", str(path), "0777")


def test_a_file_of_somebody_else(box: DoctorHost) -> None:
    if os.geteuid() == 0:
        os.chown(box.paths.config / "host.toml", 1234, 1234)
    else:
        box.euid = 0
    expect(box, "config-rights", "fail", "host.toml", "not to root", fix="chown root:root")


def test_a_secret_others_can_read(box: DoctorHost) -> None:
    box.write("/etc/kvmd/secrets/vnc", "secret", 0o644)
    (box.paths.config / "secrets").chmod(0o700)
    expect(box, "config-rights", "fail", "secrets/vnc", "0644", fix="chmod go-rwx")


@pytest.mark.parametrize("name", sorted(RIVALS))
def test_a_rival_runs(box: DoctorHost, name: str) -> None:
    box.process(666, name)
    expect(box, "rivals", "warn", f"{name} (pid 666)")


def test_network_manager_may_take_kvmd_s_links(box: DoctorHost) -> None:
    box.process(666, "NetworkManager")
    expect(box, "rivals", "warn", "NetworkManager may set up", fix="unmanaged-devices=interface-name:kv*")
    box.write("/etc/NetworkManager/conf.d/kvmd.conf", "[keyfile]\n# unmanaged-devices=interface-name:kv*\n")
    expect(box, "rivals", "warn", "NetworkManager")
    box.write("/etc/NetworkManager/conf.d/kvmd.conf", "[keyfile]\nunmanaged-devices=interface-name:kv*\n")
    expect(box, "rivals", "ok")


def test_interrupts_do_not_matter_without_dedicated_guests(box: DoctorHost) -> None:
    box.process(666, "irqbalance")
    expect(box, "rivals", "warn", fix="IRQBALANCE_BANNED_CPULIST=2-3")
    box.guest("web", GUEST.replace("dedicated", "shared"))
    expect(box, "rivals", "ok")


def test_kvmd_does_not_come_with_the_host(box: DoctorHost) -> None:
    box.remove("/etc/systemd/system/multi-user.target.wants/kvmd.service")
    expect(box, "unit", "warn", "not enabled", fix="systemctl enable --now kvmd")
    box.remove("/lib/systemd/system/kvmd.service")
    expect(box, "unit", "warn", "not installed", fix="scripts/install")
    box.remove("/run/systemd")
    expect(box, "unit", "skip")


def test_a_group_is_missing(box: DoctorHost) -> None:
    text = (box.root / "etc/group").read_text()
    box.write("/etc/group", text.replace("kvmd-operator", "operator"))
    expect(box, "groups", "warn", "kvmd-operator", fix="groupadd --system kvmd-operator")


def test_a_user_has_a_guests_uid(box: DoctorHost) -> None:
    box.write("/etc/passwd", "root:x:0:0::/root:/bin/sh\nbob:x:64200:64200::/home/bob:/bin/sh\n")
    expect(box, "uids", "fail", "uid 64200 of user bob", fix='qemu.uid_range = "64201-65200"')


def test_a_container_has_guests_uids(box: DoctorHost) -> None:
    box.write("/etc/subuid", "alice:60000:65536\nbob:125536:65536\n")
    expect(box, "uids", "fail", "60000-125535 of alice", fix='qemu.uid_range = "191072-192071"')


def test_needrestart_would_pull_the_plug(box: DoctorHost) -> None:
    box.write("/etc/needrestart/conf.d/kvmd.conf", "# $nrconf{override_rc}{qr(^kvmd-guest@)} = 0;\n")
    expect(box, "needrestart", "warn", "needrestart", fix="qr(^kvmd-guest@)")
    box.remove("/etc/needrestart")
    expect(box, "needrestart", "skip")


def test_the_clock_is_not_synchronized(box: DoctorHost) -> None:
    box.synchronized = False
    expect(box, "clock", "warn", "chronyd runs", fix="chronyc tracking")
    box.remove("/proc/500")
    expect(box, "clock", "warn", "nobody keeps", fix="systemd-timesyncd")
    box.process(501, "systemd-timesyn")
    expect(box, "clock", "warn", "systemd-timesyncd runs")
    box.synchronized = Unseen("adjtimex: Function not implemented")
    expect(box, "clock", "skip", "adjtimex")


def test_this_kernels_clock_can_be_asked() -> None:
    assert is_synchronized() in (True, False)
