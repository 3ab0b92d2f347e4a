"""The test guest itself: what other tests rely on it to say and do."""

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.guestconsole import POWERBUTTON, GuestConsole
from tests.rig.guestimage import bootsector, guest_kernel

pytestmark = pytest.mark.system

QEMU = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-machine", "q35"]


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GuestConsole, Path, "subprocess.Popen[bytes]"]]:
    directory = tmp_path_factory.mktemp("guest")
    kernel, initrd = guest_kernel()
    disk = bootsector(directory / "disk.img")
    arguments = [
        *QEMU,
        *("-cpu", "max", "-m", "192", "-kernel", str(kernel), "-initrd", str(initrd)),
        *("-append", "console=ttyS0 quiet kvmd.role=web kvmd.httpd=1"),
        *("-netdev", "user,id=lan,restrict=on", "-device", "virtio-net-pci,netdev=lan"),
        *("-drive", f"if=none,id=root,format=raw,file={disk}", "-device", "virtio-blk-pci,drive=root"),
        *("-device", "virtio-balloon-pci", "-device", "pvpanic-pci"),
        *("-serial", f"unix:{directory}/serial.sock,server=on,wait=off"),
        *("-qmp", f"unix:{directory}/qmp.sock,server=on,wait=off"),
    ]
    with subprocess.Popen(arguments) as qemu:
        try:
            with GuestConsole(directory / "serial.sock") as console:
                yield console, directory / "qmp.sock", qemu
        finally:
            qemu.kill()


def test_the_guest_boots_leases_serves_and_obeys(guest: tuple[GuestConsole, Path, "subprocess.Popen[bytes]"]) -> None:
    console, qmp, qemu = guest
    ready = console.wait_ready()
    assert ready[1] == "web"
    assert 140_000 < int(ready[2]) < 192 * 1024
    assert ready[4] == "vda:1048576"
    lease = console.wait_lease()
    assert lease[1] == "eth0"
    assert re.match(r"10\.0\.2\.\d+", lease[2])

    assert console.check("wget -qO- http://127.0.0.1/") == "hello from web"
    assert console.run("false").status == 1
    assert console.run("printf 'no newline'").output == "no newline"

    before = console.memory()
    console.check("memactor hold 40")
    during = console.memory()
    assert during["held_mib"] == 40
    assert during["available_kib"] < before["available_kib"] - 35 * 1024
    assert console.run("memactor hold 4000").status == 1
    console.check("memactor free")
    assert console.memory()["held_mib"] == 0

    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(str(qmp))
        monitor.recv(65536)
        for command in ("qmp_capabilities", "system_powerdown"):
            monitor.sendall(json.dumps({"execute": command}).encode())
            monitor.recv(65536)
        console.wait_for(POWERBUTTON, 10)
        assert qemu.wait(10) == 0


@pytest.mark.parametrize(("ending", "times"), [("halt", 1), ("poweroff", 1), ("reboot", 2)])
def test_a_boot_sector_prints_and_ends_as_asked(tmp_path: Path, ending: str, times: int) -> None:
    disk = bootsector(tmp_path / "boot.img", "cheap guest\n", then=ending)  # type: ignore[arg-type]
    log = tmp_path / "serial.log"
    arguments = [*QEMU, "-m", "32", "-serial", f"file:{log}", "-drive", f"format=raw,file={disk}"]
    with subprocess.Popen(arguments) as qemu:
        try:
            deadline = time.monotonic() + 20
            while not log.exists() or log.read_text().count("cheap guest\n") < times:
                assert time.monotonic() < deadline, log.read_text() if log.exists() else "no serial output"
                time.sleep(0.05)
            if ending == "poweroff":
                assert qemu.wait(10) == 0
            else:
                assert qemu.poll() is None
        finally:
            qemu.kill()
