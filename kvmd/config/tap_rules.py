"""What the keys of a NIC mean for each other where a TAP is its other end. Pure, as `rules.py`.

The exclusions are QEMU's own (net/tap.c, net_init_tap), with the reason it does not give.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvmd.config.devices import Nic
from kvmd.config.faults import Complaint

_NUMBERS = {
    "fd": (
        "a descriptor number means nothing to a daemon: it is open in no process that kvmd could ask",
        'ifname = "tap7" uses a TAP that is there: ip tuntap add tap7 mode tap',
    ),
    "vhostfd": ("a descriptor number means nothing to a daemon", "vhost = true: kvmd opens /dev/vhost-net itself"),
}


def tap_rules(path: tuple[str, ...], nic: Nic) -> Iterator[Complaint]:
    """All that is wrong in one [nic.NAME] about its TAP."""
    yield from _numbers(path, nic)
    yield from _belonging(path, nic)
    yield from _helper(path, nic)
    yield from _vhost(path, nic)


def _numbers(path: tuple[str, ...], nic: Nic) -> Iterator[Complaint]:
    others = [key for key in ("ifname", "script", "downscript", "helper") if getattr(nic, key) is not None]
    others += ["vnet_hdr"] if "vnet_hdr" in nic.model_fields_set else []
    if nic.fd is not None and others:
        reason = f"excludes {', '.join(others)}: what somebody else opened must not be named or set up again"
        yield Complaint((*path, "fd"), reason, "and a number means nothing to a daemon: take fd out")
    elif nic.fd is not None:
        yield Complaint((*path, "fd"), *_NUMBERS["fd"])
    if nic.vhostfd is not None:
        yield Complaint((*path, "vhostfd"), *_NUMBERS["vhostfd"])


def _belonging(path: tuple[str, ...], nic: Nic) -> Iterator[Complaint]:
    """Keys of another type of NIC."""
    given = nic.model_fields_set
    for key in ("ifname", "script", "downscript", "vnet_hdr"):
        if key in given and nic.type != "tap":
            yield Complaint((*path, key), 'only with type = "tap"')
    if nic.helper is not None and nic.type not in ("tap", "bridge"):
        yield Complaint((*path, "helper"), 'only with type = "tap" or "bridge"')
    if nic.br is not None and nic.type != "bridge" and (nic.type != "tap" or nic.helper is None):
        yield Complaint((*path, "br"), 'only with type = "bridge", or with helper')
    for key in ("sndbuf", "vhost", "vhostforce"):
        if key in given and not nic.has_tap:
            yield Complaint((*path, key), 'only with a TAP: network, or type = "tap" or "bridge"')
    if not nic.link and nic.type == "vf":
        yield Complaint((*path, "link"), "the cable of a virtual function is not kvmd's to pull", "leave the key out")


def _helper(path: tuple[str, ...], nic: Nic) -> Iterator[Complaint]:
    if nic.helper is None:
        return
    reason = "excluded by helper, which makes, names and plugs in the TAP"
    for key in ("ifname", "script", "downscript", "vnet_hdr"):
        if key in nic.model_fields_set and nic.type == "tap":
            yield Complaint((*path, key), reason, f"leave out {key} or helper")
    if nic.queues > 1:
        yield Complaint((*path, "queues"), "excluded by helper, which makes one queue", "leave out queues or helper")


def _vhost(path: tuple[str, ...], nic: Nic) -> Iterator[Complaint]:
    if nic.vhost and not nic.model.startswith("virtio"):
        yield Complaint((*path, "vhost"), f'only with model = "virtio"; it is "{nic.model}"')
    if nic.vhostforce and nic.vhost is False:
        yield Complaint((*path, "vhostforce"), "contradicts vhost = false", "leave one of them out")
