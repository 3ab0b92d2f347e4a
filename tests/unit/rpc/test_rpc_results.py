"""kvmd/rpc/results.py: the shapes clients rely on, and that nothing else passes."""

from __future__ import annotations

import inspect
import json

import pytest
from pydantic import BaseModel, ValidationError

from kvmd.rpc import results
from kvmd.rpc.results import ApplyParams, GuestList, GuestSummary, SubscribeParams, TuneHost

MODELS = [
    model
    for _, model in inspect.getmembers(results, inspect.isclass)
    if issubclass(model, BaseModel) and model.__module__ == results.__name__ and "[" not in model.__name__
]
SUMMARY = GuestSummary(
    name="web",
    state="running",
    reason=None,
    uuid="u",
    pid=5,
    vcpus=2,
    memory_bytes=1 << 30,
    balloon_bytes=None,
    wanted="running",
    since=1.5,
    pending=("memory.size",),
    stale=False,
    held=None,
    observed_at=2.5,
)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_shape_is_frozen_and_says_what_it_is(model: type[BaseModel]) -> None:
    assert model.model_config.get("frozen") is True
    assert model.__doc__
    if model.__pydantic_root_model__ or model is TuneHost:
        return
    assert model.model_config.get("extra") == "forbid"
    assert model.model_config.get("strict") is True


def test_names_without_a_value_are_null_and_present() -> None:
    (guest,) = json.loads(GuestList(guests=(SUMMARY,)).model_dump_json())["guests"]
    assert guest == {
        "name": "web",
        "state": "running",
        "reason": None,
        "uuid": "u",
        "pid": 5,
        "vcpus": 2,
        "memory_bytes": 1 << 30,
        "balloon_bytes": None,
        "wanted": "running",
        "since": 1.5,
        "pending": ["memory.size"],
        "stale": False,
        "held": None,
        "observed_at": 2.5,
    }


def test_a_result_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        SUMMARY.state = "stopped"  # type: ignore[misc]


def test_a_state_that_does_not_exist_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValidationError, match="state"):
        GuestSummary(**(SUMMARY.model_dump() | {"state": "dead"}))


@pytest.mark.parametrize("allow", [["none"], ["guest"] * 4, "guest", ["everything"]])
def test_apply_allows_nothing_by_a_typo(allow: object) -> None:
    with pytest.raises(ValidationError):
        ApplyParams.model_validate_json(json.dumps({"allow": allow}))


@pytest.mark.parametrize("wrong", [{"since": -1}, {"since": 1.5}, {"types": [""]}, {"types": ["x"] * 65}])
def test_wrong_subscriptions(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SubscribeParams.model_validate_json(json.dumps(wrong))
