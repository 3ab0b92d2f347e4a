"""Ethernet frames as a guest writes them into its TAP, right or forged, and what comes out of one."""

from __future__ import annotations

import os
import socket
import struct
import time
from ipaddress import IPv6Address

VNET_HDR = bytes(10)  # struct virtio_net_hdr: no offloads
BROADCAST = "ff:ff:ff:ff:ff:ff"


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def ether(source: str, target: str, kind: int, payload: bytes, *, vlan: int | None = None) -> bytes:
    """A frame, with `vlan` tagged as 802.1Q. Without padding: br_netfilter would cut it off."""
    tag = b"" if vlan is None else struct.pack("!HH", 0x8100, vlan)
    return mac_bytes(target) + mac_bytes(source) + tag + struct.pack("!H", kind) + payload


def arp(
    source_mac: str, source_ip: str, target_ip: str, *, claimed_mac: str | None = None, reply: bool = False
) -> bytes:
    """Who has `target_ip`? (or: `source_ip` is at `claimed_mac`), sent to all."""
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2 if reply else 1)
    body += mac_bytes(claimed_mac or source_mac) + socket.inet_aton(source_ip) + bytes(6) + socket.inet_aton(target_ip)
    return ether(source_mac, BROADCAST, 0x0806, body)


def udp4(
    source_mac: str,
    target_mac: str,
    source: str,
    target: str,
    payload: bytes,
    *,
    sport: int = 4000,
    dport: int = 4000,
    vlan: int | None = None,
) -> bytes:
    """An IPv4 packet with a UDP datagram without checksum."""
    datagram = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0)
    head += socket.inet_aton(source) + socket.inet_aton(target)
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return ether(source_mac, target_mac, 0x0800, head + datagram, vlan=vlan)


def ipv6(source_mac: str, target_mac: str, source: str, target: str, following: int, payload: bytes) -> bytes:
    """An IPv6 packet; `following` is the next header (17 UDP, 58 ICMPv6)."""
    addresses = IPv6Address(source).packed + IPv6Address(target).packed
    return ether(
        source_mac,
        target_mac,
        0x86DD,
        struct.pack("!IHBB", 6 << 28, len(payload), following, 255) + addresses + payload,
    )


def icmpv6(source_mac: str, target_mac: str, source: str, target: str, kind: int, body: bytes) -> bytes:
    """An ICMPv6 message with its checksum (RFC 4443, 2.3)."""
    message = struct.pack("!BBH", kind, 0, 0) + body
    pseudo = IPv6Address(source).packed + IPv6Address(target).packed + struct.pack("!II", len(message), 58)
    message = struct.pack("!BBH", kind, 0, checksum(pseudo + message)) + body
    return ipv6(source_mac, target_mac, source, target, 58, message)


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def send(tap: int, frame: bytes) -> None:
    """What a guest's card does."""
    os.write(tap, VNET_HDR + frame)


def received(tap: int) -> list[bytes]:
    """All frames that wait in a TAP."""
    found = []
    while True:
        try:
            found.append(os.read(tap, 1 << 17)[len(VNET_HDR) :])
        except BlockingIOError:
            return found


def arrives(tap: int, frame: bytes, timeout_s: float = 5.0) -> bool:
    """Whether the frame comes out of the TAP."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if frame in received(tap):
            return True
        time.sleep(0.01)
    return False
