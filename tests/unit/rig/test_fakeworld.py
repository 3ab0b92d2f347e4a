"""tests/rig/fakeworld.py knows every action there is, and journals what kvmd journals."""

from __future__ import annotations

from typing import get_args

from kvmd.actions import GuestAction, HostAction
from kvmd.effects.records import EffectKind
from tests.rig import fakeworld


def test_every_action_has_its_effect_on_the_fake_world() -> None:
    """When this fails: write the function in tests/rig/fakeworld.py, and a drift in tests/unit/plan/test_drift.py."""
    assert set(get_args(HostAction)) | set(get_args(GuestAction)) == set(fakeworld.EFFECTS)


def test_every_kind_of_effect_can_be_undone() -> None:
    """plan/release.py answers for each kind that is journalled; "written by another version" is for none of ours."""
    from kvmd.plan.release import plan_release

    subjects = {EffectKind.HUGEPAGES: "0:2097152", EffectKind.VFIO_GROUP: "1"}
    for kind in EffectKind:
        original = "0,1" if kind == EffectKind.SRIOV else "0"
        for undo in plan_release([(kind, subjects.get(kind, "x"), original, "1")], fakeworld.fresh()):
            assert undo.kept is None or "another version" not in undo.kept, kind
