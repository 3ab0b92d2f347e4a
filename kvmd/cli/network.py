"""Commands about networks: list, show, leases, and the confirmation of an uplink that is on trial."""

from __future__ import annotations

import time

from kvmd.cli import render
from kvmd.cli.arguments import Parsed
from kvmd.cli.session import Session

TYPE_CHECKING = False  # typing itself is 3 ms of every start
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any


def list_networks(session: Session, _parsed: Parsed) -> int:
    """All networks."""
    found = session.call("network.list")
    session.result(found, lambda: _table(found["networks"], on=session.colours))
    return 0


def show(session: Session, parsed: Parsed) -> int:
    """All about one network."""
    found = session.call("network.show", name=parsed.word("NETWORK"))
    session.result(found, lambda: _detail(found, on=session.colours))
    return 0


def leases(session: Session, parsed: Parsed) -> int:
    """What DHCP servers gave out."""
    found = session.call("network.leases", name=parsed.word("NETWORK") or None)
    session.result(found, lambda: _leases(found["leases"], now=time.time()))
    return 0


def confirm(session: Session, parsed: Parsed) -> int:
    """An uplink on trial stays."""
    name = parsed.word("NETWORK")
    if session.dry_run:
        session.say(f"would keep the uplink of network {name}")
        return 0
    found = session.call("network.confirm", name=name)
    session.result(found, lambda: f"the uplink of network {name} stays" if found["changed"] else "")
    return 0


def _state(text: str) -> str:
    return {"up": render.GREEN, "degraded": render.YELLOW}.get(text, render.RED)


def _table(networks: Sequence[Mapping[str, Any]], *, on: bool) -> str:
    if not networks:
        return "no networks; kvmd-cli init writes one"
    rows = [
        (n["name"], n["mode"], n["bridge"], n["state"], " ".join(n["addresses"]) or "-", str(n["ports"]))
        for n in networks
    ]
    colours = {(number, 3): _state(row[3]) for number, row in enumerate(rows)}
    heads = ("NETWORK", "MODE", "BRIDGE", "STATE", "ADDRESSES", "PORTS")
    return render.table(heads, rows, right=frozenset({5}), colours=colours, on=on)


def _detail(found: Mapping[str, Any], *, on: bool) -> str:
    switches = [word for word in ("stp", "vlan_filtering", "guests_isolated") if found[word]]
    state = found["uplink_state"]
    lines = render.fields(
        ("network", found["name"]),
        ("description", found["description"]),
        ("mode", found["mode"]),
        ("bridge", found["bridge"]),
        ("state", found["state"]),
        ("addresses", " ".join(found["addresses"]) or None),
        ("mtu", str(found["mtu"])),
        ("switches", ", ".join(switches) or None),
        ("uplink", found["uplink"] and found["uplink"] + (f" ({state})" if state else "")),
        ("dhcp", ", ".join(found["dhcp"]) or None),
        ("domain", found["domain"]),
        ("route here", ", ".join(found["routes"]) or None),
    )
    if found["ports_declared"]:
        keys = ("guest", "nic", "mac", "link", "vlans", "ipv4", "ipv6")
        rows = [tuple(port[key] or "-" for key in keys) for port in found["ports_declared"]]
        lines += ["", render.table(tuple(key.upper() for key in keys), rows, on=on)]
    if found["reservations"]:
        fixed = [tuple(one[key] or "-" for key in ("name", "mac", "ipv4", "ipv6")) for one in found["reservations"]]
        lines += ["", render.table(("RESERVATION", "MAC", "IPV4", "IPV6"), fixed, on=on)]
    if found["problems"]:
        lines += ["", *(render.clean(f"! {problem}") for problem in found["problems"])]
    return "\n".join(lines)


def _leases(found: Sequence[Mapping[str, Any]], *, now: float) -> str:
    if not found:
        return "no leases"
    rows = [
        (
            lease["network"],
            lease["address"],
            lease["mac"] or "-",
            lease["name"] or "-",
            lease["guest"] or "-",
            render.age(lease["expires"] - now) if lease["expires"] else "never",
        )
        for lease in found
    ]
    return render.table(("NETWORK", "ADDRESS", "MAC", "NAME", "GUEST", "ENDS IN"), rows)
