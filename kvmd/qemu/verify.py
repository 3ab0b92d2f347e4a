"""Whether the QEMU that runs is the one that was asked for: what to ask it while it still stands, and how to judge.

Identity, disks and the accelerator refuse a start: a guest that runs with another's disk loses data. Everything else is
a warning, and so is an answer that did not come: a wrong verifier must not stop a host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvmd.qemu.fds import Launch
from kvmd.units import Size

Severity = Literal["refuse", "warn"]


@dataclass(frozen=True, slots=True)
class Query:
    """One QMP command to send before `cont`; its `return` goes into the replies under `label`."""

    label: str
    command: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One thing that is not as asked. `str()` is the sentence for people."""

    what: str
    asked: str
    seen: str
    severity: Severity

    def __str__(self) -> str:
        return f"{self.what}: asked for {self.asked}, runs with {self.seen}"


def queries(launch: Launch) -> tuple[Query, ...]:
    """What `check_running` wants to know: few and short, about 0.3 ms each."""
    plain = ["query-status", "query-uuid", "query-kvm", "query-cpus-fast", "query-memory-size-summary"]
    plain += ["query-block"] if launch.expect.disks else []
    macs = (
        Query(f"mac:{device}", "qom-get", {"path": f"/machine/peripheral/{device}", "property": "mac"})
        for device in launch.expect.nics
    )  # `query-rx-filter` would say it too, in 24 kB a card
    functions = (
        Query(f"function:{device}", "qom-get", {"path": f"/machine/peripheral/{device}", "property": "host"})
        for device in launch.expect.functions
    )
    return (*(Query(command, command, {}) for command in plain), *macs, *functions)


def check_running(launch: Launch, replies: Mapping[str, Any]) -> tuple[Mismatch, ...]:
    """What differs from the Launch; empty when all is as asked. Replies are untrusted and may be missing."""
    return tuple(_differences(launch, replies))


def _differences(launch: Launch, replies: Mapping[str, Any]) -> Iterator[Mismatch]:
    expect = launch.expect
    scalars: tuple[tuple[str, str, str, object, Severity], ...] = (
        ("uuid", "query-uuid", "UUID", expect.uuid, "refuse"),
        ("KVM", "query-kvm", "enabled", expect.kvm, "refuse"),
        ("run state", "query-status", "status", "prelaunch", "warn"),
    )
    for what, label, member, asked, severity in scalars:
        reply = replies.get(label)
        seen = reply.get(member) if isinstance(reply, Mapping) else None
        if seen is None:
            yield _unanswered(what, asked)
        elif seen != asked:
            yield Mismatch(what, _shown(asked), _shown(seen), severity)
    cpus = replies.get("query-cpus-fast")
    if not isinstance(cpus, list):
        yield _unanswered("vCPUs", expect.vcpus)
    elif len(cpus) != expect.vcpus:
        yield Mismatch("vCPUs", str(expect.vcpus), str(len(cpus)), "warn")
    yield from _memory(expect.memory_bytes, replies.get("query-memory-size-summary"))
    if expect.disks:
        yield from _disks(expect.disks, expect.readonly, replies.get("query-block"))
    yield from _functions(expect.functions, replies)
    for device, mac in expect.nics.items():
        seen = replies.get(f"mac:{device}")
        if not isinstance(seen, str):
            yield _unanswered(f"MAC of {device}", mac)
        elif seen.lower() != mac:
            yield Mismatch(f"MAC of {device}", mac, _shown(seen), "refuse")


def _functions(asked: Mapping[str, str], replies: Mapping[str, Any]) -> Iterator[Mismatch]:
    """Devices of the host: another one than was asked for is another guest's."""
    for device, address in asked.items():
        seen = replies.get(f"function:{device}")
        if not isinstance(seen, str):
            yield _unanswered(device, address)
        elif seen.lower() != address:
            yield Mismatch(device, address, _shown(seen), "refuse")


def _memory(asked: int, reply: object) -> Iterator[Mismatch]:
    seen = reply.get("base-memory") if isinstance(reply, Mapping) else None
    if type(seen) is not int:
        yield _unanswered("memory", Size(asked))
    elif seen != asked:
        yield Mismatch("memory", str(Size(asked)), str(Size(max(0, seen))), "warn")


def _disks(asked: Mapping[str, str | None], readonly: frozenset[str], reply: object) -> Iterator[Mismatch]:
    """Each device has its node, writable or not as asked, and no device has a medium nobody asked for."""
    if not isinstance(reply, list):
        yield _unanswered("disks", ", ".join(asked))
        return
    seen = {_device(entry): entry.get("inserted") for entry in reply if isinstance(entry, Mapping)}
    for device, node in asked.items():
        medium = seen.get(device)
        if device not in seen:
            yield Mismatch(device, node or "an empty drive", "no such device", "refuse")
        elif not isinstance(medium, Mapping):
            if node is not None:
                yield Mismatch(device, node, "no medium", "refuse")
        elif medium.get("node-name") != node:
            yield Mismatch(device, node or "no medium", _shown(medium.get("node-name")), "refuse")
        elif medium.get("ro") is not (device in readonly):
            wanted, have = ("read-only", "writable") if device in readonly else ("writable", "read-only")
            yield Mismatch(device, wanted, have, "refuse")
    for device, medium in seen.items():
        if device not in asked and isinstance(medium, Mapping):
            # Arguments of the guest's own file (qemu.extra_args) may well add one.
            yield Mismatch(_shown(device), "no such drive", _shown(medium.get("node-name")), "warn")


def _device(entry: Mapping[str, Any]) -> str:
    """The device id behind a block backend: in the QOM path of a virtio or USB disk, the plain id of others."""
    path = entry.get("qdev")
    text = path if isinstance(path, str) else ""
    return text.removeprefix("/machine/peripheral/").partition("/")[0]


def _unanswered(what: str, asked: object) -> Mismatch:
    return Mismatch(what, _shown(asked), "no answer", "warn")


def _shown(value: object) -> str:
    """A value from an untrusted reply, short and printable."""
    return "".join(char for char in str(value)[:100] if char.isprintable())
