"""What the configuration says about tuning, in the agent's own terms. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from kvmd.config.guest import Guest
from kvmd.config.host import Host
from kvmd.plan.admission import reserve_bytes
from kvmd.tuning.ksm import KsmLimits
from kvmd.tuning.snapshot import GuestLimits, Limits, Mode

GUARANTEED_FRACTION = 0.5  # of memory.size where memory.guaranteed is not given: ballooning on, never down to the bone


def limits_of(host: Host, guests: Mapping[str, Guest], *, total_bytes: int) -> Limits:
    """Limits for ballooning. `total_bytes` is the machine's RAM, of which `memory.reserve = "auto"` is a part."""
    mode = Mode(host.tuning.balloon or host.tuning.mode)
    return Limits(
        mode=mode,
        reserve_bytes=reserve_bytes(host.memory.reserve, total_bytes),
        guests=MappingProxyType({name: _guest_limits(guest, mode) for name, guest in sorted(guests.items())}),
    )


def advise_only(limits: Limits) -> Limits:
    """The same, with nothing carried out."""
    guests = {name: replace(guest, mode=_at_most_advice(guest.mode)) for name, guest in limits.guests.items()}
    return replace(limits, mode=_at_most_advice(limits.mode), guests=MappingProxyType(guests))


def _at_most_advice(mode: Mode) -> Mode:
    return Mode.ADVISE if mode is Mode.APPLY else mode


def ksm_limits_of(host: Host, guests: Mapping[str, Guest]) -> KsmLimits:
    """Limits for page merging."""
    return KsmLimits(
        owned=host.ksm.mode == "kvmd",
        mode=Mode(host.tuning.ksm or host.tuning.mode),
        max_cpu=float(host.ksm.max_cpu),
        members=sum(guest.memory.ksm_group is not None for guest in guests.values()),
    )


def _guest_limits(guest: Guest, host_mode: Mode) -> GuestLimits:
    """The guest's own word wins over the host's, the narrower key over `mode`."""
    own = guest.tuning.balloon or guest.tuning.mode
    size = int(guest.memory.size)
    guaranteed = guest.memory.guaranteed
    return GuestLimits(
        guaranteed_bytes=int(guaranteed) if guaranteed is not None else int(size * GUARANTEED_FRACTION),
        shares=guest.memory.shares,
        mode=Mode(own) if own else host_mode,
        dedicated=guest.cpu.placement == "dedicated",
    )
