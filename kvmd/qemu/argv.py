"""A guest's file, its identity and the emulator's capabilities -> QEMU's command line. Pure; QEMU is not asked.

The order of the options is fixed, so that two command lines can be compared as text: who it is, board, CPU, memory,
confinement, monitors, devices in the order of the file, and last whatever the file adds verbatim.
Options by device family: memory.py, storage.py, network.py, devices.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kvmd.config.guest import Guest
from kvmd.errors import NotSupported, Refused
from kvmd.facts import EMPTY
from kvmd.qemu import boot, defaults, devices, memory, network, passthrough, storage
from kvmd.qemu.caps import Accel, Capabilities, near
from kvmd.qemu.fds import Expectation, FdTable, Launch
from kvmd.qemu.identity import Identity
from kvmd.qemu.storage import ImageFact
from kvmd.qemu.text import double

# What QEMU's docs/system/i386/hyperv.rst recommends for a Windows guest; each is a promise KVM keeps.
HYPERV = (
    "hv-relaxed=on",
    "hv-vapic=on",
    "hv-spinlocks=0x1fff",
    "hv-vpindex=on",
    "hv-runtime=on",
    "hv-time=on",
    "hv-synic=on",
    "hv-stimer=on",
    "hv-frequencies=on",
)
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def build(
    name: str,
    guest: Guest,
    identity: Identity,
    caps: Capabilities,
    *,
    accel: Accel,
    run_dir: str,
    images: Mapping[str, ImageFact] = EMPTY,
    mtus: Mapping[str, int] = EMPTY,
    hugepages: bool = True,
    memory_nodes: tuple[int, ...] = (),
    prealloc_threads: int = 0,
    vhost: bool = False,
    sandbox: bool = True,
    functions: Mapping[str, str] = EMPTY,
) -> Launch:
    """Everything needed to start `guest`.

    `run_dir`: the guest's own, RUN/guests/NAME; `images`: what was seen of each disk's image; `mtus`: of each NIC's
    network; `hugepages` False: the pool is too small now, fall back if the file allows; `memory_nodes`: host nodes to
    bind memory to; `prealloc_threads`: 0 is one for each vCPU; `vhost`: /dev/vhost-net works; `sandbox`: kvmd.toml's
    word, the guest's file can only switch it off; `functions`: PCI function of the host behind each device that is one.
    Raises Refused and NotSupported, naming the key, for what this guest cannot have.
    """
    machine = _machine(name, identity, caps)
    topology = _topology(name, guest, caps, machine)
    indices = boot.first_indices(name, guest)
    threads = prealloc_threads or topology.vcpus
    fds = FdTable()
    memory_args, warnings = memory.memory(
        name, guest, caps, fds, hugepages=hugepages, nodes=memory_nodes, threads=threads
    )
    monitors = devices.monitors(fds)
    serials = devices.serials(name, guest, identity, caps, fds)
    drives = storage.drives(name, guest, identity, caps, fds, images, indices)
    cards = network.cards(name, guest, identity, caps, fds, mtus, indices, vhost=vhost)
    given = passthrough.given(name, guest, identity, caps, functions, indices)
    socket = devices.display_socket(name, run_dir) if guest.display.type == "vnc" else None
    extras = devices.extras(name, guest, identity, caps, fds)
    kernel = boot.kernel(guest, fds)
    boot_options = boot.options(guest, fds)
    sandboxed = sandbox and guest.qemu.sandbox
    args = [
        "-name", f"guest={double(name)},debug-threads=on",
        "-uuid", identity.uuid,
        "-S",
        "-no-user-config", "-nodefaults",
        "-msg", "timestamp=on",
        *_sandbox(name, caps, on=sandboxed),
        "-machine", f"{machine},usb=off,{memory.machine_options(guest)}",
        "-accel", "kvm" if accel == "kvm" else "tcg,thread=multi",
        "-cpu", _cpu(name, guest, caps, accel),
        "-smp", _smp(topology),
        *memory_args,
        *boot.clock(guest), *boot.smbios(guest), *boot_options,
        *_action(name, guest, caps),
        *fds.arguments,
        *monitors, *serials, *drives.args, *cards.args, *given.args,
        *devices.display(name, guest, identity, caps, socket),
        *extras, *kernel,
        *guest.qemu.extra_args,
    ]  # fmt: skip
    return Launch(
        args=tuple(_whole(name, argument) for argument in args),
        opens=fds.opens,
        expect=Expectation(
            uuid=identity.uuid,
            vcpus=topology.vcpus,
            memory_bytes=int(guest.memory.size),
            kvm=accel == "kvm",
            disks=MappingProxyType(drives.shown),
            readonly=frozenset(drives.readonly),
            nics=MappingProxyType(cards.macs),
            functions=MappingProxyType(given.functions),
        ),
        commands=boot.later_indices(name, guest),
        display_socket=socket,
        warnings=(*warnings, *drives.warnings, *_unusual(guest, accel, sandboxed=sandboxed)),
    )


def _topology(name: str, guest: Guest, caps: Capabilities, machine: str) -> defaults.Topology:
    found = defaults.topology(name, guest.cpu)
    if found.vcpus > caps.machines[machine].cpu_max:
        raise Refused(f"guest {name}: {found.vcpus} vCPUs, {machine} takes {caps.machines[machine].cpu_max}")
    return found


def _smp(topology: defaults.Topology) -> str:
    """All parts: what QEMU derives from a few has changed between machine types."""
    parts = {"cpus": topology.vcpus, "maxcpus": topology.vcpus, "sockets": topology.sockets, "dies": topology.dies}
    parts |= {"cores": topology.cores, "threads": topology.threads}
    return ",".join(f"{part}={count}" for part, count in parts.items())


def _machine(name: str, identity: Identity, caps: Capabilities) -> str:
    if identity.machine not in caps.machines:
        raise NotSupported(
            f"guest {name} is pinned to {identity.machine}, which this QEMU {caps.version_text} does not have",
            hint=f"{near(identity.machine, caps.machines) or 'install that QEMU'}; see `machine` in its identity file",
        )
    defaults.require_board(name, identity.machine)
    return identity.machine


def _cpu(name: str, guest: Guest, caps: Capabilities, accel: Accel) -> str:
    """-cpu. Under KVM the host's own CPU, under TCG all that can be emulated, unless the file names a model."""
    model = guest.cpu.model or ("host" if accel == "kvm" else "max")
    if model not in caps.cpu_models:
        raise NotSupported(
            f'guest {name}: cpu.model = "{model}": this QEMU {caps.version_text} has no such model',
            hint=near(model, caps.cpu_models),
        )
    if model == "host" and accel != "kvm":
        raise Refused(
            f'guest {name}: cpu.model = "host" needs KVM, and this guest runs emulated',
            hint='leave cpu.model out, or set it to "max"',
        )
    for feature in guest.cpu.features:
        if feature not in caps.cpu_features:
            raise NotSupported(
                f"guest {name}: cpu.features: this QEMU {caps.version_text} knows no feature {feature}",
                hint=near(feature, caps.cpu_features),
            )
    switched = (f"{feature}={'on' if on else 'off'}" for feature, on in guest.cpu.features.items())
    hyperv = HYPERV if defaults.hyperv(guest) and accel == "kvm" else ()
    return ",".join((model, *hyperv, *switched))


def _sandbox(name: str, caps: Capabilities, *, on: bool) -> list[str]:
    if not on:
        return []
    if not caps.can_sandbox:
        raise NotSupported(
            f"guest {name}: this QEMU {caps.version_text} was built without seccomp",
            hint="install one with it, or set qemu.sandbox = false in the guest's file",
        )
    return ["-sandbox", SANDBOX]


def _action(name: str, guest: Guest, caps: Capabilities) -> list[str]:
    """QEMU stays, with its reason, after a guest's end: kvmd learns the cause even if it was away."""
    if not caps.can_action:
        raise NotSupported(f"guest {name}: this QEMU {caps.version_text} has no -action")
    watchdog = f",watchdog={guest.watchdog.action}" if guest.watchdog.model else ""
    return ["-action", f"reboot=reset,shutdown=pause,panic=pause{watchdog}"]


def _unusual(guest: Guest, accel: Accel, *, sandboxed: bool) -> list[str]:
    """What people should see in `show`: how this guest is less safe or slower than the default."""
    found = []
    if accel == "tcg":
        found.append("runs emulated (TCG): slow, and no security boundary")
        if defaults.hyperv(guest):
            found.append("has no Hyper-V features (hyperv.enabled): they need KVM")
    if not sandboxed:
        found.append("runs without QEMU's seccomp filter (qemu.sandbox = false)")
    if guest.qemu.extra_args:
        found.append("has unmanaged arguments (qemu.extra_args)")
    return found


def _whole(name: str, argument: str) -> str:
    """An argument that execve can carry."""
    if "\0" in argument:
        raise Refused(f"guest {name}: an argument holds a NUL byte: {argument!r}")
    return argument
