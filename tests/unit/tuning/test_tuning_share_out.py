"""Sharing memory out: sums, caps and crumbs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmd.tuning.share_out import Claim, Excess, by_water_level, in_proportion

MIB = 1 << 20


def claim(name: str, weight: float, cap_mib: int, least_mib: int = 1) -> Claim:
    return Claim(name, weight, cap_mib * MIB, least_mib * MIB)


def shares(amount_mib: int, *claims: Claim) -> dict[str, int]:
    return {name: size // MIB for name, size in in_proportion(amount_mib * MIB, claims).items()}


def test_by_weight() -> None:
    assert shares(300, claim("a", 1, 1000), claim("b", 2, 1000)) == {"a": 100, "b": 200}


def test_what_one_cannot_take_the_others_do() -> None:
    assert shares(300, claim("a", 1, 20), claim("b", 1, 1000), claim("c", 1, 1000)) == {"a": 20, "b": 140, "c": 140}


def test_who_would_get_a_crumb_gets_nothing() -> None:
    assert shares(100, claim("a", 1, 500, 16), claim("b", 9, 500, 16)) == {"b": 100}


def test_many_equal_small_parts_become_a_few_worthwhile_ones() -> None:
    found = shares(64, *(claim(f"g{n}", 1, 500, 16) for n in range(10)))
    assert sum(found.values()) >= 48
    assert all(share >= 16 for share in found.values())


def test_nothing_to_share() -> None:
    assert shares(0, claim("a", 1, 10)) == {}
    assert shares(10, claim("a", 1, 0), claim("b", 0, 100), claim("c", 1, 5, 16)) == {}


def test_water_level_takes_from_the_highest_first() -> None:
    guests = [Excess(name, excess * MIB, 100, excess * MIB, 16 * MIB) for name, excess in (("a", 900), ("b", 300))]
    assert by_water_level(400 * MIB, guests) == {"a": 400 * MIB}
    assert by_water_level(800 * MIB, guests) == {"a": 700 * MIB, "b": 100 * MIB}


def test_water_level_respects_shares() -> None:
    """Twice the shares keep twice the excess."""
    guests = [Excess(name, 600 * MIB, weight, 600 * MIB, MIB) for name, weight in (("poor", 100), ("rich", 200))]
    takes = by_water_level(600 * MIB, guests)
    assert abs((600 * MIB - takes["rich"]) - 2 * (600 * MIB - takes["poor"])) <= 3 * MIB


claims = st.lists(
    st.builds(
        claim,
        st.sampled_from("abcdefgh"),
        st.floats(0, 1e12),
        st.integers(0, 10**6),
        st.integers(0, 500),
    ),
    max_size=8,
    unique_by=lambda one: one.name,
)


@given(st.integers(0, 10**7), claims, st.randoms(use_true_random=False))
def test_never_too_much_never_a_crumb_in_any_order(amount_mib: int, given_claims: list[Claim], order: object) -> None:
    found = in_proportion(amount_mib * MIB, given_claims)
    by_name = {one.name: one for one in given_claims}
    assert sum(found.values()) <= amount_mib * MIB
    for name, share in found.items():
        assert by_name[name].least_bytes <= share <= by_name[name].cap_bytes
        assert share % MIB == 0
    order.shuffle(given_claims)  # type: ignore[attr-defined]
    assert in_proportion(amount_mib * MIB, given_claims) == found


@given(
    st.integers(0, 10**7),
    st.lists(
        st.builds(
            lambda name, excess, weight, cap, least: Excess(
                name, excess * MIB, weight, min(cap, excess) * MIB, least * MIB
            ),
            st.sampled_from("abcdefgh"),
            st.integers(0, 10**6),
            st.integers(1, 10**4),
            st.integers(0, 10**6),
            st.integers(0, 500),
        ),
        max_size=8,
        unique_by=lambda one: one.name,
    ),
)
def test_water_is_bounded_too(amount_mib: int, guests: list[Excess]) -> None:
    found = by_water_level(amount_mib * MIB, guests)
    by_name = {one.name: one for one in guests}
    assert sum(found.values()) <= amount_mib * MIB
    assert all(by_name[name].least_bytes <= take <= by_name[name].cap_bytes for name, take in found.items())
    assert by_water_level(amount_mib * MIB, list(reversed(guests))) == found
