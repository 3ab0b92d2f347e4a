"""The scalar types of the files: text in, a typed value out, an error in kvmd's words otherwise.

Each is an `Annotated` type whose validator takes the TOML value (or the finished value, so that tests and
`create` can build models directly) and raises ValueError with what was given, what is wanted and an example.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import uuid
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, PlainSerializer, PlainValidator

from kvmd.config.key import Kind, quote
from kvmd.units import CpuSet, Duration, Percent, Rate, Size

T = TypeVar("T")

# Unit instance, host name label, machined name and part of a socket path of at most 107 bytes, without escaping.
_GUEST_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?")
# QEMU's node names stop at 31 bytes (block.c, char node_name[32]) and kvmd adds prefixes and suffixes.
_TABLE_NAME = re.compile(r"[a-z0-9]([a-z0-9_-]{0,18}[a-z0-9])?")
# IFNAMSIZ is 16 with the NUL; the kernel would expand "%d" (net/core/dev.c, __dev_alloc_name).
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_MAC = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")
_PCI = re.compile(r"([01]?[0-9A-Fa-f])(?:\.[0-7])?")
_QEMU_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_PRINCIPAL = re.compile(r"@?[A-Za-z_][A-Za-z0-9_.-]{0,31}")
# Names of kernel modules, and modprobe options never: no name begins with "-" (init/Kconfig, MODULES; kmod(8)).
_MODULE = re.compile(r"[a-z0-9_][a-z0-9_-]{0,54}")
_HOSTFWD = re.compile(r"(tcp|udp):([0-9.]*):(\d{1,5})-([0-9.]*):(\d{1,5})")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
MAX_NODE = 1023  # CONFIG_NODES_SHIFT is at most 10
_MAX_UID = (1 << 32) - 2  # (uid_t)-1 means "no change" to chown and setresuid


def described(value: object) -> str:
    """A TOML value's type and content in words, for "this is ..."."""
    match value:
        case bool():
            return f"{quote(value)} (yes or no)"
        case int() | float():
            return f"the number {quote(value)}"
        case str():
            return f"the text {quote(value)}"
        case list() | tuple():
            return "a list"
        case dict():
            return "a table"
        case _:
            return "a date or time"


def _text(value: object, wanted: str, example: str) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"wants {wanted} in quotes, for example {example}; this is {described(value)}")


def _unit(kind: type[T], parse: Callable[[str], T], wanted: str, example: str) -> Callable[[object], T]:
    """A validator for one of the unit types: their parse() has the error text already."""

    def check(value: object) -> T:
        if isinstance(value, kind):
            return value
        return parse(_text(value, wanted, example))

    return check


def _pattern(regex: re.Pattern[str], wanted: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if not regex.fullmatch(value):
            raise ValueError(f"{quote(value)} is not {wanted}")
        return value

    return check


_size = _unit(Size, Size.parse, "a size", '"8GiB"')
_duration = _unit(Duration, Duration.parse, "a duration", '"3min"')
_rate = _unit(Rate, Rate.parse, "a bandwidth", '"100Mbit"')
_percent = _unit(Percent, Percent.parse, "a percentage", '"10%"')


_SLOWEST, _FASTEST = Rate(8_000), Rate(32_000_000_000)  # tc and nft count bytes; tc in 32 bits


def _bandwidth(value: object) -> Rate:
    found = _rate(value)
    if not _SLOWEST <= found <= _FASTEST:
        raise ValueError(f'"{found}" is outside what can be kept: "{_SLOWEST}" to "{_FASTEST}"')
    return found


def _positive(value: Size) -> Size:
    if value <= 0:
        raise ValueError("must be more than nothing")
    return value


def _cpus(value: object) -> CpuSet:
    if isinstance(value, CpuSet):
        return value
    found = CpuSet.parse(_text(value, "a CPU set", '"0-3,8"'))
    if not found:
        raise ValueError('is an empty CPU set; write for example "0-3,8", or leave the key out')
    return found


def _nodes(value: object) -> CpuSet:
    if isinstance(value, CpuSet):
        return value
    text = _text(value, "a set of NUMA nodes", '"0-1"')
    try:
        found = CpuSet.parse(text)
    except ValueError:
        found = CpuSet()
    if not found or max(found) > MAX_NODE:
        raise ValueError(f'{quote(text)} is not a set of NUMA nodes: write for example "0" or "0-1"')
    return found


def _or_auto(check: Callable[[object], T], word: str) -> Callable[[object], T | str]:
    """`check`, or the literal `word`."""

    def either(value: object) -> T | str:
        return word if value == word and isinstance(value, str) else check(value)

    return either


def _count(low: int, high: int, wanted: str) -> Callable[[object], int]:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"wants {wanted}; this is {described(value)}")
        if not low <= value <= high:
            raise ValueError(f"{quote(value)} is outside {low} to {high}")
        return value

    return check


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"wants a number, for example 4.0; this is {described(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("is too large a number") from None


def _uuid(value: object) -> str:
    text = _text(value, "a UUID", '"6f0d2c6e-9a0f-4a57-8a0c-3b3f7b6f7a11"')
    if not re.fullmatch(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", text):
        raise ValueError(f'{quote(text)} is not a UUID: write for example "6f0d2c6e-9a0f-4a57-8a0c-3b3f7b6f7a11"')
    if uuid.UUID(text).int == 0:
        raise ValueError("the all-zero UUID identifies nothing; leave the key out and one is made")
    return text.lower()


def _mac(value: object) -> str:
    text = _text(value, "a MAC address", '"52:54:00:12:34:56"')
    if not _MAC.fullmatch(text):
        raise ValueError(f'{quote(text)} is not a MAC address: write for example "52:54:00:12:34:56"')
    if int(text[:2], 16) & 1:
        raise ValueError(f"{quote(text)} is a multicast address (the first byte is odd); a NIC needs a unicast one")
    if int(text.replace(":", ""), 16) == 0:
        raise ValueError("the all-zero MAC address belongs to nobody")
    return text.lower()


def _ipv4(value: object) -> ipaddress.IPv4Address:
    if isinstance(value, ipaddress.IPv4Address) and not isinstance(value, ipaddress.IPv4Interface):
        return value
    text = _text(value, "an IPv4 address", '"192.168.50.20"')
    try:
        return ipaddress.IPv4Address(text)
    except ValueError:
        raise ValueError(f'{quote(text)} is not an IPv4 address: write for example "192.168.50.20"') from None


def _ipv4_interface(value: object) -> ipaddress.IPv4Interface:
    if isinstance(value, ipaddress.IPv4Interface):
        return value
    text = _text(value, "an address with its prefix", '"192.168.50.1/24"')
    wanted = f'{quote(text)} is not an IPv4 address with its prefix: write for example "192.168.50.1/24"'
    if not re.fullmatch(r"[0-9.]+/\d{1,2}", text):
        raise ValueError(wanted)
    try:
        found = ipaddress.IPv4Interface(text)
    except ValueError:
        raise ValueError(wanted) from None
    if found.network.prefixlen > 30 or found.network.prefixlen < 8:
        raise ValueError(f"{quote(text)}: a prefix between /8 and /30 is wanted")
    if found.ip in (found.network.network_address, found.network.broadcast_address):
        raise ValueError(f"{quote(text)} is the network's own or its broadcast address; the host needs one in between")
    return found


def _ipv4_network(value: object) -> ipaddress.IPv4Network:
    if isinstance(value, ipaddress.IPv4Network):
        return value
    text = _text(value, "a subnet", '"10.0.2.0/24"')
    try:
        if "/" not in text:
            raise ValueError
        return ipaddress.IPv4Network(text)
    except ValueError:
        raise ValueError(f'{quote(text)} is not an IPv4 subnet: write for example "10.0.2.0/24"') from None


def _ipv6(value: object) -> ipaddress.IPv6Address:
    if isinstance(value, ipaddress.IPv6Address) and not isinstance(value, ipaddress.IPv6Interface):
        return value
    text = _text(value, "an IPv6 address", '"fd50::20"')
    try:
        found = ipaddress.IPv6Address(text)
    except ValueError:
        raise ValueError(f'{quote(text)} is not an IPv6 address: write for example "fd50::20"') from None
    if found.scope_id is not None:
        raise ValueError(f"{quote(text)} names an interface behind %; only the address is wanted")
    return found


def _ip(value: object) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    if isinstance(value, ipaddress.IPv4Address):
        return _ipv4(value)
    if isinstance(value, ipaddress.IPv6Address):
        return _ipv6(value)
    text = _text(value, "an address", '"192.0.2.53"')
    try:
        return _ipv6(text) if ":" in text else _ipv4(text)
    except ValueError:
        wanted = f'{quote(text)} is no address: write for example "192.0.2.53" or "2001:db8::53"'
        raise ValueError(wanted) from None


def _ipv6_interface(value: object) -> ipaddress.IPv6Interface:
    if isinstance(value, ipaddress.IPv6Interface):
        return value
    text = _text(value, "an IPv6 address with its prefix", '"fd50::1/64"')
    wanted = f'{quote(text)} is not an IPv6 address with its prefix: write for example "fd50::1/64"'
    if not re.fullmatch(r"[0-9A-Fa-f:.]+/\d{1,3}", text):
        raise ValueError(wanted)
    try:
        found = ipaddress.IPv6Interface(text)
    except ValueError:
        raise ValueError(wanted) from None
    if not 48 <= found.network.prefixlen <= 126:
        raise ValueError(f"{quote(text)}: a prefix between /48 and /126 is wanted")
    if found.ip.is_multicast or found.ip.is_link_local or found.ip.is_loopback or found.ip.ipv4_mapped:
        raise ValueError(
            f"{quote(text)} is no address of a network: take one of fd00::/8, or of what your provider gave"
        )
    if found.ip == found.network.network_address:
        raise ValueError(f"{quote(text)} is the address of any router there (RFC 4291, 2.6.1); the host needs its own")
    return found


def _path(value: object) -> str:
    text = _text(value, "an absolute path", '"/srv/vm/web.qcow2"')
    if not text.startswith("/"):
        raise ValueError(f"{quote(text)} is not an absolute path (it must begin with /)")
    if ".." in text.split("/"):
        raise ValueError(f'{quote(text)} contains ".."; write the path as it is')
    if len(text.encode()) > 4095:
        raise ValueError("is longer than the 4095 bytes the kernel takes for a path")
    return text


def _emulator(value: object) -> str:
    text = _text(value, "a program's name or absolute path", '"qemu-system-x86_64"')
    if text.startswith("/"):
        return _path(text)
    return _pattern(_QEMU_WORD, "a program's name or absolute path")(text)


def interface_name(value: object) -> str:
    """A name the kernel takes for an interface. Raises ValueError."""
    text = _text(value, "an interface name", '"br0"')
    if not _INTERFACE.fullmatch(text) or text in (".", ".."):
        raise ValueError(f"{quote(text)} is not an interface name: 1 to 15 of letters, digits, _ . and -")
    return text


def _pci_address(value: object) -> str:
    text = _text(value, "a PCI slot", '"05.0"')
    if not _PCI.fullmatch(text):
        raise ValueError(f'{quote(text)} is not a PCI slot: write slot and function, for example "05.0" (00 to 1f)')
    return text.lower()


def _module(value: object) -> str:
    text = _text(value, "a kernel module's name", '"vhost_net"')
    if not _MODULE.fullmatch(text):
        raise ValueError(f'{quote(text)} is not a kernel module\'s name: a-z, 0-9, _ and -, for example "vhost_net"')
    return text.replace("-", "_")  # one name to the kernel (kernel/module, modprobe(8))


def _hostfwd(value: object) -> str:
    example = 'for example "tcp:127.0.0.1:8080-:80"'
    text = _text(value, "a forwarding", '"tcp:127.0.0.1:8080-:80"')
    found = _HOSTFWD.fullmatch(text)
    if not found:
        raise ValueError(f"{quote(text)} is not a forwarding: PROTOCOL:ADDRESS:PORT-ADDRESS:PORT, {example}")
    for address in filter(None, (found[2], found[4])):
        _ipv4(address)
    for port in (found[3], found[5]):
        if not 0 < int(port) < 65536:
            raise ValueError(f"{quote(text)}: {port} is not a port between 1 and 65535")
    return text


class Listen(NamedTuple):
    """A port of the host; address None: any address of the host but loopback."""

    address: ipaddress.IPv4Address | None
    port: int


class GuestPort(NamedTuple):
    """A port of a guest."""

    guest: str
    port: int


def _port(text: str, number: str) -> int:
    if not re.fullmatch(r"\d{1,5}", number) or not 0 < int(number) < 65536:
        raise ValueError(f"{quote(text)}: {quote(number)} is not a port between 1 and 65535")
    return int(number)


def _listen(value: object) -> Listen:
    if isinstance(value, Listen):
        return value
    text = _text(value, "ADDRESS:PORT or :PORT", '"203.0.113.7:443"')
    address, colon, number = text.rpartition(":")
    if not colon or address.startswith("["):
        example = 'write for example "203.0.113.7:443", or ":443" for every address of the host'
        raise ValueError(f"{quote(text)} is not an IPv4 address and a port: {example}")
    found = None if address in ("", "*") else _ipv4(address)
    if found is not None and (found.is_loopback or found.is_unspecified or found.is_multicast):
        hint = 'for every address of the host write ":PORT"'
        raise ValueError(f"{quote(text)}: packets to {found} cannot be sent on to a guest; {hint}")
    return Listen(found, _port(text, number))


def _guest_port(value: object) -> GuestPort:
    if isinstance(value, GuestPort):
        return value
    text = _text(value, "GUEST:PORT", '"web:443"')
    guest, colon, number = text.rpartition(":")
    if not colon:
        raise ValueError(f'{quote(text)} names no port: write for example "web:443"')
    return GuestPort(guest_name(guest), _port(text, number))


def _domain(value: object) -> str:
    text = _text(value, "a domain name", '"lan.example"')
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in text.split(".")):
        raise ValueError(f'{quote(text)} is not a domain name: write for example "lan.example"')
    return text.lower()


def _serial(value: object) -> str:
    text = _text(value, "a serial number", '"root-01"')
    if not 0 < len(text.encode()) <= 20:
        raise ValueError(
            f"{quote(text)} has {len(text.encode())} bytes; virtio-blk takes 1 to 20 (VIRTIO_BLK_ID_BYTES)"
        )
    return text


def _boot_order(value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        if not re.fullmatch(r"[a-p]{1,16}", value) or len(set(value)) != len(value):
            raise ValueError(f'{quote(value)} is not a boot order: classic letters as in "cn", each once')
        return value
    if not isinstance(value, tuple):
        raise ValueError(
            f'wants a list such as ["disk.root", "nic.lan"], or letters as in "cn"; this is {described(value)}'
        )
    for device in value:
        if not isinstance(device, str) or not re.fullmatch(r"(disk|nic|hostdev)\.[a-z0-9_-]{1,20}", device):
            shown = quote(device) if isinstance(device, str) else described(device)
            raise ValueError(f'{shown} is not a device: write for example "disk.root" or "nic.lan"')
    if len(set(value)) != len(value):
        raise ValueError("names a device twice")
    return value


def _rtc_base(value: object) -> str:
    text = _text(value, '"utc", "localtime" or a date', '"2026-01-31T12:00:00"')
    if text not in ("utc", "localtime") and not re.fullmatch(r"\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\d)?", text):
        raise ValueError(f'{quote(text)} is neither "utc", "localtime" nor a date such as "2026-01-31T12:00:00"')
    if text not in ("utc", "localtime"):
        try:
            datetime.datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(f"{quote(text)} is no day or time there is") from None
    return text


class UidRange(NamedTuple):
    """Numeric user ids, both ends included."""

    first: int
    last: int


def _uid_range(value: object) -> UidRange:
    if isinstance(value, UidRange):
        return value
    text = _text(value, "a range of user ids", '"64100-65099"')
    found = re.fullmatch(r"(\d{1,10})-(\d{1,10})", text)
    if not found or not 0 < int(found[1]) <= int(found[2]) <= _MAX_UID:
        raise ValueError(f'{quote(text)} is not a range of user ids: write for example "64100-65099"')
    if int(found[1]) < 1000:
        raise ValueError(f"{quote(text)} reaches into the system's own users (below 1000)")
    return UidRange(int(found[1]), int(found[2]))


def guest_name(value: object) -> str:
    """A guest's or a network's name: a host name label. Raises ValueError."""
    text = _text(value, "a name", '"web"')
    if not _GUEST_NAME.fullmatch(text):
        raise ValueError(
            f"{quote(text)} is not a name: 1 to 47 of a-z, 0-9 and -, beginning and ending with a letter or digit"
        )
    return text


def table_name(value: object) -> str:
    """The NAME in `[disk.NAME]`: an id of at most 20 characters. Raises ValueError."""
    if not isinstance(value, str) or not _TABLE_NAME.fullmatch(value):
        raise ValueError(
            f"{quote(value)} is not a name: 1 to 20 of a-z, 0-9, _ and -, beginning and ending with a letter or digit"
        )
    return value


SizeT = Annotated[Size, PlainValidator(_size), Kind("size", '"8GiB"')]
PositiveSize = Annotated[Size, PlainValidator(_size), AfterValidator(_positive), Kind("size", '"8GiB"')]
DurationT = Annotated[Duration, PlainValidator(_duration), Kind("duration", '"3min"')]
PercentT = Annotated[Percent, PlainValidator(_percent), Kind("percentage", '"10%"')]
_AS_LIST = PlainSerializer(str, when_used="json")  # a set has no order, and records are compared as text
RateT = Annotated[Rate, PlainValidator(_bandwidth), Kind("bandwidth", '"100Mbit"')]
CpuSetT = Annotated[CpuSet, PlainValidator(_cpus), _AS_LIST, Kind("CPU set", '"0-3,8"')]
NodeSetT = Annotated[CpuSet, PlainValidator(_nodes), _AS_LIST, Kind("node set", '"0-1"')]
Number = Annotated[float, PlainValidator(_number), Kind("number", "4.0")]

AutoSize = Annotated[Size | Literal["auto"], PlainValidator(_or_auto(_size, "auto")), Kind('size or "auto"', '"4GiB"')]
AutoDuration = Annotated[
    Duration | Literal["auto"], PlainValidator(_or_auto(_duration, "auto")), Kind('duration or "auto"', '"90s"')
]
AutoCpuSet = Annotated[
    CpuSet | Literal["auto"], PlainValidator(_or_auto(_cpus, "auto")), Kind('CPU set or "auto"', '"0-1"')
]
AutoCount = Annotated[
    int | Literal["auto"],
    PlainValidator(_or_auto(_count(1, 1024, 'a number of at least 1, or "auto"'), "auto")),
    Kind('number or "auto"', "4"),
]
Swappiness = Annotated[
    int | Literal["keep"],
    PlainValidator(_or_auto(_count(0, 200, 'a number from 0 to 200, or "keep"'), "keep")),
    Kind('number or "keep"', "10"),
]
AutoInterface = Annotated[
    str, PlainValidator(interface_name), Kind('interface name or "auto"', '"eth0"')
]  # "auto" is an interface name by the pattern and is kept as the word

Uuid = Annotated[str, PlainValidator(_uuid), Kind("UUID", '"6f0d2c6e-9a0f-4a57-8a0c-3b3f7b6f7a11"')]
Mac = Annotated[str, PlainValidator(_mac), Kind("MAC address", '"52:54:00:12:34:56"')]
Ipv4 = Annotated[ipaddress.IPv4Address, PlainValidator(_ipv4), Kind("IPv4 address", '"192.168.50.20"')]
Ipv4Interface = Annotated[
    ipaddress.IPv4Interface, PlainValidator(_ipv4_interface), Kind("IPv4 address/prefix", '"192.168.50.1/24"')
]
Ipv4Network = Annotated[ipaddress.IPv4Network, PlainValidator(_ipv4_network), Kind("IPv4 subnet", '"10.0.2.0/24"')]
Ipv6 = Annotated[ipaddress.IPv6Address, PlainValidator(_ipv6), Kind("IPv6 address", '"fd50::20"')]
Ipv6InterfaceT = Annotated[
    ipaddress.IPv6Interface, PlainValidator(_ipv6_interface), Kind("IPv6 address/prefix", '"fd50::1/64"')
]
Ip = Annotated[
    ipaddress.IPv4Address | ipaddress.IPv6Address, PlainValidator(_ip), Kind("IPv4 or IPv6 address", '"192.0.2.53"')
]
Vlan = Annotated[int, PlainValidator(_count(1, 4094, "a VLAN, a number from 1 to 4094")), Kind("VLAN", "10")]
Path = Annotated[str, PlainValidator(_path), Kind("absolute path", '"/srv/vm/web.qcow2"')]
Emulator = Annotated[str, PlainValidator(_emulator), Kind("program", '"qemu-system-x86_64"')]
Interface = Annotated[str, PlainValidator(interface_name), Kind("interface name", '"br0"')]
PciAddress = Annotated[str, PlainValidator(_pci_address), Kind("PCI slot", '"05.0"')]
ModuleName = Annotated[str, PlainValidator(_module), Kind("module name", '"vhost_net"')]
Hostfwd = Annotated[str, PlainValidator(_hostfwd), Kind("forwarding", '"tcp:127.0.0.1:8080-:80"')]
ListenT = Annotated[Listen, PlainValidator(_listen), Kind("ADDRESS:PORT or :PORT", '"203.0.113.7:443"')]
GuestPortT = Annotated[GuestPort, PlainValidator(_guest_port), Kind("GUEST:PORT", '"web:443"')]
Domain = Annotated[str, PlainValidator(_domain), Kind("domain name", '"lan.example"')]
DiskSerial = Annotated[str, PlainValidator(_serial), Kind("text", '"root-01"')]
RtcBase = Annotated[str, PlainValidator(_rtc_base), Kind("utc, localtime or date", '"utc"')]
KeyboardLayout = Annotated[
    str,
    AfterValidator(_pattern(re.compile(r"[a-z]{2}(-[a-z]{2})?"), 'a keyboard layout such as "de" or "en-us"')),
    Kind("keyboard layout", '"de"'),
]
BootOrder = Annotated[
    str | tuple[str, ...], PlainValidator(_boot_order), Kind("list of device, or letters", '["disk.root", "nic.lan"]')
]
UidRangeT = Annotated[UidRange, PlainValidator(_uid_range), Kind("range of user ids", '"64100-65099"')]
GuestName = Annotated[str, PlainValidator(guest_name), Kind("name", '"web"')]
TableName = Annotated[str, PlainValidator(table_name), Kind("name", '"root"')]
QemuWord = Annotated[
    str, AfterValidator(_pattern(_QEMU_WORD, "a word of QEMU's (letters, digits, _ . -)")), Kind("QEMU name", '"q35"')
]
Principal = Annotated[
    str, AfterValidator(_pattern(_PRINCIPAL, "a user or @group")), Kind("user or @group", '"@kvmd-admin"')
]
