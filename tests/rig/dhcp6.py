#!/usr/bin/env python3
"""A DHCPv6 client that asks once: `dhcp6.py INTERFACE` prints the address it was given, and its name servers.

RFC 8415: Solicit with rapid commit, a DUID-LL of the interface's MAC, one IA_NA. Runs in a fake guest's namespace,
where no other client is at hand.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_SOLICIT, _REPLY, _ADVERTISE, _REQUEST = 1, 7, 2, 3
_CLIENT_ID, _SERVER_ID, _IA_NA, _IA_ADDR, _ORO, _RAPID_COMMIT, _DNS = 1, 2, 3, 5, 6, 14, 23
_IAID = 7


def option(code: int, data: bytes) -> bytes:
    return struct.pack("!HH", code, len(data)) + data


def options(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        code, length = struct.unpack("!HH", data[:4])
        yield code, data[4 : 4 + length]
        data = data[4 + length :]


def ask(interface: str, timeout_s: float = 10.0) -> tuple[str, list[str]]:
    """The address and the name servers. TimeoutError."""
    mac = bytes.fromhex(Path(f"/sys/class/net/{interface}/address").read_text().strip().replace(":", ""))
    index = socket.if_nametoindex(interface)
    client = option(_CLIENT_ID, b"\0\3\0\1" + mac)
    ia = option(_IA_NA, struct.pack("!III", _IAID, 0, 0))
    rest = client + ia + option(_ORO, struct.pack("!H", _DNS))
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as link:
        link.bind(("::", 546, 0, index))
        link.settimeout(1.0)
        message = bytes([_SOLICIT]) + os.urandom(3) + option(_RAPID_COMMIT, b"") + rest
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                link.sendto(message, ("ff02::1:2", 547, 0, index))
                answer = link.recv(4096)
            except OSError:  # no link-local address yet, or no answer
                time.sleep(0.2)
                continue
            found = dict(options(answer[4:]))
            if answer[0] == _ADVERTISE:
                message = bytes([_REQUEST]) + os.urandom(3) + rest + option(_SERVER_ID, found[_SERVER_ID])
            elif answer[0] == _REPLY:
                leased = dict(options(found[_IA_NA][12:]))[_IA_ADDR][:16]
                servers = found.get(_DNS, b"")
                each = [servers[at : at + 16] for at in range(0, len(servers), 16)]
                return str(ipaddress.IPv6Address(leased)), [str(ipaddress.IPv6Address(server)) for server in each]
    raise TimeoutError(f"no DHCPv6 server answers on {interface}")


if __name__ == "__main__":
    address, servers = ask(sys.argv[1])
    print(address, *servers)
