"""What one emulator binary can do, as it says itself over QMP.

Options are checked against these facts, never against help texts, and never against a version number where QEMU can
be asked. `parse` is pure; asking is done by `effects/probe.py`. Replies come from a process that is about to be thrown
away, and are still only data: an odd one is a QemuFailed with the command's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal

from kvmd.errors import NotSupported, QemuFailed, Refused

Accel = Literal["kvm", "tcg"]

OLDEST = (7, 2)  # the QEMU of Debian 12: JSON for -device and -netdev, -action, fdsets as kvmd uses them
CACHE_SCHEMA = 2

# Asked once each. `device-list-properties` costs 2.4 ms a type and some types kill the emulator that is asked (their
# module is missing), so it is asked for the types kvmd emits and for no other.
COMMANDS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("query-version", {}),
    ("query-target", {}),
    ("query-machines", {}),
    ("query-cpu-definitions", {}),
    ("query-kvm", {}),
    ("query-command-line-options", {}),
    ("query-qmp-schema", {}),
    ("qom-list-types:device", {"implements": "device", "abstract": False}),
    ("qom-list-types:object", {"implements": "user-creatable", "abstract": False}),
)
DEVICES = (
    "virtio-blk-pci",
    "virtio-scsi-pci",
    "scsi-hd",
    "scsi-cd",
    "ide-hd",
    "ide-cd",
    "nvme",
    "usb-storage",
    "floppy",
    "sd-card",
    "ich9-ahci",
    "qemu-xhci",
    "sdhci-pci",
    "isa-fdc",
    "virtio-net-pci",
    "virtio-balloon-pci",
    "virtio-rng-pci",
    "virtio-serial-pci",
    "virtserialport",
    "isa-serial",
    "pvpanic-pci",
    "vfio-pci",
    "pcie-root-port",
    "VGA",
    "virtio-vga",
    "cirrus-vga",
    "qxl-vga",
    "vmware-svga",
    "bochs-display",
    "ramfb",
    "i6300esb",
    "ib700",
    "ich9-intel-hda",
    "hda-duplex",
    "AC97",
    "ES1370",
    "usb-tablet",
)
NIC_MODELS = (
    "virtio-net-pci",
    "e1000",
    "e1000e",
    "rtl8139",
    "pcnet",
    "ne2k_pci",
    "i82551",
    "i82557b",
    "i82559er",
    "vmxnet3",
)


@dataclass(frozen=True, slots=True)
class MachineType:
    """One versioned board. `cpu_max` is the most vCPUs it takes."""

    name: str
    cpu_max: int
    deprecated: bool = False


@dataclass(frozen=True, slots=True)
class Kvm:
    """Whether guests of this host can have KVM. `reason` is a clause, `fix` what to do when they cannot."""

    usable: bool
    reason: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """One emulator, seen under one accelerator."""

    version: tuple[int, int, int]
    package: str
    arch: str
    machines: Mapping[str, MachineType]
    aliases: Mapping[str, str]  # "q35" -> "pc-q35-7.2"
    cpu_models: frozenset[str]
    cpu_features: frozenset[str]  # names `-cpu MODEL,NAME=on` takes
    kvm_present: bool  # compiled in
    kvm_enabled: bool  # the probed process ran under it
    device_types: frozenset[str]  # those of DEVICES and NIC_MODELS that this emulator has
    device_properties: Mapping[str, frozenset[str]]  # of those of DEVICES that it has
    object_types: frozenset[str]
    netdev_types: frozenset[str]
    block_drivers: frozenset[str]
    aio: frozenset[str]
    display_types: frozenset[str]
    options: Mapping[str, frozenset[str]]  # command-line option -> its parameters
    commands: frozenset[str]

    @property
    def can_sandbox(self) -> bool:
        """Built with seccomp, and with every class of calls that kvmd denies."""
        wanted = {"enable", "obsolete", "elevateprivileges", "spawn", "resourcecontrol"}
        return wanted <= self.options.get("sandbox", frozenset())

    @property
    def can_action(self) -> bool:
        """`-action` and `set-action`: QEMU waits with its reason instead of leaving."""
        return {"panic", "shutdown", "reboot"} <= self.options.get(
            "action", frozenset()
        ) and "set-action" in self.commands

    def machine(self, wanted: str) -> MachineType:
        """The board an alias or versioned name stands for now. Raises Refused with near matches."""
        name = self.aliases.get(wanted, wanted)
        if name not in self.machines:
            known = [*self.aliases, *self.machines]
            raise Refused(
                f'machine.type = "{wanted}": this QEMU {self.version_text} has no such machine',
                hint=near(wanted, known) or f"it has {', '.join(sorted(self.aliases))} and older versions of them",
            )
        return self.machines[name]

    @property
    def version_text(self) -> str:
        """ "7.2.22"."""
        return ".".join(map(str, self.version))

    def require_device(self, device: Mapping[str, object], key: str) -> None:
        """Raises NotSupported, naming `key`, when this emulator has no such device or the device no such property."""
        driver = str(device["driver"])
        if driver not in self.device_types:
            raise NotSupported(
                f"{key}: this QEMU {self.version_text} has no device {driver}",
                hint="install the package with its module, or choose another model",
            )
        known = self.device_properties.get(driver)
        for word in device:
            if known is not None and word not in known and word not in _NOT_PROPERTIES:
                raise NotSupported(f"{key}: {driver} of this QEMU {self.version_text} has no {word}")


_NOT_PROPERTIES = frozenset({"driver", "id", "bus"})  # -device's own words


def near(word: str, known: Iterable[str]) -> str | None:
    """A "did you mean" clause, or None."""
    found = get_close_matches(word, sorted(set(known)), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(found)}?" if found else None


def choose_accel(wanted: str, kvm: Kvm) -> tuple[Accel, str | None]:
    """The accelerator a guest starts with, and a warning for people.

    "kvm" without a usable KVM raises Refused with the fix: TCG is slower by an order of magnitude and no security
    boundary (QEMU's own security page), so nobody gets it without asking.
    """
    if wanted == "tcg":
        return "tcg", None
    if kvm.usable:
        return "kvm", None
    if wanted == "kvm":
        hint = kvm.fix or "look at `kvmd-cli doctor`"
        raise Refused(
            f'machine.accel = "kvm": {kvm.reason}', hint=f'{hint}; or set machine.accel = "auto" to run emulated'
        )
    return "tcg", f"runs emulated (TCG): {kvm.reason}; slow, and no security boundary"


def device_queries(replies: Mapping[str, Any]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """The second round of questions: properties of the devices kvmd emits, where the first round named them."""
    have = _names(replies, "qom-list-types:device")
    wanted = [(name, name) for name in DEVICES if name in have]
    cpu = _feature_carrier(replies)
    if cpu:
        wanted.append(("cpu", cpu))
    return tuple((f"device-list-properties:{label}", {"typename": name}) for label, name in wanted)


def parse(replies: Mapping[str, Any]) -> Capabilities:
    """Capabilities from QMP `return` values, keyed as COMMANDS and device_queries name them.

    Raises QemuFailed on a reply that is missing or of another shape, NotSupported on a QEMU older than OLDEST.
    """
    try:
        return _parse(replies)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise QemuFailed(f"the emulator answered the probe oddly: {type(error).__name__}: {error}") from error


def _parse(replies: Mapping[str, Any]) -> Capabilities:
    numbers = replies["query-version"]["qemu"]
    version = (int(numbers["major"]), int(numbers["minor"]), int(numbers["micro"]))
    if version[:2] < OLDEST:
        raise NotSupported(
            f"QEMU {'.'.join(map(str, version))} is older than {'.'.join(map(str, OLDEST))}",
            hint="install a newer QEMU, or name one in kvmd.toml: qemu.emulator",
        )
    machines = _list(replies, "query-machines")
    schema = {entry["name"]: entry for entry in _list(replies, "query-qmp-schema")}
    devices = _names(replies, "qom-list-types:device")
    block = _variants(schema, "blockdev-add")
    properties = {
        name: frozenset(str(entry["name"]) for entry in replies[f"device-list-properties:{name}"])
        for name in DEVICES
        if f"device-list-properties:{name}" in replies
    }
    return Capabilities(
        version=version,
        package=str(replies["query-version"]["package"]),
        arch=str(replies["query-target"]["arch"]),
        machines=MappingProxyType(
            {
                str(entry["name"]): MachineType(
                    str(entry["name"]), int(entry["cpu-max"]), bool(entry.get("deprecated"))
                )
                for entry in machines
                if entry["name"] != "none"
            }
        ),
        aliases=MappingProxyType({str(entry["alias"]): str(entry["name"]) for entry in machines if "alias" in entry}),
        cpu_models=frozenset(str(entry["name"]) for entry in _list(replies, "query-cpu-definitions")),
        cpu_features=frozenset(
            str(entry["name"]) for entry in replies.get("device-list-properties:cpu", ()) if entry["type"] == "bool"
        ),
        kvm_present=bool(replies["query-kvm"]["present"]),
        kvm_enabled=bool(replies["query-kvm"]["enabled"]),
        device_types=frozenset(name for name in (*DEVICES, *NIC_MODELS) if name in devices),
        device_properties=MappingProxyType(properties),
        object_types=_names(replies, "qom-list-types:object"),
        netdev_types=frozenset(_variants(schema, "netdev_add")),
        block_drivers=frozenset(block),
        aio=frozenset(_members(schema, block["file"], "aio")),
        display_types=frozenset(_cases(schema, schema["query-display-options"]["ret-type"])),
        options=MappingProxyType(
            {
                str(entry["option"]): frozenset(str(parameter["name"]) for parameter in entry["parameters"])
                for entry in _list(replies, "query-command-line-options")
                if entry["option"]
                in ("sandbox", "action", "boot-opts", "smp-opts", "memory", "name", "overcommit", "vnc")
            }
        ),
        commands=frozenset(str(entry["name"]) for entry in schema.values() if entry["meta-type"] == "command"),
    )


def _list(replies: Mapping[str, Any], key: str) -> list[Any]:
    found = replies[key]
    if not isinstance(found, list):
        raise TypeError(f"{key} is not a list")
    return found


def _names(replies: Mapping[str, Any], key: str) -> frozenset[str]:
    return frozenset(str(entry["name"]) for entry in _list(replies, key))


def _feature_carrier(replies: Mapping[str, Any]) -> str | None:
    """The QOM type whose bool properties are the CPU features: of "max", which has them all."""
    for entry in replies["query-cpu-definitions"]:
        if entry["name"] == "max":
            return str(entry["typename"])
    return None


def _variants(schema: Mapping[str, Any], command: str) -> dict[str, str]:
    return _cases(schema, schema[command]["arg-type"])


def _cases(schema: Mapping[str, Any], type_name: str) -> dict[str, str]:
    """The cases of a QAPI union: discriminator value -> type name (QMP introspection numbers its types)."""
    return {str(variant["case"]): str(variant["type"]) for variant in schema[type_name].get("variants", ())}


def _members(schema: Mapping[str, Any], type_name: str, member: str) -> tuple[str, ...]:
    """The values of an enum member of a QAPI struct."""
    for entry in schema[type_name]["members"]:
        if entry["name"] == member:
            return tuple(map(str, schema[entry["type"]]["values"]))
    return ()


_SETS = (
    "cpu_models",
    "cpu_features",
    "device_types",
    "object_types",
    "netdev_types",
    "block_drivers",
    "aio",
    "display_types",
    "commands",
)


def to_data(caps: Capabilities) -> dict[str, Any]:
    """JSON values that `from_data` takes back: what the probe's cache keeps."""
    return {
        "schema": CACHE_SCHEMA,
        "version": list(caps.version),
        "package": caps.package,
        "arch": caps.arch,
        "machines": [[machine.name, machine.cpu_max, machine.deprecated] for machine in caps.machines.values()],
        "aliases": dict(caps.aliases),
        "kvm_present": caps.kvm_present,
        "kvm_enabled": caps.kvm_enabled,
        "device_properties": {name: sorted(values) for name, values in caps.device_properties.items()},
        "options": {name: sorted(values) for name, values in caps.options.items()},
        **{name: sorted(getattr(caps, name)) for name in _SETS},
    }


def from_data(data: Mapping[str, Any]) -> Capabilities:
    """Capabilities from the cache. Raises QemuFailed when the data is of another schema or shape."""
    try:
        if data["schema"] != CACHE_SCHEMA:
            raise ValueError(f"schema {data['schema']}")
        major, minor, micro = map(int, data["version"])
        sets = {name: frozenset(map(str, data[name])) for name in _SETS}
        return Capabilities(
            version=(major, minor, micro),
            package=str(data["package"]),
            arch=str(data["arch"]),
            machines=MappingProxyType(
                {str(n): MachineType(str(n), int(most), bool(old)) for n, most, old in data["machines"]}
            ),
            aliases=MappingProxyType({str(alias): str(name) for alias, name in data["aliases"].items()}),
            kvm_present=bool(data["kvm_present"]),
            kvm_enabled=bool(data["kvm_enabled"]),
            device_properties=MappingProxyType(
                {str(n): frozenset(map(str, v)) for n, v in data["device_properties"].items()}
            ),
            options=MappingProxyType(
                {str(name): frozenset(map(str, values)) for name, values in data["options"].items()}
            ),
            **sets,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QemuFailed(f"the cached capabilities cannot be used: {error}") from error
