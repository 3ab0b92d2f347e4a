"""kvmd installed on a booted Debian: its units do what they say, while everything around guests fails and returns.

One tree for the whole module, since installing takes longer than all tests together; the tests run in their order and
each leaves kvmd running. Sandbox scores are asked of the very units that just ran guests and a network.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.rig.guestfiles import LAN, linux
from tests.rig.installedtree import INSTALL, UNINSTALL, InstalledTree, installed_tree

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(400)]

UNITS = "/usr/local/lib/systemd/system"
QUICK_STOP = '[stop]\ntimeout = "2s"\n'


@pytest.fixture(scope="module")
def host() -> Iterator[InstalledTree]:
    with installed_tree() as found:
        yield found


def status_of(host: InstalledTree, pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in host.lines(f"/proc/{pid}/status") if ":\t" in line)


def test_installing_again_changes_nothing_and_all_units_are_sound(host: InstalledTree) -> None:
    before = host.tree.check("find /opt/kvmd /etc/kvmd /usr/local /etc/cron.d -newermt 2020-01-01 -printf '%p %C@\\n'")
    said = host.tree.check(INSTALL, timeout_s=120)
    after = host.tree.check("find /opt/kvmd /etc/kvmd /usr/local /etc/cron.d -newermt 2020-01-01 -printf '%p %C@\\n'")
    assert "up to date" in said
    changed = set(after.splitlines()) ^ set(before.splitlines())
    assert {line.split()[0] for line in changed} <= {"/usr/local/bin", "/usr/local/bin/kvmd-cli", "/opt/kvmd/.lock"}
    # The tree's own kvmd.toml was there first.
    assert "/var/cache" in host.tree.check("cat /etc/kvmd/kvmd.toml")
    assert host.tree.check(f"systemd-analyze verify --man=no {UNITS}/kvmd* 2>&1") == ""
    assert host.tree.check("stat -c %a:%U /run/kvmd /run/kvmd/guests /var/lib/kvmd /var/log/kvmd").split() == [
        "755:root",
        "711:root",
        "700:root",
        "750:root",
    ]
    assert host.tree.run("systemctl is-active kvmd").stdout == "inactive\n"  # nothing is started by installing


def test_one_command_starts_kvmd_with_sockets_and_timer(host: InstalledTree) -> None:
    host.tree.write("/etc/kvmd/networks.d/lan.toml", LAN)
    host.tree.check("systemctl enable --now kvmd", timeout_s=90)
    units = "kvmd.service kvmd.socket kvmd-launch.socket kvmd-reconcile.timer"
    assert host.tree.check(f"systemctl is-active {units}").split() == ["active"] * 4
    assert host.tree.check(f"systemctl is-enabled {units} kvmd-guests.target").split() == ["enabled"] * 5
    assert host.tree.check("stat -c %a /run/kvmd/kvmd.sock /run/kvmd/launch.sock").split() == ["666", "600"]
    assert host.cli("status")["supervisor"] == "systemd"
    # READY=1 came after the host was prepared.
    assert "kvlan" in host.tree.check("ip -brief link")
    assert host.tree.check("pgrep -x dnsmasq")


def test_a_guest_is_a_confined_unit(host: InstalledTree) -> None:
    """Both guests of the rest of this module: one boot sector, one Linux with a NIC on the network."""
    host.tiny("tiny", QUICK_STOP)
    host.guest("lin", linux("lin", extra='[on]\ncrash = "stay_off"\n'))
    host.cli("start", "tiny")
    host.cli("start", "lin")
    uids = set()
    for name in ("tiny", "lin"):
        unit, pid = f"kvmd-guest@{name}.service", host.show(name)["pid"]
        assert host.property(unit, "MainPID") == str(pid)
        assert f"/machine.slice/{unit}" in host.tree.check(f"cat /proc/{pid}/cgroup")
        status = status_of(host, pid)
        uids |= set(status["Uid"].split())
        assert int(status["Uid"].split()[0]) >= 64100
        groups = host.tree.check("getent group kvmd-qemu kvm | cut -d: -f3").split()
        assert {*status["Gid"].split(), *status["Groups"].split()} <= set(groups)
        assert status["CapEff"] == status["CapPrm"] == status["CapInh"] == "0000000000000000"
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert host.tree.check(f"cat /proc/{pid}/environ") == ""
        opened = set(host.tree.check(f"find /proc/{pid}/fd -type l -printf '%l\\n'").split("\n")) - {""}
        allowed = ("socket:", "pipe:", "anon_inode:", "/dev/null", "/memfd:", "/var/log/kvmd/", "/dev/net/tun")
        assert {path for path in opened if not path.startswith(allowed)} <= {"/srv/vm/tiny.img"}
        # Nothing to connect to, nothing to read.
        assert host.tree.check(f"nsenter -t {pid} -n ip -brief link | cut -d' ' -f1") == "lo\n"
        assert "toml" not in host.tree.check(f"ls /proc/{pid}/root/etc/kvmd")
        host.tree.check(f"systemd-analyze security --no-pager --threshold=15 {unit} >/dev/null")
    assert len(uids) == 2
    host.tree.check("systemd-analyze security --no-pager --threshold=55 kvmd.service >/dev/null")
    stranger = "import socket; socket.socket(socket.AF_UNIX).connect('/run/kvmd/launch.sock')"
    refused = host.tree.run(["setpriv", "--reuid=64100", "--clear-groups", "python3", "-c", stranger])
    assert "PermissionError" in refused.stderr


def test_what_a_guest_needs_more_is_in_its_drop_in(host: InstalledTree) -> None:
    limits = '[limits]\nmemory_max = "1GiB"\ncpu_weight = 50\n[nic.out]\ntype = "user"\n[start]\nauto = false\n'
    host.tiny("wide", QUICK_STOP + limits)
    lines = [action["line"] for action in host.plan()["actions"]]
    assert "~ guest wide: drop-in of its unit" in lines
    host.cli("reconcile")
    host.cli("start", "wide")
    unit = "kvmd-guest@wide.service"
    assert host.property(unit, "MemoryMax") == str(1 << 30)
    assert host.property(unit, "CPUWeight") == "50"
    text = host.tree.check(f"cat /etc/systemd/system/{unit}.d/50-kvmd.conf")
    assert "# nic.out.type\nPrivateNetwork=no\n" in text
    assert host.plan()["actions"] == []
    host.tree.check(f"systemd-analyze security --no-pager --threshold=22 {unit} >/dev/null")
    # The drop-in follows the file, and the reconcile unit is what does it.
    host.tiny("wide", QUICK_STOP + limits.replace("50", "60"))
    host.tree.check("systemctl start kvmd-reconcile.service", timeout_s=120)
    assert host.property(unit, "CPUWeight") == "60"
    host.cli("kill", "wide")


def test_guests_and_dhcp_outlive_any_end_of_kvmd(host: InstalledTree) -> None:
    guests = {name: host.show(name)["pid"] for name in ("tiny", "lin")}
    dnsmasq = host.tree.check("pgrep -x dnsmasq")

    def same() -> None:
        for name, pid in guests.items():
            assert host.wait_guest(name, "running")["pid"] == pid
        assert host.tree.check("pgrep -x dnsmasq") == dnsmasq

    first = host.kvmd_pid()
    host.tree.check(f"kill -KILL {first}")
    host.wait(host.kvmd_pid, lambda pid: pid not in (first, "0"))
    same()
    for _ in range(3):
        before = host.kvmd_pid()
        host.tree.check("systemctl restart kvmd", timeout_s=60)
        assert host.kvmd_pid() != before
        same()
    host.tree.check("systemctl stop kvmd")
    assert host.tree.run("systemctl is-active kvmd").stdout == "inactive\n"
    same()  # the client's connection started it: socket activation
    host.tree.wait_for("systemctl is-active kvmd")


def test_the_dhcp_server_is_a_unit_that_needs_no_kvmd(host: InstalledTree) -> None:
    """systemd restarts it while kvmd is away, kvmd while it is there; the leases stay, and nothing is done twice."""
    unit, leases = "kvmd-net@lan.service", "/var/lib/kvmd/networks/lan/leases"
    host.tree.wait_for(f"grep -q 192.168.50. {leases}", 90)
    lease = host.tree.check(f"cat {leases}")
    main = host.property(unit, "MainPID")
    assert host.tree.check("pgrep -x dnsmasq").split() == [main]
    assert f"/{unit}" in host.tree.check(f"cat /proc/{main}/cgroup")
    host.tree.check(f"systemd-analyze security --no-pager --threshold=35 {unit} >/dev/null")
    host.tree.check("systemctl stop kvmd.socket kvmd-launch.socket kvmd")
    assert host.property(unit, "MainPID") == main
    host.tree.check(f"kill -KILL {main}")
    second = host.wait(lambda: host.property(unit, "MainPID"), lambda pid: pid not in ("0", main))
    host.tree.wait_for(f"test $(systemctl is-active {unit}) = active")
    host.tree.check("systemctl start kvmd", timeout_s=60)
    assert host.plan()["actions"] == []
    assert host.property(unit, "MainPID") == second
    host.tree.check(f"kill -KILL {second}")
    host.wait(lambda: host.property(unit, "MainPID"), lambda pid: pid not in ("0", second))
    host.wait(host.plan, lambda found: found["actions"] == [])
    assert host.tree.check(f"cat {leases}") == lease
    # One that cannot start says why in dnsmasq's own words, and is there once the cause is gone; one nobody wants goes.
    host.tree.check("mkdir -p /var/lib/kvmd/networks/spare/leases")
    spare = LAN.replace("kvlan", "kvspare").replace("192.168.50.", "192.168.51.").replace("lan.test", "spare.test")
    host.tree.write("/etc/kvmd/networks.d/spare.toml", spare)
    outcomes = json.loads(host.tree.run(["kvmd-cli", "--json", "reconcile"]).stdout)["outcomes"]
    (error,) = [outcome["error"] for outcome in outcomes if outcome["kind"] == "start-dnsmasq"]
    assert "dnsmasq of network spare does not start: " in error
    assert "Is a directory" in error
    host.tree.check("rmdir /var/lib/kvmd/networks/spare/leases")
    host.tree.check("kvmd-cli reconcile")
    assert host.property("kvmd-net@spare.service", "ActiveState") == "active"
    host.tree.check("rm /etc/kvmd/networks.d/spare.toml && kvmd-cli apply --yes --prune")
    assert host.property("kvmd-net@spare.service", "ActiveState") == "inactive"
    assert host.property(unit, "ActiveState") == "active"


def test_a_hung_kvmd_is_replaced_by_the_watchdog(host: InstalledTree) -> None:
    pid = host.show("tiny")["pid"]
    host.tree.write("/run/systemd/system/kvmd.service.d/test.conf", "[Service]\nWatchdogSec=4s\nTimeoutAbortSec=1s\n")
    host.tree.check("systemctl daemon-reload && systemctl restart kvmd", timeout_s=60)
    hung = host.kvmd_pid()
    host.tree.check(f"kill -STOP {hung}")
    host.wait(host.kvmd_pid, lambda now: now not in (hung, "0"), 40)
    assert "watchdog" in host.tree.journal("kvmd.service").lower()
    assert host.wait_guest("tiny", "running")["pid"] == pid
    host.tree.check("rm -r /run/systemd/system/kvmd.service.d && systemctl daemon-reload && systemctl restart kvmd")


def test_systemctl_stop_is_polite_and_no_crash(host: InstalledTree) -> None:
    host.tree.wait_for("grep -q 'KVMD-GUEST READY' /var/log/kvmd/lin/serial-console.log", 90)
    begun = time.monotonic()
    host.tree.check("systemctl stop kvmd-guest@lin", timeout_s=100)
    assert time.monotonic() - begun < 60  # it obeyed: stop.timeout is three minutes
    shown = host.wait_guest("lin", "stopped")
    assert (shown["wanted"], shown["reason"]) == ("stopped", "stop asked by systemd")
    assert host.property("kvmd-guest@lin.service", "Result") == "success"
    assert "Power down" in host.tree.check("cat /var/log/kvmd/lin/serial-console.log")
    # A deaf one is quit when its time is up; started by systemctl again, it is wanted again.
    host.tree.check("systemctl stop kvmd-guest@tiny", timeout_s=60)
    assert host.wait_guest("tiny", "stopped")["wanted"] == "stopped"
    assert host.property("kvmd-guest@tiny.service", "Result") == "success"
    host.tree.check("systemctl start kvmd-reconcile.service", timeout_s=60)
    assert host.show("tiny")["state"] == "stopped"
    host.tree.check("systemctl start kvmd-guest@tiny", timeout_s=60)
    assert host.wait_guest("tiny", "running")["wanted"] == "running"
    before = host.show("tiny")["pid"]
    host.tree.check("systemctl restart kvmd-guest@tiny", timeout_s=60)
    after = host.wait(lambda: host.show("tiny"), lambda it: it["state"] == "running" and it["pid"] != before)
    assert after["wanted"] == "running"


def test_a_stop_while_kvmd_is_away_is_known_later(host: InstalledTree) -> None:
    host.tree.check("systemctl stop kvmd.socket kvmd-launch.socket kvmd")
    host.tree.check("systemctl stop kvmd-guest@tiny", timeout_s=60)
    host.tree.check("systemctl start kvmd", timeout_s=60)
    shown = host.wait_guest("tiny", "stopped")
    assert (shown["wanted"], "while kvmd was away" in shown["reason"]) == ("stopped", True)
    assert host.tree.check("systemctl is-active kvmd.socket kvmd-launch.socket").split() == ["active"] * 2


def test_a_start_of_an_unknown_guest_fails_without_a_trace(host: InstalledTree) -> None:
    host.tree.run("systemctl start kvmd-guest@nobody", timeout_s=60)
    host.wait(lambda: host.property("kvmd-guest@nobody.service", "ActiveState"), lambda state: state == "failed")
    assert "nobody" not in [guest["name"] for guest in host.cli("list")["guests"]]


@pytest.mark.parametrize("away", [False, True])
def test_a_crash_is_recorded_with_its_signal(host: InstalledTree, away: bool) -> None:
    host.tiny("crash", QUICK_STOP + '[on]\ncrash = "stay_off"\n')
    host.cli("start", "crash")
    pid = host.show("crash")["pid"]
    if away:
        kvmd = host.kvmd_pid()
        host.tree.check(f"kill -STOP {kvmd}; kill -SEGV {pid}; sleep 0.3; kill -KILL {kvmd}")
    else:
        host.tree.check(f"kill -SEGV {pid}")
    assert "signal 11" in host.wait_guest("crash", "failed")["reason"]


def test_the_journal_tells_a_guests_story(host: InstalledTree) -> None:
    lines = host.tree.check("journalctl -q --no-pager -o json KVMD_GUEST=crash").splitlines()
    messages = [json.loads(line)["MESSAGE"] for line in lines]
    assert any(message == "guest crash: running" for message in messages), messages
    assert any("signal 11" in message for message in messages), messages
    assert not any("tiny" in message for message in messages)


def test_a_guest_comes_with_the_host_and_goes_before_kvmd(host: InstalledTree) -> None:
    host.tiny("boot", QUICK_STOP + "[start]\nauto = true\n")
    host.cli("reconcile")
    assert host.tree.check("systemctl is-enabled kvmd-guest@boot") == "enabled\n"
    host.cli("start", "boot")
    # Deaf, with three minutes to obey: it is not waited for when the host goes down, and only then.
    host.tiny("deaf", '[stop]\nat_host_shutdown = "kill"\n')
    host.cli("start", "deaf")
    # Linked to come with the host, and held.
    assert host.cli("enable", "tiny")["changed"] is True
    assert host.tree.check("systemctl is-enabled kvmd-guest@tiny") == "enabled\n"
    host.cli("hold", "--reason", "its disk is away", "tiny")
    host.tree.write("/etc/systemd/journald.conf.d/test.conf", "[Journal]\nStorage=persistent\n")
    host.tree.check("mkdir -p /var/log/journal && systemctl restart systemd-journald && journalctl --flush")
    begun = time.monotonic()
    host.tree.poweroff()
    assert time.monotonic() - begun < 45
    host.tree.boot()
    shown = host.wait_guest("boot", "running", 90)
    assert shown["wanted"] == "running"
    others = {guest["name"]: guest["wanted"] for guest in host.cli("list")["guests"] if guest["name"] != "boot"}
    assert others == {**dict.fromkeys(("lin", "wide", "crash", "deaf"), "stopped"), "tiny": "running"}
    assert host.cli("why", "deaf")["cause"] == "host-shutdown"
    assert host.show("tiny")["pid"] is None
    assert "held by root: its disk is away" in host.tree.check("cat /var/log/kvmd/tiny/qemu.log")
    for verb in ("disable", "stop", "unhold"):
        host.cli(verb, "tiny")
    assert host.tree.check("systemctl is-active kvmd kvmd-guests.target kvmd-reconcile.timer").split() == ["active"] * 3
    at = {
        unit: int(host.property(unit, "ActiveEnterTimestampMonotonic"))
        for unit in ("kvmd.service", "kvmd-guest@boot.service")
    }
    assert at["kvmd.service"] <= at["kvmd-guest@boot.service"]
    # kvmd did not wait for a guest that waited for kvmd.
    took_us = at["kvmd.service"] - int(host.property("kvmd.service", "InactiveExitTimestampMonotonic"))
    assert took_us < 25_000_000
    down = host.tree.check("journalctl -q --no-pager -b -1 -o cat -u kvmd -u kvmd-guest@boot | tail -n 20")
    assert down.rindex("guest boot: stopped") < down.rindex("Stopped kvmd.service")


def test_a_broken_kvmd_keeps_no_guest_off(host: InstalledTree) -> None:
    """The host boots with kvmd's environment gone: what starts with the host starts, and what root asks for."""
    bridge = "ip link add br0 type bridge && ip link set br0 up"  # the distribution's
    host.tree.check(bridge)
    host.tree.write("/etc/kvmd/networks.d/house.toml", '[network]\nmode = "bridge"\nbridge = "br0"\n')
    host.tiny("web", QUICK_STOP + '[nic.out]\nnetwork = "house"\n')
    host.cli("start", "web")
    tap = host.show("web")["nics"][0]["tap"]
    host.tree.wait_for("test -s /var/lib/kvmd/guests/web/last-start.json")
    host.tree.check("mv /opt/kvmd/venv /opt/kvmd/venv-away")
    host.tree.poweroff()
    host.tree.boot()
    host.tree.check(bridge)
    host.tree.check("systemctl start kvmd-guest@web", timeout_s=30)
    is_qemu = "grep -q -e -uuid /proc/$(systemctl show --value --property=MainPID kvmd-guest@{})/cmdline"
    for name in ("web", "boot"):
        host.tree.wait_for(is_qemu.format(name), 40)
    pids = {name: host.property(f"kvmd-guest@{name}.service", "MainPID") for name in ("web", "boot")}
    for pid in pids.values():
        status = status_of(host, int(pid))
        assert int(status["Uid"].split()[0]) >= 64100
        assert (status["CapEff"], status["Seccomp"]) == ("0000000000000000", "2")
    assert tap in host.tree.check("ip -brief link show master br0")
    assert host.tree.run("systemctl is-active kvmd").stdout != "active\n"
    host.tree.check("mv /opt/kvmd/venv-away /opt/kvmd/venv")
    for name, pid in pids.items():
        shown = host.wait_guest(name, "running", 60)
        assert (str(shown["pid"]), shown["wanted"]) == (pid, "running")
        assert "was started without kvmd: neither verified nor placed" in shown["warnings"]
    host.cli("stop", "--force", "--timeout", "1", "web")
    host.tree.check(
        f"systemd-analyze security --no-pager --offline=yes --threshold=35 {UNITS}/kvmd-standby@.service >/dev/null"
    )


def test_uninstalling_leaves_the_guest_and_says_how_to_stop_it(host: InstalledTree) -> None:
    pid = host.show("boot")["pid"]
    refused = host.tree.run(f"{UNINSTALL} --purge", timeout_s=60)
    assert (refused.returncode, "guests run: boot;" in refused.stderr) == (1, True)
    said = host.tree.check(UNINSTALL, timeout_s=60)
    assert "these guests run on: boot\n" in said
    assert "systemctl stop kvmd-guest@NAME" in said
    assert "qemu" in host.tree.check(f"cat /proc/{pid}/cmdline")
    assert host.tree.check(f"ls {UNITS}").split() == ["kvmd-guest@.service", "kvmd-net@.service"]
    assert host.tree.check("ls /opt/kvmd") == "launch.py\n"
    host.tree.check("test ! -e /usr/local/bin/kvmd-cli && test -e /etc/kvmd/kvmd.toml && test -e /srv/vm/boot.img")
    host.tree.check("systemctl stop kvmd-guest@boot", timeout_s=60)
    assert host.tree.run(f"test -e /proc/{pid}").returncode != 0
    assert host.property("kvmd-guest@boot.service", "Result") == "success"
    host.tree.check(f"{UNINSTALL} --purge", timeout_s=60)
    left = "ls -d /opt/kvmd /etc/kvmd /var/lib/kvmd /var/log/kvmd /run/kvmd /etc/systemd/system/*kvmd* 2>/dev/null"
    assert host.tree.run(left).stdout == "/etc/systemd/system/kvmd.service.d\n"  # the rig's own
