"""Which running guests would suffer if one thing kvmd did to the host were undone. Pure.

A guest is plugged in where its TAP says so (its mark is `kvmd:NETWORK:GUEST:NIC`), not where its file would have it.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmd.facts import Facts, Link
from kvmd.plan.links import ALIAS, is_our_bridge
from kvmd.plan.network import FORWARDING, FORWARDING6
from kvmd.plan.nfttable import PORTS


def needed_by(kind: str, subject: str, original: str, new: str, facts: Facts) -> tuple[str, ...]:
    """Names of running guests that need what the journal calls `kind:subject`."""
    ours = {link.name for link in facts.links if is_our_bridge(link)}
    match kind:
        case "hugepages":
            return _in_pages(subject, int(original), facts)
        case "bridge":
            return _plugged(facts, lambda link, _network: link.master == subject)
        case "vfio":
            return (new,) if any(guest.name == new for guest in facts.guests) else ()
        case "dnsmasq":
            return _plugged(facts, lambda _link, network: network == subject)
        case "ruleset" if subject == PORTS:
            return _plugged(facts, lambda _link, _network: True)
        case "ruleset":
            return _plugged(facts, lambda link, _network: link.master in ours)
        case "knob" if subject in (FORWARDING, FORWARDING6):
            return _plugged(facts, lambda link, _network: link.master in ours)
        case _:
            return ()


def _plugged(facts: Facts, where: Callable[[Link, str], bool]) -> tuple[str, ...]:
    found = set()
    running = {guest.name for guest in facts.guests}
    for link in facts.links:
        mark = (link.alias or "").removeprefix(ALIAS).split(":")
        if (link.alias or "").startswith(ALIAS) and len(mark) == 3 and mark[1] in running and where(link, mark[0]):
            found.add(mark[1])
    return tuple(sorted(found))


def _in_pages(subject: str, original: int, facts: Facts) -> tuple[str, ...]:
    """Those whose memory is in pages of that size, as long as more are in use than there were before kvmd."""
    node, page_bytes = (int(part) for part in subject.split(":"))
    pool = next((p for p in facts.hugepages if (p.node, p.page_bytes) == (node, page_bytes)), None)
    if pool is None or pool.used <= original:
        return ()
    return tuple(sorted(guest.name for guest in facts.guests if guest.page_bytes == page_bytes))
