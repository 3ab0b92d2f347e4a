"""Kernel modules: which are there, and modprobe(8) for those that are not. Reads below a root path.

/proc/modules knows nothing of what is built in, and /sys/module only of what has parameters or is loaded, so the
running kernel's own lists under /lib/modules/RELEASE (kmod, depmod(8)) complete the picture.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Mapping

from kvmd.effects.tree import Tree
from kvmd.errors import HostFailed, NotSupported, TimedOut
from kvmd.facts import Module

_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
_DEADLINE_S = 30.0  # a driver may wait for its firmware
_FILE = re.compile(r"(?:^|/)([^/:\s]+?)\.ko(?:\.\w+)?(?::|$)", re.MULTILINE)


def observe(tree: Tree, names: Collection[str]) -> Mapping[str, Module]:
    """Each of `names` as the kernel has it. The lists are read only for what /sys/module does not know."""
    found = {name: known for name in names if (known := _known(tree, name)) is not None}
    unseen = sorted(set(names) - found.keys())
    return {**found, **(_listed(tree, unseen) if unseen else {})}


def observe_nodes(tree: Tree, nodes: Iterable[str]) -> frozenset[str]:
    """Those of `nodes` that exist."""
    return frozenset(node for node in nodes if tree.exists(node))


async def load(tree: Tree, name: str) -> None:
    """Load it, with what it needs, and see that it is there. HostFailed, NotSupported, TimedOut."""
    await _modprobe(name, "--", name)
    if observe(tree, [name])[name].state not in ("loaded", "builtin"):
        raise HostFailed(f"modprobe {name} reported success, and the module is not there", hint="journalctl -k")


async def unload(tree: Tree, name: str) -> None:
    """Take it out, with what nobody else needs. One that is not loaded is taken out. HostFailed when it is in use."""
    if observe(tree, [name])[name].state == "loaded":
        await _modprobe(name, "-r", "--", name)


async def _modprobe(name: str, *arguments: str) -> None:
    program = shutil.which("modprobe", path=_PATH)
    if program is None:
        raise NotSupported(f"module {name}: there is no modprobe", hint="apt-get install kmod")
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": _PATH, "LC_ALL": "C"},
    )
    try:
        async with asyncio.timeout(_DEADLINE_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise TimedOut(f"modprobe {name} did not end in {_DEADLINE_S:g} s", hint="journalctl -k") from None
    if process.returncode:
        words = re.sub(r"\s+", " ", output.decode("utf-8", "replace")).strip()[:500]
        raise HostFailed(f"modprobe {' '.join(arguments)} failed: {words}", hint=_hint(words))


def _hint(words: str) -> str:
    if "in use" in words:
        return "`lsmod` says by whom"
    if "not permitted" in words:
        return "kvmd needs CAP_SYS_MODULE, and a kernel that is not locked down takes signed modules only"
    return "journalctl -k"


def _known(tree: Tree, name: str) -> Module | None:
    """As /sys/module tells it: what can be unloaded has an initstate (kernel/module/sysfs.c), what is built in none."""
    name = name.replace("-", "_")
    here = f"/sys/module/{name}"
    if not tree.exists(here):
        return None
    state = tree.read(f"{here}/initstate")
    if state is None:
        return Module(name, "builtin")
    return Module(name, "loaded", tree.number(f"{here}/refcnt") or 0) if state == "live" else None


def _listed(tree: Tree, names: Iterable[str]) -> Mapping[str, Module]:
    """As the lists under /lib/modules tell it."""
    here = f"/lib/modules/{tree.read('/proc/sys/kernel/osrelease') or ''}"
    available, builtin = _files(tree, f"{here}/modules.dep"), _files(tree, f"{here}/modules.builtin")
    if available is None and builtin is None:
        return {name: Module(name.replace("-", "_"), "unknown") for name in names}
    found = {}
    aliases: Mapping[str, str] | None = None
    for asked in names:
        name = asked.replace("-", "_")
        if name not in (available or ()) and name not in (builtin or ()):
            aliases = _aliases(tree, f"{here}/modules.alias") if aliases is None else aliases
            name = aliases.get(name, name)
        known = _known(tree, name)
        if known is None and name in (builtin or ()):
            known = Module(name, "builtin")
        found[asked] = known or Module(name, "available" if name in (available or ()) else "absent")
    return found


def _files(tree: Tree, path: str) -> frozenset[str] | None:
    """Modules in a list of files, None when there is no list. Whole: Debian's is larger than a Tree reads."""
    try:
        text = tree.path(path).read_text(errors="replace")
    except OSError:
        return None
    return frozenset(name.replace("-", "_") for name in _FILE.findall(text))


def _aliases(tree: Tree, path: str) -> Mapping[str, str]:
    """Aliases that are plain names ("alias fs-ext4 ext4"); those with patterns are hardware's."""
    try:
        lines = tree.path(path).read_text(errors="replace").splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines if line.startswith("alias "))
    return {row[1].replace("-", "_"): row[2] for row in rows if len(row) == 3 and not set(row[1]) & set("*?[:")}
