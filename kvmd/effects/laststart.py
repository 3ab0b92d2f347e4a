"""last-start.json: how a guest was last started, for a start without kvmd and for a kvmd that lost its records.

Written under STATE/guests/NAME after each good start, read by `kvmd/standby.py`, which knows nothing else of kvmd, and
by the roster when a QEMU runs that no record of this boot knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmd.effects.files import write_atomic
from kvmd.effects.images import declared_root
from kvmd.plan.links import tap_mac
from kvmd.qemu.fds import FdRequest, ListenUnix, Memfd, OpenImage, OpenLog, OpenTap, OpenVhostNet
from kvmd.standby import FORMAT

if TYPE_CHECKING:
    from kvmd.effects.descriptors import TapPlan

FILE = "last-start.json"


@dataclass(frozen=True, slots=True)
class LastStart:
    """One start that went well."""

    name: str
    uuid: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    argv: tuple[str, ...]
    open: tuple[Mapping[str, Any], ...]  # what each number in argv stands for: `described`
    config: str  # the guest's tables as JSON: GuestRun.config_text

    def save(self, directory: Path) -> None:
        """Replace the guest's record; one that says the same already stays. HostFailed."""
        data = json.dumps({"format": FORMAT} | asdict(self), indent=1).encode() + b"\n"
        path = directory / FILE
        if not path.exists() or path.read_bytes() != data:
            write_atomic(path, data)


def load(directory: Path) -> LastStart | None:
    """The guest's record; None when there is none that can be read."""
    try:
        found: dict[str, Any] = json.loads((directory / FILE).read_bytes())
        if found.pop("format") != FORMAT:
            return None
        for key in ("groups", "argv", "open"):
            found[key] = tuple(found[key])
        return LastStart(**found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def described(request: FdRequest, taps: Mapping[str, TapPlan], roots: Sequence[Path]) -> tuple[dict[str, Any], ...]:
    """How to open it again, in JSON's types; nothing for what comes with another. `kind` is what standby.py knows.

    A request it does not know is named all the same: the guest then needs kvmd, and says so.
    """
    match request:
        case OpenImage(fd, _, path, writable):
            return ({"fd": fd, "kind": "image", "path": path, "root": _root(path, roots), "writable": writable},)
        case OpenTap(fd, nic, queue, queues):
            # Only what differs from nothing: a key standby.py does not know leaves the NIC unplugged.
            plan = {key: value for key, value in asdict(taps[nic]).items() if value}
            tap = plan | {"mac": tap_mac(taps[nic].name)}
            return () if queue else ({"fd": fd, "kind": "tap", "nic": nic, "queues": queues, "tap": tap},)
        case OpenVhostNet(fd, nic):
            return ({"fd": fd, "kind": "vhost-net", "nic": nic},)
        case ListenUnix(fd, purpose):
            return ({"fd": fd, "kind": "listen", "purpose": purpose},)
        case OpenLog(fd, purpose):
            return ({"fd": fd, "kind": "log", "purpose": purpose},)
        case Memfd(fd, path):
            return ({"fd": fd, "kind": "copy", "path": path, "root": _root(path, roots)},)
        case _:
            return ({"fd": request.fd, "kind": type(request).__name__},)


def _root(path: str, roots: Sequence[Path]) -> str:
    """Where links end: the storage root, or /dev."""
    return "/dev" if path.startswith("/dev/") else str(declared_root(path, roots)[0])
