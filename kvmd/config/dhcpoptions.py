"""DHCP options as a file may have them: which there are, which are taken, and values that no text can break out of."""

from __future__ import annotations

import difflib
import re
from typing import Annotated

from pydantic import PlainValidator

from kvmd.config.key import Kind, quote
from kvmd.config.scalars import described

# RFC 2132 and others, by the names dnsmasq 2.90 has for them (`dnsmasq --help dhcp`).
DHCP_OPTIONS = {
    "time-offset": 2, "router": 3, "dns-server": 6, "log-server": 7, "lpr-server": 9, "boot-file-size": 13,
    "swap-server": 16, "root-path": 17, "extension-path": 18, "ip-forward-enable": 19, "non-local-source-routing": 20,
    "policy-filter": 21, "max-datagram-reassembly": 22, "default-ttl": 23, "all-subnets-local": 27,
    "router-discovery": 31, "router-solicitation": 32, "static-route": 33, "trailer-encapsulation": 34,
    "arp-timeout": 35, "ethernet-encap": 36, "tcp-ttl": 37, "tcp-keepalive": 38, "nis-domain": 40, "nis-server": 41,
    "ntp-server": 42, "netbios-ns": 44, "netbios-dd": 45, "netbios-nodetype": 46, "netbios-scope": 47,
    "x-windows-fs": 48, "x-windows-dm": 49, "nis+-domain": 64, "nis+-server": 65, "tftp-server": 66,
    "bootfile-name": 67, "mobile-ip-home": 68, "smtp-server": 69, "pop3-server": 70, "nntp-server": 71,
    "irc-server": 74, "posix-timezone": 100, "tzdb-timezone": 101, "ipv6-only": 108, "domain-search": 119,
    "sip-server": 120, "classless-static-route": 121, "tftp-server-address": 150,
}  # fmt: skip
# What other keys say, and what belongs to the protocol itself.
_OPTIONS_TAKEN = {1: "ipv4.address", 15: "dns.domain", 26: "network.mtu", 51: "ipv4.dhcp.lease"}
_OPTIONS_OF_PROTOCOL = frozenset({0, 12, *range(50, 62), 82, 255})
_OPTION_TEXT = re.compile(r"[A-Za-z0-9 ._:/@+=~*()\[\]-]{1,255}")  # dnsmasq would cut at a comma and unquote


def _dhcp_option(value: object) -> str:
    text = value if isinstance(value, str) else ""
    if re.fullmatch(r"\d{1,3}", text):
        number = int(text)
    elif text in DHCP_OPTIONS:
        number = DHCP_OPTIONS[text]
    else:
        near = difflib.get_close_matches(text, DHCP_OPTIONS, n=1)
        hint = f'did you mean "{near[0]}"?' if near else 'a name as in `dnsmasq --help dhcp`, or a number as in "42"'
        raise ValueError(f"{quote(text)} is no DHCP option: {hint}")
    if number in _OPTIONS_TAKEN:
        raise ValueError(f"{quote(text)} comes from {_OPTIONS_TAKEN[number]}")
    if number in _OPTIONS_OF_PROTOCOL or number > 254:
        raise ValueError(f"{quote(text)} belongs to the protocol itself and cannot be set")
    return text


def option_number(name: str) -> int:
    """The code of an option that was taken by name or as a number in text."""
    return DHCP_OPTIONS.get(name) or int(name)


def _option_value(value: object) -> tuple[str, ...]:
    found = []
    for part in value if isinstance(value, list | tuple) else (value,):
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise ValueError(f"wants text, a number, or a list of them; this is {described(part)}")
        if isinstance(part, str) and not _OPTION_TEXT.fullmatch(part):
            raise ValueError(f"{quote(part)}: 1 to 255 of letters, digits, spaces and ._:/@+=~*()[]- are wanted")
        found.append(str(part))
    return tuple(found)


DhcpOption = Annotated[str, PlainValidator(_dhcp_option), Kind("DHCP option", "ntp-server")]
DhcpOptionValue = Annotated[
    tuple[str, ...], PlainValidator(_option_value), Kind("text, number or list of them", '"192.0.2.123"')
]
