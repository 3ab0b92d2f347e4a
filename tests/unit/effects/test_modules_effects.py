"""Kernel modules read from trees of kernels that build in, load and lack them; modprobe by a program that acts it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from kvmd.effects import modules
from kvmd.effects.sysfs import HostTree
from kvmd.errors import HostFailed, NotSupported
from kvmd.facts import Module

RELEASE = "6.1.0-56-amd64"
LISTS = {
    "modules.dep": "kernel/drivers/net/tun.ko:\nkernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/virt/lib/irqbypass.ko\n"
    "kernel/drivers/vfio/vfio.ko.xz:\nkernel/fs/ext4/ext4.ko.zst:\n",
    "modules.builtin": "kernel/drivers/nvme/host/nvme-core.ko\nkernel/arch/x86/kvm/kvm.ko\n",
    "modules.alias": "# Aliases\nalias fs-ext4 ext4\n"
    "alias pci:v*d*sv*sd*bc*sc*i* vfio_pci\nalias devname:net/tun tun\n",
}


def kernel(root: Path, loaded: Mapping[str, int], *, builtin: tuple[str, ...] = (), lists: bool = True) -> HostTree:
    release = root / "proc/sys/kernel/osrelease"
    release.parent.mkdir(parents=True)
    release.write_text(RELEASE + "\n")
    for name, users in loaded.items():
        (root / "sys/module" / name).mkdir(parents=True)
        (root / "sys/module" / name / "initstate").write_text("live\n")
        (root / "sys/module" / name / "refcnt").write_text(f"{users}\n")
    for name in builtin:
        (root / "sys/module" / name).mkdir(parents=True)
    if lists:
        (root / "lib/modules" / RELEASE).mkdir(parents=True)
        for name, text in LISTS.items():
            (root / "lib/modules" / RELEASE / name).write_text(text)
    return HostTree(root)


def test_loaded_builtin_available_absent(tmp_path: Path) -> None:
    host = kernel(tmp_path, {"tun": 2}, builtin=("kvm",))
    assert modules.observe(host, ["tun", "kvm", "nvme_core", "vfio-pci", "vfio_pci", "fs-ext4", "nosuch"]) == {
        "tun": Module("tun", "loaded", 2),
        "kvm": Module("kvm", "builtin"),
        "nvme_core": Module("nvme_core", "builtin"),
        "vfio-pci": Module("vfio_pci", "available"),
        "vfio_pci": Module("vfio_pci", "available"),
        "fs-ext4": Module("ext4", "available"),
        "nosuch": Module("nosuch", "absent"),
    }


def test_an_alias_of_a_loaded_module_is_loaded(tmp_path: Path) -> None:
    host = kernel(tmp_path, {"ext4": 1})
    assert modules.observe(host, ["fs-ext4"]) == {"fs-ext4": Module("ext4", "loaded", 1)}


def test_one_that_is_being_removed_is_not_there(tmp_path: Path) -> None:
    host = kernel(tmp_path, {"tun": 0})
    (tmp_path / "sys/module/tun/initstate").write_text("going\n")
    assert modules.observe(host, ["tun"])["tun"].state == "available"


def test_without_lists_nothing_is_claimed(tmp_path: Path) -> None:
    host = kernel(tmp_path, {"tun": 1}, lists=False)
    assert modules.observe(host, ["tun", "vhost_net"]) == {
        "tun": Module("tun", "loaded", 1),
        "vhost_net": Module("vhost_net", "unknown"),
    }
    assert modules.observe(host, []) == {}


def test_nodes(tmp_path: Path) -> None:
    (tmp_path / "dev/net").mkdir(parents=True)
    (tmp_path / "dev/net/tun").touch()
    assert modules.observe_nodes(HostTree(tmp_path), ["/dev/net/tun", "/dev/kvm"]) == {"/dev/net/tun"}


ACTING = """#!/bin/sh
# A modprobe that acts on the tree beside it: loads, unloads, fails or lies as its name-giving file says.
root=ROOT
[ "$1" = -r ] && { [ "$2" = -- ] || exit 9; shift 2; rm -r "$root/sys/module/$1"; exit; }
[ "$1" = -- ] || exit 9
case "$2" in
    nosuch) echo "modprobe: FATAL: Module nosuch not found in directory /lib/modules"; exit 1;;
    lie) exit 0;;
esac
mkdir -p "$root/sys/module/$2" && echo live >"$root/sys/module/$2/initstate" && echo 0 >"$root/sys/module/$2/refcnt"
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostTree:
    """A kernel whose modprobe acts."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/modprobe"
    program.write_text(ACTING.replace("ROOT", str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setattr(modules, "_PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return kernel(tmp_path, {})


def test_load_and_unload_are_idempotent(host: HostTree) -> None:
    for _ in range(2):
        asyncio.run(modules.load(host, "tun"))
        assert modules.observe(host, ["tun"])["tun"].state == "loaded"
    for _ in range(2):
        asyncio.run(modules.unload(host, "tun"))
        assert modules.observe(host, ["tun"])["tun"].state == "available"


def test_modprobes_own_words_are_the_error(host: HostTree) -> None:
    with pytest.raises(HostFailed, match="modprobe -- nosuch failed: modprobe: FATAL: Module nosuch not found"):
        asyncio.run(modules.load(host, "nosuch"))


def test_a_load_is_read_back(host: HostTree) -> None:
    with pytest.raises(HostFailed, match="reported success, and the module is not there"):
        asyncio.run(modules.load(host, "lie"))


def test_no_modprobe_names_the_package(host: HostTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "_PATH", "/nowhere")
    with pytest.raises(NotSupported) as caught:
        asyncio.run(modules.load(host, "tun"))
    assert caught.value.hint == "apt-get install kmod"
