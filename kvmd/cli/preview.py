"""The command line a stopped guest would get, built from its files as a start would, with nothing locked or changed."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvmd.cli.arguments import nearest
from kvmd.cli.offline import paths_of
from kvmd.cli.session import Session
from kvmd.config.desired import Desired
from kvmd.config.guest import Guest
from kvmd.config.load import load
from kvmd.effects.images import open_image
from kvmd.effects.probe import kvm_usable, probe
from kvmd.errors import NotFound
from kvmd.paths import Paths
from kvmd.qemu import argv, identity
from kvmd.qemu.caps import Kvm, choose_accel
from kvmd.qemu.identity import Identity
from kvmd.qemu.storage import ImageFact

_NEW_UUID = "00000000-0000-4000-8000-000000000000"  # stands for the one a first start makes


def preview(session: Session, name: str) -> Sequence[str]:
    """Program and arguments. Raises what a start would: NotFound, Refused, Denied, QemuFailed."""
    paths = paths_of(session)
    desired = load(paths.config, last_good_dir=paths.last_good).desired
    guest = desired.guests.get(name)
    if guest is None:
        near = nearest(name, desired.guests)
        raise NotFound(f"no guest is called {name}", hint=f"did you mean {near}?" if near else "kvmd-cli check")
    return asyncio.run(_built(paths, desired, name, guest))


async def _built(paths: Paths, desired: Desired, name: str, guest: Guest) -> tuple[str, ...]:
    emulator = guest.machine.emulator or desired.daemon.qemu.emulator
    kvm = Kvm(usable=False, reason="not asked for")
    if guest.machine.accel != "tcg":
        low, _ = desired.daemon.qemu.uid_range
        kvm = await kvm_usable(emulator, uid=low, gid=low) if os.geteuid() == 0 else await kvm_usable(emulator)
    accel, _ = choose_accel(guest.machine.accel, kvm)
    cache = paths.state / "cache"
    caps = await probe(emulator, accel, cache if os.access(cache, os.W_OK) else None)
    ident = identity.allot(name, guest, _identity(paths, name), caps, _NEW_UUID)
    launch = argv.build(
        name,
        guest,
        ident,
        caps,
        accel=accel,
        run_dir=str(paths.guest_run(name)),
        images=_images(desired, guest),
        mtus=_mtus(desired, guest),
        vhost=os.access("/dev/vhost-net", os.R_OK | os.W_OK),
        sandbox=desired.daemon.qemu.sandbox,
    )
    return (shutil.which(emulator) or emulator, *launch.args)


def _identity(paths: Paths, name: str) -> Identity | None:
    try:
        return identity.from_toml(name, (paths.guest_state(name) / "identity.toml").read_text())
    except FileNotFoundError:
        return None


def _images(desired: Desired, guest: Guest) -> Mapping[str, ImageFact]:
    """What the argv depends on of each image: whether it is a device, and whether direct I/O works."""
    storage, seen = desired.daemon.storage, {}
    roots = [Path(root) for root in (*storage.roots, storage.images)]
    for key, disk in guest.disk.items():
        if not disk.file:
            continue
        found = open_image(disk.file, writable=False, format=disk.format, roots=roots, media=disk.media, lock=False)
        os.close(found.fd)
        seen[key] = ImageFact(block=found.is_block, direct=found.direct_io)
    return seen


def _mtus(desired: Desired, guest: Guest) -> Mapping[str, int]:
    return {
        key: nic.mtu or desired.networks[nic.network].network.mtu
        for key, nic in guest.nic.items()
        if nic.network is not None and nic.network in desired.networks
    }
