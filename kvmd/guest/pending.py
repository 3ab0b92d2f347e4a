"""What of a running guest's file waits for a new QEMU: the file now against what its run was started with."""

from __future__ import annotations

import json
from typing import Any

from kvmd.config.catalogue import generic, keys_of
from kvmd.config.guest import Guest
from kvmd.effects.records import GuestRun
from kvmd.guest.started import started_config


def pending_changes(run: GuestRun | None, guest: Guest | None) -> tuple[str, ...]:
    """Keys in which the file differs from what the running QEMU was started with, and that need a new one."""
    if run is None or guest is None or not run.config_text:
        return ()
    text = guest.model_dump_json(by_alias=True)
    if text == run.config_text:
        return ()
    old, new = started_config(run), json.loads(text)
    return tuple(key for key in _differences(old, new) if _needs_restart(key) or _is_of_a_function(key, guest))


def _needs_restart(key: str) -> bool:
    found = keys_of("guests.d").get(".".join(generic("guests.d", tuple(key.split(".")))))
    return found is not None and found.applies == "restart"


def _is_of_a_function(key: str, guest: Guest) -> bool:
    """The VLAN of a virtual function is set before it is given to the guest."""
    table, _, rest = key.partition(".")
    name, _, word = rest.partition(".")
    return table == "nic" and word == "vlan" and name in guest.nic and guest.nic[name].type == "vf"


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted paths of all leaves that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return [] if old == new else [prefix]
