"""The command line: the goldens, what is refused, and that no text of a file can become an option."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.config.devices import Disk, Nic
from kvmd.config.guest import Boot, Cpu, Guest, Memory
from kvmd.errors import KvmdError, NotSupported, Refused
from kvmd.qemu import argv, identity
from kvmd.qemu.fds import FIRST_FD, FdTable, Launch, ListenUnix, OpenImage, OpenVhostNet
from kvmd.qemu.storage import ImageFact
from kvmd.units import Size
from tests.rig import golden_argv

CAPS = golden_argv.recorded()


def built(guest: Guest, name: str = "web", **host: Any) -> Launch:
    allotted = identity.allot(name, guest, None, CAPS, golden_argv.UUID)
    return argv.build(name, guest, allotted, CAPS, **({"accel": "tcg", "run_dir": "/run/kvmd"} | host))


def guest_of(**tables: Any) -> Guest:
    return Guest.model_validate({"memory": {"size": Size(64 << 20)}} | tables)


def after(launch: Launch, option: str) -> list[str]:
    """The values of an option, each time it is given."""
    return [launch.args[i + 1] for i, argument in enumerate(launch.args) if argument == option]


@pytest.mark.parametrize("name", golden_argv.names())
def test_golden(name: str) -> None:
    golden = golden_argv.DATA / "argv" / f"{name}.args"
    assert golden_argv.text(golden_argv.launch(name, CAPS)) == golden.read_text(), "read the diff of scripts/regen"


@pytest.mark.parametrize("name", golden_argv.names())
def test_fd_numbers_follow_each_other_and_each_is_used(name: str) -> None:
    launch = golden_argv.launch(name, CAPS)
    numbers = [request.fd for request in launch.opens]
    assert numbers == list(range(FIRST_FD, FIRST_FD + len(numbers)))
    words = " ".join(launch.args)
    for number in numbers:
        spellings = (f"fd={number},", f'"{number}"', f":{number}", f'"{number}:', f"/proc/self/fd/{number}")
        assert any(spelling in words for spelling in spellings), number


@pytest.mark.parametrize("name", golden_argv.names())
def test_no_image_is_named_by_path(name: str) -> None:
    launch = golden_argv.launch(name, CAPS)
    assert not any("/srv/" in argument for argument in launch.args)


def test_twenty_devices_in_under_two_milliseconds() -> None:
    name = "many"
    guest = golden_argv.guest(name)
    allotted = identity.allot(name, guest, None, CAPS, golden_argv.UUID)
    best = 1.0
    for _ in range(50):
        begin = time.perf_counter()
        argv.build(name, guest, allotted, CAPS, accel="tcg", run_dir="/run/kvmd")
        best = min(best, time.perf_counter() - begin)
    assert best < 0.002 * 5  # a loaded machine gets five times the figure; benchmarks/ has the ratio


def test_extra_arguments_come_last_and_as_they_are() -> None:
    words = ("-device", "a,b=c", "--odd", "")
    launch = built(guest_of(qemu={"extra_args": words}))
    assert launch.args[-4:] == words
    assert any("extra_args" in warning for warning in launch.warnings)


def test_seccomp_is_on_unless_somebody_says_otherwise() -> None:
    assert after(built(guest_of()), "-sandbox") == [argv.SANDBOX]
    for launch in (built(guest_of(qemu={"sandbox": False})), built(guest_of(), sandbox=False)):
        assert "-sandbox" not in launch.args
        assert any("seccomp" in warning for warning in launch.warnings)


def test_vhost_only_for_virtio_cards_on_networks() -> None:
    nics = {"a": {"network": "lan"}, "b": {"network": "lan", "model": "e1000e"}, "c": {"type": "user"}}
    launch = built(guest_of(nic=nics), vhost=True)
    assert [request.nic for request in launch.opens if isinstance(request, OpenVhostNet)] == ["a"]
    assert not any(isinstance(request, OpenVhostNet) for request in built(guest_of(nic=nics)).opens)


def test_a_cards_place_and_vectors_are_what_the_file_says() -> None:
    nics = {
        "a": {"network": "lan", "pci_address": "0a", "vectors": 3},
        "b": {"network": "lan", "queues": 4},
        "c": {"network": "lan", "queues": 2, "vectors": 0},
    }
    launch = built(guest_of(nic=nics, cpu={"vcpus": 4}), vhost=True)
    cards = {card["id"]: card for value in after(launch, "-device") if (card := json.loads(value)).get("netdev")}
    assert (cards["nic-a"]["addr"], cards["nic-a"]["vectors"]) == ("0a.0", 3)
    assert (cards["nic-b"]["mq"], cards["nic-b"]["vectors"]) == (True, 10)
    assert cards["nic-c"]["vectors"] == 0
    backends = {backend["id"]: backend for backend in map(json.loads, after(launch, "-netdev"))}
    assert backends["net-b"]["vhostfds"].count(":") == backends["net-b"]["fds"].count(":") == 3


def test_boot_order_gives_indexes_to_what_it_names_only() -> None:
    disks = {"a": {"file": "/a", "format": "raw"}, "b": {"file": "/b", "format": "raw"}}
    launch = built(guest_of(disk=disks, boot={"order": ("disk.b",)}))
    devices = [value for value in after(launch, "-device") if '"drive"' in value]
    assert "bootindex" not in devices[0]
    assert '"bootindex":1' in devices[1]
    assert after(launch, "-boot") == ["strict=on,menu=off"]


@pytest.mark.parametrize(
    ("tables", "host", "kind", "words"),
    [
        ({"cpu": {"vcpus": 6, "cores": 4}}, {}, Refused, "1 sockets x 1 dies x 4 cores x 1 threads = 4"),
        ({"cpu": {"vcpus": 300}}, {}, Refused, "300 vCPUs, pc-q35-7.2 takes 288"),
        ({"cpu": {"model": "Skylake-Sever"}}, {}, NotSupported, "did you mean Skylake-Server"),
        ({"cpu": {"model": "host"}}, {}, Refused, "needs KVM"),
        ({"cpu": {"features": {"avx3": True}}}, {}, NotSupported, "did you mean avx"),
        ({"cpu": {"features": {"model-id": True}}}, {}, NotSupported, "no feature model-id"),
        ({"nic": {"a": {"type": "user", "model": "e100"}}}, {}, NotSupported, "did you mean e1000"),
        ({"nic": {"a": {"type": "user", "model": "VGA"}}}, {}, NotSupported, "no such card"),
        ({"nic": {"a": {"network": "n", "model": "e1000", "queues": 2}}}, {}, Refused, "several queues"),
        ({"nic": {"a": {"network": "n", "model": "e1000", "mtu": 1400}}}, {}, Refused, "only a virtio card"),
        ({"nic": {"a": {"network": "n", "model": "e1000", "vectors": 4}}}, {}, Refused, "only a virtio card"),
        ({"memory": {"size": Size((64 << 20) + 4096)}}, {}, Refused, "not a multiple of 1MiB"),
        ({"memory": {"size": Size(65 << 20), "backing": "hugepages"}}, {}, Refused, "not a multiple of 2MiB"),
        (
            {"memory": {"size": Size(64 << 20), "backing": "hugepages"}},
            {"hugepages": False},
            Refused,
            "memory.fallback",
        ),
        ({"boot": {"order": ("disk.gone",)}}, {}, Refused, "names disk.gone"),
        ({"display": {"type": "vnc"}}, {"run_dir": "/r" * 50}, Refused, "shorter --run-dir"),
        (
            {"disk": {"a": {"file": "/a", "format": "raw", "cache": "none"}}},
            {"images": {"a": ImageFact(direct=False)}},
            Refused,
            "no direct I/O",
        ),
        (
            {"disk": {"a": {"file": "/a", "format": "raw", "aio": "native"}}},
            {"images": {"a": ImageFact(direct=False)}},
            Refused,
            'aio = "threads"',
        ),
        ({"serial": {f"s{i}": {} for i in range(5)}}, {}, Refused, "port 4 of 4"),
        (
            {"disk": {f"c{i}": {"file": "/c", "format": "raw", "media": "cdrom"} for i in range(7)}},
            {},
            Refused,
            "drive 6 of 6 on sata",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(
    tables: dict[str, Any], host: dict[str, Any], kind: type[KvmdError], words: str
) -> None:
    with pytest.raises(kind) as caught:
        built(guest_of(**tables), **host)
    assert words in f"{caught.value.message} {caught.value.hint}"
    assert "guest web" in caught.value.message


def test_a_board_that_is_gone_is_said() -> None:
    guest = guest_of()
    allotted = replace(identity.allot("web", guest, None, CAPS, golden_argv.UUID), machine="pc-q35-1.0")
    with pytest.raises(NotSupported, match=r"pinned to pc-q35-1\.0"):
        argv.build("web", guest, allotted, CAPS, accel="tcg", run_dir="/run/kvmd")


def test_boards_without_known_slots_are_not_built() -> None:
    with pytest.raises(NotSupported, match="only q35 and pc"):
        built(guest_of(machine={"type": "microvm"}))


@pytest.mark.parametrize(
    ("lacking", "tables", "words"),
    [
        ({"options": {}}, {}, "without seccomp"),
        ({"commands": frozenset()}, {}, "no -action"),
        ({"object_types": frozenset()}, {}, "memory-backend-ram"),
        ({"netdev_types": frozenset({"tap"})}, {}, "user-mode"),
        ({"device_types": frozenset({"virtio-net-pci"})}, {}, "virtio-balloon-pci"),
        ({"block_drivers": frozenset({"file", "raw"})}, {"disk": {"a": {"file": "/a", "format": "qcow2"}}}, "qcow2"),
        ({"device_properties": {"virtio-balloon-pci": frozenset({"addr"})}}, {}, "has no deflate-on-oom"),
        ({"aio": frozenset({"threads"})}, {"disk": {"a": {"file": "/a", "format": "raw"}}}, "native"),
    ],
)
def test_what_this_qemu_lacks_is_refused(lacking: dict[str, Any], tables: dict[str, Any], words: str) -> None:
    guest = guest_of(**tables)
    allotted = identity.allot("web", guest, None, CAPS, golden_argv.UUID)
    poorer = replace(CAPS, **lacking)
    with pytest.raises(NotSupported, match=words):
        argv.build("web", guest, allotted, poorer, accel="tcg", run_dir="/run/kvmd")


def test_a_table_name_that_qemu_would_not_take_gets_a_prefix() -> None:
    launch = built(guest_of(disk={"0": {"file": "/a", "format": "raw"}}))
    assert launch.expect.disks == {"disk-0": "disk.0"}
    longest = "a" * 20
    launch = built(guest_of(disk={longest: {"file": "/a", "format": "raw"}, "9" * 20: {"file": "/b", "format": "raw"}}))
    names = [part.split('"')[0] for value in after(launch, "-blockdev") for part in value.split('"node-name":"')[1:]]
    assert len(names) == 4
    assert all(len(name) <= 31 and name[0].isalpha() for name in names)  # block.c: char node_name[32]


# Any text a file could hold, and what would do harm: option syntax, JSON syntax, NUL, newlines.
TEXT = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["-daemonize", ",process=x", 'a","driver":"evil', "a,,b=c", "\n-S", "--", "", "on,id=x", "{}", "\\u0000"]
    ),
)


@given(
    path=TEXT,
    serial=TEXT,
    cmdline=TEXT,
    kernel=TEXT,
    mac=TEXT,
    hostfwd=st.lists(TEXT, max_size=3),
    run_dir=TEXT,
    name=TEXT,
)
def test_no_text_becomes_an_option(
    path: str, serial: str, cmdline: str, kernel: str, mac: str, hostfwd: list[str], run_dir: str, name: str
) -> None:
    """Even with every check of the model switched off: as many arguments as ever, the options ours, the JSON whole."""
    plain = _texts("/a", "s", "c" * bool(cmdline), "/k", "m", (), "/r", "n")
    odd = _texts(path, serial, cmdline, kernel, mac, tuple(hostfwd), run_dir, name)
    if odd is None:
        return
    assert plain is not None
    options = [argument for argument in plain.args if argument.startswith("-")]
    assert [argument for argument in odd.args if argument.startswith("-")] == options
    assert len(odd.args) == len(plain.args)
    for option, mine, other in zip(odd.args, odd.args[1:], plain.args[1:], strict=False):
        if option in ("-object", "-blockdev", "-netdev", "-device"):
            assert set(_json(mine)) == set(_json(other))


def _json(text: str) -> dict[str, Any]:
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


def _texts(
    path: str, serial: str, cmdline: str, kernel: str, mac: str, hostfwd: tuple[str, ...], run_dir: str, name: str
) -> Launch | None:
    """A launch of a guest with these texts, unchecked; None when it is refused (NUL, too long a path)."""
    disk = Disk.model_construct(file=path, format="raw", serial=serial)
    nic = Nic.model_construct(type="user", hostfwd=hostfwd or ("x",))
    boot = Boot.model_construct(kernel=kernel, cmdline=cmdline or None)
    guest = guest_of(display={"type": "vnc"}, serial={"console": {}}).model_copy(
        update={"disk": {"root": disk}, "nic": {"lan": nic}, "boot": boot}
    )
    allotted = replace(identity.allot("n", guest, None, CAPS, golden_argv.UUID), macs={"lan": mac})
    try:
        return argv.build(name, guest, allotted, CAPS, accel="tcg", run_dir=run_dir)
    except Refused:
        return None


@given(
    st.lists(st.sampled_from("abcdef"), unique=True), st.lists(st.sampled_from("xyz"), unique=True), st.integers(1, 8)
)
def test_every_guest_that_is_built_is_whole(disks: list[str], nics: list[str], vcpus: int) -> None:
    guest = Guest(
        memory=Memory(size=Size(64 << 20)),
        cpu=Cpu(vcpus=vcpus),
        disk={key: Disk(file=f"/{key}", format="raw") for key in disks},
        nic={key: Nic(network="lan") for key in nics},
    )
    launch = built(guest)
    assert [request.disk for request in launch.opens if isinstance(request, OpenImage)] == disks
    assert launch.expect.vcpus == vcpus
    addresses = [_json(value)["addr"] for value in after(launch, "-device") if '"addr"' in value]
    assert len(addresses) == len(set(addresses))
    assert launch == built(guest)


def test_fd_numbers_are_given_out_in_order_only() -> None:
    fds = FdTable()
    with pytest.raises(ValueError, match="not the next one"):
        fds.add(ListenUnix(FIRST_FD + 1, "qmp"))


# ---- devices of the host ----------------------------------------------------------------------------------------

GIVEN = {
    "machine": {"default_nic": False},
    "hostdev": {"gpu": {"pci": "0000:3b:00.0"}},
    "nic": {"fast": {"type": "vf", "pool": "ens1"}},
    "boot": {"order": ("nic.fast",)},
}
FUNCTIONS = {"hostdev-gpu": "0000:3b:00.0", "nic-fast": "0000:af:02.1"}


def devices_of(launch: Launch) -> dict[str, dict[str, Any]]:
    found = [json.loads(text) for text in after(launch, "-device") if text.startswith("{")]
    return {device["id"]: device for device in found}


def test_a_device_of_the_host_is_behind_a_root_port_of_its_own() -> None:
    launch = built(guest_of(**GIVEN), functions=FUNCTIONS)
    found = devices_of(launch)
    port = found["port-hostdev-gpu"]
    assert (port["driver"], port["bus"]) == ("pcie-root-port", "pcie.0")
    assert found["hostdev-gpu"] == {
        "driver": "vfio-pci",
        "id": "hostdev-gpu",
        "bus": "port-hostdev-gpu",
        "addr": "00.0",
        "host": "0000:3b:00.0",
    }
    assert found["nic-fast"]["host"] == "0000:af:02.1"
    assert found["nic-fast"]["bootindex"] == 1
    assert found["port-nic-fast"]["chassis"] != port["chassis"]
    assert launch.expect.functions == FUNCTIONS
    assert "-netdev" not in launch.args
    assert "balloon" not in found


def test_on_a_board_without_pci_express_it_is_on_the_bus_itself() -> None:
    found = devices_of(built(guest_of(**GIVEN | {"machine": {"type": "pc"}}), functions=FUNCTIONS))
    assert found["hostdev-gpu"]["bus"] == "pci.0"
    assert not [device for device in found if device.startswith("port-")]


def test_its_place_does_not_move_when_the_pool_gives_another_function() -> None:
    guest = guest_of(**GIVEN)
    places = [
        devices_of(built(guest, functions=FUNCTIONS | {"nic-fast": address}))["port-nic-fast"]["addr"]
        for address in ("0000:af:02.1", "0000:af:02.5")
    ]
    assert places[0] == places[1]


def test_a_device_nobody_reserved_is_refused() -> None:
    with pytest.raises(Refused, match=r"nic\.fast: no device of the host was reserved for it"):
        built(guest_of(**GIVEN), functions={"hostdev-gpu": "0000:3b:00.0"})
