"""Which kernel modules have to be there, and the device nodes they should bring. Pure.

Built in counts as loaded. A module kvmd loaded stays for the rest of the boot, whatever the files say later: loaded
modules disturb nobody, and `host release` takes out those that are not in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvmd.actions import Action, LoadModule, Problem
from kvmd.config.desired import Desired
from kvmd.facts import Facts, Module
from kvmd.plan.vfio import MODULE

# What a module is loaded for: without its node (devtmpfs makes it) the module is of no use.
NODES: Mapping[str, str] = {
    "kvm": "/dev/kvm",
    "kvm_amd": "/dev/kvm",
    "kvm_intel": "/dev/kvm",
    "tun": "/dev/net/tun",
    "vfio": "/dev/vfio/vfio",
    "vfio_pci": "/dev/vfio/vfio",
    "vhost_net": "/dev/vhost-net",
    "vhost_vsock": "/dev/vhost-vsock",
}
_MADE_BY_HAND = {"/dev/net/tun": "mkdir -p /dev/net && mknod -m 0666 /dev/net/tun c 10 200"}


def wanted(desired: Desired) -> Mapping[str, str]:
    """Modules to have, each with the reason."""
    needing = sorted(name for name, guest in desired.guests.items() if guest.passthrough)
    implied = {MODULE: f"guest {needing[0]} is given {desired.guests[needing[0]].passthrough[0]}"} if needing else {}
    return implied | dict.fromkeys(desired.host.modules.load, "modules.load names it")


def plan_modules(desired: Desired, facts: Facts) -> tuple[tuple[Action, ...], tuple[Problem, ...]]:
    """Loads of what is missing, and what cannot be had."""
    actions: list[Action] = []
    problems: list[Problem] = []
    for name, why in sorted(wanted(desired).items()):
        found = facts.modules.get(name, Module(name, "unknown"))
        if found.state == "available":
            actions.append(LoadModule(name=name, why=why))
        else:
            problems += _fault(name, found, facts)
    return tuple(actions), tuple(problems)


def _fault(name: str, found: Module, facts: Facts) -> Iterator[Problem]:
    node = NODES.get(found.name)
    has_node = node is None or node in facts.nodes
    release = facts.kernel or "that runs"
    match found.state:
        case "loaded" | "builtin" if not has_node:
            how = "is built in" if found.state == "builtin" else "is loaded"
            yield Problem(f"module {name}", f"it {how}, but there is no {node}", _node_hint(found, node or ""))
        case "absent":
            yield Problem(f"module {name}", f"kernel {release} has no module of this name", _absent_hint(name, release))
        case "unknown" if node is None:
            message = f"cannot tell whether kernel {release} has it: there is no /lib/modules/{release}"
            yield Problem(f"module {name}", message, "take it out of modules.load if it is built in")
        case "unknown" if not has_node:
            message = f"there is no {node}, and no /lib/modules/{release} to load it from"
            yield Problem(f"module {name}", message, "after an upgrade of the kernel: reboot; else install its modules")
        case _:
            pass


def _node_hint(found: Module, node: str) -> str:
    if found.name == "kvm":
        return "load kvm_intel or kvm_amd as well: kvm alone makes no device"
    if found.name in ("kvm_intel", "kvm_amd"):
        return "enable VT-x or AMD-V in the firmware; on a virtual machine: nested virtualisation on the outer host"
    return _MADE_BY_HAND.get(node, "mount devtmpfs on /dev, or look at `journalctl -k`")


def _absent_hint(name: str, release: str) -> str:
    if "cloud" in release:
        return "Debian's cloud kernel leaves out most drivers: apt-get install linux-image-amd64, and reboot into it"
    return (
        f"is the name right (modinfo {name})? If so: apt-get install linux-modules-extra-{release}, or another kernel"
    )
