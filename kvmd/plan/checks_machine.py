"""Judgements about the machine: KVM, its devices, QEMU, the kernel and its processors. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from kvmd.plan.assignment import CpuWish
from kvmd.plan.cpus import place_all
from kvmd.plan.hostreport import FileStat, Finding, HostReport, Unseen, count, fail, ok, skip, warn
from kvmd.qemu.caps import Kvm
from kvmd.units import CpuSet

KVM_DEVICE, VHOST_DEVICE, TUN_DEVICE = "/dev/kvm", "/dev/vhost-net", "/dev/net/tun"
# pidfd_open(2) is of 5.3, openat2(2) of 5.6; kvmd watches guests by the first and opens images by the second.
OLDEST_KERNEL = (5, 6)
_OUTER = "on the outer host: modprobe -r kvm_intel; modprobe kvm_intel nested=1 (kvm_amd likewise), CPU model host"


def kernel(report: HostReport) -> Iterator[Finding]:
    """The calls kvmd rests on."""
    if report.kernel_version == (0, 0):
        yield skip("/proc/sys/kernel/osrelease cannot be read")
    elif report.kernel_version < OLDEST_KERNEL:
        oldest = ".".join(map(str, OLDEST_KERNEL))
        yield fail(f"kernel {report.kernel} is older than {oldest}: no openat2(2)", "apt-get install linux-image-amd64")
    else:
        yield ok(f"kernel {report.kernel}")


def kvm(report: HostReport) -> Iterator[Finding]:
    """A QEMU really ran under KVM as a guest's uid."""
    if isinstance(report.kvm, Unseen):
        yield skip(report.kvm.reason)
    elif report.kvm.usable:
        yield ok(report.kvm.reason)
    else:
        guests = sorted(name for name, guest in report.desired.guests.items() if guest.machine.accel == "kvm")
        message = f"KVM cannot be used: {report.kvm.reason}"
        if guests or not report.desired.guests:
            yield fail(message + (f"; needed by {_some(guests)}" if guests else ""), _kvm_fix(report, report.kvm))
        else:
            slow = "every guest runs emulated, about twenty times slower"
            yield warn(f"{message}; {slow}", _kvm_fix(report, report.kvm))


def _kvm_fix(report: HostReport, found: Kvm) -> str:
    """The probe's own advice, unless that is to ask doctor."""
    if found.fix and "doctor" not in found.fix:
        return found.fix
    return _OUTER if report.under_hypervisor else "journalctl -k -g kvm"


def kvm_device(report: HostReport) -> Iterator[Finding]:
    """/dev/kvm opens to the group kvm, which every guest's QEMU has."""
    found = report.files.get(KVM_DEVICE)
    if not isinstance(found, FileStat):
        yield skip(f"there is no {KVM_DEVICE}")
        return
    shown = f"{KVM_DEVICE} has mode {found.mode:04o} and group {found.gid}"
    group = report.accounts.groups.get("kvm")
    by_group = found.mode & 0o060 == 0o060 and group is not None and found.gid == group
    if by_group or found.mode & 0o006 == 0o006:
        yield ok(shown)
    elif group is None:
        yield fail(f"{shown}, and this host has no group kvm", "groupadd --system kvm && udevadm trigger /dev/kvm")
    else:
        yield fail(f"{shown}; the group kvm is {group}", f"chgrp kvm {KVM_DEVICE} && chmod 0660 {KVM_DEVICE}")


def nested(report: HostReport) -> Iterator[Finding]:
    """Whether this host is itself a guest, and whether its guests may be hosts."""
    usable = not isinstance(report.kvm, Unseen) and report.kvm.usable
    if report.under_hypervisor and not usable and not isinstance(report.kvm, Unseen):
        yield warn(
            "this host is itself a virtual machine, and the host around it gives it no KVM",
            _OUTER,
        )
    elif report.under_hypervisor:
        yield ok("this host is itself a virtual machine: guests run nested, and slower")
    elif report.nested in ("Y", "1"):
        yield ok("guests with CPU model host may run virtual machines of their own (parameter nested)")
    else:
        yield ok("not nested")


def vhost_net(report: HostReport) -> Iterator[Finding]:
    """Packets of guests go through the kernel instead of through QEMU."""
    found = report.files.get(VHOST_DEVICE)
    if found is None:
        yield warn(
            f"there is no {VHOST_DEVICE}: every packet of a guest passes through QEMU",
            "modprobe vhost_net && echo vhost_net > /etc/modules-load.d/kvmd.conf",
        )
    else:
        yield ok(f"{VHOST_DEVICE} is there")


def tun(report: HostReport) -> Iterator[Finding]:
    """NICs on a network are TAPs."""
    if report.files.get(TUN_DEVICE) is not None:
        yield ok(f"{TUN_DEVICE} is there")
        return
    users = sorted(
        name for name, guest in report.desired.guests.items() if any(nic.network for nic in guest.nic.values())
    )
    fix = "modprobe tun && echo tun > /etc/modules-load.d/kvmd-tun.conf"
    if users:
        yield fail(f"there is no {TUN_DEVICE}: no NIC on a network for {_some(users)}", fix)
    else:
        yield warn(f"there is no {TUN_DEVICE}: no guest can be on a network", fix)


def qemu(report: HostReport) -> Iterator[Finding]:
    """Every emulator that is named answers, and is new enough (the bound is qemu.caps's)."""
    for emulator in report.emulators:
        if emulator.error:
            yield fail(f"{emulator.name}: {emulator.error}", emulator.hint or "apt-get install qemu-system-x86")
        else:
            yield ok(f"{emulator.name} is QEMU {emulator.version}")


def qemu_sandbox(report: HostReport) -> Iterator[Finding]:
    """QEMU's own system call filter."""
    if not report.desired.daemon.qemu.sandbox:
        yield warn("qemu.sandbox is false: a QEMU that was taken over may call what it likes", "qemu.sandbox = true")
        return
    answered = [emulator for emulator in report.emulators if not emulator.error]
    lacking = [emulator.name for emulator in answered if not emulator.can_sandbox]
    for name in lacking:
        yield fail(f"{name} was built without -sandbox and its four classes", "apt-get install qemu-system-x86")
    if not lacking:
        yield ok("QEMU's system call filter is there") if answered else skip("no QEMU answered")


def isolcpus(report: HostReport) -> Iterator[Finding]:
    """Isolated CPUs and guests that want them, both or neither."""
    guests = report.desired.guests
    isolated = report.facts.cpus.isolated
    placed = _placements(report)
    exclusive = {
        name: placed[name]
        for name, guest in sorted(guests.items())
        if guest.cpu.placement in ("dedicated", "manual") and name in placed
    }
    cpus = CpuSet(cpu for found in exclusive.values() for cpu in found)
    wanting = [name for name in exclusive if guests[name].cpu.isolated != "avoid"]
    idle = CpuSet(isolated - cpus)
    if wanting and not isolated:
        held = CpuSet(cpu for name in wanting for cpu in exclusive[name])
        yield warn(
            f"{_some(wanting)} {_has(wanting)} CPUs of its own ({held}), and none is isolated: others run there too",
            "kvmd-cli host kernel-args --write --update, and a reboot",
        )
    elif idle:
        yield warn(
            f"CPUs {idle} are isolated and no guest is placed on them: they do nothing",
            'cpu.placement = "dedicated" in a guest\'s file (or take them out of isolcpus= on the kernel command line)',
        )
    elif isolated:
        yield ok(f"CPUs {isolated} are isolated and have their guests")
    else:
        yield ok("no CPU is isolated, and no guest asks for one")


def pins(report: HostReport) -> Iterator[Finding]:
    """Every guest's vCPUs and QEMU's other threads find their place."""
    host = report.desired.host.cpu
    online = report.facts.cpus.online
    if isinstance(host.housekeeping, CpuSet) and (missing := CpuSet(host.housekeeping - online)):
        yield fail(
            f"host.toml: cpu.housekeeping names CPUs {missing}, which are not online",
            f'cpu.housekeeping = "{CpuSet(host.housekeeping & online) or "auto"}" in host.toml',
        )
    wishes = {name: CpuWish.of(guest) for name, guest in report.desired.guests.items()}
    problems = place_all(wishes, report.facts.cpus, host).problems if wishes else ()
    for problem in problems:
        judged = fail if problem.guests else warn
        yield judged(f"{problem.subject}: {problem.message}", problem.hint or "kvmd-cli host cpus")
    if not problems:
        yield ok(f"{count(len(wishes), 'guest')} placed on CPUs {online}")


def _placements(report: HostReport) -> dict[str, CpuSet]:
    wishes = {name: CpuWish.of(guest) for name, guest in report.desired.guests.items()}
    if not wishes:
        return {}
    answer = place_all(wishes, report.facts.cpus, report.desired.host.cpu)
    return {name: found.cpus for name, found in answer.of.items()}


def psi(report: HostReport) -> Iterator[Finding]:
    """Pressure is what the tuning agent acts on (Documentation/accounting/psi.rst)."""
    if report.has_psi:
        yield ok("/proc/pressure answers")
        return
    yield warn(
        "/proc/pressure does not answer: the tuning agent cannot tell who suffers",
        _kernel_arguments("psi", "psi=1"),
    )


def cgroup(report: HostReport) -> Iterator[Finding]:
    """Weights and limits of guests are those of cgroup v2 (Documentation/admin-guide/cgroup-v2.rst)."""
    if report.cgroup == "v2":
        yield ok("cgroup v2")
        return
    fix = _kernel_arguments("cgroup", "systemd.unified_cgroup_hierarchy=1")
    limited = sorted(
        name
        for name, guest in report.desired.guests.items()
        if any(value is not None for key, value in guest.limits if key != "oom_score_adjust")
    )
    if limited:
        yield fail(f"cgroup {report.cgroup}: [limits] of {_some(limited)} has no effect", fix)
    else:
        yield warn(f"cgroup {report.cgroup}: a guest's [limits] would have no effect", fix)


def _kernel_arguments(what: str, words: str) -> str:
    """The command that adds words to the kernel command line on Debian (/etc/default/grub.d)."""
    line = f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {words}"'
    return f"echo '{line}' > /etc/default/grub.d/kvmd-{what}.cfg && update-grub && reboot"


def _some(names: list[str]) -> str:
    """At most three names, and how many more."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _has(names: list[str]) -> str:
    return "has" if len(names) == 1 else "each has"
