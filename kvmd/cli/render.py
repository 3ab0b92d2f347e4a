"""Text for people: rows to tables, bytes and ages in words. Pure, and the only place that puts in colours.

Whatever came from a guest or a file passes `clean`: a terminal obeys control characters, people should not have to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

TYPE_CHECKING = False  # typing itself is 3 ms of every start
if TYPE_CHECKING:
    from typing import Any

GREEN, RED, YELLOW, DIM = "32", "31", "33", "2"
_STATE_COLOURS = {"running": GREEN, "failed": RED, "unreachable": RED, "paused": YELLOW, "stopped": DIM}
_SIGN_COLOURS = {"+": GREEN, "-": RED, "~": YELLOW}
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
_AGES = (("d", 86_400), ("h", 3_600), ("min", 60))
DISRUPTIONS = {
    "none": "now, disturbs nobody",
    "network": "interrupts networks",
    "guest": "stops or restarts guests",
    "host": "changes the host under everyone",
}


def clean(text: str, keep: str = "") -> str:
    """`text` without what a terminal would obey or hide: control and formatting characters become U+FFFD."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in text)


def width(text: str) -> int:
    """Columns on a terminal: wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def paint(text: str, colour: str | None, *, on: bool) -> str:
    """`text` in a colour, where colours are wanted."""
    return f"\x1b[{colour}m{text}\x1b[0m" if on and colour and text else text


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: frozenset[int] = frozenset(),
    colours: Mapping[tuple[int, int], str] | None = None,
    on: bool = False,
) -> str:
    """Columns as wide as their widest cell, two spaces apart; `right` ones aligned there.

    `colours` by (row, column); they never count as width. No trailing spaces.
    """
    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [max([width(head), *(width(row[column]) for row in cells)]) for column, head in enumerate(heads)]
    lines = [_line(heads, widths, right, {}, on=False)]
    painted: dict[int, dict[int, str]] = {}
    for (number, column), colour in (colours or {}).items() if on else ():
        painted.setdefault(number, {})[column] = colour
    lines += [_line(row, widths, right, painted.get(number, {}), on=on) for number, row in enumerate(cells)]
    return "\n".join(lines)


def _line(
    cells: Sequence[str], widths: Sequence[int], right: frozenset[int], own: Mapping[int, str], *, on: bool
) -> str:
    parts = []
    for column, cell in enumerate(cells):
        pad = " " * (widths[column] - width(cell))
        shown = paint(cell, own.get(column), on=on)
        parts.append(pad + shown if column in right else shown + pad)
    return "  ".join(parts).rstrip()


def size(count: int | None) -> str:
    """Bytes for people: "1.5 GiB"; "-" for None."""
    if count is None:
        return "-"
    for unit, factor in _UNITS:
        if abs(count) >= factor:
            value = count / factor
            return f"{value:.0f} {unit}" if count % factor == 0 else f"{value:.1f} {unit}"
    return f"{count} B"


def age(seconds: float) -> str:
    """How long: "42s", "3min", "2h", "4d"; the largest unit alone. A clock that was set back gives "0s"."""
    whole = max(0, int(seconds))
    for unit, factor in _AGES:
        if whole >= factor:
            return f"{whole // factor}{unit}"
    return f"{whole}s"


def moment(time_s: float) -> str:
    """A time of day in the local zone, as RFC 3339 has it but for the T."""
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def guests(found: Sequence[Mapping[str, Any]], *, now: float, on: bool) -> str:
    """The table of `kvmd-cli list`."""
    if not found:
        return "no guests; kvmd-cli create makes one"
    rows = []
    for guest in found:
        rows.append(
            (
                guest["name"],
                guest["state"],
                age(now - guest["since"]) if guest["since"] else "-",
                str(guest["vcpus"]),
                _memory(guest),
                str(guest["pid"] or "-"),
                "; ".join(notes(guest)),
            )
        )
    heads = ("NAME", "STATE", "SINCE", "VCPUS", "MEMORY", "PID", "NOTES")
    states = {(n, 1): _STATE_COLOURS.get(row[1], "") for n, row in enumerate(rows)}
    return table(heads, rows, right=frozenset({2, 3, 4, 5}), colours=states, on=on)


def notes(guest: Mapping[str, Any]) -> list[str]:
    """What is worth saying about a guest besides its state."""
    said = []
    if guest["reason"] and guest["state"] not in ("running", "starting"):
        said.append(str(guest["reason"]))
    up = guest["state"] not in ("stopped", "failed")
    if guest["wanted"] and (guest["wanted"] == "running") != up:
        said.append(f"wanted {guest['wanted']}")
    if guest["held"]:
        said.append(f"held: {guest['held']}")
    if guest["pending"]:
        said.append(f"pending: {', '.join(guest['pending'])}")
    if guest["stale"]:
        said.append("its file has faults, the last good one counts")
    return said


def _memory(guest: Mapping[str, Any]) -> str:
    now, full = guest["balloon_bytes"], guest["memory_bytes"]
    return size(full) if now is None or now == full else f"{size(now)}/{size(full)}"


def details(guest: Mapping[str, Any], *, now: float, on: bool) -> str:
    """The page of `kvmd-cli show`."""
    state = paint(guest["state"], _STATE_COLOURS.get(guest["state"]), on=on)
    since = f" for {age(now - guest['since'])}" if guest["since"] else ""
    said = notes(guest)
    lines = [f"{clean(guest['name'])}: {state}{since}" + (f" ({clean('; '.join(said))})" if said else "")]
    lines += fields(
        ("description", guest["description"]),
        ("owner", guest["owner"]),
        ("tags", ", ".join(guest["tags"])),
        ("uuid", guest["uuid"]),
        ("pid", guest["pid"]),
        ("machine", " ".join(filter(None, (guest["machine"], guest["accel"])))),
        ("vCPUs", guest["vcpus"]),
        ("memory", _memory(guest)),
        ("placement", _placement(guest["placement"])),
        ("display", guest["display"]),
        ("logs", guest["log_dir"]),
    )
    if guest["disks"]:
        disks = [(d["name"], d["format"], size(d["size_bytes"]), d["file"]) for d in guest["disks"]]
        lines += ["", table(("DISK", "FORMAT", "SIZE", "FILE"), disks)]
    if guest["nics"]:
        nics = [(n["name"], n["network"] or "user", n["mac"], n["ipv4"] or "-", n["tap"] or "-") for n in guest["nics"]]
        lines += ["", table(("NIC", "NETWORK", "MAC", "IPV4", "TAP"), nics)]
    if guest["warnings"]:
        lines += ["", *(paint(f"! {clean(warning)}", YELLOW, on=on) for warning in guest["warnings"])]
    return "\n".join(lines)


def _placement(placement: Mapping[str, Any] | None) -> str | None:
    if placement is None:
        return None
    cpus = ", ".join(f"vCPU {number} on {cpus}" for number, cpus in enumerate(placement["vcpus"]))
    return f"{cpus}; the rest on {placement['emulator']}"


def fields(*pairs: tuple[str, Any]) -> list[str]:
    """`name  value` lines; what has no value is left out."""
    return [f"  {name:<12}{clean(str(value))}" for name, value in pairs if value not in (None, "", ())]


def action(shown: Mapping[str, Any], *, on: bool) -> str:
    """A plan line with its reason: "~ /sys/kernel/mm/ksm/run: 0 -> 1  (why)"."""
    line = clean(str(shown["line"]))
    why = f"  ({clean(str(shown['why']))})" if shown["why"] else ""
    return paint(line, _SIGN_COLOURS.get(line[:1]), on=on) + why


def actions(found: Sequence[Mapping[str, Any]], *, on: bool) -> str:
    """The plan, grouped by whom it disturbs, the harmless first."""
    lines: list[str] = []
    for word, title in DISRUPTIONS.items():
        group = [shown for shown in found if shown["disruption"] == word]
        if group:
            lines += [f"{title}:", *(f"  {action(shown, on=on)}" for shown in group)]
    return "\n".join(lines)


def plan(found: Mapping[str, Any], *, on: bool) -> str:
    """A whole plan: actions by whom they disturb, then what only a reboot brings."""
    waiting = [one for one in found["problems"] if one.get("needs") == "reboot"]
    lines = [actions(found["actions"], on=on)] if found["actions"] else []
    if waiting:
        lines += ["only after a reboot of the host:", *("  " + problem(one).replace("\n", "\n  ") for one in waiting)]
    if found.get("admissions"):
        lines.append(admissions(found["admissions"]))
    return "\n".join(lines)


def admissions(found: Sequence[Mapping[str, Any]]) -> str:
    """Who would start, and the memory that decides it."""
    return "\n".join(["memory:", *(f"  {clean(one['line'])}" for one in found)]) if found else ""


_AFTER_REBOOT = {
    "guest": "guests that start, or do not come back",
    "pending": "changes that come with it",
    "kernel": "the kernel's command line",
    "remade": "gone with the boot, made again by kvmd",
    "gone": "gone with the boot",
    "problem": "not to be had then either",
}


def reboot(found: Sequence[Mapping[str, Any]], *, on: bool) -> str:
    """What a reboot changes, by kind."""
    lines: list[str] = []
    for kind, title in _AFTER_REBOOT.items():
        group = [one for one in found if one["kind"] == kind]
        if group:
            lines += [f"{title}:", *(f"  {action(one, on=on)}" for one in group)]
    return "\n".join(lines)


def yielded(knob: Mapping[str, Any]) -> str:
    """A tuning knob that is somebody else's now."""
    return f"= {clean(knob['path'])}: {clean(knob['theirs'])}, left to whoever set it; kvmd wrote {clean(knob['ours'])}"


def outcomes(done: Sequence[Mapping[str, Any]], *, on: bool) -> str:
    """What was done, and what was not and why."""
    return "\n".join(
        action(one, on=on) + (paint(f"\n    failed: {clean(one['error'])}", RED, on=on) if one["error"] else "")
        for one in done
    )


def problem(found: Mapping[str, Any]) -> str:
    """Something asked for that cannot be had."""
    hint = f"\n    hint: {clean(found['hint'])}" if found["hint"] else ""
    return f"! {clean(found['subject'])}: {clean(found['message'])}{hint}"


def fault(found: Mapping[str, Any]) -> str:
    """`guests.d/web.toml:14: memory.sise: unknown key (did you mean memory.size?)`."""
    place = found["file"] if found["line"] is None else f"{found['file']}:{found['line']}"
    parts = [place, "warning" if found["severity"] == "warning" else None, found["key"], found["message"]]
    text = ": ".join(part for part in parts if part)
    return clean(f"{text} ({found['hint']})" if found["hint"] else text)


def tree(value: Any, indent: str = "", *, key: str = "") -> list[str]:
    """Any JSON value as indented lines; a list of like objects is a table. Members called `*_bytes` are sizes."""
    match value:
        case dict():
            lines: list[str] = []
            for name, inner in value.items():
                unit = name if name.endswith("_bytes") else key
                if isinstance(inner, dict | list) and inner:
                    lines += [f"{indent}{clean(name)}:", *tree(inner, indent + "  ", key=unit)]
                else:
                    lines.append(f"{indent}{clean(name)}: {_scalar(inner, unit)}")
            return lines
        case list() if value and all(isinstance(item, dict) and item.keys() == value[0].keys() for item in value):
            heads = list(value[0])
            rows = [[_scalar(item[head], head) for head in heads] for item in value]
            return [indent + line for line in table(heads, rows).split("\n")]
        case list():
            return [f"{indent}- {_scalar(item, key)}" for item in value]
        case _:
            return [indent + _scalar(value, key)]


def _scalar(value: Any, key: str = "") -> str:
    match value:
        case int() if key.endswith("_bytes"):
            return size(value)
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(_scalar(item) for item in value) or "-"
        case dict():
            return ", ".join(f"{key}={_scalar(item)}" for key, item in value.items()) or "-"
        case _:
            return clean(str(value))
