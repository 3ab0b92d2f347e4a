"""When each line of a plan takes effect, and at whose cost: the groups people read a plan in. Pure."""

from __future__ import annotations

from enum import StrEnum
from typing import assert_never

from kvmd.actions import Disruption


class When(StrEnum):
    """The groups, the harmless first."""

    NOW = "now"  # disturbs nobody
    NETWORK = "network"  # networks are interrupted
    GUEST_RESTART = "guest-restart"  # guests are stopped or get a new QEMU
    HOST = "host"  # the host changes under everyone
    REBOOT = "reboot"  # nothing but a reboot of the host brings it


def when(disruption: Disruption) -> When:
    """The group of an action that disturbs this much."""
    match disruption:
        case Disruption.NONE:
            return When.NOW
        case Disruption.NETWORK:
            return When.NETWORK
        case Disruption.GUEST:
            return When.GUEST_RESTART
        case Disruption.HOST:
            return When.HOST
    assert_never(disruption)
