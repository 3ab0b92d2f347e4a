"""The booted Debian tree itself: systemd is PID 1 in it, files stay in the copy, nothing stays on the host."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.rig.guestimage import cache
from tests.rig.tree import Tree, TreeFailed, tree_path

pytestmark = pytest.mark.systemd

UNIT = """
[Service]
Type=notify
ExecStart=/bin/sh -c 'systemd-notify --ready; exec sleep 1000'
NotifyAccess=all
"""


def leftovers() -> tuple[list[str], list[Path]]:
    mine = f"tree-{os.getpid()}-"
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if mine in line]
    return mounts, list(Path("/sys/fs/cgroup").glob(f"*/{mine}*"))


def test_a_tree_boots_runs_units_and_powers_off() -> None:
    with Tree() as tree:
        tree.write("/etc/systemd/system/probe.service", UNIT)
        tree.write("/etc/only-in-the-copy", "yes\n")
        tree.boot()
        assert tree.check("cat /proc/1/comm") == "systemd\n"
        assert tree.check("systemctl --failed --no-legend") == ""
        assert tree.check("cat /etc/only-in-the-copy") == "yes\n"
        assert not (tree_path() / "etc/only-in-the-copy").exists()

        tree.check("systemctl start probe.service", timeout_s=30)
        assert tree.check("systemctl is-active probe.service") == "active\n"
        assert "Started probe.service" in tree.journal("probe.service")
        tree.write("/etc/later", "also\n")
        assert tree.check("cat /etc/later") == "also\n"

        python = Path(subprocess.check_output(["readlink", "-f", "/usr/bin/python3"], text=True).strip())
        assert tree.check(["readlink", "-f", "/usr/bin/python3"]).strip() == str(python)
        assert tree.check("cat", stdin="passed in") == "passed in"
        with pytest.raises(TreeFailed, match="status 3"):
            tree.check("echo why; exit 3")
        # The network is the tree's own.
        assert tree.check("ip -brief link").split()[0] == "lo"
        assert len(tree.check("ip -brief link").splitlines()) == 1
        tree.poweroff()
    assert leftovers() == ([], [])


def test_two_trees_at_once_do_not_meet() -> None:
    with Tree() as one, Tree() as other:
        one.boot()
        other.boot()
        one.check("systemd-run --unit=mine --quiet sleep 1000")
        assert one.check("systemctl is-active mine") == "active\n"
        assert other.run("systemctl is-active mine").stdout == "inactive\n"
        leader = other.leader
    assert not Path(f"/proc/{leader}").exists()
    assert leftovers() == ([], [])


def test_the_environment_and_the_checkout_are_there() -> None:
    with Tree() as tree:
        tree.boot()
        python = cache() / "venv/bin/python"
        tree.check([python, "-c", "import pydantic, pyroute2, psutil, systemd.daemon, kvmd"])
        assert "QEMU emulator" in tree.check("qemu-system-x86_64 --version")
