"""A host's PCI bus below a directory, whose files do what the kernel's do when they are written.

driver_override, unbind, drivers_probe, sriov_numvfs and sriov_drivers_autoprobe act as drivers/pci/pci-driver.c and
drivers/pci/iov.c say; /dev/vfio/GROUP comes and goes with the functions of the group on vfio-pci. `refuse` makes one
write fail, `die_after` ends the writer as kill -9 would.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from kvmd.effects.sysfs import HostTree
from kvmd.errors import HostFailed

BUS = "/sys/bus/pci"
NVME, ETHERNET, VGA, BRIDGE, ISA = 0x010802, 0x020000, 0x030000, 0x060400, 0x060100


class KilledHere(BaseException):
    """Where a kvmd was killed: nothing after it happens."""


class PciHost(HostTree):
    """Build it with `add`, then write to it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.writes: list[str] = []
        self.refuse: dict[str, int] = {}  # end of a path -> errno of the next write to it
        self.die_after: int | None = None
        self._owners: dict[str, tuple[int, int, int]] = {}
        self._natural: dict[str, str | None] = {}
        for directory in (f"{BUS}/devices", f"{BUS}/drivers/vfio-pci", "/dev/vfio", "/sys/kernel/iommu_groups"):
            self.path(directory).mkdir(parents=True)
        self._file("/dev/vfio/vfio", "")
        self._file(f"{BUS}/drivers_probe", "")
        self._file("/proc/sys/kernel/random/boot_id", "boot-1")

    def add(
        self,
        address: str,
        class_code: int,
        driver: str | None,
        *,
        group: int | None,
        total_vfs: int = 0,
        parent: str | None = None,
        override: str = "(null)",
        disk: str | None = None,
        link: str | None = None,
        node: int = 0,
    ) -> None:
        """One function, bound to `driver`, which is also the one that would take it by itself."""
        here = f"/sys/devices/pci{address[:7]}/{address}"
        for name, text in (
            ("class", f"0x{class_code:06x}"),
            ("numa_node", str(node)),
            ("driver_override", override),
        ):
            self._file(f"{here}/{name}", text)
        if total_vfs:
            self._file(f"{here}/sriov_totalvfs", str(total_vfs))
            self._file(f"{here}/sriov_numvfs", "0")
            self._file(f"{here}/sriov_drivers_autoprobe", "1")
        self._link(f"{BUS}/devices/{address}", here)
        if group is not None:
            self.path(f"/sys/kernel/iommu_groups/{group}/devices").mkdir(parents=True, exist_ok=True)
            self._link(f"{here}/iommu_group", f"/sys/kernel/iommu_groups/{group}")
            self._link(f"/sys/kernel/iommu_groups/{group}/devices/{address}", here)
        if parent:
            self._link(f"{here}/physfn", f"/sys/devices/pci{parent[:7]}/{parent}")
        if disk:
            self.add_block(disk, f"{here}/block/{disk}")
        if link:
            self.path(f"{here}/net/{link}").mkdir(parents=True)
            self._link(f"/sys/class/net/{link}", f"{here}/net/{link}")
        self._natural[address] = driver
        if driver:
            self._attach(address, driver)

    def add_block(self, name: str, where: str, *, number: str = "", slaves: tuple[str, ...] = ()) -> None:
        """A block device at a path below /sys/devices, made of `slaves` where it stands on others."""
        self._file(f"{where}/dev", number or f"8:{len(self.names('/sys/class/block'))}")
        self._link(f"/sys/class/block/{name}", where)
        for slave in slaves:
            (self.path(f"/sys/class/block/{slave}") / "holders" / name).mkdir(parents=True)
            self.path(f"{where}/slaves/{slave}").mkdir(parents=True)

    def put(self, path: str, text: str) -> None:
        """A file that is only read."""
        self._file(path, text)

    def picture(self) -> str:
        """Drivers, overrides, numbers of virtual functions and owners of nodes, as text."""
        lines = []
        for address in self.names(f"{BUS}/devices"):
            here = f"{BUS}/devices/{address}"
            target = self.link(f"{here}/driver") or ""
            words = [address, target.rpartition("/")[2] or "-", self.read(f"{here}/driver_override") or ""]
            words += [self.read(f"{here}/{name}") or "-" for name in ("sriov_numvfs", "sriov_drivers_autoprobe")]
            lines.append(" ".join(words))
        lines += [f"{name} {self.owner(f'/dev/vfio/{name}')}" for name in self.names("/dev/vfio")]
        return "\n".join(lines)

    # ---- what the kernel does -----------------------------------------------------------------------------------

    def write(self, path: str, value: str) -> None:
        if self.die_after is not None and len(self.writes) >= self.die_after:
            raise KilledHere
        self.writes.append(f"{path.removeprefix(BUS)} {value.strip()}")
        ending = next((end for end in self.refuse if path.endswith(end)), None)
        if ending is not None:
            raise self._refused(path, value, self.refuse.pop(ending))
        if not self.exists(path):
            raise self._refused(path, value, errno.ENOENT)
        name, text = path.rpartition("/")[2], value.strip()
        match name:
            case "driver_override":
                self._file(path, text or "(null)")
            case "unbind":
                self._unbind(path, value)
            case "drivers_probe":
                self._probe(text)
            case "sriov_numvfs":
                self._set_vfs(path, value)
            case "sriov_drivers_autoprobe":
                self._file(path, text)
            case _:
                raise self._refused(path, value, errno.EINVAL)

    def owner(self, path: str) -> tuple[int, int, int] | None:
        if path in self._owners:
            return self._owners[path]
        return (0, 0, 0o600) if self.exists(path) else None

    def give(self, path: str, uid: int, gid: int, mode: int) -> None:
        if self.die_after is not None and len(self.writes) >= self.die_after:
            raise KilledHere
        self.writes.append(f"{path} owner {uid}")
        self._owners[path] = (uid, gid, mode)

    def _refused(self, path: str, value: str, number: int) -> HostFailed:
        return HostFailed(f'cannot write "{value.strip()}" to {path}: {os.strerror(number)}', errno=number)

    def _group(self, address: str) -> str | None:
        target = self.link(f"{BUS}/devices/{address}/iommu_group")
        return target.rpartition("/")[2] if target else None

    def _attach(self, address: str, driver: str) -> None:
        self.path(f"{BUS}/drivers/{driver}").mkdir(parents=True, exist_ok=True)
        self._file(f"{BUS}/drivers/{driver}/unbind", "")
        self._link(f"{BUS}/devices/{address}/driver", f"{BUS}/drivers/{driver}")
        group = self._group(address)
        if driver == "vfio-pci" and group is not None and not self.exists(f"/dev/vfio/{group}"):
            self._file(f"/dev/vfio/{group}", "")

    def _detach(self, address: str) -> None:
        path = self.path(f"{BUS}/devices/{address}/driver")
        if path.is_symlink():
            path.unlink()
        group = self._group(address)
        mates = [a for a in self.names(f"{BUS}/devices") if self._group(a) == group]
        if group and not any((self.link(f"{BUS}/devices/{a}/driver") or "").endswith("/vfio-pci") for a in mates):
            self.path(f"/dev/vfio/{group}").unlink(missing_ok=True)
            self._owners.pop(f"/dev/vfio/{group}", None)

    def _unbind(self, path: str, address: str) -> None:
        if not self.exists(f"{BUS}/devices/{address}"):
            raise self._refused(path, address, errno.ENODEV)
        self._detach(address)

    def _probe(self, address: str) -> None:
        here = f"{BUS}/devices/{address}"
        if not self.exists(here):
            raise self._refused(f"{BUS}/drivers_probe", address, errno.ENODEV)
        if self.link(f"{here}/driver"):
            return
        override = self.read(f"{here}/driver_override")
        parent = self.link(f"{here}/physfn")
        if override not in (None, "", "(null)"):
            if self.exists(f"{BUS}/drivers/{override}"):
                self._attach(address, override or "")
        elif parent is None or self.read(f"{BUS}/devices/{parent.rpartition('/')[2]}/sriov_drivers_autoprobe") == "1":
            natural = self._natural[address]
            if natural:
                self._attach(address, natural)

    def _set_vfs(self, path: str, value: str) -> None:
        address = path.split("/")[-2]
        now, wanted = int(self.read(path) or "0"), int(value)
        if now and wanted:
            raise self._refused(path, value, errno.EBUSY)
        if wanted > int(self.read(f"{BUS}/devices/{address}/sriov_totalvfs") or "0"):
            raise self._refused(path, value, errno.ERANGE)
        for number in range(now):
            self._remove_vf(address, number)
        for number in range(wanted):
            self._add_vf(address, number)
        self._file(path, str(wanted))

    def _add_vf(self, parent: str, number: int) -> None:
        address = f"{parent[:-4]}{2 + number // 8:02x}.{number % 8}"
        group = 100 + number + 16 * int(parent[5:7], 16)
        self.add(address, int(self.read(f"{BUS}/devices/{parent}/class") or "0", 16), None, group=group, parent=parent)
        self._link(f"{BUS}/devices/{parent}/virtfn{number}", f"/sys/devices/pci{address[:7]}/{address}")
        driver = self.link(f"{BUS}/devices/{parent}/driver")
        self._natural[address] = driver.rpartition("/")[2] if driver else None
        self._probe(address)

    def _remove_vf(self, parent: str, number: int) -> None:
        link = self.path(f"{BUS}/devices/{parent}/virtfn{number}")
        address = (self.link(f"{BUS}/devices/{parent}/virtfn{number}") or "").rpartition("/")[2]
        self._detach(address)
        group = self._group(address)
        self.path(f"/sys/kernel/iommu_groups/{group}/devices/{address}").unlink()
        self.path(f"{BUS}/devices/{address}").unlink()
        shutil.rmtree(self.path(f"/sys/devices/pci{address[:7]}/{address}"))
        link.unlink()

    # ---- files --------------------------------------------------------------------------------------------------

    def _file(self, path: str, text: str) -> None:
        where = self.path(path)
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(text + "\n" if text else "")

    def _link(self, path: str, target: str) -> None:
        """A relative link, as sysfs has them."""
        where = self.path(path)
        where.parent.mkdir(parents=True, exist_ok=True)
        where.symlink_to(os.path.relpath(self.path(target), where.parent.resolve()))
