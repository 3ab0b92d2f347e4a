"""kvmd's environment as scripts/install makes it, made at this machine's speed and not at the lab's.

pip takes minutes under TCG and does there what it does here. So scripts/install is run in a copy-on-write view of the
same Debian tree the lab is made from, from the same wheels; the lab finds the outcome beside its checkout, links it
into /opt/kvmd and runs scripts/install itself, which sees an environment that is up to date and makes the rest: files,
users, units. An installation with nothing prepared is a test of its own (tests/lab/test_fresh_lab.py). Needs root.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import time
from pathlib import Path

from tests.rig.guestimage import cache
from tests.rig.labimage import OTHERS_KEPT_S
from tests.rig.tree import tree_path

# What an installation reads of the checkout.
PARTS = ("kvmd", "systemd", "etc", "scripts/install", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
# The tree of this process alone: nothing of it is seen by the machine, and all of it ends with the command.
SCRIPT = """
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
mkdir -p "$2/root/src/kvmd" "$2/root/opt/kvmd-wheels"
mount --rbind /dev "$2/root/dev"
mount -t proc proc "$2/root/proc"
mount --bind "$3" "$2/root/src/kvmd"
mount --bind "$4" "$2/root/opt/kvmd-wheels"
exec chroot "$2/root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root KVMD_WHEELS=/opt/kvmd-wheels \
    /src/kvmd/scripts/install
"""


def prepared_environment(checkout: Path) -> Path:
    """A directory that is /opt/kvmd after scripts/install of `checkout`; made when that would differ (15 s)."""
    kept = cache() / "lab" / f"opt-{_inputs_hash(checkout)}"
    with (cache() / "lab" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            _make(checkout, kept)
        kept.touch()
        for other in kept.parent.glob("opt-*"):
            if other != kept and other.stat().st_mtime < time.time() - OTHERS_KEPT_S:
                shutil.rmtree(other)
    return kept


def _inputs_hash(checkout: Path) -> str:
    digest = hashlib.sha256()
    for stamp in ("tree", "wheels"):
        digest.update((cache() / "stamps" / stamp).read_bytes())
    for part in PARTS:
        path = checkout / part
        for source in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if source.is_file():
                digest.update(f"{source.relative_to(checkout)}\0".encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _make(checkout: Path, target: Path) -> None:
    scratch = target.with_name("new-opt")
    shutil.rmtree(scratch, ignore_errors=True)
    for name in ("upper", "work", "root"):
        (scratch / name).mkdir(parents=True)
    arguments = [str(tree_path()), str(scratch), str(checkout), str(cache() / "wheels")]
    ran = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-euc", SCRIPT, "sh", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise AssertionError(f"scripts/install in the Debian tree: status {ran.returncode}: {ran.stdout}{ran.stderr}")
    (scratch / "upper/opt/kvmd").rename(target)
    shutil.rmtree(scratch)
