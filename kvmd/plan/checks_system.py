"""Judgements about kvmd's place in the system: its files, unit, accounts, rivals and the clock. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvmd.plan.hostreport import Finding, HostReport, Unseen, count, fail, ok, skip, warn

GROUPS = ("kvmd-admin", "kvmd-operator", "kvmd-qemu")
NM_CONF = "/etc/NetworkManager/conf.d/kvmd.conf"
NEEDRESTART_CONF = "/etc/needrestart/conf.d/kvmd.conf"


@dataclass(frozen=True, slots=True)
class Rival:
    """A program that steers what kvmd steers."""

    harm: str
    fix: str
    only_dedicated: bool = False  # harmless unless a guest has CPUs of its own


# By the name the kernel keeps of a process (15 bytes).
RIVALS: Mapping[str, Rival] = {
    "libvirtd": Rival(
        "may start the same images and sets up its own network and firewall",
        "systemctl disable --now libvirtd.service libvirtd.socket, once its guests are kvmd's",
    ),
    "virtqemud": Rival("may start the same images", "systemctl disable --now virtqemud.service virtqemud.socket"),
    "tuned": Rival(
        "sets transparent hugepages, swappiness and page merging by its profile", "systemctl disable --now tuned"
    ),
    "numad": Rival("moves QEMU's threads and memory between nodes", "systemctl disable --now numad"),
    "irqbalance": Rival(
        "puts interrupts on the CPUs of dedicated guests",
        "IRQBALANCE_BANNED_CPULIST={cpus} in /etc/default/irqbalance; systemctl restart irqbalance",
        only_dedicated=True,
    ),
    "systemd-oomd": Rival(
        "kills the whole cgroup under pressure, and a guest is one",
        "mkdir -p /etc/systemd/system/kvmd-guest@.service.d && printf '[Service]\\nManagedOOMPreference=omit\\n'"
        " > /etc/systemd/system/kvmd-guest@.service.d/oomd.conf && systemctl daemon-reload",
    ),
    "earlyoom": Rival(
        "kills the largest process when memory is short, and that is a guest",
        "EARLYOOM_ARGS=\"--avoid '^qemu-system'\" in /etc/default/earlyoom; systemctl restart earlyoom",
    ),
}


def rivals(report: HostReport) -> Iterator[Finding]:
    """Nobody else steers guests, their memory or their CPUs."""
    exclusive = [g for g in report.desired.guests.values() if g.cpu.placement in ("dedicated", "manual")]
    cpus = str(report.facts.cpus.isolated) or "the guests' CPUs"
    clean = True
    for name, rival in RIVALS.items():
        if name in report.processes and (exclusive or not rival.only_dedicated):
            clean = False
            yield warn(f"{name} (pid {report.processes[name]}) {rival.harm}", rival.fix.replace("{cpus}", cpus))
    if report.network_manager == "may take" and report.desired.networks:
        clean = False
        yield warn(
            "NetworkManager may set up kvmd's bridges and TAPs as connections of its own",
            f"printf '[keyfile]\\nunmanaged-devices=interface-name:kv*\\n' > {NM_CONF}"
            " && systemctl reload NetworkManager",
        )
    if clean:
        yield ok("no program runs that steers guests, their memory, their CPUs or their links")


def config(report: HostReport) -> Iterator[Finding]:
    """The files say what they should."""
    for fault in report.loaded.faults:
        judged = fail if fault.severity == "error" else warn
        path = report.paths.config / fault.file
        if path == report.paths.config:
            fix = "kvmd-cli init"
        else:
            fix = f"editor +{fault.line or 1} {path}" if fault.file.endswith(".toml") else f"ls -ld {path}"
        yield judged(str(fault), fix)
    for name in sorted(report.desired.stale):
        yield warn(f"{name} runs from its last good version", "kvmd-cli check")
    if not report.loaded.faults:
        yield ok(
            f"{count(len(report.desired.guests), 'guest')}, {count(len(report.desired.networks), 'network')}: no faults"
        )


def config_rights(report: HostReport) -> Iterator[Finding]:
    """Whoever can write the files becomes root, and kvmd refuses such files; secrets are root's alone."""
    clean = True
    for path, found in report.config_files.items():
        if found.uid not in report.trusted:
            clean = False
            yield fail(f"{path} belongs to uid {found.uid}, not to root", f"chown root:root {path}")
        elif found.mode & 0o022:
            clean = False
            yield fail(f"{path} can be written by others than root (mode {found.mode:04o})", f"chmod go-w {path}")
        elif "/secrets" in path and found.mode & 0o077:
            clean = False
            yield fail(f"{path} can be read by others than root (mode {found.mode:04o})", f"chmod go-rwx {path}")
    if clean:
        yield (
            ok(f"{len(report.config_files)} files and directories are root's")
            if report.config_files
            else skip("no file to look at")
        )


def unit(report: HostReport) -> Iterator[Finding]:
    """kvmd comes up with the host."""
    state = report.unit
    if not state.systemd:
        yield skip("systemd does not run this host")
    elif not state.installed:
        yield warn("kvmd.service is not installed: no guest starts with the host", "scripts/install")
    elif not state.enabled:
        yield warn("kvmd.service is not enabled: no guest starts with the host", "systemctl enable --now kvmd")
    else:
        yield ok("kvmd.service starts with the host")


def groups(report: HostReport) -> Iterator[Finding]:
    """The groups that roles and guests' uids refer to."""
    missing = [name for name in GROUPS if name not in report.accounts.groups]
    for name in missing:
        yield warn(f"there is no group {name}", f"groupadd --system {name} (systemd-sysusers makes all three)")
    if not missing:
        yield ok(f"groups {', '.join(GROUPS)} are there")


def uids(report: HostReport) -> Iterator[Finding]:
    """Guests' uids are nobody else's: a user or a container with the same uid could signal and trace a QEMU."""
    first, last = report.desired.daemon.qemu.uid_range
    accounts = report.accounts
    taken = sorted((uid, name) for name, uid in accounts.users.items() if first <= uid <= last)
    ranges = sorted(each for each in accounts.subordinate if each[1] <= last and first <= each[2])
    fix = f'qemu.uid_range = "{_free_range(report)}" in kvmd.toml'
    for uid, name in taken[:3]:
        yield fail(f"qemu.uid_range {first}-{last} has uid {uid} of user {name} (/etc/passwd)", fix)
    for owner, low, high in ranges[:3]:
        yield fail(f"qemu.uid_range {first}-{last} overlaps {low}-{high} of {owner} (/etc/subuid)", fix)
    if not taken and not ranges:
        yield ok(f"uids {first}-{last} are nobody's")


def _free_range(report: HostReport) -> str:
    """The next range of the same length that no user and no container has."""
    first, last = report.desired.daemon.qemu.uid_range
    width = last - first + 1
    low = first
    while blocked := [
        *(uid for uid in report.accounts.users.values() if low <= uid < low + width),
        *(high for _, start, high in report.accounts.subordinate if start < low + width and low <= high),
    ]:
        low = max(blocked) + 1
    return f"{low}-{low + width - 1}"


def needrestart(report: HostReport) -> Iterator[Finding]:
    """needrestart restarts services after an upgrade of a library, and a guest is a service."""
    match report.needrestart:
        case "absent":
            yield skip("needrestart is not installed")
        case "exempt":
            yield ok("needrestart leaves guests alone")
        case "would restart guests":
            yield warn(
                "needrestart may restart guests after an upgrade, as if the plug were pulled",
                f"echo '$nrconf{{override_rc}}{{qr(^kvmd-guest@)}} = 0;' > {NEEDRESTART_CONF}",
            )


def clock(report: HostReport) -> Iterator[Finding]:
    """Guests take their time from the host (adjtimex(2): STA_UNSYNC)."""
    if isinstance(report.clock, Unseen):
        yield skip(report.clock.reason)
    elif report.clock.synchronized:
        yield ok("the clock is synchronized" + (f" by {report.clock.service}" if report.clock.service else ""))
    elif report.clock.service:
        fix = "chronyc tracking" if report.clock.service == "chronyd" else f"systemctl status {report.clock.service}"
        yield warn(f"{report.clock.service} runs, and the clock is not synchronized", fix)
    else:
        yield warn("nobody keeps the clock: guests drift with this host", "apt-get install systemd-timesyncd")
