"""A half-finished edit, a typo plus a reboot, an unmounted directory: what was good goes on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from kvmd.config.load import load, save_last_good

GUEST = '[memory]\nsize = "{}"\n[nic.a]\ntype = "user"\n'
ISOLATED = '[network]\nmode = "isolated"\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    root = tmp_path / "etc"
    for directory in ("guests.d", "networks.d", "profiles.d"):
        (root / directory).mkdir(parents=True)
    (root / "guests.d/a.toml").write_text(GUEST.format("1GiB"))
    (root / "guests.d/b.toml").write_text(GUEST.format("2GiB"))
    (root / "networks.d/lan.toml").write_text(ISOLATED)
    (root / "host.toml").write_text("[cpu]\novercommit_ratio = 2.0\n")
    (root / "kvmd.toml").write_text("[apply]\nmax_stops = 7\n")
    return root


@pytest.fixture
def good(config: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "good"
    save_last_good(load(config), directory)
    return directory


def test_what_is_kept(good: Path) -> None:
    kept = sorted(str(path.relative_to(good)) for path in good.rglob("*") if path.is_file())
    assert kept == ["guests.d/a.toml", "guests.d/b.toml", "host.toml", "kvmd.toml", "networks.d/lan.toml"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in good.rglob("*"))


def test_saving_twice_writes_nothing(config: Path, good: Path) -> None:
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in good.rglob("*.toml")}
    save_last_good(load(config, last_good_dir=good), good)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in good.rglob("*.toml")} == before


@pytest.mark.parametrize("text", ["[", '[memory]\nsise = "9GiB"\n', "x" * (2 << 20), ""])
def test_a_broken_guest_runs_from_its_last_good_version(config: Path, good: Path, text: str) -> None:
    (config / "guests.d/a.toml").write_text(text)
    loaded = load(config, last_good_dir=good)
    assert loaded.desired.stale == {"a"}
    assert {name: guest.memory.size >> 30 for name, guest in loaded.desired.guests.items()} == {"a": 1, "b": 2}
    assert loaded.faulty == {"guests.d/a.toml"}

    save_last_good(loaded, good)
    assert (good / "guests.d/a.toml").read_text() == GUEST.format("1GiB"), "the good one is not overwritten"


def test_without_a_last_good_version_it_is_left_out(config: Path) -> None:
    (config / "guests.d/a.toml").write_text("[")
    assert list(load(config).desired.guests) == ["b"]


def test_other_files_too(config: Path, good: Path) -> None:
    (config / "host.toml").write_text("[cpu]\novercommit_ratio = 'x'\n")
    (config / "kvmd.toml").write_text("[")
    (config / "networks.d/lan.toml").write_text("")
    loaded = load(config, last_good_dir=good)
    assert loaded.desired.stale == {"host.toml", "kvmd.toml", "networks.d/lan.toml"}
    assert loaded.desired.host.cpu.overcommit_ratio == 2.0
    assert loaded.desired.daemon.apply.max_stops == 7
    assert loaded.desired.networks["lan"].network.mode == "isolated"


def test_removed_files_are_gone(config: Path, good: Path) -> None:
    for file in ("guests.d/a.toml", "host.toml", "networks.d/lan.toml"):
        (config / file).unlink()
    loaded = load(config, last_good_dir=good)
    assert loaded.faults == ()
    assert list(loaded.desired.guests) == ["b"]
    assert loaded.desired.host.cpu.overcommit_ratio == 4.0
    save_last_good(loaded, good)
    assert not (good / "guests.d/a.toml").exists()
    assert not (good / "host.toml").exists()


@pytest.mark.parametrize("how", ["empty", "gone", "file", "everything"])
def test_a_directory_that_lost_its_guests_stops_nothing(config: Path, good: Path, how: str) -> None:
    shutil.rmtree(config if how == "everything" else config / "guests.d")
    if how == "empty":
        (config / "guests.d").mkdir()
        (config / "guests.d/README").write_text("")
    if how == "file":
        (config / "guests.d").write_text("")

    loaded = load(config, last_good_dir=good)

    assert sorted(loaded.desired.guests) == ["a", "b"]
    assert {"a", "b"} <= loaded.desired.stale
    message = "is empty or cannot be read, but 2 guests were in it: they stay as they were"
    assert [fault.message for fault in loaded.errors if "guests were in it" in fault.message] == [message]
    save_last_good(loaded, good)
    assert sorted(path.name for path in (good / "guests.d").iterdir()) == ["a.toml", "b.toml"]


def test_a_new_host_without_guests_is_no_fault(tmp_path: Path) -> None:
    assert load(tmp_path).faults == ()
    (tmp_path / "guests.d").mkdir()
    assert load(tmp_path, last_good_dir=tmp_path / "none").faults == ()


def test_a_profile_is_kept_with_each_guest(config: Path, good: Path) -> None:
    for name in ("a", "b"):
        (config / f"guests.d/{name}.toml").write_text('[guest]\nprofile = "p"\n' + GUEST.format("1GiB"))
    (config / "profiles.d/p.toml").write_text("[cpu]\nvcpus = 3\n")
    save_last_good(load(config, last_good_dir=good), good)
    assert (good / "profiles.d/a.toml").read_text() == "[cpu]\nvcpus = 3\n"

    # A change of the profile that spoils one guest only.
    (config / "guests.d/a.toml").write_text('[guest]\nprofile = "p"\n[cpu]\ncores = 3\n' + GUEST.format("1GiB"))
    save_last_good(load(config, last_good_dir=good), good)
    (config / "profiles.d/p.toml").write_text("[cpu]\nvcpus = 4\n")
    loaded = load(config, last_good_dir=good)
    save_last_good(loaded, good)

    assert loaded.desired.stale == {"a"}
    assert {name: guest.cpu.vcpus for name, guest in loaded.desired.guests.items()} == {"a": 3, "b": 4}
    assert [str(fault) for fault in loaded.errors] == [
        "profiles.d/p.toml:2: cpu.vcpus: sockets 1 x dies 1 x cores 3 x threads 1 = 3, but cpu.vcpus = 4, "
        "with guests.d/a.toml"
    ]
    assert loaded.faulty == {"guests.d/a.toml", "profiles.d/p.toml"}
    assert load(config, last_good_dir=good).desired == loaded.desired, "and it stays so"


def test_a_broken_profile_spoils_no_running_guest(config: Path, good: Path) -> None:
    (config / "guests.d/a.toml").write_text('[guest]\nprofile = "p"\n' + GUEST.format("1GiB"))
    (config / "profiles.d/p.toml").write_text("[cpu]\nvcpus = 3\n")
    save_last_good(load(config, last_good_dir=good), good)
    (config / "profiles.d/p.toml").write_text("[cpu]\nvcpu = 3\n")
    loaded = load(config, last_good_dir=good)
    assert loaded.desired.guests["a"].cpu.vcpus == 3
    assert loaded.desired.stale == {"a"}
    assert [str(fault) for fault in loaded.errors] == [
        "guests.d/a.toml:2: guest.profile: profiles.d/p.toml has faults, so this guest cannot be read",
        "profiles.d/p.toml:2: cpu.vcpu: unknown key (did you mean cpu.vcpus?)",
    ]


def test_dropping_the_profile_drops_its_copy(config: Path, good: Path) -> None:
    (config / "guests.d/a.toml").write_text('[guest]\nprofile = "p"\n' + GUEST.format("1GiB"))
    (config / "profiles.d/p.toml").write_text("[cpu]\nvcpus = 3\n")
    save_last_good(load(config, last_good_dir=good), good)
    (config / "guests.d/a.toml").write_text(GUEST.format("1GiB"))
    save_last_good(load(config, last_good_dir=good), good)
    assert not (good / "profiles.d/a.toml").exists()


def test_a_last_good_copy_that_no_longer_checks_is_not_used(config: Path, good: Path) -> None:
    (good / "guests.d/a.toml").write_text("[")
    (config / "guests.d/a.toml").write_text("[")
    assert list(load(config, last_good_dir=good).desired.guests) == ["b"]


def test_a_torn_write_leaves_the_old_copy(config: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (config / "guests.d/a.toml").write_text(GUEST.format("4GiB"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_last_good(load(config), good)
    assert (good / "guests.d/a.toml").read_text() == GUEST.format("1GiB")
