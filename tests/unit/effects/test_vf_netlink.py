"""Virtual functions over rtnetlink: the bytes the kernel gets, what is read back, and drivers that lack a part.

No card with virtual functions can be emulated by this QEMU as a NIC, so the messages themselves are checked against
struct ifla_vf_mac, ifla_vf_vlan and ifla_vf_spoofchk of linux/if_link.h.
"""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest
from pyroute2.iproute.linux import get_arguments_processor
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from kvmd.actions import VfPort
from kvmd.effects.netlink import Netlink, vf_ports
from kvmd.errors import HostFailed

PORT = VfPort("lo", 1, "52:54:00:00:00:07", 30)


class Recorder(Netlink):
    """Takes every request down instead of sending it; `refuse` is the errno of those that set this word."""

    def __init__(self, refuse: dict[str, int] | None = None) -> None:
        super().__init__()
        self.sent: list[dict[str, Any]] = []
        self._refuse = refuse or {}

    async def change(self, what: str, command: str, *, gone_ok: bool = False, **values: Any) -> None:
        assert command == "set"
        assert not gone_ok
        for word, code in self._refuse.items():
            if word in values["vf"]:
                raise HostFailed(f"cannot {what}", errno=code)
        self.sent.append(values["vf"])


def encoded(vf: dict[str, Any]) -> bytes:
    arguments = get_arguments_processor("link", "set", {"index": 2, "vf": dict(vf)})
    arguments.finalize()
    message = ifinfmsg()
    message["attrs"] = [(name, value) for name, value in arguments.items() if name.startswith("IFLA")]
    message.encode()
    return bytes(message.data)


def test_the_bytes_are_those_of_the_kernels_structures() -> None:
    mac = struct.pack("=HHI32s", 40, 1, 1, bytes.fromhex("525400000007"))
    vlan = struct.pack("=HHIII", 16, 2, 1, 30, 0)
    check = struct.pack("=HHII", 12, 4, 1, 1)
    for wish, wanted in (
        ({"vf": 1, "mac": PORT.mac}, mac),
        ({"vf": 1, "vlan": 30}, vlan),
        ({"vf": 1, "spoofchk": 1}, check),
    ):
        # IFLA_VFINFO_LIST (22) around IFLA_VF_INFO (1) around the structure
        assert encoded(wish).endswith(struct.pack("=HHHH", len(wanted) + 8, 22, len(wanted) + 4, 1) + wanted), wish


async def test_mac_vlan_and_check_are_set_in_this_order() -> None:
    netlink = Recorder()
    await netlink.set_vf(PORT)
    assert netlink.sent == [{"vf": 1, "mac": PORT.mac}, {"vf": 1, "vlan": 30}, {"vf": 1, "spoofchk": 1}]


async def test_a_driver_without_spoof_check_goes_without() -> None:
    netlink = Recorder({"spoofchk": errno.EOPNOTSUPP})
    await netlink.set_vf(PORT)
    assert len(netlink.sent) == 2


@pytest.mark.parametrize(
    ("word", "code"), [("mac", errno.EOPNOTSUPP), ("vlan", errno.EINVAL), ("spoofchk", errno.EPERM)]
)
async def test_what_isolates_guests_is_not_done_without(word: str, code: int) -> None:
    with pytest.raises(HostFailed, match="cannot set virtual function 1 of lo"):
        await Recorder({word: code}).set_vf(PORT)


async def test_a_card_that_is_gone() -> None:
    with pytest.raises(HostFailed, match="there is no interface nosuch0"):
        await Recorder().set_vf(VfPort("nosuch0", 0, PORT.mac))


def test_what_is_read_back() -> None:
    def info(index: int, check: int | None) -> tuple[str, Any]:
        found: list[tuple[str, Any]] = [
            ("IFLA_VF_MAC", {"vf": index, "mac": f"52:54:00:00:00:0{index}"}),
            ("IFLA_VF_VLAN", {"vf": index, "vlan": 10 * index, "qos": 0}),
        ]
        if check is not None:
            found.append(("IFLA_VF_SPOOFCHK", {"vf": index, "spoofchk": check}))
        return "IFLA_VF_INFO", {"attrs": found}

    message = ifinfmsg()
    message["attrs"] = [("IFLA_VFINFO_LIST", {"attrs": [info(0, 1), info(1, 0xFFFFFFFF), info(2, None)]})]
    message.encode()
    read = ifinfmsg(message.data)
    read.decode()
    assert list(vf_ports("ens1", read)) == [
        VfPort("ens1", 0, "52:54:00:00:00:00", 0, True),
        VfPort("ens1", 1, "52:54:00:00:00:01", 10, None),
        VfPort("ens1", 2, "52:54:00:00:00:02", 20, None),
    ]
    assert list(vf_ports("ens1", ifinfmsg())) == []
