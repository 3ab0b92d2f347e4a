"""The labs of tests/lab: one VM alive at a time, one boot a profile.

A test takes `lab` (the profile every run boots), `lab_numa`, `lab_iommu` or `lab_plain` (long: scripts/test --long), or
a fixture that does. pytest orders the tests so that each profile comes once, and ends the former VM, with every
fixture that stands on it, before it boots the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.rig.lab import Lab
from tests.rig.labprofiles import DEFAULT, PROFILES

FIXTURES = {"lab": DEFAULT} | {f"lab_{name}": name for name in PROFILES if name != DEFAULT}
# Of one profile only, as `scripts/lab test --profile NAME` asks.
ONLY = os.environ.get("KVMD_TEST_LAB")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test the machine its fixtures name. Being a parameter is what makes pytest order by it."""
    wanted = [profile for fixture, profile in FIXTURES.items() if fixture in metafunc.fixturenames]
    if len(wanted) > 1:
        raise pytest.UsageError(f"{metafunc.definition.nodeid} wants two labs, and one is alive at a time: {wanted}")
    if wanted:
        (profile,) = wanted
        marks = [] if profile == DEFAULT else [pytest.mark.long]
        metafunc.parametrize("machine", [pytest.param(profile, marks=marks)], indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of other profiles when one was asked for."""
    if ONLY is None:
        return
    ours = [item for item in items if _profile(item) in (None, ONLY)]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours


def _profile(item: pytest.Item) -> str | None:
    """The lab a test runs in."""
    parameters: dict[str, str] = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("machine")


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A booted lab of the profile that is the parameter. Its console is in pytest's temporary directory.

    Tests leave it as they found it, and may reboot it; the last one's poweroff is this fixture's.
    """
    hardware = PROFILES[request.param].hardware
    with Lab(hardware, log_dir=tmp_path_factory.mktemp(f"lab-{request.param}")) as booted:
        booted.boot()
        yield booted
        booted.poweroff()


@pytest.fixture(scope="session")
def lab(machine: Lab) -> Lab:
    """4 CPUs of which 2 and 3 are isolated, 3 GiB: the one every run boots."""
    return machine


@pytest.fixture(scope="session")
def lab_numa(machine: Lab) -> Lab:
    """2 nodes of 2 cores with 2 threads and 3 GiB each, one 1 GiB page reserved on each."""
    return machine


@pytest.fixture(scope="session")
def lab_iommu(machine: Lab) -> Lab:
    """4 CPUs, 3 GiB, an IOMMU, an SR-IOV NVMe controller, a spare one, two devices in one group."""
    return machine


@pytest.fixture(scope="session")
def lab_plain(machine: Lab) -> Lab:
    """2 CPUs, 4 GiB, nothing special: where kvmd is installed as on a fresh machine."""
    return machine
