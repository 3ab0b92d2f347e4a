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
    command = [sys.executable, "-m", "pytest", "-p", "tests.rig.strict", "-p", "no:cacheprovider", "-q", "-rA"]
    ran = subprocess.run(
        command,
        cwd=directory,
        env=base | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return ran.stdout + ran.stderr


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = long: slow\n")
    (tmp_path / "test_sample.py").write_text(TESTS)
    return tmp_path


def test_a_relaxed_run_skips(project: Path) -> None:
    output = run(project)
    assert "2 skipped, 1 deselected, 1 xfailed" in output, output


def test_a_strict_run_fails_what_is_not_allowed(project: Path) -> None:
    output = run(project, KVMD_TEST_STRICT="1")
    assert "1 failed, 1 skipped, 1 deselected, 1 xfailed" in output, output
    assert "does not allow this reason: Skipped: no such tool" in output, output


def test_a_strict_run_fails_a_module_left_out(project: Path) -> None:
    (project / "test_whole.py").write_text("import pytest\npytest.importorskip('no_such_module_anywhere')\n")
    output = run(project, KVMD_TEST_STRICT="1")
    assert "does not allow this reason: Skipped: could not import" in output, output
    assert "error" in output.splitlines()[-1], output


def test_a_long_run_takes_the_long_ones(project: Path) -> None:
    assert "1 passed" in run(project, KVMD_TEST_LONG="1")
