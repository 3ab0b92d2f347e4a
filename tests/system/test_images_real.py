"""Images against the real kernel, QEMU's own tools and a real QEMU that holds the descriptor."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvmd.effects.images import create_image, open_image
from kvmd.errors import Conflict, Denied, KvmdError
from kvmd.qemu.imageheader import empty_qcow2
from tests.data.images import corpus

pytestmark = pytest.mark.system

MIB = 1 << 20
QEMU = ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-m", "32M", "-nodefaults", "-display", "none", "-S"]


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "vm"
    root.mkdir()
    create_image(str(root / "disk.qcow2"), format="qcow2", size_bytes=64 * MIB, roots=[root])
    return root


@contextlib.contextmanager
def opened(path, root, **options):
    image = open_image(str(path), **({"writable": True, "format": "qcow2", "roots": [root]} | options))
    try:
        yield image
    finally:
        os.close(image.fd)


@contextlib.contextmanager
def running(command, pass_fds=()):
    """A process, ended on the way out."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=pass_fds)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


def conflict(path, root, **options) -> Conflict:
    with pytest.raises(Conflict) as raised, opened(path, root, **options):
        pass
    return raised.value


def qemu_img(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, timeout=60, check=False)


def until(condition, timeout_s=20.0):
    """Poll for what another process does by itself; False when it does not."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


# ---- locks --------------------------------------------------------------------------------------------------------


def test_the_lock_lives_in_the_child_after_we_closed_ours(root):
    """Row 54, R3: whoever has the descriptor has the lock, whatever became of kvmd; SIGKILL frees it."""
    disk = root / "disk.qcow2"
    image = open_image(str(disk), writable=True, format="qcow2", roots=[root])
    with running(["sleep", "1000"], pass_fds=[image.fd]) as process:
        os.close(image.fd)
        error = conflict(disk, root)
        assert error.details["pid"] == process.pid
        assert f"sleep (pid {process.pid})" in error.message
    with opened(disk, root):
        pass


def test_the_lock_outlives_a_killed_kvmd(root):
    """The opener hands the descriptor to a child and is killed: the child still keeps everybody out."""
    disk = root / "disk.qcow2"
    opener = (
        "import os, subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from kvmd.effects.images import open_image\n"
        "image = open_image(sys.argv[1], writable=True, format='qcow2', roots=[Path(sys.argv[2])])\n"
        "child = subprocess.Popen(['sleep', '1000'], pass_fds=[image.fd], start_new_session=True,\n"
        "    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    command = [sys.executable, "-c", opener, str(disk), str(root)]
    kvmd = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    child = int(kvmd.stdout.readline())
    pidfd = os.pidfd_open(child)
    try:
        kvmd.kill()
        kvmd.communicate(timeout=20)
        assert conflict(disk, root).details["pid"] == child
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)

    def free() -> bool:
        with contextlib.suppress(Conflict), opened(disk, root):
            return True
        return False

    assert until(free)


def test_a_qemu_with_the_descriptor_is_named_as_guest_and_its_write_is_ours_alone(root):
    disk = root / "disk.qcow2"
    image = open_image(str(disk), writable=True, format="qcow2", roots=[root])
    node = '{"driver":"file","filename":"/dev/fdset/1","node-name":"f","locking":"off"}'
    sets = ["-add-fd", f"fd={image.fd},set=1", "-blockdev", node, "-blockdev", "qcow2,node-name=d,file=f"]
    with running([*QEMU, "-name", "web", *sets], pass_fds=[image.fd]) as process:
        os.close(image.fd)
        error = conflict(disk, root)
        assert error.details == {"path": str(disk), "pid": process.pid, "guest": "web"}
        assert "guest web, qemu-system-x86" in error.message
        assert process.poll() is None
        refused = qemu_img("resize", "-f", "qcow2", disk, "128M")
        assert refused.returncode != 0
        assert b"lock" in refused.stderr


def test_a_foreign_qemu_keeps_us_out_and_is_named(root):
    """Row 55: a QEMU that someone started by hand, with QEMU's own locks."""
    disk = root / "disk.qcow2"
    with running([*QEMU, "-name", "guest=other,debug-threads=on", "-drive", f"file={disk},format=qcow2"]) as process:
        assert until(lambda: str(disk) in {os.path.realpath(f) for f in Path(f"/proc/{process.pid}/fd").iterdir()})
        assert until(lambda: _locked(disk, root)), process.stderr.read1()
        error = conflict(disk, root)
        assert error.details["pid"] == process.pid
        assert "guest other" in error.message
        assert conflict(disk, root, writable=False).details["pid"] == process.pid


def _locked(disk, root) -> bool:
    with contextlib.suppress(Conflict), opened(disk, root):
        return False
    return True


def test_readers_of_ours_and_foreign_readers_share(root):
    disk = root / "disk.qcow2"
    with opened(disk, root, writable=False):
        assert qemu_img("info", "-f", "qcow2", disk).returncode == 0
        assert qemu_img("resize", "-f", "qcow2", disk, "128M").returncode != 0
        with running([*QEMU, "-drive", f"file={disk},format=qcow2,readonly=on,if=virtio"]) as process:
            assert until(lambda: any(os.path.realpath(f) == str(disk) for f in _fds(process)))
            with opened(disk, root, writable=False):
                pass
            assert process.poll() is None


def _fds(process):
    return list(Path(f"/proc/{process.pid}/fd").iterdir())


# ---- images made and judged, with qemu-img as the oracle -----------------------------------------------------------


@pytest.mark.parametrize("size", [512, MIB, 512 * MIB + 512, 20 << 30, 1 << 40, 64 << 40])
def test_qemu_img_finds_no_fault_in_a_new_image(tmp_path, size):
    path = tmp_path / "new.qcow2"
    path.write_bytes(empty_qcow2(size))
    checked = qemu_img("check", "-f", "qcow2", path)
    assert (checked.returncode, checked.stderr) == (0, b"")
    assert f"({size} bytes)".encode() in qemu_img("info", "-f", "qcow2", path).stdout


@pytest.mark.parametrize("options", ["", "compat=0.10", "cluster_size=2M", "cluster_size=512", "extended_l2=on"])
@pytest.mark.parametrize("size", ["512", "1M", "20G"])
def test_what_qemu_img_makes_is_accepted(root, options, size):
    path = root / "made.qcow2"
    made = qemu_img("create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, size)
    assert made.returncode == 0, made.stderr
    with opened(path, root) as image:
        assert image.info.warnings == ()


def test_a_real_backing_file_and_a_real_data_file_are_refused(root, tmp_path):
    (tmp_path / "secret").write_bytes(corpus.SECRET.ljust(MIB, b"\0"))
    qemu_img("create", "-f", "qcow2", "-b", tmp_path / "secret", "-F", "raw", root / "backed.qcow2")
    options = f"data_file={tmp_path}/secret,data_file_raw=on"
    qemu_img("create", "-f", "qcow2", "-o", options, root / "data.qcow2", "1M")
    for name, reason in (("backed", "backing file"), ("data", "external file")):
        with pytest.raises(KvmdError, match=reason), opened(root / f"{name}.qcow2", root):
            pass


# ---- block devices ------------------------------------------------------------------------------------------------


@pytest.fixture
def loop(tmp_path):
    """A loop device of 4 MiB with a file system."""
    backing = tmp_path / "loop.img"
    backing.write_bytes(bytes(4 * MIB))
    subprocess.run(["mkfs.ext4", "-q", str(backing)], check=True, timeout=60)
    found = subprocess.run(["losetup", "-f", "--show", str(backing)], capture_output=True, check=True, timeout=60)
    device = Path(found.stdout.decode().strip())
    yield device
    subprocess.run(["losetup", "-d", str(device)], check=True, timeout=60)


def test_a_block_device_opens_and_has_its_size(loop):
    with opened(loop, loop, format="raw") as image:
        assert (image.is_block, image.file_bytes, image.free_bytes) == (True, 4 * MIB, None)
        assert "kvmd itself" in conflict(loop, loop, format="raw", writable=False).message


def test_a_volumes_link_beneath_dev_is_followed_and_none_that_leaves(loop, tmp_path):
    group = Path(f"/dev/kvmd-test-{os.getpid()}")
    group.mkdir()
    try:
        (group / "data").symlink_to(f"../{loop.name}")
        (group / "evil").symlink_to(tmp_path / "loop.img")
        with opened(group / "data", group, format="raw") as image:
            assert image.is_block
        with pytest.raises(Denied), opened(group / "evil", group, format="raw"):
            pass
    finally:
        shutil.rmtree(group)


def test_a_mounted_device_is_refused_for_writing(loop):
    mount = ["unshare", "-m", "sh", "-c", f"mount {loop} /mnt && echo mounted && exec sleep 1000"]
    process = subprocess.Popen(mount, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"mounted\n"
        error = conflict(loop, loop, format="raw")
        assert "in use by the host" in error.message
        with opened(loop, loop, format="raw", writable=False):
            pass
    finally:
        process.kill()
        process.communicate(timeout=20)


def test_a_read_only_file_system_says_which_key_to_set(root):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from kvmd.effects.images import open_image\n"
        "from kvmd.errors import HostFailed\n"
        "try:\n"
        "    open_image(sys.argv[1], writable=True, format='qcow2', roots=[Path(sys.argv[2])])\n"
        "except HostFailed as error:\n"
        "    print(error.message, '|', error.hint)\n"
        "open_image(sys.argv[1], writable=False, format='qcow2', roots=[Path(sys.argv[2])])\n"
    )
    shell = 'mount --bind "$2" "$2" && mount -o remount,ro,bind "$2" && exec "$0" -c "$3" "$1" "$2"'
    command = ["unshare", "-m", "sh", "-c", shell, sys.executable, str(root / "disk.qcow2"), str(root), script]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Read-only file system" in done.stdout
    assert b"readonly = true" in done.stdout
