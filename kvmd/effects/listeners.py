"""Sockets of this host that wait for packets, from /proc/net. Reads only."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from kvmd.effects.tree import Tree
from kvmd.facts import Listener

Protocol = Literal["udp", "tcp"]

_TCP_LISTEN, _UDP_BOUND = "0A", "07"  # net/tcp_states.h: TCP_LISTEN; an unconnected UDP socket is TCP_CLOSE
TABLES: tuple[tuple[Protocol, str, str], ...] = (
    ("udp", "/proc/net/udp", _UDP_BOUND),
    ("udp", "/proc/net/udp6", _UDP_BOUND),
    ("tcp", "/proc/net/tcp", _TCP_LISTEN),
    ("tcp", "/proc/net/tcp6", _TCP_LISTEN),
)


def observe(tree: Tree) -> tuple[Listener, ...]:
    """All of them, each once, sorted."""
    return tuple(sorted({Listener(*row[:3]) for row in rows(tree)}, key=lambda each: (each.port, each.address)))


def rows(tree: Tree) -> Iterator[tuple[Protocol, str, int, str]]:
    """(protocol, address, port, inode) of every waiting socket."""
    for protocol, path, state in TABLES:
        for fields in map(str.split, (tree.read(path) or "").splitlines()[1:]):
            if len(fields) > 9 and fields[3] == state:
                yield (protocol, *endpoint(fields[1]), fields[9])


def endpoint(text: str) -> tuple[str, int]:
    """Address and port of "0100007F:0035": words of the host's byte order (little-endian wherever QEMU has KVM)."""
    words, _, port = text.partition(":")
    raw = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
    return str(IPv4Address(raw) if len(raw) == 4 else IPv6Address(raw)), int(port, 16)
