"""What files mean for each other: both files named, the settled one never in the wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmd.config.desired import Loaded
from kvmd.config.load import load, save_last_good

MEMORY = '[memory]\nsize = "1GiB"\n'
USER = '[nic.a]\ntype = "user"\n'
NAT = '[network]\nmode = "nat"\n[ipv4]\naddress = "10.0.{}.1/24"\n[ipv4.dhcp]\nrange = ["10.0.{}.100", "10.0.{}.200"]\n'
UUID = "6f0d2c6e-9a0f-4a57-8a0c-3b3f7b6f7a11"


def nat(subnet: int) -> str:
    return NAT.format(subnet, subnet, subnet)


def disk(file: str, more: str = "") -> str:
    return MEMORY + USER + f'[disk.root]\nfile = "{file}"\nformat = "raw"\n{more}'


def nic(more: str) -> str:
    return MEMORY + f'[nic.lan]\nnetwork = "lan"\n{more}'


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def errors(loaded: Loaded) -> list[str]:
    return [str(fault) for fault in loaded.errors]


CASES = [
    (
        {
            "guests.d/a.toml": f'{MEMORY}backing = "file"\npath = "/srv/ram"\npage_size = "2MiB"\n{USER}',
            "guests.d/b.toml": f'{MEMORY}backing = "file"\npath = "/srv/ram/"\n{USER}',
        },
        'guests.d/b.toml:4: memory.path: "/srv/ram/" is of 2MiB in guests.d/a.toml (memory.path)'
        " (choose another directory)",
    ),
    (
        {"guests.d/a.toml": disk("/srv/vm/x.img"), "guests.d/b.toml": disk("/srv/vm/./x.img")},
        "guests.d/b.toml:6: disk.root.file: image /srv/vm/x.img belongs to guests.d/a.toml (disk.root.file)",
    ),
    (
        {"guests.d/a.toml": disk("/srv/vm/x.img", "readonly = true\n"), "guests.d/b.toml": disk("/srv/vm/x.img")},
        "guests.d/b.toml:6: disk.root.file: image /srv/vm/x.img belongs to guests.d/a.toml (disk.root.file)",
    ),
    (
        {
            "guests.d/a.toml": f'[guest]\nuuid = "{UUID}"\n{MEMORY}{USER}',
            "guests.d/b.toml": f'[guest]\nuuid = "{UUID.upper()}"\n{MEMORY}{USER}',
        },
        f"guests.d/b.toml:2: guest.uuid: uuid {UUID} belongs to guests.d/a.toml (guest.uuid)",
    ),
    (
        {
            "networks.d/lan.toml": nat(1),
            "guests.d/a.toml": nic('mac = "52:54:00:00:00:0a"\n'),
            "guests.d/b.toml": nic('mac = "52:54:00:00:00:0A"\n'),
        },
        "guests.d/b.toml:5: nic.lan.mac: MAC address 52:54:00:00:00:0a belongs to guests.d/a.toml (nic.lan.mac)",
    ),
    (
        {
            "networks.d/lan.toml": nat(1),
            "guests.d/a.toml": nic('ipv4 = "10.0.1.9"\n'),
            "guests.d/b.toml": nic('ipv4 = "10.0.1.9"\n'),
        },
        "guests.d/b.toml:5: nic.lan.ipv4: address 10.0.1.9 belongs to guests.d/a.toml (nic.lan.ipv4)",
    ),
    (
        {
            "guests.d/a.toml": MEMORY + USER + 'hostfwd = ["tcp::8080-:80"]\n',
            "guests.d/b.toml": MEMORY + USER + 'hostfwd = ["tcp::8080-:443"]\n',
        },
        "guests.d/b.toml:5: nic.a.hostfwd: host port tcp::8080 belongs to guests.d/a.toml (nic.a.hostfwd)",
    ),
    (
        {"networks.d/lan.toml": nat(1), "guests.d/a.toml": nic('ipv4 = "10.0.2.9"\n')},
        "guests.d/a.toml:5: nic.lan.ipv4: 10.0.2.9 is outside the network's addresses 10.0.1.1 to 10.0.1.254"
        " (see networks.d/lan.toml)",
    ),
    (
        {"networks.d/lan.toml": nat(1), "guests.d/a.toml": nic('ipv4 = "10.0.1.1"\n')},
        "guests.d/a.toml:5: nic.lan.ipv4: 10.0.1.1 is the host's own address (see networks.d/lan.toml)",
    ),
    (
        {
            "networks.d/lan.toml": nat(1) + '[reservation.p]\nmac = "3c:2a:f4:00:00:01"\nipv4 = "10.0.1.9"\n',
            "guests.d/a.toml": nic('ipv4 = "10.0.1.9"\n'),
        },
        "guests.d/a.toml:5: nic.lan.ipv4: address 10.0.1.9 belongs to networks.d/lan.toml (reservation.p)",
    ),
    (
        {
            "networks.d/lan.toml": nat(1) + '[reservation.p]\nmac = "3c:2a:f4:00:00:01"\nipv4 = "10.0.1.9"\n',
            "guests.d/a.toml": nic('mac = "3C:2A:F4:00:00:01"\n'),
        },
        "guests.d/a.toml:5: nic.lan.mac: MAC address 3c:2a:f4:00:00:01 belongs to networks.d/lan.toml (reservation.p)",
    ),
    (
        {"guests.d/a.toml": nic("")},
        'guests.d/a.toml:4: nic.lan.network: unknown network "lan" (there is no networks.d/lan.toml)',
    ),
    (
        {
            "guests.d/a.toml": MEMORY + USER + '[start]\nafter = ["b"]\n',
            "guests.d/b.toml": MEMORY + USER + '[start]\nafter = ["c"]\n',
            "guests.d/c.toml": MEMORY + USER + '[start]\nafter = ["a"]\n',
        },
        "guests.d/c.toml:6: start.after: a circle: c -> a -> b -> c (see guests.d/a.toml, guests.d/b.toml)",
    ),
    (
        {"guests.d/nas.toml": MEMORY + USER, "guests.d/web.toml": MEMORY + USER + '[start]\nafter = ["nass"]\n'},
        'guests.d/web.toml:6: start.after: unknown guest "nass" (did you mean "nas"?)',
    ),
    (
        {
            "networks.d/a.toml": '[network]\nmode = "isolated"\nbridge = "kvb"\n',
            "networks.d/b.toml": '[network]\nmode = "isolated"\n',
        },
        'networks.d/b.toml:1: network.bridge: "kvb" is the bridge of networks.d/a.toml too',
    ),
    (
        {
            "networks.d/a.toml": nat(1) + '[forward.x]\nlisten = ":443"\nto = "web:1"\n',
            "networks.d/b.toml": nat(2) + '[forward.y]\nlisten = "203.0.113.7:443"\nto = "web:1"\n',
            "guests.d/web.toml": MEMORY
            + '[nic.a]\nnetwork = "a"\nipv4 = "10.0.1.9"\n[nic.b]\nnetwork = "b"\nipv4 = "10.0.2.9"\n',
        },
        "networks.d/b.toml:8: forward.y.listen: tcp port 443 belongs to networks.d/a.toml (forward.x)",
    ),
    (
        {f"guests.d/{name}.toml": MEMORY + '[nic.n]\ntype = "tap"\nifname = "tap7"\n' for name in "ab"},
        "guests.d/b.toml:5: nic.n.ifname: TAP tap7 belongs to guests.d/a.toml (nic.n.ifname)",
    ),
    (
        {"networks.d/a.toml": nat(1), "networks.d/b.toml": nat(1).replace("/24", "/16")},
        "networks.d/b.toml:4: ipv4.address: 10.0.0.0/16 overlaps 10.0.1.0/24 of networks.d/a.toml",
    ),
]


@pytest.mark.parametrize(("files", "message"), CASES, ids=[case[1][:60] for case in CASES])
def test_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    loaded = load(write(tmp_path, files))
    assert errors(loaded) == [message]
    bad = message.split(":")[0]
    desired = {f"guests.d/{name}.toml" for name in loaded.desired.guests}
    desired |= {f"networks.d/{name}.toml" for name in loaded.desired.networks}
    assert desired == set(files) - {bad}, "the others load"


@pytest.mark.parametrize(
    "files",
    [
        {
            f"guests.d/{name}.toml": disk("/srv/vm/x.iso", more)
            for name, more in (("a", 'media = "cdrom"\n'), ("b", "readonly = true\n"))
        },
        {
            "networks.d/lan.toml": nat(1),
            "networks.d/dmz.toml": nat(2),
            "guests.d/a.toml": nic('ipv4 = "10.0.1.9"\n'),
            "guests.d/b.toml": nic('ipv4 = "10.0.2.9"\n').replace('"lan"', '"dmz"'),
        },
        {
            "guests.d/a.toml": MEMORY + USER + '[start]\nafter = ["c", "b"]\n',
            "guests.d/b.toml": MEMORY + USER + '[start]\nafter = ["c"]\n',
            "guests.d/c.toml": MEMORY + USER,
        },
    ],
)
def test_allowed(tmp_path: Path, files: dict[str, str]) -> None:
    assert errors(load(write(tmp_path, files))) == []


FORWARD = '[forward.x]\nlisten = ":443"\nto = "web:443"\n'


@pytest.mark.parametrize(
    ("guest", "message"),
    [
        (None, 'unknown guest "web" (there is no guests.d/web.toml)'),
        (MEMORY + USER, "guest web has no NIC on network lan"),
        (nic(""), "guest web has no fixed address on network lan (give its NIC an ipv4 in guests.d/web.toml)"),
        (nic('ipv4 = "10.0.1.9"\n'), None),
    ],
)
def test_a_forward_that_leads_nowhere_is_a_fault_and_the_network_stays(
    tmp_path: Path, guest: str | None, message: str | None
) -> None:
    files = {"networks.d/lan.toml": nat(1) + FORWARD} | ({"guests.d/web.toml": guest} if guest else {})
    loaded = load(write(tmp_path, files))
    assert errors(loaded) == ([f"networks.d/lan.toml:9: forward.x.to: {message}"] if message else [])
    assert list(loaded.desired.networks) == ["lan"], "one guest's file must not take a network away"


def test_a_copy_never_puts_the_original_in_the_wrong(tmp_path: Path) -> None:
    config, good = tmp_path / "etc", tmp_path / "good"
    write(config, {"guests.d/web.toml": disk("/srv/vm/x.img")})
    save_last_good(load(config), good)
    write(config, {"guests.d/a-copy.toml": disk("/srv/vm/x.img")})

    loaded = load(config, last_good_dir=good)

    assert list(loaded.desired.guests) == ["web"]
    assert loaded.desired.stale == frozenset()
    assert loaded.faulty == {"guests.d/a-copy.toml"}


def test_an_edit_that_takes_anothers_image_runs_from_the_last_good_version(tmp_path: Path) -> None:
    config, good = tmp_path / "etc", tmp_path / "good"
    write(config, {"guests.d/a.toml": disk("/srv/vm/a.img"), "guests.d/b.toml": disk("/srv/vm/b.img")})
    save_last_good(load(config), good)
    write(config, {"guests.d/a.toml": disk("/srv/vm/b.img")})

    loaded = load(config, last_good_dir=good)

    assert loaded.faulty == {"guests.d/a.toml"}
    assert loaded.desired.stale == {"a"}
    assert loaded.desired.guests["a"].disk["root"].file == "/srv/vm/a.img"
    assert loaded.desired.guests["b"].disk["root"].file == "/srv/vm/b.img"


def test_images_outside_the_roots_are_warned_about(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, {"guests.d/a.toml": disk("/root/x.img"), "guests.d/b.toml": disk("/srv/vmx/y")}))
    assert [str(fault) for fault in loaded.faults] == [
        f'guests.d/{name}.toml:6: warning: disk.root.file: "{file}" lies under none of storage.roots and will not be '
        "opened (add its directory in kvmd.toml)"
        for name, file in (("a", "/root/x.img"), ("b", "/srv/vmx/y"))
    ]
    assert sorted(loaded.desired.guests) == ["a", "b"]


@pytest.mark.parametrize("network", ['mode = "isolated"', 'mode = "bridge"\nbridge = "br0"'])
def test_an_address_nobody_hands_out_is_warned_about(tmp_path: Path, network: str) -> None:
    files = {"networks.d/lan.toml": f"[network]\n{network}\n", "guests.d/a.toml": nic('ipv4 = "10.0.1.9"\n')}
    loaded = load(write(tmp_path, files))
    assert [str(fault) for fault in loaded.faults] == [
        "guests.d/a.toml:5: warning: nic.lan.ipv4: nobody hands the address out: the network has no [ipv4.dhcp] "
        "(see networks.d/lan.toml)"
    ]
    assert list(loaded.desired.guests) == ["a"]


POOL = [
    disk("/srv/vm/1.img"),
    disk("/srv/vm/2.img"),
    disk("/srv/vm/1.img", "readonly = true\n"),
    MEMORY + USER + '[start]\nafter = ["a"]\n',
    MEMORY + USER + '[start]\nafter = ["b", "c"]\n',
    MEMORY + "[nic.lan]\n",
    "[",
]


@given(st.permutations("abcd"), st.lists(st.sampled_from(POOL), min_size=4, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_order_of_files_is_irrelevant(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], texts: list[str]
) -> None:
    """Directory order is what the file system gives: files are made in two orders."""
    files = {f"guests.d/{name}.toml": text for name, text in zip("abcd", texts, strict=True)}
    first = load(write(tmp_path_factory.mktemp("one"), files))
    second = load(
        write(tmp_path_factory.mktemp("two"), {f"guests.d/{n}.toml": files[f"guests.d/{n}.toml"] for n in order})
    )
    assert first == second
