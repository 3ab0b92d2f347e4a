"""The real table of methods: its document, and who may call what."""

from __future__ import annotations

import re
from pathlib import Path

from tests.rig.golden_openrpc import registry, text
from tests.rig.rolematrix import check_roles

ROOT = Path(__file__).resolve().parents[3]


def test_the_document_is_the_golden_one() -> None:
    """When this fails and the change is meant: scripts/regen, and read the diff as a client would."""
    assert (ROOT / "tests/data/openrpc.json").read_text() == text()


async def test_nobody_may_more_than_his_role() -> None:
    assert await check_roles(registry()) == len(registry().methods) >= 20


def test_every_method_is_documented() -> None:
    documented = (ROOT / "docs/api.md").read_text()
    missing = [name for name in registry().methods if not re.search(rf"`{re.escape(name)}`", documented)]
    assert not missing
