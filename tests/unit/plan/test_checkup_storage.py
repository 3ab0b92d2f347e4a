"""Doctor's checks of images, space, directories and sockets, each broken on a directory that looks like a host."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from kvmd.qemu.imageheader import empty_qcow2
from tests.rig.doctorhost import GUEST, DoctorHost, doctor_host, expect


@pytest.fixture
def box() -> Iterator[DoctorHost]:
    with doctor_host() as found:
        yield found


def test_an_image_is_missing(box: DoctorHost) -> None:
    box.remove("/srv/vm/web.raw")
    expect(box, "images", "fail", "guest web", "disk.root", "/srv/vm/web.raw", "does not exist")
    expect(box, "image-format", "skip")


def test_an_image_outside_the_roots(box: DoctorHost) -> None:
    box.write("/home/alice/web.raw", "x" * 512)
    box.guest("web", GUEST.replace("{images}", "/home/alice"))
    expect(box, "images", "fail", "/home/alice/web.raw", "no storage root")


def test_an_image_that_is_a_directory_or_a_link(box: DoctorHost) -> None:
    box.remove("/srv/vm/web.raw")
    image = box.root / "srv/vm/web.raw"
    image.symlink_to("/etc/shadow")
    expect(box, "images", "fail", "web.raw")
    image.unlink()
    image.mkdir()
    expect(box, "image-format", "fail", "is a directory")


def test_a_kernel_is_missing(box: DoctorHost) -> None:
    box.guest("web", GUEST + '[boot]\nkernel = "{images}/vmlinuz"\n')
    expect(box, "images", "fail", "boot.kernel", "/srv/vm/vmlinuz")


def test_another_header_than_declared(box: DoctorHost) -> None:
    box.guest("web", GUEST.replace('"raw"', '"qcow2"'))
    expect(box, "image-format", "fail", "guest web", "disk.root")
    (box.root / "srv/vm/web.raw").write_bytes(empty_qcow2(1 << 20))
    expect(box, "image-format", "ok")
    box.guest("web")
    expect(box, "image-format", "warn", "qcow2 header", fix='format = "qcow2"')


def test_an_image_others_can_write_to(box: DoctorHost) -> None:
    image = box.root / "srv/vm/web.raw"
    image.chmod(0o660)
    expect(box, "image-rights", "warn", "0660", fix="chmod 0600 /srv/vm/web.raw")
    image.chmod(0o666)
    expect(box, "image-rights", "fail", "0666", "every user", fix="chmod 0600 /srv/vm/web.raw")


def test_images_that_cannot_grow_to_their_size(box: DoctorHost) -> None:
    (box.root / "srv/vm/web.raw").write_bytes(empty_qcow2(60 << 40))
    box.guest("web", GUEST.replace('"raw"', '"qcow2"'))
    expect(box, "image-space", "warn", "web", "60.0 TiB", "/srv/vm")
    box.guest("web", GUEST.replace('cache = "writeback"', "readonly = true").replace('"raw"', '"qcow2"'))
    expect(box, "image-space", "ok")  # what the guest cannot write does not grow


def test_little_space_is_left(box: DoctorHost) -> None:
    box.daemon("", low_space="100%")
    for what in ("state", "logs", "images"):
        expect(box, "space", "warn", f"{what} (", "storage.low_space is 100%", fix="du ")


def test_space_is_judged_before_kvmd_made_its_directories(box: DoctorHost) -> None:
    box.remove("/var")
    box.daemon("", low_space="100%")
    expect(box, "space", "warn", f"state ({box.root})")


def test_a_directory_is_too_open(box: DoctorHost) -> None:
    box.paths.state.chmod(0o755)
    expect(box, "directories", "fail", str(box.paths.state), "0755, wider than 0700", fix="chmod 0700")


def test_a_directory_of_somebody_else(box: DoctorHost) -> None:
    box.euid = 4321  # then our own uid is a stranger's, unless we are root
    found = expect(box, "directories", "ok" if os.geteuid() == 0 else "fail")
    if os.geteuid() == 0:
        os.chown(box.paths.log, 1234, 1234)
        found = expect(box, "directories", "fail", "uid 1234", fix="chown root:root")
    assert found.name == "directories"


def test_the_socket_is_closed_to_clients(box: DoctorHost) -> None:
    box.paths.api_socket.chmod(0o600)
    expect(box, "socket", "fail", "0600", fix="chmod 0666")


def test_the_sockets_directory_is_open(box: DoctorHost) -> None:
    box.paths.run.chmod(0o777)
    expect(box, "socket", "fail", "0777", "replace", fix="chmod 0755")


def test_nobody_answers_on_the_socket(box: DoctorHost) -> None:
    box.close()
    expect(box, "socket", "fail", "nobody answers", fix="systemctl restart")


def test_a_file_where_the_socket_should_be(box: DoctorHost) -> None:
    box.paths.api_socket.unlink()
    expect(box, "socket", "warn", "not running", fix="systemctl enable --now kvmd")
    box.paths.api_socket.touch()
    expect(box, "socket", "fail", "no socket", fix="rm ")


def test_others_may_ask_for_a_guests_disks(box: DoctorHost) -> None:
    box.paths.launch_socket.chmod(0o666)
    expect(box, "launch-socket", "fail", "0666", fix="chmod 0600")
    box.paths.launch_socket.unlink()
    expect(box, "launch-socket", "skip")


def test_asking_whether_somebody_answers_leaves_the_socket_usable(box: DoctorHost) -> None:
    expect(box, "socket", "ok")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(box.paths.api_socket))
