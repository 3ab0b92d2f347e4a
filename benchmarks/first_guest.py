"""From nothing to the first running guest by the README's own commands, without the network's share.

Runs what the README's install section runs, each command timed. `--in-tree` does it in a fresh Debian tree booted for
it, which has the distribution's packages; kvmd's Python packages come from the tests' directory of wheels, as from a
mirror next door. The guest is one boot sector, emulated where this machine's KVM boots no Linux (`--accel tcg` is then
added to `create`). `--yes-install-here` does it on this machine, and installs kvmd for real.

    python -m benchmarks.first_guest --in-tree
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import begin, verdict
from tests.rig.guestimage import bootsector, cache
from tests.rig.installedtree import BOOT_ID, CHECKOUT, PARTS, WHEELS
from tests.rig.tree import Tree

README = Path(__file__).resolve().parents[1] / "README.md"
LIMIT_S = 180.0
IMAGE = "/var/lib/kvmd/images/web.qcow2"
_COMMANDS = re.compile(r"```(?:sh|console|bash)\n(.*?)```", re.DOTALL)


def main() -> None:
    """Each command of the README block that begins with scripts/install, timed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--in-tree", action="store_true", help="in a Debian tree booted for it")
    parser.add_argument("--yes-install-here", action="store_true", help="this machine is there to be installed on")
    parser.add_argument("--print", action="store_true", help="only show the commands")
    chosen = parser.parse_args()
    commands = first_guest_commands(README.read_text())
    if chosen.print or not (chosen.yes_install_here or chosen.in_tree):
        print("\n".join(commands))
        return
    begin("from nothing to the first guest, by the README")
    total = _in_tree(commands) if chosen.in_tree else _timed(commands, _here)
    verdict("first guest", total, LIMIT_S, "s")


def first_guest_commands(readme: str) -> list[str]:
    """The lines of the first code block that installs."""
    block = next((found for found in _COMMANDS.findall(readme) if "scripts/install" in found), "")
    lines = [line.strip() for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _timed(commands: list[str], run: Callable[[str], int]) -> float:
    """The sum of seconds; ends the program when one fails."""
    total = 0.0
    for command in commands:
        begun = time.perf_counter()
        status = run(command)
        seconds = time.perf_counter() - begun
        total += seconds
        print(f"  {seconds:7.1f} s  {command}", flush=True)
        if status:
            sys.exit(f"it failed with {status}")
    return total


def _here(command: str) -> int:
    return subprocess.run(["bash", "-ec", command], cwd=README.parent, check=False).returncode


def _in_tree(commands: list[str]) -> float:
    kvm = any(Path("/sys/module", module).exists() for module in ("kvm_intel", "kvm_amd"))

    def run(command: str) -> int:
        line = command.replace("sudo ", "")  # the tree has none, and this is root
        if not kvm:
            line = line.replace("kvmd-cli create web", "kvmd-cli create web --accel tcg")
        ran = tree.run(f"cd {CHECKOUT} && export KVMD_WHEELS={WHEELS} && {line}", timeout_s=600)
        sys.stderr.write(ran.stderr if ran.returncode else "")
        return ran.returncode

    with TemporaryDirectory() as scratch, Tree(binds={cache() / "wheels": Path(WHEELS)}) as tree:
        raw, image = bootsector(Path(scratch) / "raw", "web is up\n"), Path(scratch) / "image"
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(image)], check=True)
        tree.write(IMAGE, image.read_bytes())
        tree.write("/etc/systemd/system/kvmd.service.d/tree.conf", BOOT_ID)
        tree.boot()
        tree.check(f"mkdir {CHECKOUT} && cd /src/kvmd && cp -a {PARTS} {CHECKOUT}/")
        total = _timed(commands, run)
        tree.check("kvmd-cli kill web")  # deaf to the power button
        tree.poweroff()
        return total


if __name__ == "__main__":
    main()
