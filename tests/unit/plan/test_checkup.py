"""The whole of doctor: a healthy host is clean, every check is documented, one broken thing changes one check."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmd.doctor import failed
from kvmd.plan.checkup import CHECKS, judge
from kvmd.plan.hostreport import HostReport, Status
from tests.rig.doctorhost import DoctorHost, doctor_host

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture
def box() -> Iterator[DoctorHost]:
    with doctor_host() as found:
        yield found


def test_a_healthy_host_has_no_warning(box: DoctorHost) -> None:
    checks = box.all()
    assert [check for check in checks if check.status in (Status.WARN, Status.FAIL)] == []
    assert [check.name for check in checks if check.status is Status.SKIP] == [
        "modules",
        "iommu",
        "passthrough",
        "bridges",
    ]
    assert not failed(checks)


def test_every_check_speaks_in_the_tables_order(box: DoctorHost) -> None:
    assert list(dict.fromkeys(check.name for check in box.all())) == list(CHECKS)


def test_an_empty_report_is_judged_without_a_crash_and_each_check_speaks() -> None:
    checks = judge(HostReport())
    silent = CHECKS.keys() - {check.name for check in checks}
    assert silent <= {"qemu"}  # there is no emulator in an empty report; a real one names at least one
    assert all(check.fix for check in checks if check.status in (Status.WARN, Status.FAIL))


def test_one_broken_thing_is_one_failure(box: DoctorHost) -> None:
    before = {check.name: check.status for check in box.all()}
    box.remove("/usr/sbin/nft")
    after = {check.name: check.status for check in box.all()}
    assert {name for name in after if after[name] != before[name]} == {"nft"}
    assert failed(box.all())


def test_a_bare_host_without_kvmd_is_examined_too(box: DoctorHost) -> None:
    box.close()
    for path in ("/run", "/var", "/etc", "/sys", "/proc", "/dev", "/lib", "/usr", "/srv"):
        box.remove(path)
    assert len({check.name for check in box.all()}) == len(CHECKS)


def test_as_another_user_what_cannot_be_seen_is_skipped(box: DoctorHost) -> None:
    box.euid, box.as_root = 1000, False
    skipped = {check.name: check.message for check in box.all() if check.status is Status.SKIP}
    assert "only root" in skipped["kvm"] and "uid 1000" in skipped["kvm"]
    assert "only root" in skipped["firewall"]


def test_every_check_is_documented() -> None:
    headings = re.findall(r"^### (\S+)$", (REPO / "docs" / "doctor.md").read_text(), re.MULTILINE)
    assert headings == list(CHECKS)


def test_every_check_is_broken_by_a_test() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_checkup_*.py"))
    tests += (REPO / "tests" / "system" / "test_doctor.py").read_text()
    broken = set(re.findall(r'expect\(\s*box, "([a-z-]+)", "(?:warn|fail)"', tests))
    broken |= set(re.findall(r'_named\([^"\n]*, "([a-z-]+)"\)', tests))
    assert CHECKS.keys() - broken == set()
