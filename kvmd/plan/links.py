"""Names and marks of the links kvmd makes: what says that one is ours, and whose it is. Pure."""

from __future__ import annotations

import hashlib

from kvmd.facts import Link

ALIAS = "kvmd:"


def bridge_alias(network: str) -> str:
    """The mark of a bridge that kvmd made."""
    return ALIAS + network


def tap_alias(network: str, guest: str, nic: str) -> str:
    """The mark of a TAP that kvmd made."""
    return f"{ALIAS}{network}:{guest}:{nic}"


def bridge_mac(bridge: str) -> str:
    """The address a bridge of ours keeps whatever its ports are; else it would be the lowest port's."""
    return _mac(0x02, f"kvmd bridge {bridge}")


def tap_mac(tap: str) -> str:
    """The host's end of a TAP: 0xfe first, so a foreign bridge that takes its lowest port's address never takes it."""
    return _mac(0xFE, f"kvmd tap {tap}")


def _mac(first: int, seed: str) -> str:
    return ":".join(f"{byte:02x}" for byte in (first, *hashlib.sha256(seed.encode()).digest()[:5]))


def tap_name(uuid: str, nic: str) -> str:
    """The TAP of a guest's NIC: 14 bytes, the same at each start; 48 bits of hash keep two apart."""
    return "kv" + hashlib.sha256(f"{uuid}/{nic}".encode()).hexdigest()[:12]


def is_our_bridge(link: Link) -> bool:
    """Whether kvmd made it: by the mark; without one (kvmd died before setting it) by the address it was made with."""
    if link.kind != "bridge":
        return False
    if link.alias:
        return link.alias.startswith(ALIAS) and link.alias.count(":") == 1
    return link.mac == bridge_mac(link.name)
