"""`host cpus`: who sits where, drawn by node, last-level cache and core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvmd.cli import render
from kvmd.cli.arguments import Parsed
from kvmd.cli.session import Session
from kvmd.units import CpuSet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_COLOURS = {"offline": render.DIM, "forbidden": render.DIM, "housekeeping": render.YELLOW, "isolated": render.GREEN}


def cpus(session: Session, _parsed: Parsed) -> int:
    """The table of CPUs, the guests on them, and what cannot be had."""
    found = session.call("host.cpus")
    session.result(found, lambda: draw(found, on=session.colours))
    return 0


def draw(found: Mapping[str, Any], *, on: bool = False) -> str:
    """Text of the whole answer. Cores of one cache that are alike and nobody's are one line."""
    with_speed = len({cpu["capacity"] for cpu in found["cpus"] if cpu["capacity"] is not None}) > 1
    heads = ["NODE", "L3", "CORES", "CPUS", "ROLE", "VCPUS"]
    if with_speed:
        heads.insert(5, "SPEED")
    rows: list[list[str]] = []
    colours: dict[tuple[int, int], str] = {}
    before: tuple[str, str] = ("", "")
    for group in _groups(found["cpus"]):
        first = group[0][0]
        where = (_text(first["node"]), _text(first["l3"]))
        role = " ".join(first["roles"]) or "-"
        row = [
            "" if where[0] == before[0] else where[0],
            "" if where == before else where[1],
            _text(first["core"]) if len(group) == 1 else f"{len(group)} cores",
            str(CpuSet(cpu["id"] for core in group for cpu in core)),
            role if len({tuple(cpu["roles"]) for cpu in group[0]}) == 1 else _mixed(group[0]),
            " ".join(_holders(group[0])) or "-",
        ]
        if with_speed:
            row.insert(5, "-" if first["capacity"] is None else f"{first['capacity'] * 100 // 1024} %")
        colours.update({(len(rows), 4): colour for word, colour in _COLOURS.items() if word in first["roles"]})
        rows.append(row)
        before = where
    lines = [render.table(heads, rows, colours=colours, on=on)]
    if found["guests"]:
        lines += ["", _guests(found["guests"], on=on)]
    if found["interrupts"]:
        lines += ["", _interrupts(found["interrupts"])]
    for problem in found["problems"]:
        lines += ["", f"! {render.clean(problem['subject'])}: {render.clean(problem['message'])}"]
        if problem["hint"]:
            lines.append(f"  {render.clean(problem['hint'])}")
    return "\n".join(lines)


def _groups(cpus: Sequence[Mapping[str, Any]]) -> list[list[list[Mapping[str, Any]]]]:
    """Cores in their order; neighbours that are alike and hold nobody together."""
    cores: dict[Any, list[Mapping[str, Any]]] = {}
    for cpu in cpus:
        cores.setdefault(("offline",) if cpu["core"] is None else cpu["core"], []).append(cpu)
    groups: list[list[list[Mapping[str, Any]]]] = []
    for core in cores.values():
        if groups and _kind(groups[-1][0]) == _kind(core) is not None:
            groups[-1].append(core)
        else:
            groups.append([core])
    return groups


def _kind(core: Sequence[Mapping[str, Any]]) -> object:
    """What two cores must have in common to be drawn as one; None for one that somebody has, or is uneven."""
    if any(cpu["vcpus"] for cpu in core) or len({tuple(cpu["roles"]) for cpu in core}) > 1:
        return None
    first = core[0]
    return first["node"], first["l3"], first["capacity"], tuple(first["roles"]), len(core)


def _mixed(core: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{cpu['id']}: {' '.join(cpu['roles']) or 'ordinary'}" for cpu in core)


def _holders(core: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{cpu['id']}={'+'.join(cpu['vcpus'])}" for cpu in core if cpu["vcpus"]]


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _guests(found: Sequence[Mapping[str, Any]], *, on: bool) -> str:
    rows: list[list[str]] = []
    colours: dict[tuple[int, int], str] = {}
    for guest in found:
        others = sorted({thread["cpus"] for thread in guest["threads"]})
        state = "placed" if guest["placed"] else "refused" if guest["wanted_vcpus"] is None else "to be pinned"
        if not guest["placed"]:
            colours[len(rows), 4] = render.RED if guest["wanted_vcpus"] is None else render.YELLOW
        rows.append(
            [guest["name"], guest["placement"] or "-", _each(guest["vcpus"]), " and ".join(others) or "-", state]
        )
    return render.table(("GUEST", "PLACEMENT", "VCPUS ON", "THE REST ON", "STATE"), rows, colours=colours, on=on)


def _interrupts(found: Sequence[Mapping[str, Any]]) -> str:
    """By the CPUs they arrive at: hundreds of them are a few lines."""
    at: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
    for each in found:
        at.setdefault((each["arrives"], each["kept"]), []).append(each)
    rows = []
    for (cpus_, kept), group in sorted(
        at.items(), key=lambda item: (min(CpuSet.parse(item[0][0]), default=-1), item[0][1])
    ):
        devices = sorted({each["device"] for each in group})
        shown = ", ".join(devices[:3]) + (f" and {len(devices) - 3} more" if len(devices) > 3 else "")
        rows.append((cpus_, str(CpuSet(each["number"] for each in group)), shown, "the kernel's" if kept else "-"))
    return render.table(("ARRIVE AT", "INTERRUPTS", "DEVICES", "KEPT"), rows)


def _each(vcpus: Sequence[str]) -> str:
    """One list when all vCPUs share it, else one after the other."""
    return "-" if not vcpus else vcpus[0] if len(set(vcpus)) == 1 and len(vcpus) > 1 else " ".join(vcpus)
