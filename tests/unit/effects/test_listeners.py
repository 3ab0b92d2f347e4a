"""Waiting sockets as /proc/net tells them."""

from __future__ import annotations

from pathlib import Path

from kvmd.effects.listeners import observe
from kvmd.effects.tree import Tree
from kvmd.facts import Listener
from tests.rig.doctorhost import socket_row

SIX = "  0: 00000000000000000000000000000000:01BB 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 7 2 0 0\n"


def test_servers_are_found_and_connections_are_none(tmp_path: Path) -> None:
    net = tmp_path / "proc/net"
    net.mkdir(parents=True)
    listening, connected = socket_row("0.0.0.0", 22, 5, state="0A"), socket_row("192.0.2.1", 40000, 6, state="01")
    (net / "tcp").write_text(f"header\n{listening}{listening}{connected}")
    (net / "tcp6").write_text(f"header\n{SIX}")
    (net / "udp").write_text(f"header\n{socket_row('127.0.0.53', 53, 9)}garbage\n")
    assert observe(Tree(tmp_path)) == (
        Listener("tcp", "0.0.0.0", 22),
        Listener("udp", "127.0.0.53", 53),
        Listener("tcp", "::", 443),
    )
