"""Sharing a number of bytes among guests: in proportion to weights, or by a water level. Pure, total, deterministic.

All results are whole MiB, never more than asked for in sum, never above a cap, and never a crumb below a guest's
least worthwhile step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvmd.tuning.constants import MIB

_LEVEL_STEPS = 60  # bisections: exact to a byte for any 60-bit range


@dataclass(frozen=True, slots=True)
class Claim:
    """One guest's part in a sharing: `least` is the smallest step worth making."""

    name: str
    weight: float
    cap_bytes: int
    least_bytes: int


def in_proportion(amount_bytes: int, claims: Iterable[Claim]) -> dict[str, int]:
    """Shares of `amount_bytes` by weight. What one cannot take the others do; who would get a crumb gets nothing."""
    open_claims = sorted(
        (claim for claim in claims if claim.cap_bytes >= max(1, claim.least_bytes) and claim.weight > 0),
        key=lambda claim: (claim.weight, claim.name),
    )
    while open_claims:
        shares = _fill(amount_bytes, open_claims)
        crumbs = [claim for claim in open_claims if shares[claim.name] < claim.least_bytes]
        if not crumbs:
            return {name: share // MIB * MIB for name, share in shares.items() if share >= MIB}
        # the lighter half of those goes first, so that the rest may still reach a worthwhile step
        dropped = {claim.name for claim in crumbs[: (len(crumbs) + 1) // 2]}
        open_claims = [claim for claim in open_claims if claim.name not in dropped]
    return {}


def _fill(amount_bytes: int, claims: list[Claim]) -> dict[str, int]:
    """By weight with caps; whoever reaches his cap leaves the rest to the others."""
    shares: dict[str, int] = {}
    left, rest = max(0, amount_bytes), list(claims)
    while rest:
        total = sum(claim.weight for claim in rest)
        full = [claim for claim in rest if left * claim.weight / total >= claim.cap_bytes]
        if not full:
            shares.update({claim.name: int(left * claim.weight / total) for claim in rest})
            break
        for claim in full:
            shares[claim.name] = min(claim.cap_bytes, left)
            left -= shares[claim.name]
        rest = [claim for claim in rest if claim.name not in shares]
    return shares


@dataclass(frozen=True, slots=True)
class Excess:
    """How much a guest has above its guarantee, and how much of it may go now."""

    name: str
    excess_bytes: int
    shares: int
    cap_bytes: int
    least_bytes: int


def by_water_level(amount_bytes: int, guests: Iterable[Excess]) -> dict[str, int]:
    """Takes so that all end at one level of excess per share: who has most above its guarantee gives first."""
    able = [guest for guest in guests if guest.cap_bytes >= max(1, guest.least_bytes)]
    if not able or amount_bytes <= 0:
        return {}
    low, high = 0.0, max(guest.excess_bytes / guest.shares for guest in able)
    for _ in range(_LEVEL_STEPS):
        middle = (low + high) / 2
        if sum(_above(guest, middle) for guest in able) > amount_bytes:
            low = middle
        else:
            high = middle
    takes = {guest.name: _above(guest, high) // MIB * MIB for guest in able}
    takes = {guest.name: takes[guest.name] for guest in able if takes[guest.name] >= max(MIB, guest.least_bytes)}
    left = amount_bytes - sum(takes.values())
    for guest in sorted(able, key=lambda guest: (-guest.excess_bytes / guest.shares, guest.name)):
        if guest.name not in takes and MIB <= guest.least_bytes <= left:
            takes[guest.name] = guest.least_bytes  # many small parts of one need: some give a whole step, most nothing
            left -= guest.least_bytes
    return takes


def _above(guest: Excess, level: float) -> int:
    return min(guest.cap_bytes, max(0, int(guest.excess_bytes - level * guest.shares)))
