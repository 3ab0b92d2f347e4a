"""Pools of virtual functions: made, changed by way of 0 while none is in use, given back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import SetVfs
from kvmd.config.host import Sriov
from kvmd.facts import Facts, GuestLife, HostUse, PciDevice
from kvmd.plan.release import plan_release
from kvmd.plan.sriov import plan_sriov

CARD, OTHER = "0000:af:00.0", "0000:5e:00.0"


def world(vfs: int, *, total: int = 8, driver: str | None = "ice", used: int = 0, by_host: int = 0) -> Facts:
    card = PciDevice(CARD, 0x020000, driver, group=20, total_vfs=total, vfs=vfs, links=("ens1",))
    functions = tuple(
        PciDevice(
            f"0000:af:02.{n}",
            0x020000,
            "vfio-pci" if n < used else None,
            group=30 + n,
            parent=CARD,
            index=n,
            uses=(HostUse(f"v{n}", "is below br0"),) if used <= n < used + by_host else (),
        )
        for n in range(vfs)
    )
    reservations = {f"0000:af:02.{n}": "web" for n in range(used)}
    lives = (GuestLife("web", alive=True, wanted=True),)
    return Facts(
        pci=(card, *functions, PciDevice(OTHER, 0x010802, "nvme", total_vfs=4)), reservations=reservations, lives=lives
    )


def pools(**numbers: int) -> dict[str, Sriov]:
    return {name: Sriov(vfs=number) for name, number in numbers.items()}


def test_made_kept_and_changed() -> None:
    actions, problems = plan_sriov(pools(ens1=4), world(0))
    assert [action.line() for action in actions] == ["~ ens1: 0 -> 4 virtual functions"]
    assert (actions[0].why, actions[0].autoprobe, problems) == ("sriov.ens1.vfs = 4", False, ())
    assert plan_sriov(pools(ens1=4), world(4)) == ((), ())
    assert plan_sriov(pools(ens1=4), world(4, used=4)) == ((), ())
    assert plan_sriov(pools(ens1=6), world(4))[0][0].line() == "~ ens1: 4 -> 6 virtual functions"


def test_a_device_without_an_interface_goes_by_its_address() -> None:
    actions, problems = plan_sriov({OTHER: Sriov(vfs=4)}, world(0))
    assert [(action.device, action.new) for action in actions] == [(OTHER, 4)]
    assert problems == ()


def test_what_is_in_use_is_not_taken_away_and_the_arithmetic_is_said() -> None:
    actions, (problem,) = plan_sriov(pools(ens1=8), world(4, used=2, by_host=1))
    assert actions == ()
    assert problem.message == (
        "8 virtual functions are wanted, 4 are there and 3 of them in use (0000:af:02.0 by guest web, "
        "0000:af:02.1 by guest web, 0000:af:02.2 by the host (v2 is below br0)); "
        "the kernel goes from 4 to 8 only by way of 0"
    )
    assert problem.hint == "stop these guests, then kvmd-cli apply"


def test_one_that_comes_back_in_this_pass_is_free() -> None:
    left = replace(world(4, used=2), lives=(GuestLife("web", alive=False, wanted=False),))
    actions, problems = plan_sriov(pools(ens1=8), left)
    assert (len(actions), problems) == (1, ())


@pytest.mark.parametrize(
    ("facts", "number", "said"),
    [
        (world(0), 9, "9 virtual functions are wanted, 0000:af:00.0 has at most 8"),
        (world(0, total=0), 1, "0000:af:00.0 has no virtual functions"),
        (world(0, driver=None), 1, "0000:af:00.0 has no driver, which would make them"),
        (Facts(pci=(PciDevice(OTHER, total_vfs=4),)), 1, "this host has no such device"),
    ],
)
def test_what_cannot_be(facts: Facts, number: int, said: str) -> None:
    actions, (problem,) = plan_sriov(pools(ens1=number), facts)
    assert actions == ()
    assert problem.message == said
    assert problem.hint


def test_a_pool_no_file_declares_any_more_goes_back_to_what_it_was() -> None:
    (action,), _ = plan_sriov({}, replace(world(4), vfs_before={CARD: 0}))
    assert (action.new, action.autoprobe, action.why) == (0, True, "no file declares sriov.ens1 any more")
    assert plan_sriov({}, replace(world(4, used=1), vfs_before={CARD: 0})) == ((), ())
    assert plan_sriov({}, world(4)) == ((), ()), "what kvmd did not make is not kvmd's"


@given(st.integers(0, 10), st.integers(0, 8), st.integers(0, 8), st.integers(0, 8))
def test_a_second_plan_is_empty_and_nobody_loses_a_function(wanted: int, now: int, used: int, by_host: int) -> None:
    used = min(used, now)
    facts = world(now, used=used, by_host=by_host)
    actions, problems = plan_sriov(pools(ens1=wanted), facts)
    assert len(actions) + len(problems) <= 1
    if actions:
        (action,) = actions
        assert (action.device, action.old, action.new) == (CARD, now, wanted)
        assert used == 0 or now == 0
        assert min(by_host, now - used) == 0
        assert plan_sriov(pools(ens1=wanted), world(wanted)) == ((), ())
    elif not problems:
        assert wanted == now


def test_release() -> None:
    (undo,) = plan_release([("sriov", CARD, "0,1", "4")], world(4))
    assert undo.action == SetVfs(device=CARD, pool="ens1", old=4, new=0, autoprobe=True, why="kvmd lets go of the host")
    (undo,) = plan_release([("sriov", CARD, "0,1", "4")], world(4, used=1))
    assert undo.action is None
    assert undo.kept == "ens1 keeps its 4 virtual functions: 0000:af:02.0 by guest web"
    (undo,) = plan_release([("sriov", CARD, "0,1", "4")], Facts())
    assert (undo.action, undo.kept) == (None, None)
