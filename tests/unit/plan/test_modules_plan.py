"""modules.load: what is loaded, what cannot be had and why, and what release takes out again."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import LoadModule, UnloadModule
from kvmd.config.desired import Desired
from kvmd.config.host import Host
from kvmd.facts import Facts, Module
from kvmd.plan.modules import NODES, plan_modules
from kvmd.plan.release import plan_release

NAMES = ("tun", "vhost_net", "vfio_pci", "kvm", "kvm_amd", "nbd")
STATES = ("loaded", "builtin", "available", "absent", "unknown")


def desired(*names: str) -> Desired:
    return Desired(host=Host.model_validate({"modules": {"load": list(names)}}))


def facts(*modules: Module, nodes: tuple[str, ...] = (), kernel: str = "6.1.0-56-amd64") -> Facts:
    return Facts(kernel=kernel, modules={module.name: module for module in modules}, nodes=frozenset(nodes))


def test_what_is_missing_is_loaded_and_what_is_there_is_not() -> None:
    world = facts(Module("tun", "available"), Module("nbd", "builtin"), Module("vhost_net", "loaded", 3))
    actions, problems = plan_modules(
        desired("tun", "nbd", "vhost-net"), replace(world, nodes=frozenset(NODES.values()))
    )
    assert [action.line() for action in actions] == ["+ module tun"]
    assert actions[0].why == "modules.load names it"
    assert problems == ()


@pytest.mark.parametrize(
    ("module", "kernel", "said", "hint"),
    [
        (Module("tun", "loaded"), "6.1", "it is loaded, but there is no /dev/net/tun", "mknod -m 0666 /dev/net/tun"),
        (Module("kvm", "loaded"), "6.1", "it is loaded, but there is no /dev/kvm", "kvm_intel or kvm_amd"),
        (Module("kvm_amd", "builtin"), "6.1", "it is built in, but there is no /dev/kvm", "firmware"),
        (Module("vfio_pci", "absent"), "6.1.0-56-cloud-amd64", "kernel 6.1.0-56-cloud-amd64 has no module", "cloud"),
        (Module("tnu", "absent"), "6.1.0-56-amd64", "has no module of this name", "modinfo tnu"),
        (Module("tun", "unknown"), "6.18", "no /lib/modules/6.18 to load it from", "reboot"),
        (Module("nbd", "unknown"), "6.18", "cannot tell whether kernel 6.18 has it", "built in"),
    ],
)
def test_what_cannot_be_had_says_why_and_what_to_do(module: Module, kernel: str, said: str, hint: str) -> None:
    actions, problems = plan_modules(desired(module.name), facts(module, kernel=kernel))
    assert actions == ()
    (problem,) = problems
    assert problem.subject == f"module {module.name}"
    assert said in problem.message
    assert hint in (problem.hint or "")


def test_a_kernel_without_modules_that_has_the_device_is_as_wanted() -> None:
    assert plan_modules(desired("tun"), facts(Module("tun", "unknown"), nodes=("/dev/net/tun",))) == ((), ())


@given(
    st.lists(st.sampled_from(NAMES), unique=True),
    st.fixed_dictionaries({name: st.sampled_from(STATES) for name in NAMES}),
    st.randoms(use_true_random=False),
)
def test_a_second_plan_is_empty_and_the_order_does_not_matter(
    names: list[str], states: dict[str, str], random: Random
) -> None:
    world = facts(*(Module(name, state) for name, state in states.items()))  # type: ignore[arg-type]
    actions, problems = plan_modules(desired(*names), world)
    shuffled = list(names)
    random.shuffle(shuffled)
    assert plan_modules(desired(*shuffled), world) == (actions, problems)
    assert all(isinstance(action, LoadModule) for action in actions)
    loaded = {action.name for action in actions if isinstance(action, LoadModule)}
    after = replace(
        world,
        modules={n: replace(m, state="loaded") if n in loaded else m for n, m in world.modules.items()},
        nodes=frozenset(NODES[name] for name in loaded if name in NODES),
    )
    again, left = plan_modules(desired(*names), after)
    assert again == ()
    assert {problem.subject for problem in left} <= {problem.subject for problem in problems}


def test_release_takes_out_what_kvmd_loaded_unless_somebody_uses_it() -> None:
    entries = [("module", name, "", name) for name in ("tun", "vhost_net", "vfio_pci", "nbd")]
    world = facts(
        Module("tun", "loaded", 2),
        Module("vhost_net", "loaded"),
        Module("vfio_pci", "available"),
        Module("nbd", "builtin"),
    )
    undos = {undo.key: undo for undo in plan_release(entries, world)}
    assert undos["module:tun"].kept == "module tun stays: it is in use (2 times)"
    assert undos["module:tun"].action is None
    assert isinstance(undos["module:vhost_net"].action, UnloadModule)
    assert undos["module:vfio_pci"].action is None
    assert undos["module:nbd"].action is None
