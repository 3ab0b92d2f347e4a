"""What the emulators of this host can do, asked once for each binary: capabilities, and whether KVM is usable."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from kvmd.effects.probe import kvm_usable, probe
from kvmd.errors import NotFound
from kvmd.qemu.caps import Accel, Capabilities, Kvm, choose_accel


class Emulators:
    """Answers remembered; one probe at a time, for twenty starts want the same."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._caps: dict[tuple[object, ...], Capabilities] = {}
        self._kvm = Kvm(usable=False, reason="not looked at yet", fix=None)
        self._asking = asyncio.Lock()

    async def accel(self, emulator: str, wanted: str, *, uid: int, gid: int) -> tuple[Accel, str | None]:
        """The accelerator and a warning; KVM is proved once, under this uid, and asked again until it is. Refused."""
        if wanted != "tcg" and not self._kvm.usable:
            async with self._asking:
                if not self._kvm.usable:
                    self._kvm = await kvm_usable(emulator, uid=uid, gid=gid)
        return choose_accel(wanted, self._kvm)

    async def capabilities(self, emulator: str, accel: Accel) -> Capabilities:
        """What this binary, as it is now, can do. QemuFailed, NotSupported."""
        key = (emulator, *_stamp(emulator), accel)
        if key not in self._caps:
            async with self._asking:
                if key not in self._caps:
                    self._caps[key] = await probe(emulator, accel, self._cache)
        return self._caps[key]


def _stamp(path: str) -> tuple[int, int]:
    """What changes when a binary is upgraded."""
    status = Path(path).stat()
    return status.st_mtime_ns, status.st_size


def resolve(emulator: str) -> str:
    """The absolute path of an emulator. NotFound."""
    found = shutil.which(emulator)
    if found is None:
        raise NotFound(f"no emulator {emulator} in PATH", hint="apt install qemu-system-x86, or set qemu.emulator")
    return found
