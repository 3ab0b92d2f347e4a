"""From nothing to the first running guest by the README's own commands, without the network's share.

Runs what the README's install section runs, in a machine made for it (the lab): it installs kvmd for real. Packages
come from the distribution's mirror, whose speed is not ours: the time of each command is printed beside the sum.

    python -m benchmarks.first_guest --yes-install-here
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import begin, verdict

README = Path(__file__).resolve().parents[1] / "README.md"
LIMIT_S = 180.0
_COMMANDS = re.compile(r"```(?:sh|console|bash)\n(.*?)```", re.DOTALL)


def main() -> None:
    """Each command of the README block that begins with scripts/install, timed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--yes-install-here", action="store_true", help="this machine is there to be installed on")
    parser.add_argument("--print", action="store_true", help="only show the commands")
    chosen = parser.parse_args()
    commands = first_guest_commands(README.read_text())
    if chosen.print or not chosen.yes_install_here:
        print("\n".join(commands))
        return
    begin("from nothing to the first guest, by the README")
    total = 0.0
    for command in commands:
        begun = time.perf_counter()
        done = subprocess.run(["bash", "-ec", command], cwd=README.parent, check=False)
        seconds = time.perf_counter() - begun
        total += seconds
        print(f"  {seconds:7.1f} s  {command}", flush=True)
        if done.returncode:
            sys.exit(f"it failed with {done.returncode}")
    verdict("first guest", total, LIMIT_S, "s")


def first_guest_commands(readme: str) -> list[str]:
    """The lines of the first code block that installs."""
    block = next((found for found in _COMMANDS.findall(readme) if "scripts/install" in found), "")
    lines = [line.strip() for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


if __name__ == "__main__":
    main()
