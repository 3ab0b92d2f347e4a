"""Opens what an argv's fd numbers stand for, all of it or nothing.

The argv builder says what each number shall be; this is the only place that makes it so. Everything is closed on
exec of anybody else, and by us once the launcher has it: QEMU's copies are then the only ones, locks included.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never

from kvmd.config.guest import Guest
from kvmd.effects import files, images, ramfile
from kvmd.effects.handover import listen_private
from kvmd.effects.laststart import described
from kvmd.effects.netlink import Netlink
from kvmd.errors import HostFailed
from kvmd.facts import Tbf, VlanRange
from kvmd.qemu.fds import FdRequest, ListenUnix, Memfd, OpenImage, OpenLog, OpenMemory, OpenTap, OpenVhostNet
from kvmd.qemu.storage import ImageFact


@dataclass(frozen=True, slots=True)
class TapPlan:
    """The TAP of one NIC."""

    name: str
    bridge: str
    mtu: int
    alias: str
    port_isolated: bool
    vlans: Callable[[int], tuple[VlanRange, ...]] | None = None  # of a bridge that filters, by its default VLAN
    tbf: Tbf | None = None


@dataclass(slots=True)
class Descriptors:
    """`(target number, our fd)` of everything that is open, and how each was opened; close() closes ours."""

    pairs: list[tuple[int, int]] = field(default_factory=list)
    described: list[Mapping[str, Any]] = field(default_factory=list)  # for last-start.json

    def close(self) -> None:
        """Close our copies."""
        while self.pairs:
            os.close(self.pairs.pop()[1])


@dataclass(slots=True)
class Opener:
    """Opens one guest's things: images first, since the argv depends on what they are, then the rest."""

    guest: str
    run_dir: Path
    log_dir: Path
    roots: Sequence[Path]
    netlink: Netlink
    uid: int = 0  # whom files belong to that QEMU opens once more
    gid: int = 0
    _images: dict[str, int] = field(default_factory=dict)

    def open_images(self, guest: Guest) -> Mapping[str, ImageFact]:
        """Open and lock every disk's image; what was seen of each, by disk. Raises what `images.open_image` does."""
        seen = {}
        for name, disk in guest.disk.items():
            if not disk.file:
                continue
            found = images.open_image(
                disk.file,
                writable=disk.writable,
                format=disk.format,
                roots=self.roots,
                media=disk.media,
                shared=disk.shared,
            )
            self._images[name] = found.fd
            seen[name] = ImageFact(block=found.is_block, direct=found.direct_io)
        return seen

    async def open_all(self, requests: Sequence[FdRequest], taps: Mapping[str, TapPlan]) -> Descriptors:
        """Everything the argv asks for, in its order. On failure what was opened here is closed."""
        opened = Descriptors()
        try:
            for request in requests:
                opened.pairs += await self._open(request, taps)
                opened.described += described(request, taps, self.roots)
        except BaseException:
            opened.close()
            raise
        return opened

    async def _open(self, request: FdRequest, taps: Mapping[str, TapPlan]) -> list[tuple[int, int]]:
        match request:
            case OpenImage():
                return [(request.fd, self._images.pop(request.disk))]
            case OpenTap():
                if request.queue:
                    return []  # came with the first queue
                fds = await self._tap(taps[request.nic], request.queues)
                return [(request.fd + queue, fd) for queue, fd in enumerate(fds)]
            case OpenMemory():
                opened = await asyncio.to_thread(
                    ramfile.open_ram, request.path, request.size_bytes, request.page_bytes, self.uid, self.gid
                )
                return [(request.fd, opened)]
            case OpenVhostNet():
                return [(request.fd, _device("/dev/vhost-net"))]
            case ListenUnix():
                with listen_private(self.run_dir / f"{request.purpose}.sock") as listener:
                    return [(request.fd, listener.detach())]
            case OpenLog():
                return [(request.fd, files.append_log_fd(self.log_dir / f"{request.purpose}.log"))]
            case Memfd():
                return [(request.fd, await asyncio.to_thread(images.sealed_copy, request.path, self.roots))]
            case _:
                assert_never(request)

    async def _tap(self, plan: TapPlan, queues: int) -> list[int]:
        return await self.netlink.open_tap(
            plan.name,
            bridge=plan.bridge,
            mtu=plan.mtu,
            alias=plan.alias,
            port_isolated=plan.port_isolated,
            queues=queues,
            vlans=plan.vlans,
            tbf=plan.tbf,
        )

    def close(self) -> None:
        """Close the images nobody took."""
        while self._images:
            os.close(self._images.popitem()[1])


def _device(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostFailed(f"cannot open {path}: {error.strerror}", hint="modprobe vhost_net") from None
