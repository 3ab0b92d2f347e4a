"""The golden command lines: one TOML guest each in tests/data/qemu/argv, and what is built from it beside it.

scripts/regen writes them anew; the change is then read as a diff.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvmd.config.guest import Guest
from kvmd.qemu import argv, identity
from kvmd.qemu.caps import Capabilities, parse
from kvmd.qemu.fds import Launch
from kvmd.qemu.storage import ImageFact

DATA = Path(__file__).parent.parent / "data" / "qemu"
UUID = "6f0d2c6e-9a0f-4a57-8a0c-3b3f7b6f7a11"
RUN_DIR = "/run/kvmd/guests"

# What a guest's file does not say: the host's side of each golden. Absent: TCG and nothing special.
HOST: Mapping[str, Mapping[str, Any]] = {
    "kvm": {"accel": "kvm", "vhost": True, "mtus": {"lan": 9000}, "images": {"root": ImageFact(block=True)}},
    "server": {"mtus": {"lan": 1500}},
    "hugepages": {"memory_nodes": (0,), "prealloc_threads": 2},
    "thp": {"hugepages": False},
    "pc": {"images": {"cd1": ImageFact(direct=False)}},
}


def recorded() -> Capabilities:
    """QEMU 7.2 as recorded under TCG, and it says that its KVM would work too."""
    return parse(json.loads((DATA / "replies-7.2.json").read_text()))


def names() -> list[str]:
    """All goldens."""
    return sorted(path.stem for path in (DATA / "argv").glob("*.toml"))


def guest(name: str) -> Guest:
    """The golden's guest."""
    return Guest.model_validate(tomllib.loads((DATA / "argv" / f"{name}.toml").read_text()))


def launch(name: str, caps: Capabilities, **host: Any) -> Launch:
    """What is built for the golden of that name; `host` replaces single words of HOST."""
    file = guest(name)
    allotted = identity.allot(name, file, None, caps, UUID)
    words: dict[str, Any] = {"accel": "tcg", "run_dir": f"{RUN_DIR}/{name}", **HOST.get(name, {}), **host}
    return argv.build(name, file, allotted, caps, **words)


def text(built: Launch) -> str:
    """One option a line with its value behind it, then the fds and the warnings."""
    lines: list[str] = []
    for argument in built.args:
        if argument.startswith("-") or not lines:
            lines.append(argument)
        else:
            lines[-1] += f" {argument}"
    lines += ["", *map(str, built.opens)]
    lines += [f"warning: {warning}" for warning in built.warnings]
    return "\n".join(lines) + "\n"
