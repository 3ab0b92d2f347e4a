"""What every test gets: the strict rule, and fixtures of a whole kvmd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.rig.kvmdhost import KvmdHost, kvmd_host

pytest_plugins = ["tests.rig.strict"]


@pytest.fixture
def host() -> Iterator[KvmdHost]:
    """A kvmd with private directories in a network namespace of its own; not started yet."""
    with kvmd_host() as found:
        yield found


@pytest.fixture(params=["fresh", "adopted"])
def life(request: pytest.FixtureRequest) -> str:
    """Each guest test runs on a fresh guest, and on one adopted after kvmd was killed with SIGKILL."""
    return str(request.param)
