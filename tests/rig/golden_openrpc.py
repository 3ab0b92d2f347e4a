"""The API as its own document: what clients in other languages are generated from, kept as a diff."""

from __future__ import annotations

import json
from typing import Any, cast

from kvmd.manager import Manager
from kvmd.rpc.builtin import add_builtin
from kvmd.rpc.events import EventHub
from kvmd.rpc.methods import Methods
from kvmd.rpc.networks import NetworkMethods
from kvmd.rpc.registry import Registry
from kvmd.rpc.standing import StandingMethods
from kvmd.tuning.agent import Agent


def registry() -> Registry:
    """Every method of the daemon, with nothing behind it."""
    found = Registry()
    add_builtin(found, EventHub(), version="0")
    nothing: Any = None
    Methods(cast(Manager, nothing), lambda: cast(Agent, nothing), started_at=0.0).add_to(found)
    StandingMethods(cast(Manager, nothing)).add_to(found)
    NetworkMethods(cast(Manager, nothing)).add_to(found)
    return found


def text() -> str:
    """The OpenRPC document, version left out so that a release changes nothing here."""
    return json.dumps(registry().discover(version="0"), indent=1, sort_keys=True) + "\n"
