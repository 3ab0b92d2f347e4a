"""Pytest plugin: what a test run may leave out, and how long it may search.

- KVMD_TEST_STRICT=1: a skipped test fails unless its reason matches ALLOWED, the one list of allowed reasons. An
  environment that silently lost a tool must not look green.
- Tests marked `long` are left out unless KVMD_TEST_LONG=1 (`scripts/test --long`), which also gives hypothesis its
  long profile: 1000 examples instead of 100 (KVMD_TEST_EXAMPLES sets another number; scripts/check takes a quarter).
  No deadline per example, and no complaint about slow ones: the machines are shared. Strict runs take the same examples
  each time, so that a change is judged by what it changed; `--long` and everybody's own runs search on.
- `system`, `systemd` and `lab` are set from the directory, so `-m "not lab"` needs no decorator in each file.

Loaded by `-p tests.rig.strict` in the scripts, or by `pytest_plugins = ["tests.rig.strict"]` in tests/conftest.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest

KVM_IS_REAL = "this machine has a KVM that runs Linux: the lab starts guests under one"

# Each reason is a property of the machine that no set-up script can change, and says where the thing is tested then.
ALLOWED: tuple[re.Pattern[str], ...] = (
    re.compile(r"no /dev/kvm here: the lab runs this"),
    re.compile(r"this /dev/kvm cannot boot Linux: the lab runs this"),
    re.compile(re.escape(KVM_IS_REAL)),
    re.compile(r"this kernel has no 1 GiB pages: the lab runs this"),
    re.compile(r"this kernel has no KSM"),
    re.compile(r"cgroup v2 is not in charge here: the lab runs this"),
)

STRICT = os.environ.get("KVMD_TEST_STRICT") == "1"
LONG = os.environ.get("KVMD_TEST_LONG") == "1"
TIERS = ("system", "systemd", "lab")


def allowed(reason: str) -> bool:
    """May a test be left out for this reason even when nothing may be skipped?"""
    return any(pattern.search(reason) for pattern in ALLOWED)


def pytest_configure(config: pytest.Config) -> None:
    """Choose the hypothesis profile; a test's own @settings still wins."""
    examples = int(os.environ.get("KVMD_TEST_EXAMPLES", "100"))
    patient = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
    hypothesis.settings.register_profile("quick", patient, max_examples=examples, derandomize=STRICT)
    hypothesis.settings.register_profile("long", patient, max_examples=1000)
    hypothesis.settings.load_profile("long" if LONG else "quick")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by their tier's directory and leave out the long ones."""
    tests = config.rootpath / "tests"
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        tier = _tier(item.path, tests)
        if tier in TIERS and item.get_closest_marker(tier) is None:
            item.add_marker(tier)
        (left_out if item.get_closest_marker("long") and not LONG else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def _tier(path: Path, tests: Path) -> str:
    return path.relative_to(tests).parts[0] if path.is_relative_to(tests) else ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not STRICT or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not allowed(reason):
        report.outcome = "failed"
        report.longrepr = f"skipped, and tests/rig/strict.py does not allow this reason: {reason}"
