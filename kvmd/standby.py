"""Hands a guest over as it was last started, when kvmd does not answer: degraded, but up.

systemd runs it for each launcher that found kvmd's launch socket silent (`kvmd-standby@.service`), with the launcher's
connection as fd 3, by file path and with the standard library alone: a kvmd whose environment is broken is what it is
for. It speaks the hand-over of `kvmd/launch.py` and opens what STATE/guests/NAME/last-start.json (written by
`effects/laststart.py` after each good start) lists, with the same locks and the same rights as kvmd does. It changes
nothing else of the host: no bridge, no pages, no rules. Nothing is verified or pinned; the next kvmd adopts the guest,
reads what was left out in RUN/standby/NAME, and places it.

    standby.py STATE_DIR RUN_DIR LOG_DIR

Why the launcher does not do this itself: it is what becomes QEMU, so its unit has neither the capabilities nor the
host's network, and shall not.
"""

import contextlib
import fcntl
import json
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

FORMAT = "kvmd-last-start-1"  # of the record
HAND_OVER = "kvmd-launch-1"  # of the spec, as kvmd/launch.py reads it
FDS_PER_MESSAGE = 250
CONNECTION = 3  # sd_listen_fds(3)
NAME_TIMEOUT_S = 5.0
BIRTH_TIMEOUT_S = 10.0  # from the hand-over to QEMU's own command line
RECORD_BYTES = 4 << 20
BOOT_FILE_BYTES = 1 << 30
DEVICES = "/dev"

PERM, SHARED = 100, 200  # QEMU's lock bytes, as in effects/imagelock.py
READ, WRITE, RESIZE = 0, 1, 3

TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR, IFF_TUN_EXCL = 0x0002, 0x0100, 0x1000, 0x4000, 0x8000
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFMTU, SIOCSIFHWADDR = 0x8913, 0x8914, 0x8922, 0x8924  # linux/sockios.h
SIOCBRADDIF = 0x89A2
IFF_UP, ARPHRD_ETHER = 0x1, 1
TAP_KEYS = frozenset({"name", "mac", "bridge", "mtu", "alias", "port_isolated"})

Entry = dict[str, Any]  # a JSON object of the record


class Refused(Exception):
    """Why the guest is not handed over; the launcher prints it."""


class Guest:
    """One guest that is handed over: its record, where its things lie, and what had to be left out."""

    def __init__(self, name: str, record: Entry, run_dir: str, log_dir: str) -> None:
        self.name = name
        self.record = record
        self.uid, self.gid = int(record["uid"]), int(record["gid"])
        self.run_dir = run_dir + "/guests/" + name
        self.log_dir = log_dir + "/" + name
        self.notes: list[str] = []

    def spec(self, targets: list[int]) -> bytes:
        """What the launcher is to become: the last argv, without the option that starts QEMU paused."""
        argv = list(self.record["argv"])
        if "-S" in argv:
            argv.remove("-S")
        groups = ",".join(map(str, self.record["groups"]))
        fields = [HAND_OVER, str(self.uid), str(self.gid), groups, ",".join(map(str, targets)), *argv]
        return b"".join(os.fsencode(field) + b"\0" for field in fields)

    def open_all(self) -> list[tuple[int, int]]:
        """(target number, our fd) of everything the argv names. Refused."""
        make_directory(self.run_dir, 0o711, 0, 0)
        make_directory(self.log_dir, 0o750, 0, 0)
        make_directory(self.run_dir + "/display", 0o700, self.uid, self.gid)
        pairs: list[tuple[int, int]] = []
        for entry in self.record["open"]:
            opener = OPENERS.get(entry["kind"])
            if opener is None:
                raise Refused(f"only kvmd can open its {entry['kind']}")
            try:
                opened = opener(self, entry)
            except OSError as error:
                where = entry.get("path") or entry.get("purpose") or entry.get("nic")
                raise Refused(f"cannot open {entry['kind']} {where}: {error.strerror or error}") from None
            pairs += [(entry["fd"] + offset, fd) for offset, fd in enumerate(opened)]
        return pairs


# ---- what an argv's numbers stand for ------------------------------------------------------------------------------


def open_image(_guest: Guest, entry: Entry) -> list[int]:
    """A disk image: found without links, a file with one name or a block device, locked as kvmd locks it."""
    writable = entry["writable"]
    place = find(entry["root"], entry["path"])
    try:
        found = os.fstat(place)
        is_block = stat.S_ISBLK(found.st_mode)
        is_file = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and entry["root"] != DEVICES
        if not is_block and not is_file:
            raise Refused(f"{entry['path']} is not a regular file with one name, nor a block device")
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK
        fd = os.open(f"/proc/self/fd/{place}", flags | (os.O_EXCL if is_block and writable else 0))
    finally:
        os.close(place)
    if not lock(fd, exclusive=writable):
        raise Refused(f"{entry['path']} is in use by another process")
    if writable or not is_block:  # QEMU polls a CD drive through a non-blocking descriptor
        os.set_blocking(fd, True)
    return [fd]


def copy_file(_guest: Guest, entry: Entry) -> list[int]:
    """A kernel or initrd as a memfd nobody can change."""
    place = find(entry["root"], entry["path"])
    source = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_NONBLOCK)
    os.close(place)
    if not stat.S_ISREG(os.fstat(source).st_mode) or os.fstat(source).st_size > BOOT_FILE_BYTES:
        raise Refused(f"{entry['path']} is no kernel or initrd")
    memfd = os.memfd_create("kvmd-boot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    while chunk := os.read(source, 1 << 20):
        while chunk:
            chunk = chunk[os.write(memfd, chunk) :]
    os.close(source)
    os.lseek(memfd, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, seals)
    return [memfd]


def listen(guest: Guest, entry: Entry) -> list[int]:
    """A socket of mode 0600 that listens from its first moment; by a relative name, which is never too long."""
    name = entry["purpose"] + ".sock"
    os.chdir(guest.run_dir)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    listener.bind(name)
    os.umask(before)
    listener.listen(128)
    os.chdir("/")
    return [listener.detach()]


def append_log(guest: Guest, entry: Entry) -> list[int]:
    """A log file, for appending."""
    path = guest.log_dir + "/" + entry["purpose"] + ".log"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o640)
    if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_nlink != 1:
        raise Refused(f"the log {path} is not a regular file with one name")
    os.set_blocking(fd, True)
    return [fd]


def open_vhost(_guest: Guest, _entry: Entry) -> list[int]:
    """/dev/vhost-net."""
    return [os.open("/dev/vhost-net", os.O_RDWR)]


def open_tap(guest: Guest, entry: Entry) -> list[int]:
    """A NIC's TAP, plugged in where it was; unplugged when its network is not there or needs more than we can do."""
    tap, queues = entry["tap"], entry["queues"]
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)
    fds = []
    for queue in range(queues):
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", tap["name"].encode(), flags | (0 if queue else IFF_TUN_EXCL)))
        fds.append(fd)
    beyond = sorted(tap.keys() - TAP_KEYS)
    if beyond:
        guest.notes.append(f"nic {entry['nic']} is unplugged: only kvmd can do {', '.join(beyond)}")
        return fds
    try:
        plug(tap)
    except OSError as error:
        guest.notes.append(f"nic {entry['nic']} is unplugged: bridge {tap['bridge']}: {error.strerror or error}")
    return fds


def plug(tap: Entry) -> None:
    """Set the TAP up and make it a port of its bridge. OSError."""
    name, bridge = tap["name"], tap["bridge"]
    short, index = name.encode(), socket.if_nametoindex(name)
    socket.if_nametoindex(bridge)  # first of all: without its bridge the TAP stays down
    with contextlib.suppress(OSError):  # a kernel without IPv6
        write(f"/proc/sys/net/ipv6/conf/{name}/addr_gen_mode", "1")
    with contextlib.suppress(OSError):  # it marks the link as ours; the next kvmd knows it by its QEMU
        write(f"/sys/class/net/{name}/ifalias", tap["alias"])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        address = bytes.fromhex(tap["mac"].replace(":", ""))
        fcntl.ioctl(control, SIOCSIFHWADDR, struct.pack("16sH14s8x", short, ARPHRD_ETHER, address))
        fcntl.ioctl(control, SIOCSIFMTU, struct.pack("16si20x", short, tap["mtu"]))
        fcntl.ioctl(control, SIOCBRADDIF, struct.pack("16si20x", bridge.encode(), index))
        if tap.get("port_isolated"):
            write(f"/sys/class/net/{name}/brport/isolated", "1")
        (up,) = struct.unpack("16xH22x", fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16s24x", short)))
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", short, up | IFF_UP))


OPENERS: dict[str, Callable[[Guest, Entry], list[int]]] = {
    "image": open_image,
    "copy": copy_file,
    "listen": listen,
    "log": append_log,
    "tap": open_tap,
    "vhost-net": open_vhost,
}


# ---- small things --------------------------------------------------------------------------------------------------


def find(root: str, path: str) -> int:
    """An O_PATH descriptor of `path`, no symlink beneath `root`. Links of /dev are udev's and are followed."""
    flags = os.O_PATH | os.O_CLOEXEC
    if root == DEVICES or path == root:
        return os.open(path, flags)
    current = os.open(root, flags | os.O_DIRECTORY)
    parts = path[len(root.rstrip("/")) + 1 :].split("/")
    if not path.startswith(root.rstrip("/") + "/") or any(part in ("", ".", "..") for part in parts):
        raise Refused(f"{path} does not lie beneath {root}")
    for part in parts:
        below = os.open(part, flags | os.O_NOFOLLOW, dir_fd=current)
        os.close(current)
        current = below
        if stat.S_ISLNK(os.fstat(current).st_mode):
            raise Refused(f"{path}: a part of the path is a symlink")
    return current


def lock(fd: int, *, exclusive: bool) -> bool:
    """kvmd's lock on an image (effects/imagelock.py): False when someone's use stands against it."""
    if exclusive:
        return _lock(fd, fcntl.F_WRLCK, 0, 0)
    taken = (PERM + READ, SHARED + WRITE, SHARED + RESIZE)
    against = (SHARED + READ, PERM + WRITE, PERM + RESIZE)
    return all(_lock(fd, fcntl.F_RDLCK, byte, 1) for byte in taken) and not any(_held(fd, byte) for byte in against)


def _lock(fd: int, kind: int, start: int, length: int) -> bool:
    with contextlib.suppress(BlockingIOError, PermissionError):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))
        return True
    return False


def _held(fd: int, byte: int) -> bool:
    asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    return bool(struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK)


def make_directory(path: str, mode: int, uid: int, gid: int) -> None:
    """As effects/files.ensure_dir."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if os.fstat(fd).st_uid not in (0, uid):
        raise Refused(f"{path} belongs to uid {os.fstat(fd).st_uid}")
    os.fchown(fd, uid, gid)
    os.fchmod(fd, mode)
    os.close(fd)


def write(path: str, value: str) -> None:
    """Into an existing kernel file. OSError."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def read_trusted(top: str, *parts: str) -> bytes:
    """A file that only root can have written: every step from `top` on is root's and not writable by others."""
    current = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for number in range(len(parts) + 1):
        found = os.fstat(current)
        if found.st_uid != 0 or found.st_mode & 0o022:
            raise Refused(f"{'/'.join((top, *parts[:number]))} is not root's alone to write")
        if number < len(parts):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            below = os.open(parts[number], flags, dir_fd=current)
            os.close(current)
            current = below
    with open(current, "rb") as file:
        return file.read(RECORD_BYTES)


# ---- who asks, and the answer --------------------------------------------------------------------------------------


def who_asks(peer: socket.socket) -> tuple[str, int]:
    """The guest's name and the launcher's pid, which is root's and runs as this guest's unit. Refused."""
    peer.settimeout(NAME_TIMEOUT_S)
    pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    line = peer.recv(64)
    name = line[:-1].decode("ascii", "replace")
    plain = name.replace("-", "0").isalnum() and name == name.lower() and name.isascii() and len(name) <= 47
    if uid != 0 or not line.endswith(b"\n") or not plain or not runs_as_unit(pid, name):
        raise Refused("only the launcher of a guest's unit is answered")
    return name, pid


def runs_as_unit(pid: int, name: str) -> bool:
    """Whether systemd put the process into the cgroup of the guest's unit; only root can move it there."""
    with open(f"/proc/{pid}/cgroup") as file:
        return any(f"kvmd-guest@{name}.service" in line.strip().rpartition(":")[2].split("/") for line in file)


@contextlib.contextmanager
def marked(run_dir: str, name: str) -> Iterator[int]:
    """Hold the file by which a kvmd that comes back in this moment knows that a guest is being born."""
    make_directory(run_dir + "/standby", 0o700, 0, 0)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    mark = os.open(run_dir + "/standby/" + name, flags, 0o600)
    try:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refused("it is being started already") from None
        os.ftruncate(mark, 0)
        yield mark
    finally:
        os.close(mark)


def runs_already(uuid: str) -> int | None:
    """The pid of a process that has QEMU's -uuid of this guest."""
    wanted = b"\0-uuid\0" + uuid.encode() + b"\0"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            if wanted in file.read():
                return int(pid)
    return None


def serve(peer: socket.socket, state_dir: str, run_dir: str, log_dir: str) -> str:
    """Answer one launcher; what to say of it. Refused."""
    name, pid = who_asks(peer)
    with marked(run_dir, name) as mark:
        try:
            record = json.loads(read_trusted(state_dir, "guests", name, "last-start.json"))
        except FileNotFoundError:
            raise Refused("it was never started, so there is nothing to start it from") from None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise Refused("its record is of another version")
        running = runs_already(str(record["uuid"]))
        if running:
            raise Refused(f"it runs already, as pid {running}")
        guest = Guest(name, record, run_dir, log_dir)
        pairs = guest.open_all()
        notes = ["was started without kvmd: neither verified nor placed", *guest.notes]
        os.write(mark, "".join(note + "\n" for note in notes).encode())
        hand_over(peer, guest.spec([target for target, _ in pairs]), [fd for _, fd in pairs])
        await_birth(pid, str(record["uuid"]))
    return f"guest {name} " + "; ".join(notes)


def hand_over(peer: socket.socket, spec: bytes, fds: list[int]) -> None:
    """Give the launcher the spec and all descriptors. OSError when it has gone."""
    memfd = os.memfd_create("kvmd-launch")
    os.write(memfd, spec)
    os.lseek(memfd, 0, os.SEEK_SET)
    ours = [memfd, *fds]
    groups = [ours[first : first + FDS_PER_MESSAGE] for first in range(0, len(ours), FDS_PER_MESSAGE)]
    for number, group in enumerate(groups, 1):
        socket.send_fds(peer, [b"!" if number == len(groups) else b"."], group)


def await_birth(pid: int, uuid: str) -> None:
    """Until the launcher is QEMU, or gone: from then on it can be found by its UUID."""
    deadline = time.monotonic() + BIRTH_TIMEOUT_S
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if uuid.encode() in file.read():
                    return
            time.sleep(0.02)


def main(arguments: list[str]) -> int:
    """One connection, one answer."""
    if len(arguments) != 3:
        sys.stderr.write("usage: standby.py STATE_DIR RUN_DIR LOG_DIR, a launcher's connection being fd 3\n")
        return 2
    with socket.socket(fileno=CONNECTION) as peer:
        try:
            sys.stderr.write(serve(peer, *arguments) + "\n")
        except (Refused, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
            text = f"kvmd does not answer, and the guest cannot be started without it: {reason}"
            with contextlib.suppress(OSError):
                peer.send(b"-" + text.encode("utf-8", "replace")[:4000])
            sys.stderr.write(text + "\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
