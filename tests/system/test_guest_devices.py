"""What a guest's file says, seen on the running QEMU and from inside a Linux guest."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from kvmd.effects.images import create_image
from kvmd.effects.proc import observe_threads
from kvmd.effects.tree import Tree
from kvmd.rpc.client import RemoteError
from kvmd.units import CpuSet
from tests.rig.guestconsole import READY, GuestConsole
from tests.rig.guestfiles import linux, tiny
from tests.rig.guestimage import bitmap, bootsector
from tests.rig.kvmdhost import KvmdHost
from tests.rig.qmpsession import QmpSession

pytestmark = pytest.mark.system


def ask(host: KvmdHost, name: str, command: str, **arguments: Any) -> Any:
    """One command over the monitor that is left to people."""
    with QmpSession(host.run / "guests" / name / "rescue.sock") as session:
        return session.execute(command, **arguments)


def test_cpus_memory_and_disks_are_what_the_file_says(host: KvmdHost, life: str) -> None:
    """-smp with topology, -m, a raw and a qcow2 disk, a read-only one: by QMP and from inside the guest."""
    (host.images / "raw.img").write_bytes(bytes(3 << 20))
    create_image(str(host.images / "new.qcow2"), format="qcow2", size_bytes=5 << 20, roots=[host.images])
    (host.images / "ro.img").write_bytes(bytes(2 << 20))
    extra = f"""
[cpu]
vcpus = 2
cores = 2
[disk.raw]
file = "{host.images}/raw.img"
format = "raw"
cache = "writeback"
serial = "raw-serial-1"
[disk.new]
file = "{host.images}/new.qcow2"
format = "qcow2"
cache = "writeback"
[disk.ro]
file = "{host.images}/ro.img"
format = "raw"
cache = "writeback"
readonly = true
"""
    host.guest("a", linux("a", size="224MiB", network=None, cmdline="kvmd.ip=none", extra=extra))
    host.start()
    host.call("guest.start", name="a")
    with GuestConsole(host.run / "guests/a/serial-console.sock") as console:
        ready = console.wait_for(READY, timeout_s=90)
        if life == "adopted":
            host.restart()
        assert ready[3] == "2"
        assert 180 << 10 < int(ready[2]) <= 224 << 10
        assert sorted(int(disk.split(":")[1]) for disk in ready[4].split(",")) == [2 << 20, 3 << 20, 5 << 20]
        assert "raw-serial-1" in console.run("cat /sys/block/vd*/serial").output
        written = console.run("for d in /dev/vd?; do dd if=/dev/zero of=$d bs=512 count=1 2>/dev/null && echo ok; done")
        assert written.output.split().count("ok") == 2
    cpus = ask(host, "a", "query-cpus-fast")
    assert [(cpu["props"]["socket-id"], cpu["props"]["core-id"]) for cpu in cpus] == [(0, 0), (0, 1)]
    assert ask(host, "a", "query-memory-size-summary")["base-memory"] == 224 << 20
    by_node = {node["node-name"]: node for node in ask(host, "a", "query-named-block-nodes")}
    assert (by_node["new"]["drv"], by_node["raw"]["drv"], by_node["ro"]["ro"]) == ("qcow2", "raw", True)
    assert not [warning for warning in host.show("a")["warnings"] if "asked for" in warning]


def test_drives_of_every_interface_linux_can_see_here(host: KvmdHost, life: str) -> None:
    """A SCSI disk and CD, an NVMe drive and a disk of 4096-byte sectors, each at its place, by QOM and in the guest."""
    for name, mib in (("s", 3), ("n", 4), ("big", 5)):
        (host.images / f"{name}.img").write_bytes(bytes(mib << 20))
    (host.images / "cd.iso").write_bytes(bytes(2 << 20))
    extra = "".join(
        f'[disk.{name}]\nfile = "{host.images}/{file}"\nformat = "raw"\ncache = "writeback"\n{more}\n'
        for name, file, more in (
            ("s", "s.img", 'interface = "scsi"\nindex = 9\nserial = "in-scsi"\niothread = "io"'),
            ("cd", "cd.iso", 'interface = "scsi"\nmedia = "cdrom"\nunit = 4'),
            ("n", "n.img", 'interface = "nvme"\npci_address = "0a"\nserial = "in-nvme"'),
            ("big", "big.img", "logical_block_size = 4096\nqueues = 1"),
        )
    )
    host.guest("a", linux("a", size="224MiB", network=None, cmdline="kvmd.ip=none", extra=extra))
    host.start()
    host.call("guest.start", name="a")
    with GuestConsole(host.run / "guests/a/serial-console.sock") as console:
        console.wait_ready(90)
        if life == "adopted":
            host.restart()
        hctl = console.check("ls /sys/class/scsi_device").split()
        assert sorted(line.partition(":")[2] for line in hctl) == ["0:2:0", "0:4:0"]
        blocks = console.check("for d in sda sr0 nvme0n1 vda; do cat /sys/block/$d/size; done").split()
        assert blocks == [str(mib << 11) for mib in (3, 2, 4, 5)]
        assert console.check("cat /sys/block/vda/queue/logical_block_size").strip() == "4096"
        assert console.check("cat /sys/class/nvme/nvme0/serial").strip() == "in-nvme"
        assert console.check("basename $(readlink -f /sys/class/nvme/nvme0/device)").strip() == "0000:00:0a.0"
        for disk in ("sda", "nvme0n1", "vda"):
            console.check(f"dd if=/dev/zero of=/dev/{disk} bs=4096 count=1 2>/dev/null")
        assert console.run("dd if=/dev/zero of=/dev/sr0 bs=2048 count=1 2>/dev/null").status != 0
    (thread,) = ask(host, "a", "query-iothreads")
    assert thread["id"] == "iothread-io"
    controller = ask(host, "a", "qom-get", path="/machine/peripheral/scsi1", property="iothread")
    assert controller.endswith("/iothread-io")
    assert not [warning for warning in host.show("a")["warnings"] if "asked for" in warning]


def test_the_classic_ide_drives_of_a_pc_board(host: KvmdHost) -> None:
    """-hda and -cdrom: bus 0 unit 0, and bus 1 unit 0, as the guest's own IDE driver finds them."""
    (host.images / "hda.img").write_bytes(bytes(3 << 20))
    (host.images / "cd.iso").write_bytes(bytes(2 << 20))
    extra = f"""
[disk.hda]
file = "{host.images}/hda.img"
format = "raw"
interface = "ide"
index = 0
[disk.cdrom]
file = "{host.images}/cd.iso"
format = "raw"
media = "cdrom"
index = 2
"""
    text = linux("a", size="224MiB", network=None, cmdline="kvmd.ip=none", extra=extra)
    host.guest("a", text.replace('accel = "tcg"', 'accel = "tcg"\ntype = "pc"'))
    host.start()
    host.call("guest.start", name="a")
    with GuestConsole(host.run / "guests/a/serial-console.sock") as console:
        console.wait_ready(90)
        drives = console.check("for d in sda sr0; do readlink -f /sys/block/$d/device; done").split()
    assert [drive.split("/")[-4] for drive in drives] == ["ata1", "ata2"]
    assert [drive.rsplit("/", 1)[1].partition(":")[2] for drive in drives] == ["0:0:0", "0:0:0"]
    blocks = {block["qdev"]: block["removable"] for block in ask(host, "a", "query-block")}
    assert blocks == {"disk-hda": False, "disk-cdrom": True}


def test_once_is_for_the_first_boot_only(host: KvmdHost, life: str) -> None:
    """boot.once: the second disk at the start, the first one after each reset; also under the next kvmd."""
    second = bootsector(host.images / "second.img", "second is up\n")
    extra = f'[disk.second]\nfile = "{second}"\nformat = "raw"\n[boot]\norder = "c"\nonce = ["disk.second"]\n'
    host.guest("a", tiny(host, "a", extra=extra))
    host.start()
    host.call("guest.start", name="a")
    host.wait_serial("a", "second is up", 30)
    if life == "adopted":
        host.restart()
    for boots in (1, 2):
        host.call("guest.reset", name="a")
        host.wait_serial("a", "a is up\n" * boots, 30)
    log = (host.state / "log/a/serial-console.log").read_text()
    assert (log.count("second is up"), log.count("a is up")) == (1, 2)


def test_the_splash_picture_is_on_the_screen(host: KvmdHost) -> None:
    """SeaBIOS shows it while its menu waits: the colour of the picture's middle, as QEMU dumps the screen."""
    (host.images / "logo.bmp").write_bytes(bitmap(640, 480, (10, 200, 30)))
    boot = f'[boot]\nmenu = true\nsplash = "{host.images}/logo.bmp"\nsplash_time = "60s"\n'
    host.guest("a", tiny(host, "a", extra=f'{boot}[display]\ntype = "vnc"\n'))
    host.start()
    host.call("guest.start", name="a")
    shot = Path(host.show("a")["display"]).parent / "shot.ppm"
    deadline = time.monotonic() + 30
    while True:
        ask(host, "a", "screendump", filename=str(shot))
        _, size, _, pixels = shot.read_bytes().split(b"\n", 3)
        width, height = map(int, size.split())
        middle = 3 * (height // 2 * width + width // 2)
        if (width, tuple(pixels[middle : middle + 3])) == (640, (10, 200, 30)):
            break
        assert time.monotonic() < deadline, (width, height, pixels[middle : middle + 3])
        time.sleep(0.2)


def test_clock_watchdog_sound_and_the_rest_are_what_the_file_says(host: KvmdHost) -> None:
    """Asked of QEMU itself: the guest's clock, what the watchdog does, each small device by its QOM type."""
    tables = """
[machine.smbios]
serial = "A-0017, second"
[rtc]
base = "2031-05-06T07:08:09"
clock = "vm"
[watchdog]
model = "i6300esb"
action = "pause"
[sound]
model = "hda"
[usb]
tablet = true
[display]
type = "vnc"
[video]
model = "bochs"
memory = "32MiB"
"""
    host.guest("a", linux("a", size="224MiB", network=None, cmdline="kvmd.ip=none", extra=tables))
    host.start()
    host.call("guest.start", name="a")
    kinds = {"watchdog": "i6300esb", "sound": "ich9-intel-hda", "tablet": "usb-tablet", "video": "bochs-display"}
    for device, kind in kinds.items():
        path = f"/machine/peripheral/{device}"
        assert ask(host, "a", "qom-get", path=path, property="type") == kind
    assert ask(host, "a", "qom-get", path="/machine/peripheral/video", property="vgamem") == 32 << 20
    with GuestConsole(host.run / "guests/a/serial-console.sock") as console:
        console.wait_ready(90)
        assert console.check("date -u +%Y-%m-%d").strip() == "2031-05-06"
        assert console.check("cat /sys/class/dmi/id/product_serial").strip() == "A-0017, second"
    (line,) = [word for word in host.show("a")["argv"] if word.startswith("reboot=")]
    assert line.endswith("watchdog=pause")


def test_vnc_answers_on_its_unix_socket_to_root_alone(host: KvmdHost, life: str) -> None:
    host.guest("a", tiny(host, "a", extra='[display]\ntype = "vnc"\n'))
    host.start()
    host.call("guest.start", name="a")
    if life == "adopted":
        host.restart()
    path = Path(host.show("a")["display"])
    with socket.socket(socket.AF_UNIX) as viewer:
        viewer.settimeout(10)
        viewer.connect(str(path))
        assert viewer.recv(12) == b"RFB 003.008\n"
    assert path.parent.stat().st_mode & 0o077 == 0


def test_user_mode_network_reaches_in_by_hostfwd(host: KvmdHost) -> None:
    nic = '[nic.up]\ntype = "user"\nhostfwd = ["tcp:127.0.0.1:8080-:80"]\n'
    host.guest("a", linux("a", network=None, cmdline="kvmd.ip=dhcp kvmd.httpd=1", extra=nic))
    host.start()
    host.call("guest.start", name="a")
    host.wait_serial("a", "KVMD-GUEST LEASE", 90)
    host.wait_serial("a", "KVMD-GUEST READY", 90)
    fetch = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8080/', timeout=20).read().decode())"
    assert "hello from a" in host.inside("/usr/bin/python3", "-c", fetch).stdout


def test_a_dedicated_guest_has_its_cpu_alone(host: KvmdHost, life: str) -> None:
    """vCPU 1:1 on a CPU outside housekeeping, every other thread elsewhere; mended when someone moves it."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.fail("this test needs two CPUs")
    host.guest("a", tiny(host, "a", extra='[cpu]\nplacement = "dedicated"\n'))
    host.start()
    host.call("guest.start", name="a")
    if life == "adopted":
        host.restart()
    shown = host.wait_placed("a")
    (own,) = shown["placement"]["vcpus"]
    assert own.isdigit()
    cpu_tid = ask(host, "a", "query-cpus-fast")[0]["thread-id"]
    for tid in observe_threads(Tree(), shown["pid"]):
        allowed = os.sched_getaffinity(tid)
        assert (allowed == {int(own)}) == (tid == cpu_tid)
    (seat,) = [cpu for cpu in host.call("host.cpus")["cpus"] if cpu["vcpus"]]
    assert (str(seat["id"]), seat["vcpus"]) == (own, ["a:0"])
    for strayed in (cpu_tid, shown["pid"]):
        rest = shown["placement"]["emulator"]
        os.sched_setaffinity(strayed, os.sched_getaffinity(0))
        assert not host.call("host.cpus")["guests"][0]["placed"]
        plan = host.call("host.plan")["actions"]
        assert [action["kind"] for action in plan] == ["pin-guest"]
        host.call("host.reconcile")
        assert os.sched_getaffinity(cpu_tid) == {int(own)}
        assert os.sched_getaffinity(shown["pid"]) == CpuSet.parse(rest)
        assert host.call("host.plan")["actions"] == []
    (guest,) = host.call("host.cpus")["guests"]
    assert (guest["placed"], {thread["cpus"] for thread in guest["threads"]}) == (True, {rest})


def test_others_leave_the_cpu_of_a_dedicated_guest_before_it_runs(host: KvmdHost) -> None:
    """Not at the next pass: when the start is answered, nobody else may run there."""
    for name, extra in (("mine", '[cpu]\nplacement = "dedicated"\n'), ("others", "")):
        host.guest(name, tiny(host, name, extra=extra))
    host.start()
    host.call("guest.start", name="others")
    everywhere = CpuSet(os.sched_getaffinity(0))
    pid = host.call("guest.show", name="others")["pid"]
    assert {CpuSet(os.sched_getaffinity(tid)) for tid in observe_threads(Tree(), pid)} == {everywhere}
    host.call("guest.start", name="mine")
    (own,) = host.call("guest.show", name="mine")["placement"]["vcpus"]
    left = CpuSet(everywhere - {int(own)})
    assert {CpuSet(os.sched_getaffinity(tid)) for tid in observe_threads(Tree(), pid)} == {left}
    assert host.call("host.plan")["actions"] == []


def test_more_dedicated_vcpus_than_the_host_can_give_is_refused_with_the_sum(host: KvmdHost) -> None:
    host.guest("a", tiny(host, "a", extra='[cpu]\nvcpus = 2\ncores = 2\nplacement = "dedicated"\n'))
    host.start()
    with pytest.raises(RemoteError, match="2 ") as error:
        host.call("guest.start", name="a")
    assert error.value.slug == "refused"


def test_memory_that_nobody_has_is_refused_with_the_sum(host: KvmdHost) -> None:
    host.guest("a", tiny(host, "a", size="4TiB"))
    host.start()
    with pytest.raises(RemoteError, match="RAM") as error:
        host.call("guest.start", name="a")
    assert (error.value.slug, host.show("a")["pid"]) == ("refused", None)


def test_names_that_are_no_names_are_refused_by_the_api(host: KvmdHost) -> None:
    host.start()
    for name in ("../x", "a/b", "a,b", "a\nb", "", "-a", "x" * 48, "A"):
        with pytest.raises(RemoteError) as error:
            host.call("guest.start", name=name)
        assert error.value.slug == "protocol", name


def test_the_serial_log_is_kept_with_nobody_attached(host: KvmdHost) -> None:
    host.guest("a", tiny(host, "a"))
    host.start()
    host.call("guest.start", name="a")
    assert "a is up" in host.wait_serial("a", "a is up")
    log = host.state / "log/a/serial-console.log"
    assert log.stat().st_mode & 0o007 == 0
