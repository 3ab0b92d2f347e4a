"""The host's own way out, read from /proc: what kvmd must not cut off. Reads only.

Through /proc/thread-self, since /proc/net is the namespace of the process's first thread (proc_net.c).
"""

from __future__ import annotations

from kvmd.effects.tree import Tree

_ROUTES6 = "/proc/thread-self/net/ipv6_route"
_ROUTES4 = "/proc/thread-self/net/route"
_RTF_ADDRCONF = 0x00040000  # linux/ipv6_route.h: from a router advertisement
_ANY6 = "0" * 32


def ra_uplinks(tree: Tree) -> tuple[str, ...]:
    """Links whose IPv6 default route came by router advertisement and goes when the host forwards (accept_ra is 1).

    With accept_ra = 2 it stays (Documentation/networking/ip-sysctl.rst); with 0 a program such as networkd or
    NetworkManager looks after it and the kernel does not.
    """
    return tuple(
        link
        for link in sorted(_defaults6(tree, _RTF_ADDRCONF))
        if tree.read(f"/proc/sys/net/ipv6/conf/{link}/accept_ra") == "1"
    )


def default_links(tree: Tree) -> frozenset[str]:
    """Links that some default route of the host, IPv4 or IPv6, goes through."""
    rows = [line.split() for line in (tree.read(_ROUTES4) or "").splitlines()[1:]]
    return frozenset(row[0] for row in rows if len(row) > 7 and row[1] == row[7] == "00000000") | _defaults6(tree, 0)


def _defaults6(tree: Tree, flags: int) -> frozenset[str]:
    found = set()
    for line in (tree.read(_ROUTES6) or "").splitlines():
        row = line.split()
        if len(row) == 10 and row[:2] == [_ANY6, "00"] and int(row[8], 16) & flags == flags and row[9] != "lo":
            found.add(row[9])
    return frozenset(found)
