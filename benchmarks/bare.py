"""The bare side of a start: what kvmd itself would give a guest, opened here, and QEMU exec'ed with it directly.

The argv and the descriptors come from kvmd's own code on the guest's own file and state, so both sides run the very
same QEMU; only what kvmd adds around it differs.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from benchmarks.harness import BareQemu, BenchHost, await_greeting, inside_network, spawn_bare
from kvmd.config.load import load
from kvmd.effects.descriptors import Descriptors
from kvmd.effects.netlink import Netlink
from kvmd.effects.store import Store
from kvmd.effects.sysfs import HostTree
from kvmd.guest.services import Services
from kvmd.paths import Paths
from kvmd.qemu.fds import Launch


class Bare:
    """Starts the guests of a BenchHost's files without kvmd."""

    def __init__(self, host: BenchHost) -> None:
        self._namespace = host.namespace
        self._paths = Paths.of(host.config, host.state, host.run, None)

    def prepare(self, name: str) -> tuple[tuple[str, ...], Descriptors]:
        """argv and open descriptors of one guest; it must not be running."""
        with inside_network(self._namespace) if self._namespace else contextlib.nullcontext():
            return asyncio.run(self._prepare(name))

    async def _prepare(self, name: str) -> tuple[tuple[str, ...], Descriptors]:
        with contextlib.closing(Store(self._paths.state)) as store:
            async with Netlink() as netlink:
                services = Services(
                    paths=self._paths,
                    store=store,
                    tree=HostTree(),
                    netlink=netlink,
                    units=None,
                    publish=lambda *_: None,
                    loaded=load(self._paths.config),
                )
                services.settled.set()
                decided = await services.decide(name)
                launch: Launch
                launch, descriptors = await services.open(name, decided)
        return launch.argv(decided.emulator), descriptors

    def start(self, name: str, argv: tuple[str, ...], descriptors: Descriptors) -> BareQemu:
        """From exec to the first answer over QMP."""
        pid = spawn_bare(argv, descriptors.pairs)
        return BareQemu(pid, await_greeting(self.socket(name)))

    def socket(self, name: str) -> Path:
        """The guest's monitor."""
        return self._paths.guest_run(name) / "qmp.sock"
