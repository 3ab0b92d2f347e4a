"""tests/rig/strict.py: in strict mode a skip is a failure unless its reason is on the list."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]

TESTS = """
import pytest

@pytest.mark.skip(reason="no such tool")
def test_not_allowed():
    pass

def test_allowed():
    pytest.skip("no /dev/kvm here: the lab runs this")

@pytest.mark.xfail(reason="known", strict=True)
def test_expected_failure():
    assert False

@pytest.mark.long
def test_long():
    pass
"""


def run(directory: Path, **environment: str) -> str:
    base = {key: value for key, value in os.environ.items() if not key.startswith(("KVMD_TEST", "PYTEST"))}
    command = [sys.executable, "-m", "pytest", "-p", "tests.rig.strict", "-q", "--continue-on-collection-errors"]
    ran = subprocess.run(
        command,
        cwd=directory,
        env=base | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return ran.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = long: slow\n")
    (tmp_path / "test_sample.py").write_text(TESTS)
    return tmp_path


def test_a_relaxed_run_skips_and_a_long_one_takes_the_long_tests(project: Path) -> None:
    output = run(project, KVMD_TEST_LONG="1")
    assert "1 passed, 2 skipped, 1 xfailed" in output, output


def test_a_strict_run_fails_what_the_list_does_not_allow(project: Path) -> None:
    (project / "test_whole.py").write_text("import pytest\npytest.importorskip('no_such_module_anywhere')\n")
    output = run(project, KVMD_TEST_STRICT="1")
    assert "1 skipped, 1 deselected, 1 xfailed, 2 errors" in output, output
    assert "does not allow this reason: Skipped: no such tool" in output, output
    assert "does not allow this reason: Skipped: could not import" in output, output
