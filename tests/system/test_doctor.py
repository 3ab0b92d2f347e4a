"""Doctor on the real host: what only a real kernel, file system or daemon can break."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from kvmd.doctor import Check, examine
from kvmd.paths import Paths
from kvmd.plan.checkup import CHECKS
from tests.rig.kvmdhost import KvmdHost
from tests.rig.netns import Namespace, private_namespace

pytestmark = pytest.mark.system

REPO = Path(__file__).resolve().parents[2]
NETWORK = """\
[network]
mode = "nat"
[ipv4]
address = "192.168.217.1/24"
[ipv4.dhcp]
range = ["192.168.217.100", "192.168.217.200"]
"""
GUEST = """\
[machine]
accel = "tcg"
[memory]
size = "64MiB"
[disk.root]
file = "{image}"
format = "raw"
"""
SCRIPT = """\
import asyncio, json, sys
from dataclasses import asdict
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from kvmd.doctor import examine
from kvmd.paths import Paths
paths = Paths.of(*map(Path, sys.argv[2:5]), None)
print("CHECKS", json.dumps([asdict(check) for check in asyncio.run(examine(paths))]))
"""


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """A kvmd that never ran, with an empty configuration."""
    config = tmp_path / "etc"
    for name in ("guests.d", "networks.d", "profiles.d"):
        (config / name).mkdir(parents=True)
    (config / "kvmd.toml").write_text(f'[storage]\nroots = ["{tmp_path}/images"]\nimages = "{tmp_path}/images"\n')
    (tmp_path / "images").mkdir()
    return Paths.of(config, tmp_path / "state", tmp_path / "run", None)


def _named(checks: list[dict[str, Any]] | tuple[Check, ...], name: str) -> list[dict[str, Any]]:
    plain = [check if isinstance(check, dict) else asdict(check) for check in checks]
    return [check for check in plain if check["name"] == name]


def _inside(namespace: str, paths: Paths) -> list[dict[str, Any]]:
    """Doctor run in a network namespace, where `ip netns exec` also shows that namespace's /sys."""
    argv = [sys.executable, "-c", SCRIPT, str(REPO), str(paths.config), str(paths.state), str(paths.run)]
    output = Namespace(namespace).run(*argv, timeout=60)
    found: list[dict[str, Any]] = json.loads(output.rpartition("CHECKS ")[2])
    return found


def test_this_host_is_examined_without_a_daemon(paths: Paths) -> None:
    checks = asyncio.run(examine(paths))
    assert list(dict.fromkeys(check.name for check in checks)) == list(CHECKS)
    assert all(check.fix for check in checks if check.status in ("warn", "fail"))
    assert [check["status"] for check in _named(checks, "qemu")] == ["ok"]
    assert [check["status"] for check in _named(checks, "qemu-sandbox")] == ["ok"]
    assert "not running" in _named(checks, "socket")[0]["message"]
    assert _named(checks, "kvm")[0]["status"] != "skip"  # root can always find out


def test_another_user_is_told_what_cannot_be_seen(paths: Paths, tmp_path: Path) -> None:
    paths.state.mkdir(0o700)
    for directory in (tmp_path, *tmp_path.parents[:2]):
        assert directory.owner() == "root"
    (tmp_path / "images" / "web.raw").write_bytes(bytes(1 << 20))
    (tmp_path / "images" / "web.raw").chmod(0o600)
    (paths.config / "guests.d" / "web.toml").write_text(GUEST.format(image=tmp_path / "images/web.raw"))
    with _readable_by_all(tmp_path):
        checks = _as_uid(65534, paths)
    assert list(dict.fromkeys(check["name"] for check in checks)) == list(CHECKS)
    assert "run doctor as root" in _named(checks, "images")[0]["message"]
    assert any(check["status"] == "skip" for check in _named(checks, "directories"))


@contextmanager
def _readable_by_all(directory: Path) -> Iterator[None]:
    """pytest keeps its directories 0700: let others pass for a while."""
    before = {path: path.stat().st_mode for path in (directory, *list(directory.parents)[:2])}
    try:
        for path, mode in before.items():
            path.chmod(mode | 0o055)
        yield
    finally:
        for path, mode in before.items():
            path.chmod(mode)


def _as_uid(uid: int, paths: Paths) -> list[dict[str, Any]]:
    """In a fork of this process that gives up root: the modules are loaded and need not be readable for that uid."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            checks = asyncio.run(examine(paths))
            os.write(writing, json.dumps([asdict(check) for check in checks]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    found: list[dict[str, Any]] = json.loads(answer)
    return found


@contextmanager
def _mounted(kind: str, options: str, at: Path) -> Iterator[Path]:
    at.mkdir(parents=True, exist_ok=True)
    subprocess.run(("mount", "-t", kind, "-o", options, f"kvmd-test-{secrets.token_hex(3)}", at), check=True)
    try:
        yield at
    finally:
        subprocess.run(("umount", at), check=True)


def test_a_file_system_without_direct_io(paths: Paths, tmp_path: Path) -> None:
    with _mounted("ramfs", "mode=755", tmp_path / "images") as images:
        (images / "web.raw").write_bytes(bytes(1 << 20))
        guest = paths.config / "guests.d" / "web.toml"
        guest.write_text(GUEST.format(image=images / "web.raw"))
        found = _named(asyncio.run(examine(paths)), "image-direct-io")[0]
        assert (found["status"], "no O_DIRECT" in found["message"]) == ("warn", True)
        guest.write_text(guest.read_text() + 'cache = "none"\naio = "native"\n')
        found = _named(asyncio.run(examine(paths)), "image-direct-io")[0]
        assert found["status"] == "fail" and 'cache = "writeback"' in found["fix"]


def test_a_file_system_that_is_full(paths: Paths) -> None:
    with _mounted("tmpfs", "size=1m,mode=700", paths.state) as state:
        (state / "filler").write_bytes(bytes(900 << 10))
        found = [check for check in _named(asyncio.run(examine(paths)), "space") if str(state) in check["message"]]
        assert found and {check["status"] for check in found} == {"fail"}


def test_a_file_system_that_is_read_only(paths: Paths) -> None:
    with _mounted("tmpfs", "ro,mode=700", paths.state):
        found = _named(asyncio.run(examine(paths)), "space")
        assert any(check["status"] == "fail" and "read-only" in check["message"] for check in found)


def test_a_real_drop_listener_tap_and_missing_bridge(paths: Paths) -> None:
    (paths.config / "networks.d" / "lan.toml").write_text(NETWORK)
    (paths.config / "networks.d" / "servers.toml").write_text('[network]\nmode = "bridge"\nbridge = "br0"\n')
    listen = (
        "import socket,time; a=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); a.bind(('',53)); "
        "b=socket.socket(); b.bind(('',53)); b.listen(); time.sleep(60)"
    )
    with private_namespace("doctor") as namespace:
        clean = _inside(namespace.name, paths)
        for name in ("firewall", "dns-ports", "leftover-links"):
            assert [check["status"] for check in _named(clean, name)] == ["ok"], _named(clean, name)
        assert _named(clean, "forwarding")[0]["status"] == "warn"
        assert _named(clean, "bridges")[0]["status"] == "fail"
        rules = "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }\n"
        namespace.run("nft", "-f", "-", text=rules)
        namespace.ip("tuntap add dev kvgone mode tap")
        namespace.ip("link set dev kvgone alias kvmd:lan:gone:lan")
        namespace.ip("link add br0 type bridge")
        namespace.run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        with namespace.running(sys.executable, "-c", listen):
            namespace.run("sh", "-c", "until ss -lnt | grep -q :53; do sleep 0.05; done", timeout=10)
            sick = _inside(namespace.name, paths)
        assert (
            _named(sick, "firewall")[0]["status"] == "fail" and "policy drop" in _named(sick, "firewall")[0]["message"]
        )
        found = _named(sick, "dns-ports")
        assert [check["status"] for check in found] == ["fail"] and "0.0.0.0:53" in found[0]["message"]
        assert _named(sick, "leftover-links")[0]["fix"] == "ip link delete kvgone"
        assert _named(sick, "forwarding")[0]["status"] == "ok"
        assert _named(sick, "bridges")[0]["status"] == "ok"


def test_a_running_kvmd_is_clean_and_a_killed_one_is_seen(host: KvmdHost) -> None:
    host.network("lan", NETWORK)
    host.start()
    assert host.namespace
    paths = Paths.of(host.config, host.state, host.run, None)
    checks = _inside(host.namespace, paths)
    for name in (
        "forwarding", "firewall", "dns-ports", "leftover-links", "directories", "socket", "launch-socket", "config",
        "config-rights",
    ):  # fmt: skip
        assert [check["status"] for check in _named(checks, name)] == ["ok"], _named(checks, name)
    host.network("lan", NETWORK.replace("mode =", "mood ="))
    (host.state).chmod(0o755)
    host.kill()
    checks = _inside(host.namespace, paths)
    assert "nobody answers" in _named(checks, "socket")[0]["message"]
    assert _named(checks, "config")[0]["status"] == "fail"
    assert f"chmod 0700 {host.state}" in [check["fix"] for check in _named(checks, "directories")]
