"""A booted Debian tree in which kvmd was installed by scripts/install, from wheels, and what tests ask of it.

The files of kvmd's two kinds of guests are put there; the Linux kernel they boot is the rig's, at its own path.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.rig.guestfiles import tiny_on
from tests.rig.guestimage import bootsector, cache
from tests.rig.tree import Tree

WHEELS = "/opt/kvmd-wheels"
CHECKOUT = "/root/kvmd"  # a copy of the tested one, which may be worked on meanwhile
PARTS = "kvmd systemd etc scripts pyproject.toml constraints.txt README.md LICENSE"
# With this option a service gets a /proc of its own, without the boot id that nspawn lays over the real one.
BOOT_ID = "[Service]\nProtectControlGroups=no\n"
INSTALL = f"KVMD_WHEELS={WHEELS} {CHECKOUT}/scripts/install"
UNINSTALL = f"{CHECKOUT}/scripts/uninstall"
IMAGES = "/srv/vm"


class InstalledTree:
    """The tree with kvmd in it."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def guest(self, name: str, text: str) -> None:
        """guests.d/NAME.toml"""
        self.tree.write(f"/etc/kvmd/guests.d/{name}.toml", text)

    def tiny(self, name: str, extra: str = "") -> None:
        """A guest that is one boot sector, with its image. It is deaf to the power button."""
        with TemporaryDirectory() as scratch:
            image = bootsector(Path(scratch) / "image", f"{name} is up\n").read_bytes()
        self.tree.write(f"{IMAGES}/{name}.img", image)
        self.guest(name, tiny_on(Path(f"{IMAGES}/{name}.img"), extra=extra))

    def cli(self, *arguments: str, timeout_s: float = 120.0) -> Any:
        """kvmd-cli --json: what it printed."""
        return json.loads(self.tree.check(["kvmd-cli", "--json", *arguments], timeout_s=timeout_s) or "null")

    def show(self, name: str) -> Any:
        """guest.show"""
        return self.cli("show", name)

    def plan(self) -> Any:
        """host.plan; the command's status says only whether there is something to do."""
        return json.loads(self.tree.run(["kvmd-cli", "--json", "plan"]).stdout)

    def wait_guest(self, name: str, state: str, timeout_s: float = 60.0) -> Any:
        """Until the guest is in that state; its summary then."""
        return self.wait(lambda: self.show(name), lambda found: found["state"] == state, timeout_s)

    def wait(self, ask: Callable[[], Any], enough: Callable[[Any], bool], timeout_s: float = 60.0) -> Any:
        """Ask until the answer is enough; AssertionError with the last one and kvmd's journal otherwise."""
        deadline = time.monotonic() + timeout_s
        while not enough(found := ask()):
            if time.monotonic() > deadline:
                raise AssertionError(f"{found}\n{self.tree.journal('kvmd.service')[-6000:]}")
            time.sleep(0.1)
        return found

    def property(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.tree.check(["systemctl", "show", "--value", f"--property={name}", unit]).strip()

    def kvmd_pid(self) -> str:
        """As the tree counts pids."""
        return self.property("kvmd.service", "MainPID")

    def lines(self, path: str) -> list[str]:
        """A file's lines."""
        return self.tree.check(["cat", path]).splitlines()


@contextmanager
def installed_tree() -> Iterator[InstalledTree]:
    """Boot, install, enable and start; closed whatever happens."""
    with Tree(binds={cache() / "wheels": Path(WHEELS)}) as tree:
        tree.write("/etc/kvmd/kvmd.toml", f'[storage]\nroots = ["{IMAGES}", "{cache()}"]\n')
        tree.write(f"{IMAGES}/README", "images\n")
        tree.write("/etc/systemd/system/kvmd.service.d/tree.conf", BOOT_ID)
        tree.boot()
        tree.check(f"mkdir {CHECKOUT} && cd /src/kvmd && cp -a {PARTS} {CHECKOUT}/")
        tree.check(INSTALL, timeout_s=240)
        yield InstalledTree(tree)
