"""argv of NICs: the host's side (a TAP by fd, or user mode) and the card the guest sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmd.config.devices import Nic
from kvmd.config.guest import Guest
from kvmd.errors import NotSupported, Refused
from kvmd.qemu import defaults
from kvmd.qemu.caps import NIC_MODELS, Capabilities, near
from kvmd.qemu.fds import FdTable, OpenTap, OpenVhostNet
from kvmd.qemu.identity import Identity
from kvmd.qemu.text import device_args, to_json

# virtio-net: MSI-X vectors for each queue pair, one for configuration, one for control (virtio 1.2, 5.1.2).
_VECTORS_EXTRA = 2


@dataclass(slots=True)
class Cards:
    """Arguments, and the MAC of each device that `query-rx-filter` can be asked about."""

    args: list[str] = field(default_factory=list)
    macs: dict[str, str] = field(default_factory=dict)


def cards(
    name: str,
    guest: Guest,
    identity: Identity,
    caps: Capabilities,
    fds: FdTable,
    mtus: Mapping[str, int],
    boot: Mapping[str, int],
    *,
    vhost: bool,
) -> Cards:
    """Arguments of all NICs in the order of the file; `mtus`: of their networks. Raises Refused and NotSupported."""
    found = Cards()
    for key, nic in defaults.nics(guest).items():
        if nic.type == "vf":
            continue  # a card of its own: passthrough.py
        backend = _user(key, nic, caps, name) if nic.type == "user" else _tap(name, key, nic, caps, fds, vhost=vhost)
        device = _device(name, key, nic, identity, caps, mtus.get(key), boot.get(f"nic-{key}"))
        found.args += ["-netdev", to_json(backend), *device_args(caps, f"guest {name}: nic.{key}", device)]
        if device["driver"] == "virtio-net-pci":
            found.macs[f"nic-{key}"] = identity.macs[key]
    return found


def _user(key: str, nic: Nic, caps: Capabilities, name: str) -> dict[str, object]:
    if "user" not in caps.netdev_types:
        raise NotSupported(f"guest {name}: nic.{key}: this QEMU {caps.version_text} has no user-mode network")
    backend: dict[str, object] = {"type": "user", "id": f"net-{key}"}
    if nic.net is not None:
        backend["net"] = str(nic.net)
    if nic.dns is not None:
        backend["dns"] = str(nic.dns)
    if nic.restrict:
        backend["restrict"] = True
    if nic.hostfwd:
        backend["hostfwd"] = [{"str": rule} for rule in nic.hostfwd]
    return backend


def _tap(name: str, key: str, nic: Nic, caps: Capabilities, fds: FdTable, *, vhost: bool) -> dict[str, object]:
    if "tap" not in caps.netdev_types:
        raise NotSupported(f"guest {name}: nic.{key}: this QEMU {caps.version_text} has no TAP network")
    many = nic.queues > 1
    taps = [fds.add(OpenTap(fds.next_fd, key, queue, nic.queues)) for queue in range(nic.queues)]
    backend: dict[str, object] = {"type": "tap", "id": f"net-{key}"}
    backend["fds" if many else "fd"] = ":".join(map(str, taps))
    if nic.sndbuf is not None:
        backend["sndbuf"] = int(nic.sndbuf)  # QEMU sets it, also on a descriptor: without this key to no limit
    if nic.vhost and not vhost:
        hint = "modprobe vhost_net, and [modules] load in host.toml; or leave vhost out"
        raise Refused(f"guest {name}: nic.{key}.vhost: this host has no /dev/vhost-net that works", hint=hint)
    if nic.vhostforce:
        backend["vhostforce"] = True
    # vhost serves virtio rings only; another card would silently go without.
    if vhost and nic.vhost is not False and nic.model == "virtio":
        workers = [fds.add(OpenVhostNet(fds.next_fd, key, queue)) for queue in range(nic.queues)]
        backend["vhost"] = True
        backend["vhostfds" if many else "vhostfd"] = ":".join(map(str, workers))
    return backend


def _device(
    name: str,
    key: str,
    nic: Nic,
    identity: Identity,
    caps: Capabilities,
    mtu: int | None,
    bootindex: int | None,
) -> dict[str, object]:
    driver = defaults.nic_driver(nic.model)
    if driver not in NIC_MODELS or driver not in caps.device_types:
        models = ["virtio", *sorted(caps.device_types & set(NIC_MODELS))]
        raise NotSupported(
            f'guest {name}: nic.{key}.model = "{nic.model}": this QEMU {caps.version_text} has no such card',
            hint=near(nic.model, models) or f"it has {', '.join(models)}",
        )
    virtio = driver == "virtio-net-pci"
    device: dict[str, object] = {
        "driver": driver,
        "id": f"nic-{key}",
        "bus": defaults.root_bus(identity.machine),
        "addr": identity.slots[f"nic-{key}"],
        "netdev": f"net-{key}",
        "mac": identity.macs[key],
    }
    if bootindex is not None:
        device["bootindex"] = bootindex
    if nic.queues > 1:
        if not virtio or nic.type == "user":
            raise Refused(
                f"guest {name}: nic.{key}.queues = {nic.queues}: several queues need a virtio card on a network",
                hint="take queues out",
            )
        device |= {"mq": True, "vectors": 2 * nic.queues + _VECTORS_EXTRA}
    if nic.vectors is not None:
        if not virtio:
            raise Refused(f"guest {name}: nic.{key}.vectors: only a virtio card lets them be chosen")
        device["vectors"] = nic.vectors
    if nic.mtu is not None and not virtio:
        raise Refused(f"guest {name}: nic.{key}.mtu: only a virtio card can tell the guest its MTU")
    if virtio and (nic.mtu or mtu):
        device["host_mtu"] = nic.mtu or mtu
    return device
