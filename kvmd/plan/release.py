"""Putting the host back as it was before kvmd touched it in this boot. Pure.

Only what the journal says is undone, in the reverse order of how it was done; a knob someone else has changed since
is left to them and told. What a running guest needs is not taken from it: `needed_by` names who needs what.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from kvmd.actions import (
    DetachUplink,
    HostAction,
    ReleaseDevice,
    RemoveBridge,
    RemoveSwapFile,
    RemoveZram,
    ReplaceRuleset,
    SetHugepages,
    SetVfs,
    StopDnsmasq,
    UnloadModule,
    UnmountHugetlbfs,
    WriteKernelArgs,
    WriteKnob,
)
from kvmd.facts import Facts
from kvmd.plan import swap
from kvmd.plan.kernelargs import parse_drop_in
from kvmd.plan.needs import needed_by
from kvmd.plan.nfttable import PORTS
from kvmd.plan.sriov import in_use
from kvmd.units import Size

WHY = "kvmd lets go of the host"


@dataclass(frozen=True, slots=True)
class Undo:
    """One journalled effect: `key` to forget when the action has been done; no action: nothing left to undo."""

    key: str
    action: HostAction | None
    kept: str | None = None  # why it stays as it is
    needed_by: tuple[str, ...] = ()  # running guests that would suffer

    @property
    def subject(self) -> str:
        """What it is about, for people: "bridge kvlan", "/proc/sys/net/ipv4/ip_forward"."""
        kind, _, subject = self.key.partition(":")
        match kind:
            case "knob":
                return subject
            case "ruleset":
                return f"nft table {subject}"
            case "hugepages":
                node, _, page_bytes = subject.partition(":")
                return f"hugepages {Size(int(page_bytes))} node {node}"
            case _:
                return f"{kind} {subject}"


def plan_release(entries: Iterable[tuple[str, str, str, str]], facts: Facts) -> tuple[Undo, ...]:
    """What undoes each `(kind, subject, original, new)` of the journal, and who would suffer."""
    undos = []
    for kind, subject, original, new in entries:
        if kind in ("vfio_group", "tap_script"):
            continue  # one goes back with the last function of its group, the other with its guest
        undo = _undo(kind, subject, original, new, facts)
        undos.append(replace(undo, needed_by=needed_by(kind, subject, original, new, facts)) if undo.action else undo)
    return tuple(reversed(undos))


def refusal(undos: Iterable[Undo]) -> str | None:
    """Which running guest needs which thing, as one sentence; None when nobody needs any."""
    needs: dict[str, list[str]] = {}
    for undo in undos:
        for guest in undo.needed_by:
            needs.setdefault(guest, []).append(undo.subject)
    if not needs:
        return None
    return "; ".join(f"{guest} needs {', '.join(reversed(things))}" for guest, things in sorted(needs.items()))


def _undo(kind: str, subject: str, original: str, new: str, facts: Facts) -> Undo:
    key = f"{kind}:{subject}"
    match kind:
        case "knob":
            now = facts.knobs.get(subject)
            if now == original or now is None:
                return Undo(key, None)
            if now != new:
                return Undo(key, None, kept=f"{subject} is {now}: someone changed it after kvmd wrote {new}")
            return Undo(key, WriteKnob(path=subject, old=now, new=original, why=WHY))
        case "hugepages":
            node, page_bytes = (int(part) for part in subject.split(":"))
            pool = next((p for p in facts.hugepages if (p.node, p.page_bytes) == (node, page_bytes)), None)
            if pool is None or pool.total == int(original):
                return Undo(key, None)
            held = pool.used + pool.reserved
            target = max(int(original), held)
            kept = f"{held} pages are in use" if target > int(original) else None
            action = SetHugepages(node=node, page_bytes=page_bytes, old=pool.total, new=target, why=WHY)
            return Undo(key, action, kept=kept)
        case "hugetlbfs":
            mounted = any(path.path == subject and path.ours for path in facts.memory_paths)
            return Undo(key, UnmountHugetlbfs(path=subject, remove=original == "absent", why=WHY) if mounted else None)
        case "swapfile":
            file = next((file for file in facts.swap_files if file.path == subject and file.ours), None)
            return _unswap(key, subject, RemoveSwapFile(path=subject, why=WHY) if file else None, facts)
        case "zram":
            zram = next((zram for zram in facts.zrams or () if str(zram.number) == new), None)
            if zram is None or (zram.size_bytes and not zram.ours):
                return Undo(key, None)
            return _unswap(key, zram.path, RemoveZram(number=zram.number, why=WHY), facts)
        case "bridge":
            return Undo(key, RemoveBridge(bridge=subject, why=WHY))
        case "uplink":
            return _uplink(key, subject, original, new, facts)
        case "ruleset":
            there = facts.nft_ports if subject == PORTS else facts.nft
            remove = ReplaceRuleset(text="", change="remove", table=subject, why=WHY)
            return Undo(key, remove if there is not None else None)
        case "dnsmasq":
            return Undo(key, StopDnsmasq(network=subject, why=WHY))
        case "vfio":
            return Undo(key, ReleaseDevice(device=subject, guest=new, why=WHY))
        case "sriov":
            return _vfs(key, subject, original, facts)
        case "module":
            return _module(key, subject, facts)
        case "kernel-args":
            now = facts.boot.drop_in or ""
            if now == original:
                return Undo(key, None)
            if now != new:
                return Undo(key, None, kept=f"{subject}: someone changed it after kvmd wrote it")
            words = " ".join(parse_drop_in(original))
            return Undo(key, WriteKernelArgs(path=subject, old=now, new=original, words=words, why=WHY))
        case "fixed-irq":
            return Undo(key, None)
        case _:
            return Undo(key, None, kept=f"{key} was written by another version of kvmd")


def _vfs(key: str, device: str, original: str, facts: Facts) -> Undo:
    number, _, autoprobe = original.partition(",")
    found = next((each for each in facts.pci or () if each.address == device), None)
    if found is None:
        return Undo(key, None)
    name = found.links[0] if found.links else device
    users = in_use(found, facts)
    if users:
        return Undo(key, None, kept=f"{name} keeps its {found.vfs} virtual functions: {', '.join(users)}")
    action = SetVfs(device=device, pool=name, old=found.vfs, new=int(number), autoprobe=autoprobe == "1", why=WHY)
    return Undo(key, action)


def _uplink(key: str, interface: str, original: str, bridge: str, facts: Facts) -> Undo:
    link = next((link for link in facts.links if link.name == interface), None)
    if link is None or link.master != bridge:
        return Undo(key, None)
    return Undo(key, DetachUplink(bridge=bridge, interface=interface, was_up=original == "up", why=WHY))


def _module(key: str, name: str, facts: Facts) -> Undo:
    """A module goes when nobody uses it; built in or gone, there is nothing to undo."""
    found = facts.modules.get(name)
    if found is None or found.state != "loaded":
        return Undo(key, None)
    if found.users:
        return Undo(key, None, kept=f"module {name} stays: it is in use ({found.users} times)")
    return Undo(key, UnloadModule(name=name, why=WHY))


def _unswap(key: str, path: str, action: HostAction | None, facts: Facts) -> Undo:
    """No longer swap to `path`; it stays while RAM has no room for what it holds."""
    stays = swap.no_room(path, facts)
    return Undo(key, None, kept=f"{path}: {stays}") if stays else Undo(key, action)
