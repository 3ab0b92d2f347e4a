"""argv of devices of the host: vfio-pci, each behind a PCIe root port of its own where the board has PCI Express.

QEMU opens the function's IOMMU group by path: its node belongs to the guest's uid by then. On q35 a PCIe device right
on the root complex is an integrated endpoint, which drivers and resets treat otherwise (docs/pcie.txt of QEMU).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmd.config.guest import Guest
from kvmd.errors import Refused
from kvmd.qemu import defaults
from kvmd.qemu.caps import Capabilities
from kvmd.qemu.identity import Identity
from kvmd.qemu.text import device_args


@dataclass(slots=True)
class Given:
    """Arguments, and the host's PCI function behind each device."""

    args: list[str] = field(default_factory=list)
    functions: dict[str, str] = field(default_factory=dict)


def given(
    name: str,
    guest: Guest,
    identity: Identity,
    caps: Capabilities,
    functions: Mapping[str, str],
    boot: Mapping[str, int],
) -> Given:
    """All of a guest's, in the order of its file. `functions` by device id. Raises Refused and NotSupported."""
    found = Given()
    for key in guest.passthrough:
        device_id = key.replace(".", "-", 1)
        address = functions.get(device_id)
        if address is None:
            raise Refused(f"guest {name}: {key}: no device of the host was reserved for it", hint="kvmd-cli plan")
        bus, slot = defaults.root_bus(identity.machine), identity.slots[device_id]
        if bus == "pcie.0":
            port = f"port-{device_id}"
            # Chassis numbers are the guest's names for slots: any, as long as no two ports have the same.
            chassis = int(slot.partition(".")[0], 16)
            root = {"driver": "pcie-root-port", "id": port, "bus": bus, "addr": slot, "chassis": chassis}
            found.args += device_args(caps, f"guest {name}: {key}", root)
            bus, slot = port, "00.0"
        device: dict[str, object] = {"driver": "vfio-pci", "id": device_id, "bus": bus, "addr": slot, "host": address}
        if device_id in boot:
            device["bootindex"] = boot[device_id]
        found.args += device_args(caps, f"guest {name}: {key}", device)
        found.functions[device_id] = address
    return found
