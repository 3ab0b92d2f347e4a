"""The identity files of all guests: read when they change, written when something new is allotted."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping

from kvmd.config.guest import Guest
from kvmd.effects import files
from kvmd.paths import Paths
from kvmd.qemu import identity
from kvmd.qemu.caps import Capabilities
from kvmd.qemu.identity import Identity

FILE = "identity.toml"


class Identities:
    """`/var/lib/kvmd/guests/NAME/identity.toml`, parsed once for each writing of the file."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._known: dict[str, tuple[object, Identity]] = {}  # by what changes with the file

    def get(self, name: str) -> Identity | None:
        """The guest's identity as it was last written; None before its first start. ConfigInvalid."""
        path = self._paths.guest_state(name) / FILE
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            known = self._known.get(name)
            if known is None or known[0] != stamp:
                known = self._known[name] = stamp, identity.from_toml(name, path.read_text())
        except FileNotFoundError:
            self._known.pop(name, None)
            return None
        return known[1]

    def allot(self, name: str, guest: Guest, caps: Capabilities, declared: Iterable[str]) -> Identity:
        """What the guest keeps, and places for what is new; no MAC of a `declared` guest's is given out. Refused."""
        previous = self.get(name)
        new_nics = previous is None or guest.nic.keys() - previous.macs.keys()
        macs = self.macs(declared) if new_nics else {}
        taken = frozenset(mac for (other, _), mac in macs.items() if other != name)
        found = identity.allot(name, guest, previous, caps, str(uuid.uuid4()), taken_macs=taken)
        if found != previous:
            directory = self._paths.guest_state(name)
            files.ensure_dir(directory, 0o700)
            files.write_atomic(directory / FILE, identity.to_toml(name, found).encode(), mode=0o644)
        return found

    def macs(self, names: Iterable[str]) -> Mapping[tuple[str, str], str]:
        """MACs of these guests by (guest, nic); one that was never started has none yet."""
        return {(name, nic): mac for name in names if (known := self.get(name)) for nic, mac in known.macs.items()}

    def uuids(self, names: Iterable[str]) -> Mapping[str, str]:
        """UUIDs of those of these guests that have an identity."""
        return {name: known.uuid for name in names if (known := self.get(name))}
