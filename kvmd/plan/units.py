"""What a guest's unit has to say beyond the template, and which guests systemd starts at boot. Pure.

The template `kvmd-guest@.service` is one strict sandbox for all. What a file asks for beyond it becomes one drop-in,
each line with its key; a guest that needs nothing more has none. Changes of limits reach a running QEMU with the
daemon-reload, the rest its next start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvmd.actions import Action, Disruption, EnableGuest, WriteDropIn
from kvmd.config.guest import Guest
from kvmd.facts import Facts, GuestUnit
from kvmd.plan.vfio import memlock_bytes

HEADER = (
    "# Written by kvmd from guests.d/{name}.toml and replaced whenever that changes. Yours: another file beside this.\n"
)
TEMPLATE_STOP_S = 180  # KVMD_STOP_TIMEOUT_S of the template, the default of stop.timeout
STOP_MARGIN_S = 20  # for QEMU to write back and quit after the guest's time is up


def drop_in(name: str, guest: Guest) -> str:
    """50-kvmd.conf of one guest; "" when the template is enough."""
    unit = list(_unit_lines(guest))
    service = list(_service_lines(guest))
    if not unit and not service:
        return ""
    parts = [HEADER.format(name=name)]
    for section, lines in (("Unit", unit), ("Service", service)):
        if lines:
            parts.append(f"\n[{section}]\n" + "".join(f"# {key}\n{text}" for key, text in lines))
    return "".join(parts)


def plan_units(guests: Mapping[str, Guest], facts: Facts, *, prune: bool) -> tuple[Action, ...]:
    """Drop-ins and boot links as the files want them; nothing where guests are no units.

    What belongs to a guest whose file is gone is removed by a pass that prunes, once the guest is off.
    """
    if facts.units is None:
        return ()
    there = {unit.guest: unit for unit in facts.units}
    actions: list[Action] = []
    for name, guest in sorted(guests.items()):
        unit = there.get(name, GuestUnit(name))
        actions += _wanted(unit, drop_in(name, guest), guest.start.auto)
    if prune:
        alive = {life.name for life in facts.lives if life.alive}
        for name in sorted(there.keys() - guests.keys() - alive):
            actions += _gone(there[name])
    return tuple(actions)


def _wanted(unit: GuestUnit, text: str, auto: bool | None) -> Iterator[Action]:
    if unit.drop_in != text:
        why = "its unit needs more than the template" if text else "the template is enough for its unit"
        yield WriteDropIn(guest=unit.guest, text=text, why=why)
    if auto is not None and unit.enabled != auto:
        yield EnableGuest(guest=unit.guest, on=auto, why=f"start.auto = {str(auto).lower()}")


def _gone(unit: GuestUnit) -> Iterator[Action]:
    why = "its file is gone and pruning was asked for"
    if unit.enabled:
        yield EnableGuest(guest=unit.guest, on=False, why=why, disruption=Disruption.GUEST)
    if unit.drop_in:
        yield WriteDropIn(guest=unit.guest, text="", why=why, disruption=Disruption.GUEST)


def _unit_lines(guest: Guest) -> Iterator[tuple[str, str]]:
    """(key, lines) of [Unit]."""
    if guest.start.after:
        others = " ".join(f"kvmd-guest@{other}.service" for other in guest.start.after)
        yield "start.after", f"After={others}\n"


def _service_lines(guest: Guest) -> Iterator[tuple[str, str]]:
    """(key, lines) of [Service]; systemd.exec(5), systemd.resource-control(5)."""
    patience_s = int(float(guest.stop.timeout))
    if patience_s != TEMPLATE_STOP_S:
        total_s = patience_s + STOP_MARGIN_S
        yield "stop.timeout", f"Environment=KVMD_STOP_TIMEOUT_S={patience_s}\nTimeoutStopSec={total_s}s\n"
    if guest.stop.at_host_shutdown == "kill":
        yield "stop.at_host_shutdown", "Environment=KVMD_AT_HOST_SHUTDOWN=kill\n"
    user_nic = _user_nic(guest)
    if user_nic:
        # Both empty assignments take back what the template forbids.
        yield (
            user_nic,
            "PrivateNetwork=no\nIPAddressDeny=\nRestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n",
        )
    memlock = memlock_bytes(guest)
    if memlock is not None:
        # Any group as far as the cgroup goes; which one it is shows when it is bound. Its node is its uid's alone.
        yield (
            guest.passthrough[0],
            f"BindPaths=/dev/vfio\nDeviceAllow=/dev/vfio/vfio rw\nDeviceAllow=char-vfio rw\nLimitMEMLOCK={memlock}\n",
        )
    if guest.memory.lock:  # after the other: the last one counts
        yield "memory.lock", "LimitMEMLOCK=infinity\n"
    if guest.memory.guaranteed:
        yield "memory.guaranteed", f"MemoryLow={int(guest.memory.guaranteed)}\n"
    limits = guest.limits
    for key, directive, value in (
        ("memory_max", "MemoryMax", limits.memory_max),
        ("cpu_weight", "CPUWeight", limits.cpu_weight),
        ("io_weight", "IOWeight", limits.io_weight),
        ("tasks_max", "TasksMax", limits.tasks_max),
        ("oom_score_adjust", "OOMScoreAdjust", limits.oom_score_adjust),
    ):
        if value is not None:
            yield f"limits.{key}", f"{directive}={int(value)}\n"


def _user_nic(guest: Guest) -> str | None:
    """The key that gives the guest a user-mode NIC, whose sockets QEMU itself opens."""
    if not guest.nic and guest.machine.default_nic:
        return "no [nic.NAME], so one user-mode NIC (machine.default_nic)"
    return next((f"nic.{key}.type" for key, nic in sorted(guest.nic.items()) if nic.type == "user"), None)
