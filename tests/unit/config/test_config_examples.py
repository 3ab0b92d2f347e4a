"""The files in etc/: clean as they are, and still clean with every commented setting switched on."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from kvmd.config.load import check

ETC = Path(__file__).parents[3] / "etc"
EXAMPLES = sorted(path.relative_to(ETC) for path in ETC.rglob("*.toml*") if "cron" not in path.parts)


def installed(target: Path, *, everything: bool) -> None:
    for path in EXAMPLES:
        file = target / str(path).removesuffix(".example")
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ETC / path, file)
        if everything:
            # Settings have no space behind the "#"; comments do.
            file.write_text(re.sub(r"^#(?! )", "", file.read_text(), flags=re.MULTILINE))
    # What the examples name, and two pages that cannot both be this host's.
    (target / "guests.d/nas.toml").write_text('[memory]\nsize = "1GiB"\n[nic.lan]\nnetwork = "lan"\n')


@pytest.mark.parametrize("everything", [False, True])
def test_examples_check_clean(tmp_path: Path, *, everything: bool) -> None:
    installed(tmp_path, everything=everything)
    loaded = check(tmp_path)
    assert [str(fault) for fault in loaded.faults if "does not exist" not in fault.message] == []
    assert sorted(loaded.desired.guests) == ["nas", "web"]
    assert sorted(loaded.desired.networks) == ["backend", "lan", "servers"]
    if everything:
        web = loaded.desired.guests["web"]
        assert web.rng.source == "builtin", "the profile lies below"
        assert web.memory.hugepage_size == 2 << 20


def test_an_example_of_each_file() -> None:
    names = {str(path) for path in EXAMPLES}
    assert {"kvmd.toml", "host.toml", "networks.d/lan.toml.example", "guests.d/web.toml.example"} <= names
    assert "profiles.d/linux.toml.example" in names


@pytest.mark.parametrize("file", ["kvmd.toml", "host.toml"])
def test_commented_defaults_are_the_defaults(tmp_path: Path, file: str) -> None:
    """A setting shown as a default must be it (tuning.* and hugepages are examples)."""
    plain = check(tmp_path)
    text = re.sub(r"^#(?! )", "", (ETC / file).read_text(), flags=re.MULTILINE)
    text = re.sub(r"^(balloon|ksm|placement|default_profile) = .*$", "", text, flags=re.MULTILINE)
    (tmp_path / file).write_text(re.sub(r"^\[hugepages[^[]*", "", text, flags=re.MULTILINE))
    full = check(tmp_path)
    assert full.errors == ()
    assert (full.desired.daemon, full.desired.host) == (plain.desired.daemon, plain.desired.host)
