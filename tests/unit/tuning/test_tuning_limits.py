"""From the files' words to the agent's limits."""

from __future__ import annotations

from typing import Any

import pytest

from kvmd.config.guest import Guest
from kvmd.config.host import Host
from kvmd.tuning.limits import ksm_limits_of, limits_of
from kvmd.tuning.snapshot import Mode

GIB = 1 << 30


def guest(**tables: Any) -> Guest:
    tables.setdefault("memory", {})
    tables["memory"] = {"size": "4GiB", **tables["memory"]}
    return Guest.model_validate(tables)


@pytest.mark.parametrize(
    ("host", "own", "mode"),
    [
        ({}, {}, Mode.ADVISE),
        ({"mode": "apply"}, {}, Mode.APPLY),
        ({"mode": "off", "balloon": "apply"}, {}, Mode.APPLY),
        ({"mode": "apply"}, {"mode": "off"}, Mode.OFF),
        ({"mode": "off"}, {"balloon": "apply"}, Mode.APPLY),
        ({"mode": "apply"}, {"mode": "apply", "balloon": "advise"}, Mode.ADVISE),
    ],
)
def test_the_narrower_word_wins(host: dict[str, str], own: dict[str, str], mode: Mode) -> None:
    found = limits_of(Host.model_validate({"tuning": host}), {"web": guest(tuning=own)}, total_bytes=8 * GIB)
    assert found.guests["web"].mode is mode


def test_guarantee_shares_and_reserve() -> None:
    host = Host.model_validate({"memory": {"reserve": "3GiB"}})
    guests = {"a": guest(), "b": guest(memory={"guaranteed": "1GiB", "shares": 400})}
    found = limits_of(host, guests, total_bytes=8 * GIB)
    assert found.reserve_bytes == 3 * GIB
    assert found.guests["a"].guaranteed_bytes == 2 * GIB
    assert (found.guests["b"].guaranteed_bytes, found.guests["b"].shares) == (GIB, 400)
    assert GIB < limits_of(Host.model_validate({}), {}, total_bytes=8 * GIB).reserve_bytes < 2 * GIB


def test_merging() -> None:
    host = Host.model_validate({"ksm": {"mode": "kvmd", "max_cpu": "20%"}, "tuning": {"ksm": "apply"}})
    found = ksm_limits_of(host, {"a": guest(memory={"ksm_group": "web"}), "b": guest()})
    assert (found.owned, found.mode, found.max_cpu, found.members) == (True, Mode.APPLY, 0.2, 1)
    assert not ksm_limits_of(Host.model_validate({}), {}).owned
