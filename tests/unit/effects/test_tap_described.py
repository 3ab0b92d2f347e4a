"""A NIC's port is written down with its guest's start: all of it is data that JSON takes."""

from __future__ import annotations

import json
from ipaddress import IPv4Address
from typing import Any

import pytest

from kvmd.config.devices import Nic
from kvmd.effects.descriptors import TapPlan
from kvmd.effects.laststart import described
from kvmd.plan.ports import tbf_of
from kvmd.plan.vlans import VlanWish
from kvmd.qemu.fds import OpenTap
from kvmd.standby import TAP_KEYS
from kvmd.units import Rate


@pytest.mark.parametrize("keys", [{}, {"vlan": 10}, {"vlans": (10, 20), "native_vlan": 5}])
def test_vlans_are_written_down(keys: dict[str, Any]) -> None:
    nic = Nic.model_validate({"network": "lan", "ipv4": IPv4Address("10.0.0.9"), **keys})
    plan = TapPlan("kv0", "br0", 1500, "kvmd:lan:web:a", port_isolated=False, vlans=VlanWish.of(nic))
    (entry,) = json.loads(json.dumps(described(OpenTap(10, "a", 0, 1), {"a": plan}, ())))
    # A key that standby.py does not know: without kvmd such a NIC is left unplugged rather than in a wrong VLAN.
    assert entry["tap"]["vlans"]["vlan"] == keys.get("vlan")


def test_a_port_with_rules_or_a_limit_is_one_that_only_kvmd_can_open() -> None:
    limited = TapPlan("kv0", "br0", 1500, "kvmd:lan:web:a", tbf=tbf_of(Rate.parse("10Mbit")), fenced=True)
    (entry,) = described(OpenTap(10, "a", 0, 1), {"a": limited}, [])
    assert {"tbf", "fenced"} <= json.loads(json.dumps(entry))["tap"].keys() - TAP_KEYS
