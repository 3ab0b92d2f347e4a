"""The host's way out as /proc tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmd.effects.routes import default_links, ra_uplinks
from kvmd.effects.tree import Tree

ANY = "0" * 32
BY_ROUTER, BY_HAND = "00450003", "00000003"


def host(root: Path, *rows: tuple[str, str], accept_ra: str = "1") -> Tree:
    """A host whose IPv6 default routes are these (flags, link)."""
    net, lines = root / "proc/thread-self/net", []
    for flags, link in rows:
        lines.append(f"{ANY} 00 {ANY} 00 {'fe80':0<32} 00000400 00000001 00000000 {flags} {link:>8}\n")
        knob = root / f"proc/sys/net/ipv6/conf/{link}/accept_ra"
        knob.parent.mkdir(parents=True, exist_ok=True)
        knob.write_text(f"{accept_ra}\n")
    net.mkdir(parents=True)
    (net / "ipv6_route").write_text("".join(lines))
    head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    rows4 = (
        "eth0\t00000000\t010A0A0A\t0003\t0\t0\t0\t00000000\t0\t0\t0\neth2\t000A0A0A\t0\t1\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
    )
    (net / "route").write_text(head + rows4)
    return Tree(root)


@pytest.mark.parametrize(("accept_ra", "lost"), [("1", ("eth0",)), ("2", ()), ("0", ())])
def test_only_a_link_that_would_lose_its_route_is_named(tmp_path: Path, accept_ra: str, lost: tuple[str, ...]) -> None:
    tree = host(tmp_path, (BY_ROUTER, "eth0"), (BY_HAND, "eth1"), (BY_ROUTER, "lo"), accept_ra=accept_ra)
    assert ra_uplinks(tree) == lost


def test_default_routes_of_both_families(tmp_path: Path) -> None:
    assert default_links(host(tmp_path, (BY_HAND, "eth1"), (BY_ROUTER, "lo"))) == {"eth0", "eth1"}


def test_without_proc_there_is_no_route(tmp_path: Path) -> None:
    assert ra_uplinks(Tree(tmp_path)) == () and default_links(Tree(tmp_path)) == frozenset()
