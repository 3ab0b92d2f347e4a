"""One lab VM for all of tests/lab: booting it is what costs."""

from collections.abc import Iterator

import pytest

from tests.rig.lab import Hardware, Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A booted lab: 4 CPUs of which 2 and 3 are isolated, 3 GiB. Its console is in pytest's temporary directory.

    Tests leave it as they found it, and may reboot it; the last one's poweroff is the fixture's.
    """
    hardware = Hardware(cpus=4, memory_mib=3072, kernel="isolcpus=2,3")
    with Lab(hardware, log_dir=tmp_path_factory.mktemp("lab")) as machine:
        machine.boot()
        yield machine
        machine.poweroff()
