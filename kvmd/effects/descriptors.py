"""Opens what an argv's fd numbers stand for, all of it or nothing.

The argv builder says what each number shall be; this is the only place that makes it so. Everything is closed on
exec of anybody else, and by us once the launcher has it: QEMU's copies are then the only ones, locks included.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never

from kvmd.config.guest import Guest
from kvmd.effects import files, images, programs, ramfile, taps
from kvmd.effects.handover import listen_private
from kvmd.effects.laststart import described
from kvmd.effects.netlink import Netlink
from kvmd.effects.tapscripts import TapScripts
from kvmd.errors import HostFailed
from kvmd.facts import Tbf
from kvmd.plan.vlans import VlanWish
from kvmd.qemu.fds import FdRequest, ListenUnix, Memfd, OpenImage, OpenLog, OpenMemory, OpenTap, OpenVhostNet
from kvmd.qemu.storage import ImageFact


@dataclass(frozen=True, slots=True)
class TapPlan:
    """The TAP of one NIC. `standby.py` leaves a NIC unplugged whose plan has more than it knows."""

    name: str  # "" where a helper names it
    bridge: str | None  # None: a script or somebody else plugs it in
    mtu: int | None  # None: the bridge's
    alias: str
    port_isolated: bool = False
    vlans: VlanWish | None = None  # on a bridge that filters
    tbf: Tbf | None = None
    fenced: bool = False  # there are rules that must stand first
    plain: bool = False  # without IFF_VNET_HDR
    script: str | None = None
    downscript: str | None = None
    helper: str | None = None


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
    scripts: TapScripts
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

    async def open_all(self, requests: Sequence[FdRequest], plans: Mapping[str, TapPlan]) -> Descriptors:
        """Everything the argv asks for, in its order. On failure what was opened here is closed."""
        opened = Descriptors()
        try:
            for request in requests:
                opened.pairs += await self._open(request, plans)
                opened.described += described(request, plans, self.roots)
        except BaseException:
            opened.close()
            raise
        return opened

    async def _open(self, request: FdRequest, plans: Mapping[str, TapPlan]) -> list[tuple[int, int]]:
        match request:
            case OpenImage():
                return [(request.fd, self._images.pop(request.disk))]
            case OpenTap():
                if request.queue:
                    return []  # came with the first queue
                fds = await self._tap(request.nic, plans[request.nic], request.queues)
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

    async def _tap(self, nic: str, plan: TapPlan, queues: int) -> list[int]:
        if plan.helper:
            return [await self._ask_helper(plan.helper, plan)]
        if plan.bridge is None:
            return await self._loose_tap(nic, plan, queues)
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

    async def _ask_helper(self, helper: str, plan: TapPlan) -> int:
        """A TAP that a helper makes and plugs in, as QEMU would ask it to."""
        fd = await programs.receive_descriptor((helper, "--use-vnet", f"--br={plan.bridge}"))
        try:
            await self.netlink.mark_tap(taps.name_of(fd), plan.alias)
        except BaseException:
            os.close(fd)
            raise
        return fd

    async def _loose_tap(self, nic: str, plan: TapPlan, queues: int) -> list[int]:
        """A TAP that its script plugs in; without a script it is set up and left to others, if we made it."""
        there = plan.name in {link.name for link in await self.netlink.observe_links()}
        fds = await self.netlink.open_loose_tap(
            plan.name, mtu=plan.mtu, alias=plan.alias, queues=queues, vnet_hdr=not plan.plain
        )
        try:
            if plan.script or plan.downscript:
                script, downscript = plan.script, plan.downscript
                await self.scripts.up(self.guest, nic, plan.name, script=script, downscript=downscript)
            if not plan.script and not there:
                await self.netlink.mark_tap(plan.name, plan.alias, up=True)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    def close(self) -> None:
        """Close the images nobody took."""
        while self._images:
            os.close(self._images.popitem()[1])


def _device(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostFailed(f"cannot open {path}: {error.strerror}", hint="modprobe vhost_net") from None
