"""What the keys of one file mean for each other: the rules a type cannot say.

Pure: a validated model in, complaints out, all of them. Each message shows the arithmetic or both keys.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvmd.config.daemon import Daemon
from kvmd.config.devices import Nic
from kvmd.config.diskrules import disk_rules
from kvmd.config.faults import Complaint, twice
from kvmd.config.guest import Guest
from kvmd.config.host import PAGE_SIZES, Host
from kvmd.config.tap_rules import tap_rules
from kvmd.units import MAX_CPU, Duration, Size

_MIB = 1 << 20
# What QEMU needs beside the guest's memory, as admission counts it: 256 MiB + 1/256.
_OVERHEAD = 256 * _MIB
_LONGEST_SPLASH_S = 65.535  # fw_cfg has 16 bits of milliseconds for it (hw/nvram/fw_cfg.c)
_MIN_KSM_SLEEP, _MAX_KSM_SLEEP = Duration(0.001), Duration(60)
_PRIVATE_TMP = ("/tmp/", "/var/tmp/")  # PrivateTmp= of kvmd.service


def guest_rules(guest: Guest) -> Iterator[Complaint]:
    """All that is wrong in one guest's file."""
    yield from _cpu(guest)
    yield from _memory(guest)
    yield from _backing(guest)
    yield from _hugepages(guest)
    yield from _boot(guest)
    yield from _screen(guest)
    yield from _start(guest)
    yield from disk_rules(guest)
    for name, nic in guest.nic.items():
        yield from _nic(("nic", name), nic, guest.cpu.vcpus)
    yield from _nics_together(guest)
    yield from _passthrough(guest)


def _cpu(guest: Guest) -> Iterator[Complaint]:
    cpu, shape = guest.cpu, guest.cpu.topology
    product = shape.sockets * shape.dies * shape.cores * shape.threads
    counted = f"sockets {shape.sockets} x dies {shape.dies} x cores {shape.cores} x threads {shape.threads} = {product}"
    if cpu.cores is None and cpu.vcpus % (shape.sockets * shape.dies * shape.threads):
        rest = f"sockets {shape.sockets} x dies {shape.dies} x threads {shape.threads}"
        yield Complaint(("cpu", "vcpus"), f"{cpu.vcpus} vCPUs cannot be divided by {rest}")
    elif product != cpu.vcpus:
        yield Complaint(("cpu", "vcpus"), f"{counted}, but cpu.vcpus = {cpu.vcpus}")
    if cpu.placement == "manual" and cpu.pin is None:
        yield Complaint(
            ("cpu", "placement"), '"manual" needs cpu.pin', "one host CPU per vCPU, for example pin = [4, 5]"
        )
    if cpu.pin is not None:
        yield from _pin(cpu.pin, guest)
    if cpu.isolated == "require" and cpu.placement != "dedicated":
        yield Complaint(
            ("cpu", "isolated"),
            f'has no effect with placement = "{cpu.placement}"',
            'use placement = "dedicated"',
            severity="warning",
        )
    if cpu.model == "host" and guest.machine.accel == "tcg":
        yield Complaint(("cpu", "model"), '"host" needs KVM, but machine.accel = "tcg"', 'use "max"')


def _pin(pin: tuple[int, ...], guest: Guest) -> Iterator[Complaint]:
    path = ("cpu", "pin")
    if guest.cpu.placement != "manual":
        yield Complaint(path, f'only with placement = "manual"; it is "{guest.cpu.placement}"')
    if len(pin) != guest.cpu.vcpus:
        yield Complaint(path, f"names {len(pin)} host CPUs, but cpu.vcpus = {guest.cpu.vcpus}")
    if wrong := [cpu for cpu in pin if not 0 <= cpu <= MAX_CPU]:
        yield Complaint(path, f"{wrong[0]} is not a CPU between 0 and {MAX_CPU}")
    if len(set(pin)) != len(pin) and not guest.cpu.allow_overcommit:
        yield Complaint(path, "names a host CPU twice", "cpu.allow_overcommit = true if that is meant")


def _memory(guest: Guest) -> Iterator[Complaint]:
    memory = guest.memory
    if memory.size % _MIB:
        yield Complaint(("memory", "size"), f'"{memory.size}" is not a whole number of MiB')
    if memory.guaranteed is not None and memory.guaranteed > memory.size:
        yield Complaint(("memory", "guaranteed"), f'"{memory.guaranteed}" is more than memory.size = "{memory.size}"')
    limit = guest.limits.memory_max
    needed = Size(memory.size + _OVERHEAD + memory.size // 256)
    if limit is not None and limit < memory.size:
        yield Complaint(
            ("limits", "memory_max"), f'"{limit}" is less than memory.size = "{memory.size}": the kernel would kill it'
        )
    elif limit is not None and limit < needed:
        text = f'"{limit}" leaves little beside memory.size = "{memory.size}"; QEMU may need {needed.human()} in all'
        yield Complaint(("limits", "memory_max"), text, severity="warning")


def _backing(guest: Guest) -> Iterator[Complaint]:
    memory = guest.memory
    if memory.backing == "file" and memory.path is None:
        text = '"file" needs memory.path'
        yield Complaint(("memory", "backing"), text, 'a directory, for example path = "/dev/shm"')
    if memory.path is not None and memory.backing != "file":
        yield Complaint(("memory", "path"), f'only with backing = "file"; it is "{memory.backing}"')
    if memory.policy is not None and memory.nodes is None:
        yield Complaint(("memory", "policy"), "only with memory.nodes", 'for example nodes = "0"')
    if memory.ksm_group is not None and (memory.share or memory.backing in ("memfd", "file")):
        text = "has no effect: the kernel merges no shared memory"
        yield Complaint(("memory", "ksm_group"), text, 'backing = "anonymous"', severity="warning")
    if memory.lock:
        yield from _locked(guest)


def _locked(guest: Guest) -> Iterator[Complaint]:
    memory, hint = guest.memory, "leave the key out, or memory.lock"
    if memory.balloon.enabled:
        yield Complaint(("memory", "balloon", "enabled"), "locked memory is never ballooned", hint)
    if memory.guaranteed is not None and not memory.hugepage_size:
        yield Complaint(("memory", "guaranteed"), "locked memory is never ballooned", hint)
    if memory.ksm_group is not None and not memory.hugepage_size:
        text = "a merged page needs memory when it is written to, and locked memory must not wait for any"
        yield Complaint(("memory", "ksm_group"), text, hint)


def _hugepages(guest: Guest) -> Iterator[Complaint]:
    memory, page = guest.memory, guest.memory.hugepage_size
    if page is None:
        if memory.page_size is not None:
            text = f'only with backing = "hugepages" or "file"; it is "{memory.backing}"'
            yield Complaint(("memory", "page_size"), text)
        if memory.fallback == "thp":
            text = "only with hugepages; memory.page_size says which" if memory.backing == "file" else ""
            text = text or f'only with backing = "hugepages"; it is "{memory.backing}"'
            yield Complaint(("memory", "fallback"), text)
        return
    if page not in PAGE_SIZES.values():
        yield Complaint(("memory", "page_size"), f'"{page}" is no size of page any host has', '"2MiB" or "1GiB"')
    elif memory.size % page:
        text = f'"{memory.size}" is {memory.size / page:.2f} pages of {page}; a whole number is needed'
        yield Complaint(("memory", "size"), text, f'for example "{Size(-(-memory.size // page) * page)}"')
    if memory.balloon.enabled:
        text = "a hugepage guest cannot be ballooned: it would lose the memory and the host gain none"
        yield Complaint(("memory", "balloon", "enabled"), text, "leave the key out, or use another backing")
    for key, given in (("guaranteed", memory.guaranteed is not None), ("ksm_group", memory.ksm_group is not None)):
        if given:
            yield Complaint(("memory", key), "hugepages are neither ballooned nor merged", "leave the key out")


def _boot(guest: Guest) -> Iterator[Complaint]:
    boot = guest.boot
    if boot.kernel is None:
        for key, given in (("initrd", boot.initrd), ("cmdline", boot.cmdline)):
            if given is not None:
                yield Complaint(("boot", key), "only with boot.kernel")
    for key, is_given in (("splash", boot.splash is not None), ("splash_time", boot.splash_time is not None)):
        if is_given and not boot.menu:
            yield Complaint(("boot", key), "is shown with the boot menu only", "boot.menu = true")
    if boot.splash_time is not None and boot.splash_time > _LONGEST_SPLASH_S:
        yield Complaint(("boot", "splash_time"), f'"{boot.splash_time}" is more than {_LONGEST_SPLASH_S:.3f} s')
    known = [f"disk.{name}" for name in guest.disk] + [f"nic.{name}" for name in guest.nic]
    known += [f"hostdev.{name}" for name in guest.hostdev]
    for key, order in (("order", boot.order), ("once", boot.once)):
        for device in order if isinstance(order, tuple) else ():
            if device not in known:
                listed = ", ".join(known) or "none"
                yield Complaint(("boot", key), f'this guest has no "{device}"', f"there is: {listed}")


def _screen(guest: Guest) -> Iterator[Complaint]:
    video = guest.video
    if video.memory is not None:
        if video.model in ("virtio", "ramfb", "none"):
            yield Complaint(("video", "memory"), f'"{video.model}" has none of its own', "leave the key out")
        elif video.memory % _MIB or not video.memory <= 512 * _MIB or video.memory & (video.memory - 1):
            yield Complaint(("video", "memory"), f'"{video.memory}" is not 1, 2, 4 ... 512 MiB')
    if guest.display.keyboard is not None and guest.display.type == "none":
        yield Complaint(("display", "keyboard"), 'only with a display; display.type is "none"', "leave the key out")
    needs_usb = guest.usb.tablet or any(disk.interface == "usb" for disk in guest.disk.values())
    if guest.usb.controller == "none" and needs_usb:
        yield Complaint(("usb", "controller"), '"none", and the guest has USB devices', "leave the key out")


def _start(guest: Guest) -> Iterator[Complaint]:
    if guest.start.auto and guest.guest.cluster:
        yield Complaint(("start", "auto"), "refused with guest.cluster = true: the cluster manager starts this guest")
    if not guest.nic and guest.machine.default_nic:
        text = "no [nic.NAME]: the guest gets one user-mode NIC, as QEMU does"
        yield Complaint(("nic",), text, "machine.default_nic = false for none", severity="warning", given=False)


def _nic(path: tuple[str, ...], nic: Nic, vcpus: int) -> Iterator[Complaint]:
    yield from _virtual_function(path, nic)
    yield from tap_rules(path, nic)
    if nic.network is None and nic.type is None:
        yield Complaint(path, "needs network", 'network = "NAME", or type = "user"')
    if nic.network is not None and nic.type is not None:
        yield Complaint((*path, "type"), f'"{nic.type}" has no network', "leave out network or type")
    if nic.type != "user":
        user_only = {"net": nic.net, "dns": nic.dns, "hostfwd": nic.hostfwd, "restrict": nic.restrict}
        for key, value in user_only.items():
            if value:
                yield Complaint((*path, key), 'only with type = "user"')
    if nic.network is None:
        for key, address in (("ipv4", nic.ipv4), ("ipv6", nic.ipv6)):
            if address is not None:
                yield Complaint((*path, key), "only with network")
    yield from _vlans(path, nic)
    yield from _vectors(path, nic)
    if nic.net is not None and nic.dns is not None and nic.dns not in nic.net:
        yield Complaint((*path, "dns"), f"{nic.dns} is outside net = {nic.net}")
    for key, given in (("rate_in", nic.rate_in), ("rate_out", nic.rate_out), ("guard", nic.guard)):
        if given and nic.network is None:
            yield Complaint((*path, key), "only with network")
    for key, given in (
        ("mtu", nic.mtu is not None),
        ("queues", nic.queues > 1),
        ("vectors", nic.vectors is not None),
    ):
        if given and not nic.model.startswith("virtio"):
            yield Complaint((*path, key), f'only with model = "virtio"; it is "{nic.model}"')
    if nic.queues > 1 and not nic.has_tap:
        yield Complaint((*path, "queues"), 'only with a TAP: network, or type = "tap" or "bridge"')
    elif nic.queues > vcpus:
        yield Complaint((*path, "queues"), f"{nic.queues} queue pairs, but cpu.vcpus = {vcpus}")


def _vectors(path: tuple[str, ...], nic: Nic) -> Iterator[Complaint]:
    """Virtio 1.2, 5.1.2: a queue pair has two queues, beside them are configuration changes and the control queue."""
    wanted = 2 * nic.queues + 2
    if nic.vectors is not None and nic.queues > 1 and nic.vectors < wanted:
        text = f"{nic.vectors} for {nic.queues} queue pairs: with fewer than {wanted} queues share an interrupt"
        yield Complaint((*path, "vectors"), text, "leave the key out", severity="warning")


def _vlans(path: tuple[str, ...], nic: Nic) -> Iterator[Complaint]:
    if nic.network is None:
        for key, value in (("vlan", nic.vlan), ("vlans", nic.vlans), ("native_vlan", nic.native_vlan)):
            if value and (key != "vlan" or nic.type != "vf"):
                yield Complaint((*path, key), "only with network")
    if nic.vlan is not None and nic.vlans:
        yield Complaint((*path, "vlan"), "an access port has one VLAN, a trunk has vlans", "leave out vlan or vlans")
    if nic.native_vlan is not None and not nic.vlans:
        yield Complaint((*path, "native_vlan"), "only with vlans", f"vlan = {nic.native_vlan} for an access port")
    if nic.native_vlan in nic.vlans:
        yield Complaint((*path, "native_vlan"), f"{nic.native_vlan} is one of vlans too, which go with a tag")
    if len(set(nic.vlans)) != len(nic.vlans):
        yield Complaint((*path, "vlans"), "names a VLAN twice")


def _virtual_function(path: tuple[str, ...], nic: Nic) -> Iterator[Complaint]:
    """A virtual function is a card of its own: nothing of QEMU's cards applies to it."""
    if nic.type != "vf":
        for key, given in (("pool", nic.pool), ("pci", nic.pci)):
            if given is not None:
                yield Complaint((*path, key), 'only with type = "vf"')
        return
    if (nic.pool is None) == (nic.pci is None):
        text = 'type = "vf" needs pool or pci' + (", not both" if nic.pool else "")
        yield Complaint(path, text, 'for example pool = "enp59s0f0", with [sriov.enp59s0f0] in host.toml')
    if "model" in nic.model_fields_set:
        yield Complaint((*path, "model"), 'not with type = "vf": the guest sees the card itself', "leave the key out")
    if nic.mtu is not None:
        yield Complaint((*path, "mtu"), 'not with type = "vf": it is set on the NIC of the host', "leave the key out")


def _passthrough(guest: Guest) -> Iterator[Complaint]:
    for name, hostdev in guest.hostdev.items():
        if hostdev.pci is None:
            yield Complaint(("hostdev", name), "needs pci", 'for example pci = "0000:3b:00.0"')
    addresses = [(f"hostdev.{name}", device.pci) for name, device in guest.hostdev.items()]
    addresses += [(f"nic.{name}", nic.pci) for name, nic in guest.nic.items() if nic.pci is not None]
    for key, other, address in twice(addresses):
        yield Complaint((*key.split("."), "pci"), f"{address} is {other}'s too")
    if guest.passthrough and guest.memory.balloon.enabled:
        text = f"a guest with {guest.passthrough[0]} cannot be ballooned: the device may write to any of its memory"
        yield Complaint(("memory", "balloon", "enabled"), text, "leave the key out")
    if guest.passthrough and guest.memory.ksm_group is not None:
        text = f"the memory of a guest with {guest.passthrough[0]} is pinned, and never merged"
        yield Complaint(("memory", "ksm_group"), text, "leave the key out")


def _nics_together(guest: Guest) -> Iterator[Complaint]:
    nics = guest.nic.items()
    slots = [(f"disk.{name}", disk.pci_address) for name, disk in guest.disk.items()]
    slots += [(f"nic.{name}", nic.pci_address) for name, nic in nics]
    for key, other, slot in twice(slots):
        if key.startswith("nic."):
            yield Complaint(("nic", key[4:], "pci_address"), f'"{slot}" is the slot of {other} too')
    for name, other, mac in twice((name, nic.mac) for name, nic in nics):
        yield Complaint(("nic", name, "mac"), f'"{mac}" is the address of nic.{other} too')
    for name, other, _ in twice((name, (nic.network, nic.ipv4) if nic.ipv4 else None) for name, nic in nics):
        yield Complaint(("nic", name, "ipv4"), f"{guest.nic[name].ipv4} is the address of nic.{other} too")
    for name, other, _ in twice((name, (nic.network, nic.ipv6) if nic.ipv6 else None) for name, nic in nics):
        yield Complaint(("nic", name, "ipv6"), f"{guest.nic[name].ipv6} is the address of nic.{other} too")


def host_rules(host: Host) -> Iterator[Complaint]:
    """All that is wrong in host.toml."""
    for size, pool in host.hugepages.items():
        if pool.spare and pool.pages != "auto":
            text = 'has an effect only with pages = "auto"'
            yield Complaint(("hugepages", size, "spare"), text, severity="warning")
        if pool.spare % PAGE_SIZES[size]:
            yield Complaint(("hugepages", size, "spare"), f'"{pool.spare}" is not a whole number of {size} pages')
    yield from _merging(host)
    yield from _swap(host)


def _merging(host: Host) -> Iterator[Complaint]:
    ksm = host.ksm
    least, most = ksm.min_pages, ksm.max_pages
    if least is not None and most is not None and least > most:
        yield Complaint(("ksm", "min_pages"), f"{least} is more than ksm.max_pages = {most}")
    if not _MIN_KSM_SLEEP <= ksm.sleep <= _MAX_KSM_SLEEP:
        text = f'"{ksm.sleep}" is outside {_MIN_KSM_SLEEP} to {_MAX_KSM_SLEEP}'
        yield Complaint(("ksm", "sleep"), text, '"20ms" is the kernel\'s default')


def _swap(host: Host) -> Iterator[Complaint]:
    for key, wish in (("file", host.swap.file), ("zram", host.swap.zram)):
        if wish is not None and wish.size % _MIB:
            yield Complaint(("swap", key, "size"), f'"{wish.size}" is not a whole number of MiB')
    file = host.swap.file
    if file is not None and file.path.startswith(_PRIVATE_TMP):
        text = f'"{file.path}" lies where kvmd.service has a directory of its own that goes with it'
        yield Complaint(("swap", "file", "path"), text, 'for example "/var/lib/kvmd/swap"', severity="warning")


def daemon_rules(daemon: Daemon) -> Iterator[Complaint]:
    """All that is wrong in kvmd.toml."""
    for root in daemon.storage.roots:
        if not root.strip("/"):
            yield Complaint(("storage", "roots"), '"/" would let every file of the host be an image')
    if not daemon.access.admins:
        yield Complaint(("access", "admins"), "nobody could administer kvmd", 'for example admins = ["root"]')
