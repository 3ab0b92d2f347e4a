"""Each golden command line, started with -S by the real QEMU under a guest's uid, and asked what it really has."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import json
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvmd.config.guest import Guest
from kvmd.effects.probe import ask, kvm_usable, probe
from kvmd.errors import QemuFailed
from kvmd.qemu.argv import build
from kvmd.qemu.caps import Capabilities, Kvm, choose_accel
from kvmd.qemu.events import BalloonMoved, Panicked, Shutdown, event_time, translate
from kvmd.qemu.fds import FdRequest, Launch, Memfd, OpenImage, OpenMemory, OpenTap
from kvmd.qemu.identity import allot
from kvmd.qemu.verify import check_running, queries
from tests.rig import golden_argv
from tests.rig.guestconsole import GuestConsole
from tests.rig.guestimage import bitmap, cache, guest_kernel
from tests.rig.machinestate import machine_lock
from tests.rig.qemu_process import EMULATOR, RealQemu, running

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
KERNEL = cache() / "kernel/boot"
GUEST_UID = 64100
CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100


@pytest.fixture(scope="module")
def caps(tmp_path_factory: pytest.TempPathFactory) -> Capabilities:
    return asyncio.run(probe(EMULATOR, "tcg", tmp_path_factory.mktemp("probe")))


@pytest.fixture
def images() -> Iterator[Path]:
    """A directory where O_DIRECT works: /tmp may be a tmpfs."""
    path = Path(f"/var/tmp/kvmd-argv-{os.getpid()}")
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def taps() -> Iterator[Any]:
    """Makes TAPs in a network namespace that lives as long as their fds."""
    opened: list[int] = []

    def make(launch: Launch) -> dict[str, list[int]]:
        made: dict[str, list[int]] = {}

        def in_namespace() -> None:
            assert ctypes.CDLL(None).unshare(CLONE_NEWNET) == 0
            for request in launch.opens:
                if isinstance(request, OpenTap):
                    fd = os.open("/dev/net/tun", os.O_RDWR)
                    many = IFF_MULTI_QUEUE if request.queues > 1 else 0
                    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | many
                    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", f"kv{request.nic}".encode(), flags))
                    made.setdefault(request.nic, []).append(fd)
                    opened.append(fd)

        worker = threading.Thread(target=in_namespace)  # unshare(2) holds for the calling thread only
        worker.start()
        worker.join()
        return made

    yield make
    for fd in opened:
        os.close(fd)


@pytest.fixture
def pages() -> Iterator[int]:
    """32 free pages of 2 MiB, under the lock of all host tests; what was there is put back."""
    with machine_lock():
        total = POOL / "nr_hugepages"
        before = int(total.read_text())
        total.write_text(str(before + 32))
        try:
            assert int(total.read_text()) == before + 32
            yield 32
        finally:
            total.write_text(str(before))


def prepared(launch: Launch, images: Path) -> Launch:
    """The same launch with real files behind it: the arguments name none, so they stay as they are."""
    opens: list[FdRequest] = []
    for request in launch.opens:
        match request:
            case OpenImage(disk=disk, format=form):
                path = images / f"{disk}.{form}"
                subprocess.run(["qemu-img", "create", "-q", "-f", form, path, "8M"], check=True)
                opens.append(replace(request, path=str(path)))
            case Memfd(purpose=purpose):
                path = images / purpose
                contents = {"kernel": next(KERNEL.glob("vmlinuz-*")).read_bytes(), "splash": bitmap(64, 48, (1, 2, 3))}
                path.write_bytes(contents.get(purpose, b""))
                opens.append(replace(request, path=str(path)))
            case OpenMemory():
                opens.append(replace(request, path=str(images)))
            case _:
                opens.append(request)
    return replace(launch, opens=tuple(opens))


def images_of(launch: Launch) -> list[OpenImage]:
    return [request for request in launch.opens if isinstance(request, OpenImage)]


def differences(qemu: RealQemu) -> tuple[str, ...]:
    replies = {query.label: qemu.ask(query.command, **query.arguments) for query in queries(qemu.launch)}
    return tuple(map(str, check_running(qemu.launch, replies)))


def host_side(name: str, run_dir: Path) -> dict[str, Any]:
    """What a golden cannot have on this machine is replaced, and only that: KVM, vhost, a block device."""
    host: dict[str, Any] = {"run_dir": str(run_dir)}
    if name == "kvm":
        host |= {"accel": "tcg", "vhost": False, "images": {}}
    return host


@pytest.mark.parametrize("name", [name for name in golden_argv.names() if name != "hugepages"])
def test_golden_is_what_runs(name: str, caps: Capabilities, images: Path, taps: Any) -> None:
    run_dir = images / "run"
    socket_dir = run_dir / "display"
    socket_dir.mkdir(parents=True)
    os.chown(socket_dir, GUEST_UID, GUEST_UID)
    launch = prepared(golden_argv.launch(name, caps, **host_side(name, run_dir)), images)
    with running(launch, taps(launch), GUEST_UID) as qemu:
        assert differences(qemu) == ()
        assert qemu.ask("query-name") == {"name": name}
        _check_places(qemu, name, caps)
        _check_memory(qemu, name)
        _check_blocks(qemu)
        status = Path(f"/proc/{qemu.process.pid}/status").read_text().splitlines()
        assert ("Seccomp:\t0" if name == "unusual" else "Seccomp:\t2") in status
        if launch.display_socket:
            assert Path(launch.display_socket).is_socket()
            assert qemu.ask("query-vnc")["enabled"] is True


def _check_places(qemu: RealQemu, name: str, caps: Capabilities) -> None:
    """Every PCI device is in the slot its identity says, and the board has no device nobody asked for."""
    identity = allot(name, golden_argv.guest(name), None, caps, golden_argv.UUID)
    (bus,) = qemu.ask("query-pci")
    seen = {device["qdev_id"]: device["slot"] for device in bus["devices"] if device["qdev_id"]}
    assert seen == {device: int(slot[:2], 16) for device, slot in identity.slots.items()}


def _check_memory(qemu: RealQemu, name: str) -> None:
    guest = golden_argv.guest(name)
    (memdev,) = qemu.ask("query-memdev")
    assert memdev["id"] == "ram0"
    assert memdev["size"] == guest.memory.size
    assert memdev["merge"] is (guest.memory.ksm_group is not None)
    assert memdev["dump"] is False
    assert memdev["prealloc"] is guest.memory.preallocated
    if guest.ballooned:
        assert qemu.ask("query-balloon") == {"actual": guest.memory.size}


def _check_blocks(qemu: RealQemu) -> None:
    """Node by node: the format is the file's, O_DIRECT and flushes are the cache mode's, nothing else is open."""
    guest = golden_argv.guest(qemu.ask("query-name")["name"])
    nodes = {node["node-name"]: node for node in qemu.ask("query-named-block-nodes")}
    assert len(nodes) == 2 * len(guest.disk)
    blocks = {block["inserted"]["node-name"]: block["inserted"] for block in qemu.ask("query-block")}
    for key, disk in guest.disk.items():
        name = key if key[0].isalpha() else f"disk.{key}"
        request = next(image for image in images_of(qemu.launch) if image.disk == key)
        assert nodes[name]["drv"] == disk.format
        assert nodes[name]["backing_file_depth"] == 0
        assert nodes[f"{name}.file"]["drv"] == "file"
        assert nodes[f"{name}.file"]["cache"]["direct"] is request.direct
        assert nodes[f"{name}.file"]["cache"]["no-flush"] is (disk.cache == "unsafe")
        if disk.media == "disk":
            assert blocks[name]["cache"]["writeback"] is (disk.cache not in ("writethrough", "directsync"))
        flags = {
            int(line.split()[1], 8)
            for entry in Path(f"/proc/{qemu.process.pid}/fd").iterdir()
            if entry.is_symlink() and str(entry.readlink()) == request.path
            for line in Path(f"/proc/{qemu.process.pid}/fdinfo/{entry.name}").read_text().splitlines()
            if line.startswith("flags:")
        }
        assert flags
        assert {bool(flag & os.O_DIRECT) for flag in flags} == {request.direct}
        assert {flag & os.O_ACCMODE for flag in flags} == {os.O_RDWR if disk.writable else os.O_RDONLY}


def test_hugepages_are_taken_from_the_pool(caps: Capabilities, pages: int, taps: Any, images: Path) -> None:
    launch = golden_argv.launch("hugepages", caps)
    free = int((POOL / "free_hugepages").read_text())
    with running(launch, taps(launch), GUEST_UID) as qemu:
        assert differences(qemu) == ()
        assert int((POOL / "free_hugepages").read_text()) == free - pages
        (memdev,) = qemu.ask("query-memdev")
        assert (memdev["host-nodes"], memdev["policy"], memdev["prealloc"]) == ([0], "bind", True)
        with pytest.raises(AssertionError, match="No balloon device"):
            qemu.ask("query-balloon")
    assert int((POOL / "free_hugepages").read_text()) == free


def test_a_block_device_is_opened_as_one(caps: Capabilities, images: Path) -> None:
    backing = images / "loop.raw"
    backing.write_bytes(bytes(8 << 20))
    made = subprocess.run(["losetup", "-f", "--show", backing], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.fail(f"no loop device: {made.stderr}")
    device = made.stdout.strip()
    try:
        launch = golden_argv.launch("kvm", caps, accel="tcg", vhost=False)
        disk = replace(images_of(launch)[0], path=device)
        cut = launch.args.index("-netdev")
        kept = (*launch.args[:cut], *launch.args[cut + 4 :])
        opens = tuple(disk if o.fd == disk.fd else o for o in launch.opens if not isinstance(o, OpenTap))
        with running(replace(launch, args=kept, opens=opens, expect=replace(launch.expect, nics={}))) as qemu:
            assert differences(qemu) == ()
            drivers = {node["node-name"]: node["drv"] for node in qemu.ask("query-named-block-nodes")}
            assert drivers == {"root": "raw", "root.file": "host_device"}
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_a_qcow2_that_names_another_file_opens_none(caps: Capabilities, images: Path) -> None:
    secret, image = images / "secret.raw", images / "evil.qcow2"
    secret.write_bytes(b"canary" + bytes(8 << 20))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", image], check=True)
    launch = prepared(golden_argv.launch("server", caps), images)
    opens = (replace(o, path=str(image)) if isinstance(o, OpenImage) and o.disk == "root" else o for o in launch.opens)
    cut, card = launch.args.index("-vnc"), launch.args.index("-netdev")
    args = (*launch.args[:card], *launch.args[card + 4 : cut], *launch.args[cut + 2 :])
    kept = tuple(o for o in opens if not isinstance(o, OpenTap))
    with running(replace(launch, args=args, opens=kept)) as qemu:
        links = {str(entry.readlink()) for entry in Path(f"/proc/{qemu.process.pid}/fd").iterdir()}
        assert str(image) in links
        assert str(secret) not in links


def test_a_missing_hugepage_is_said_by_qemu_not_hidden(caps: Capabilities, taps: Any) -> None:
    launch = golden_argv.launch("hugepages", caps)
    huge = tuple(argument.replace('"size":67108864', '"size":1099511627776') for argument in launch.args)
    bigger = tuple("size=1073741824k" if argument == "size=65536k" else argument for argument in huge)
    with (
        pytest.raises(AssertionError, match="Cannot allocate memory"),
        running(replace(launch, args=bigger), taps(launch)),
    ):
        pass


def test_a_wrong_guest_is_noticed(caps: Capabilities, images: Path) -> None:
    """Another QEMU behind the socket, another image in the drive, fewer CPUs: each is said, the grave ones refuse."""
    launch = prepared(golden_argv.launch("many", caps), images)
    other = "00000000-0000-4000-8000-000000000001"
    args = tuple(other if argument == golden_argv.UUID else argument for argument in launch.args)
    args = tuple(
        argument.replace('"drive":"d03"', '"drive":"dXX"').replace('"drive":"d04"', '"drive":"d03"')
        for argument in args
    )
    args = tuple(argument.replace('"drive":"dXX"', '"drive":"d04"') for argument in args)
    with running(replace(launch, args=args)) as qemu:
        replies = {query.label: qemu.ask(query.command, **query.arguments) for query in queries(launch)}
        found = {difference.what: difference for difference in check_running(launch, replies)}
        assert set(found) == {"uuid", "disk-d03", "disk-d04"}
        assert {difference.severity for difference in found.values()} == {"refuse"}


def linux(caps: Capabilities) -> Launch:
    """A Linux guest that boots from copies of its kernel and initramfs, under a uid that cannot read the files."""
    kernel, initrd = guest_kernel()
    file = Guest.model_validate(
        {
            "memory": {"size": "160MiB"},
            "machine": {"default_nic": False},
            "boot": {"kernel": str(kernel), "initrd": str(initrd), "cmdline": "console=ttyS0 quiet kvmd.role=web"},
            "serial": {"console": {}},
            "pvpanic": {"enabled": True},
        }
    )
    allotted = allot("linux", file, None, caps, golden_argv.UUID)
    return build("linux", file, allotted, caps, accel="tcg", run_dir="/run/kvmd/guests/linux")


def test_a_guest_that_powers_off_leaves_its_reason(caps: Capabilities) -> None:
    with running(linux(caps), uid=GUEST_UID) as qemu, GuestConsole(qemu.directory / "serial-console.sock") as console:
        assert differences(qemu) == ()
        qemu.ask("cont")
        console.wait_ready()
        before = qemu.ask("query-balloon")["actual"]
        qemu.ask("balloon", value=before - (32 << 20))
        moved = translate(qemu.wait_event("BALLOON_CHANGE"))
        assert isinstance(moved, BalloonMoved)
        assert moved.actual_bytes < before
        console.check("(sleep 1; poweroff -f) &")
        event = qemu.wait_event("SHUTDOWN")
        assert translate(event) == Shutdown("guest-shutdown", by_guest=True)
        assert event_time(event) is not None
        assert qemu.process.poll() is None
        assert qemu.ask("query-status")["status"] == "shutdown"
        assert b"KVMD-GUEST READY" in (qemu.directory / "serial-console.log").read_bytes()


def test_a_guest_that_panics_stands_still_and_says_so(caps: Capabilities) -> None:
    with running(linux(caps), uid=GUEST_UID) as qemu:
        with GuestConsole(qemu.directory / "serial-console.sock") as console:
            qemu.ask("cont")
            console.wait_ready()
            console.check("(sleep 2; echo c > /proc/sysrq-trigger) &")
        # Nobody is attached now. (A client that does not read would hold the guest's serial port up: QEMU sends byte by
        # byte, and some 280 of those fill a socket.)
        assert translate(qemu.wait_event("GUEST_PANICKED")) == Panicked("pause")
        assert qemu.process.poll() is None
        assert qemu.ask("query-status")["status"] == "guest-panicked"
        assert "Kernel panic - not syncing" in (qemu.directory / "serial-console.log").read_text()


def test_the_recording_is_of_this_qemu(caps: Capabilities) -> None:
    recorded = golden_argv.recorded()
    if caps.version[:2] != recorded.version[:2]:
        pytest.fail(
            f"QEMU {caps.version_text} here, {recorded.version_text} recorded: run python -m tests.rig.record_qemu"
        )
    assert caps == replace(recorded, version=caps.version, package=caps.package)


async def test_the_probe_is_cached_until_something_changes(tmp_path: Path) -> None:
    emulator = tmp_path / "qemu"
    emulator.write_text(f'#!/bin/sh\necho run >> {tmp_path}/runs\nexec {EMULATOR} "$@"\n')
    emulator.chmod(0o755)
    first = await probe(str(emulator), "tcg", tmp_path / "cache")
    again = await probe(str(emulator), "tcg", tmp_path / "cache")
    assert first == again
    assert (tmp_path / "runs").read_text() == "run\n"
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_text(json.dumps({"schema": 1, "version": "odd"}))
    assert await probe(str(emulator), "tcg", tmp_path / "cache") == first
    os.utime(emulator, (1, 1))
    assert await probe(str(emulator), "tcg", tmp_path / "cache") == first
    assert (tmp_path / "runs").read_text() == "run\n" * 3


def test_kvm_without_its_module_is_no_kvm(tmp_path: Path) -> None:
    if Path("/sys/module/kvm_intel").exists() or Path("/sys/module/kvm_amd").exists():
        (tmp_path / "sys/module").mkdir(parents=True)
        verdict = asyncio.run(kvm_usable(EMULATOR, root=tmp_path))
    else:
        verdict = asyncio.run(kvm_usable(EMULATOR))
    assert not verdict.usable
    assert "kvm_intel" in verdict.reason
    assert "modprobe" in (verdict.fix or "")


def test_kvm_is_tried_as_the_guest(tmp_path: Path) -> None:
    """With the module there and no device, a device, and a QEMU that cannot use it: three answers."""
    (tmp_path / "sys/module/kvm_amd").mkdir(parents=True)
    missing = asyncio.run(kvm_usable(EMULATOR, root=tmp_path))
    assert (missing.usable, "dev/kvm" in missing.reason) == (False, True)
    (tmp_path / "dev").mkdir()
    device = tmp_path / "dev/kvm"
    device.touch(mode=0o600)
    closed = asyncio.run(kvm_usable(EMULATOR, root=tmp_path, uid=64100, gid=64100))
    if not Path("/sys/module/kvm_amd").exists() and not Path("/sys/module/kvm_intel").exists():
        assert not closed.usable
        assert "-rw-------" in closed.reason
        assert "64100" in closed.reason
        assert "chmod 0660" in (closed.fix or "")
    refusing = tmp_path / "qemu"
    refusing.write_text("#!/bin/sh\necho 'Could not access KVM kernel module: Device or resource busy' >&2\nexit 1\n")
    refusing.chmod(0o755)
    busy = asyncio.run(kvm_usable(str(refusing), root=tmp_path))
    assert not busy.usable
    assert "Device or resource busy" in busy.reason


def test_the_probe_can_run_as_a_guest_uid(tmp_path: Path) -> None:
    replies = asyncio.run(ask(Path(EMULATOR), "tcg", uid=64100, gid=64100))
    assert replies["query-kvm"]["enabled"] is False
    teller = tmp_path / "qemu"
    teller.write_text("#!/bin/sh\nid -u >&2\nexit 1\n")
    teller.chmod(0o755)
    for directory in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        directory.chmod(0o755)
    with pytest.raises(QemuFailed, match="64100"):
        asyncio.run(ask(teller, "tcg", uid=64100, gid=64100))


def test_kvm_is_refused_with_the_fix_here() -> None:
    verdict = asyncio.run(kvm_usable(EMULATOR, uid=64100, gid=64100))
    if verdict.usable:
        assert choose_accel("kvm", verdict) == ("kvm", None)
        return
    assert isinstance(verdict, Kvm)
    accel, warning = choose_accel("auto", verdict)
    assert accel == "tcg"
    assert verdict.reason in (warning or "")
