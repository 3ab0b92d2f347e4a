"""A host on which doctor finds nothing wrong, as a directory; tests break one thing of it.

Everything lies below one root: /proc, /sys, /etc, devices as plain files, kvmd's own directories with real sockets.
Only what no file can tell is answered by fields: whether KVM works, the nft listing, the kernel's clock state.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvmd.doctor import Check, examine
from kvmd.effects.checkup import Questions
from kvmd.effects.probe import kvm_usable, probe
from kvmd.effects.sysfs import HostTree
from kvmd.paths import Paths
from kvmd.plan.hostreport import Unseen
from kvmd.qemu.caps import Accel, Capabilities, Kvm
from tests.rig import golden_argv, hosts

QEMU_PID, DNSMASQ_PID, KVMD_PID, CHRONY_PID = 4242, 300, 900, 500
GUEST = """\
[cpu]
vcpus = 2
placement = "dedicated"
[memory]
size = "32MiB"
backing = "hugepages"
[disk.root]
file = "{images}/web.raw"
format = "raw"
cache = "writeback"
aio = "threads"
[nic.lan]
network = "lan"
"""
NETWORK = """\
[network]
mode = "nat"
[ipv4]
address = "192.168.50.1/24"
[ipv4.dhcp]
range = ["192.168.50.100", "192.168.50.200"]
"""
# header, DNS on the bridge's address, DHCP on all; little-endian hexadecimal as the kernel writes it
_SOCKETS = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref\n"


def socket_row(address: str, port: int, inode: int, *, state: str = "07") -> str:
    """One line of /proc/net/udp (state 07) or tcp (0A: listening)."""
    words = socket.inet_aton(address)[::-1].hex().upper()
    return f"  10: {words}:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 0 0 {inode} 2 0 0\n"


class DoctorHost:
    """The directory, and what the live host would answer."""

    def __init__(self, base: Path) -> None:
        self.root = base
        self.paths = Paths(base / "etc/kvmd", base / "var/lib/kvmd", base / "run/kvmd", base / "var/log/kvmd")
        self.images = "/srv/vm"
        self.euid = os.geteuid()
        self.as_root = True
        self.kvm: Kvm | None = Kvm(usable=True, reason="a QEMU ran under KVM as uid 64100")  # None: the real question
        self.real_probe = False
        self.ruleset = json.dumps({"nftables": []})
        self.synchronized: bool | Unseen = True
        self._sockets: list[socket.socket] = []
        self._make_machine()
        self._make_processes()
        self._make_system()
        self._make_kvmd()

    # ---- changing it ----

    def write(self, path: str, text: str, mode: int | None = None) -> Path:
        """A file of the pictured host."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        if mode is not None:
            file.chmod(mode)
        return file

    def remove(self, path: str) -> None:
        """A file or a directory with what is in it."""
        place = self.root / path.lstrip("/")
        shutil.rmtree(place) if place.is_dir() else place.unlink()

    def config(self, name: str, text: str) -> None:
        """A file of /etc/kvmd."""
        self.write(f"/etc/kvmd/{name}", text, 0o644)

    def daemon(self, text: str, *, low_space: str = "0%") -> None:
        """kvmd.toml: the storage roots, and this."""
        storage = f'roots = ["{self.images}"]\nimages = "{self.images}"\nlow_space = "{low_space}"\n'
        self.config("kvmd.toml", f"[storage]\n{storage}{text}")

    def guest(self, name: str, text: str = GUEST) -> None:
        """guests.d/NAME.toml; "{images}" in it is the directory of images."""
        self.config(f"guests.d/{name}.toml", text.replace("{images}", self.images))

    def process(self, pid: int, name: str, command: str = "", *, inodes: tuple[int, ...] = ()) -> None:
        """A running process with the sockets it holds."""
        self.write(f"/proc/{pid}/comm", f"{name}\n")
        self.write(f"/proc/{pid}/cmdline", command.replace(" ", "\0") + "\0")
        self.write(f"/proc/{pid}/stat", f"{pid} ({name}) S " + " ".join(["0"] * 18) + f" {pid}00 0 0\n")
        fds = self.root / f"proc/{pid}/fd"
        fds.mkdir(parents=True, exist_ok=True)
        for number, inode in enumerate(inodes, 3):
            (fds / str(number)).symlink_to(f"socket:[{inode}]")

    def link(self, name: str, *, alias: str = "", bridge: bool = False, tap: bool = False) -> None:
        """A network interface."""
        self.write(f"/sys/class/net/{name}/mtu", "1500\n")
        self.write(f"/sys/class/net/{name}/ifalias", f"{alias}\n")
        if bridge:
            (self.root / f"sys/class/net/{name}/bridge").mkdir()
        if tap:
            self.write(f"/sys/class/net/{name}/tun_flags", "0x5002\n")

    def close(self) -> None:
        """Let the sockets go."""
        for each in self._sockets:
            each.close()

    # ---- asking ----

    def all(self) -> tuple[Check, ...]:
        """Every check."""
        ask = Questions(
            euid=self.euid,
            as_root=self.as_root,
            kvm=self._kvm,
            capabilities=self._capabilities,
            ruleset=self._ruleset,
            is_synchronized=lambda: self.synchronized,
        )
        return asyncio.run(examine(self.paths, tree=HostTree(self.root), ask=ask))

    def check(self, name: str) -> list[Check]:
        """The findings of one check."""
        found = [check for check in self.all() if check.name == name]
        assert found, f"no check is called {name}"
        return found

    async def _kvm(self, emulator: str, *, uid: int | None, gid: int | None, root: Path) -> Kvm:
        if self.kvm is None:
            return await kvm_usable(emulator, uid=uid, gid=gid, root=root)
        return self.kvm

    async def _capabilities(
        self, emulator: str, accel: Accel, cache_dir: Path | None, *, uid: int | None, gid: int | None
    ) -> Capabilities:
        if self.real_probe:
            return await probe(emulator, accel, cache_dir, uid=None, gid=None)
        return golden_argv.recorded()

    async def _ruleset(self) -> str:
        return self.ruleset

    # ---- the healthy host ----

    def _make_machine(self) -> None:
        shape = hosts.topology(cores=4, isolated=(2, 3))
        hosts.write_tree(
            hosts.synthetic(shape, total=16 * hosts.GIB, kernel="6.1.0-56-amd64", advisor=False), self.root
        )
        for pool in ("/sys/devices/system/node/node0/hugepages", "/sys/kernel/mm/hugepages"):
            self.write(f"{pool}/hugepages-2048kB/nr_hugepages", "16\n")
        self.write("/proc/pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
        self.write("/proc/cpuinfo", "processor : 0\nflags : fpu svm\n\n")
        self.write("/proc/self/limits", "Max locked memory         8388608              8388608              bytes\n")
        self.write("/proc/sys/fs/aio-max-nr", "65536\n")
        self.write("/proc/sys/net/ipv4/ip_forward", "1\n")
        self.write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0\n")
        self.write("/dev/kvm", "", 0o660)
        self.write("/dev/vhost-net", "", 0o600)
        self.write("/dev/net/tun", "", 0o666)

    def _make_processes(self) -> None:
        (self.root / "proc/net").mkdir()
        udp = socket_row("192.168.50.1", 53, 11) + socket_row("0.0.0.0", 67, 12) + socket_row("127.0.0.53", 53, 13)
        self.write("/proc/net/udp", _SOCKETS + udp)
        self.write("/proc/net/tcp", _SOCKETS + socket_row("192.168.50.1", 53, 14, state="0A"))
        conf = self.paths.run / "networks/lan/dnsmasq.conf"
        self.process(DNSMASQ_PID, "dnsmasq", f"/usr/sbin/dnsmasq --conf-file={conf}", inodes=(11, 12, 14))
        self.process(QEMU_PID, "qemu-system-x86", "/usr/bin/qemu-system-x86_64 -name guest=web,debug-threads=on")
        self.process(KVMD_PID, "kvmd")
        self.process(CHRONY_PID, "chronyd")
        route = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
        self.write("/proc/net/route", route + "eth0 00000000 0100A8C0 0003 0 0 100 00000000 0 0 0\n")
        self.link("lo")
        self.link("eth0")
        self.link("kvlan", alias="kvmd:lan", bridge=True)
        self.link("kv0123456789ab", alias="kvmd:lan:web:lan", tap=True)

    def _make_system(self) -> None:
        gid = (self.root / "dev/kvm").stat().st_gid
        groups = f"root:x:0:\nkvm:x:{gid}:\nkvmd-admin:x:990:\nkvmd-operator:x:991:\nkvmd-qemu:x:992:\n"
        self.write("/etc/group", groups)
        self.write("/etc/passwd", "root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n")
        self.write("/etc/subuid", "alice:100000:65536\n")
        self.write("/usr/sbin/nft", "")
        self.write("/usr/sbin/dnsmasq", "")
        (self.root / "run/systemd/system").mkdir(parents=True)
        self.write("/lib/systemd/system/kvmd.service", "")
        wants = self.root / "etc/systemd/system/multi-user.target.wants"
        wants.mkdir(parents=True)
        (wants / "kvmd.service").symlink_to("/lib/systemd/system/kvmd.service")
        self.write("/etc/needrestart/needrestart.conf", "# defaults\n")
        self.write("/etc/needrestart/conf.d/kvmd.conf", "$nrconf{override_rc}{qr(^kvmd-guest@)} = 0;\n")

    def _make_kvmd(self) -> None:
        for path, mode in self.paths.directories:
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(mode)
        for path, mode in ((self.paths.api_socket, 0o666), (self.paths.launch_socket, 0o600)):
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(str(path))
            listening.listen(8)
            path.chmod(mode)
            self._sockets.append(listening)
        for name in ("guests.d", "networks.d", "profiles.d"):
            (self.paths.config / name).mkdir(parents=True)
            (self.paths.config / name).chmod(0o755)
        self.paths.config.chmod(0o755)
        image = self.write(f"{self.images}/web.raw", "", 0o600)
        os.truncate(image, 1 << 20)
        self.daemon("")
        self.config("host.toml", "[hugepages.2MiB]\npages = 16\n")
        self.config("networks.d/lan.toml", NETWORK)
        self.guest("web")


@contextlib.contextmanager
def doctor_host() -> Iterator[DoctorHost]:
    """A healthy host in a directory of its own, gone at the end.

    In memory where that is possible: it is two hundred small files. Reached by a link with a short path, since it
    holds sockets, and no path of an image may begin with /dev.
    """
    memory = Path("/dev/shm")
    real = Path(tempfile.mkdtemp(prefix="kvdoc-", dir=memory if os.access(memory, os.W_OK) else None))
    real.chmod(0o755)
    base = Path(tempfile.gettempdir()) / f"{real.name}.link"
    base.symlink_to(real)
    found = DoctorHost(base)
    try:
        yield found
    finally:
        found.close()
        base.unlink()
        shutil.rmtree(real)


def expect(host: DoctorHost, name: str, status: str, *words: str, fix: str | None = None) -> Check:
    """The check says `status` with all `words` in one message, and offers `fix`; every other status would be wrong."""
    found = host.check(name)
    hits = [check for check in found if check.status == status and all(word in check.message for word in words)]
    assert hits, f"{name}: {status} {words} expected, found {found}"
    if status in ("warn", "fail"):
        assert hits[0].fix, f"{name} offers no fix: {hits[0]}"
    if fix is not None:
        assert fix in (hits[0].fix or ""), f"{name} offers {hits[0].fix!r}, not {fix!r}"
    return hits[0]
