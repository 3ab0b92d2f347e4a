"""-net nic/tap/user, -nic, -netdev and network devices, as [nic.NAME].

The classic `-net` joins cards and backends by `vlan=N`, a hub inside QEMU. One card and one backend on a vlan are one
NIC, which is what nearly everybody meant; anything else is a hub and is told.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from kvmd.importers.account import Keys
from kvmd.importers.drives import ROOT_BUSES
from kvmd.importers.keyval import boolean, parse
from kvmd.importers.model import Draft

MODELS = {
    "virtio-net-pci": "virtio",
    "virtio-net": "virtio",
    "virtio": "virtio",
    "virtio-net-pci-non-transitional": "virtio",
    "e1000": "e1000",
    "e1000e": "e1000e",
    "rtl8139": "rtl8139",
    "pcnet": "pcnet",
    "ne2k_pci": "ne2k_pci",
    "i82551": "i82551",
    "i82557b": "i82557b",
    "i82559er": "i82559er",
    "vmxnet3": "vmxnet3",
}
BACKENDS = ("tap", "user", "bridge", "hubport", "socket", "vde", "vhost-user", "l2tpv3", "stream", "dgram", "passt")
_IFUP = "/etc/qemu-ifup"
_IFDOWN = "/etc/qemu-ifdown"


@dataclass(slots=True)
class Hubs:
    """What -net said, by vlan: cards and backends, each with the option as written."""

    cards: dict[int, list[tuple[str, dict[str, str]]]] = field(default_factory=dict)
    backends: dict[int, list[tuple[str, dict[str, str]]]] = field(default_factory=dict)
    any: bool = False  # some NIC option was given: QEMU adds no card of its own


def default_model(draft: Draft) -> str:
    """The card a board has when nobody names one (qemu-kvm's was the rtl8139)."""
    if draft.dialect == "qemu-kvm":
        return "rtl8139"
    return "e1000e" if draft.is_q35 else "e1000"


def _no_card(draft: Draft, option: str) -> None:
    draft.put("machine", "default_nic", False)
    draft.account.mapped(option, "machine.default_nic")


def net(draft: Draft, hubs: Hubs, value: str) -> None:
    """-net TYPE,…"""
    hubs.any = True
    values = parse(value, "type")
    kind = values.pop("type", "")
    if kind == "none":
        _no_card(draft, "-net none")
        return
    text = values.pop("vlan", "0")
    vlan = int(text) if text.isdigit() else 0
    if kind == "nic":
        hubs.cards.setdefault(vlan, []).append(("-net nic", values))
    else:
        hubs.backends.setdefault(vlan, []).append((f"-net {kind}", {"type": kind, **values}))


def nic(draft: Draft, hubs: Hubs, value: str) -> None:
    """-nic TYPE,…: card and backend in one."""
    hubs.any = True
    values = parse(value, "type")
    kind = values.pop("type", "user")
    if kind == "none":
        _no_card(draft, "-nic none")
        return
    names = ("model", "mac", "macaddr", "id", "addr", "vectors")
    card: dict[str, str] = {key: values.pop(key) for key in names if key in values}
    _join(draft, "-nic", card, f"-nic {kind}", {"type": kind, **values})


def netdev(draft: Draft, value: str) -> None:
    """-netdev: found by its card."""
    values = parse(value, "type")
    draft.backends[f"netdev:{values.pop('id', '')}"] = values


def device(draft: Draft, hubs: Hubs, driver: str, values: dict[str, str]) -> None:
    """-device of a network card."""
    hubs.any = True
    below = values.pop("netdev", None)
    if below is None and "vlan" in values:
        text = values.pop("vlan")
        hubs.cards.setdefault(int(text) if text.isdigit() else 0, []).append(
            (f"-device {driver}", {"model": driver, **values})
        )
        return
    option = f"-device {driver}"
    backend = draft.claim(f"netdev:{below}", option)
    if backend is None:
        draft.account.unsupported(f"{option} netdev={below}", "no -netdev of that name: a card without a cable")
        return
    values.setdefault("id", below or "")
    _join(draft, option, {"model": driver, **values}, f"-netdev {backend.get('type')}", backend)


def finish(draft: Draft, hubs: Hubs) -> None:
    """Cards and backends that -net put on one vlan become NICs; what is not a pair is told."""
    for vlan in sorted(hubs.cards.keys() | hubs.backends.keys()):
        cards, backends = hubs.cards.get(vlan, []), hubs.backends.get(vlan, [])
        if len(cards) == 1 and len(backends) == 1:
            _join(draft, *cards[0], *backends[0])
            continue
        if cards and not backends:
            why = f"vlan {vlan} has no backend: a card without a cable"
        elif backends and not cards:
            why = f"vlan {vlan} has no card"
        else:
            why = f"vlan {vlan} is a hub of {len(cards)} cards and {len(backends)} backends; kvmd has no hubs yet"
        for option, _ in (*cards, *backends):
            draft.account.unsupported(option, why)
    if not hubs.any:
        draft.account.default("no -net, -nic, -netdev", "one user-mode NIC, as QEMU makes it")
        draft.put("nic.net0", "type", "user")
        draft.put("nic.net0", "model", default_model(draft))
    elif not draft.has("nic"):
        draft.put("machine", "default_nic", False)


def _join(draft: Draft, card_option: str, card: dict[str, str], option: str, backend: dict[str, str]) -> None:
    keys, below = Keys(card_option, card, draft.account), Keys(option, backend, draft.account)
    name = draft.fresh("nic", keys.take("id") or keys.take("name"), f"net{len(draft.tables.get('nic', {}))}")
    keys.take("name")
    table = f"nic.{name}"
    kind = below.take("type") or "user"
    if kind not in ("user", "tap", "bridge"):
        draft.account.unsupported(option, f"kvmd has no NIC of type {kind}")
        keys.finish(f"its backend is {kind}")
        below.finish(f"kvmd has no NIC of type {kind}")
        return
    if kind == "user":
        draft.put(table, "type", "user")
        draft.account.mapped(option, f"{table}.type")
    else:
        _tap(draft, below, table, kind, option)
    _card(draft, keys, table)
    if kind == "user":
        _user(draft, below, table)
    keys.finish()
    below.finish()


def _card(draft: Draft, keys: Keys, table: str) -> None:
    model = keys.take("model", f"{table}.model")
    if model is None:
        model = default_model(draft)
        draft.account.default(f"{keys.option} (no model)", f"the board's own card: {model}")
    found = MODELS.get(model, model)
    if found != "virtio":
        draft.put(table, "model", found)
    for key in ("macaddr", "mac"):
        mac = keys.take(key, f"{table}.mac")
        if mac is not None:
            draft.put(table, "mac", mac.lower())
    if keys.peek("bus") not in (None, *ROOT_BUSES):
        keys.drop("addr", "it counts on another bus; kvmd puts cards on the root bus")
    address = keys.take("addr", f"{table}.pci_address")
    if address is not None:
        draft.put(table, "pci_address", address.lower().removeprefix("0x"))
    for key, at in (("vectors", "vectors"), ("host_mtu", "mtu")):
        text = keys.take(key, f"{table}.{at}")
        if text is not None:
            draft.put(table, at, int(text, 0))
    index = keys.take("bootindex")
    if index is not None:
        draft.backends.setdefault("boot:", {})[table] = index
        draft.account.mapped(f"{keys.option} bootindex={index}", "boot.order")
    keys.drop("bus", "kvmd finds the card's place itself and keeps it")
    keys.drop("romfile", "option ROMs come from the emulator's own package")
    keys.drop("rombar", "option ROMs come from the emulator's own package")
    keys.drop("multifunction", "each card has a slot of its own")
    keys.default("mq", ("on", "off"), "by nic.NAME.queues")
    for key in ("csum", "gso", "guest_csum", "guest_tso4", "guest_tso6", "host_tso4", "host_tso6", "mrg_rxbuf"):
        keys.default(key, ("on",), "as QEMU has it")


def _user(draft: Draft, keys: Keys, table: str) -> None:
    for key in ("net", "dns"):
        text = keys.take(key, f"{table}.{key}")
        if text is not None:
            draft.put(table, key, text if key == "dns" else _network(text))
    rules = [_forward(text) for text in keys.every("hostfwd", f"{table}.hostfwd")]
    if rules:
        draft.put(table, "hostfwd", rules)
    restrict = keys.take("restrict", f"{table}.restrict")
    if restrict is not None and boolean(restrict):
        draft.put(table, "restrict", True)
    keys.default("ipv4", ("on",), "as QEMU has it")
    keys.default("ipv6", ("on", "off"), "user-mode NAT is IPv4's")


def _network(text: str) -> str:
    """`192.168.76.0/24`, of `192.168.76.9/24` and `192.168.76.0/255.255.255.0` too."""
    try:
        return str(ipaddress.ip_interface(text).network)
    except ValueError:
        return text


def _forward(text: str) -> str:
    """`tcp::2222-:22` with the protocol written out."""
    return (
        text
        if text.startswith(("tcp:", "udp:"))
        else f"tcp:{text.removeprefix(':')}"
        if text.startswith("::")
        else text
    )


def _tap(draft: Draft, keys: Keys, table: str, kind: str, option: str) -> None:
    """A TAP of one's own, or the bridge helper's; the classic default script is /etc/qemu-ifup."""
    draft.put(table, "type", kind)
    draft.account.mapped(option, f"{table}.type")
    if kind == "bridge":
        draft.put(table, "bridge", keys.take("br", f"{table}.bridge") or "br0")
        keys.drop("helper", "kvmd plugs the TAP in itself")
        return
    for key in ("ifname", "helper", "sndbuf"):
        text = keys.take(key, f"{table}.{key}")
        if text is not None:
            draft.put(table, key, text)
    for key, default in (("script", _IFUP), ("downscript", _IFDOWN)):
        text = keys.take(key)
        if text == "no":
            draft.account.default(f"{keys.option} {key}=no", "none unless the file names one")
        elif text is not None:
            draft.put(table, key, draft.path(text))
            draft.account.mapped(f"{keys.option} {key}={text}", f"{table}.{key}")
        elif keys.peek("fd") is None and not draft.has(f"{table}.helper"):
            draft.put(table, key, default)
            draft.remarks.append(f'{table}.{key} = "{default}": QEMU runs it when nothing is said; "no" for none')
    for key in ("vnet_hdr", "vhost", "vhostforce"):
        text = keys.take(key, f"{table}.{key}")
        if text is not None:
            draft.put(table, key, boolean(text))
    for key in ("fd", "vhostfd"):
        text = keys.take(key, f"{table}.{key}")
        if text is not None:
            draft.put(table, key, int(text) if text.isdigit() else text)
    queues = keys.take("queues", f"{table}.queues")
    if queues is not None:
        draft.put(table, "queues", int(queues, 0))
