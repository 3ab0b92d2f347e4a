"""Two Linux guests and a host made small, so that the tuning agent has memory to move: for tests and the demo.

Each guest fills its page cache from a disk of its own and then idles: its QEMU holds the pages and the guest can spare
them. `SmallHost` sets `memory.reserve` so that the agent takes some from both; `starve` makes one of them need more
than it was left with. All figures of the host are read when they are used: it is the same scene on any machine.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvmd.tuning import constants as c
from tests.rig.guestconsole import GuestConsole
from tests.rig.guestfiles import linux
from tests.rig.kvmdhost import KvmdHost

MIB = 1 << 20
GUEST_BYTES = 512 * MIB
GUARANTEED_BYTES = 128 * MIB
CACHE_MIB = 320  # of page cache: what a guest could spare
RECLAIM_BYTES = 280 * MIB  # to be taken from both guests together when the host becomes small
HUNGER_MIB = 370  # more than a guest is left with by that, less than it has when nothing is taken
LEAST_BYTES = 100 * MIB  # taken from each of them at least, for the scene to go on
DRIFT_BYTES = 48 * MIB  # of other programs, before the reserve follows
HUNGER_MIB_PER_S = 25  # as fast as a neighbour can give under emulation
AMPLE = "512MiB"  # a reserve that leaves the agent nothing to do


def host_toml(*, mode: str = "apply", more: str = "") -> str:
    """host.toml for a host that is not small yet."""
    return f'[memory]\nreserve = "{AMPLE}"\n[tuning]\nmode = "{mode}"\n{more}'


def set_reserve(host: KvmdHost, reserve: str) -> None:
    """Change `memory.reserve` in host.toml, as an editor would, and let kvmd read it."""
    text = (host.config / "host.toml").read_text()
    host.write("host.toml", re.sub(r'^reserve = ".*"$', f'reserve = "{reserve}"', text, count=1, flags=re.MULTILINE))
    host.call("host.reconcile")


def guest_toml(host: KvmdHost, name: str, *, network: str | None = None) -> str:
    """A guest that can be ballooned; its disk is made, sparse: reading it fills the page cache all the same."""
    image = host.images / f"{name}.img"
    with image.open("wb") as disk:
        disk.truncate(CACHE_MIB * MIB)
    return linux(
        name,
        size=f"{GUEST_BYTES // MIB}MiB",
        network=network,
        memory=f'guaranteed = "{GUARANTEED_BYTES // MIB}MiB"\n',
        extra=f'[disk.data]\nfile = "{image}"\nformat = "raw"\ncache = "writeback"\n',
        cmdline="" if network else "kvmd.ip=none",
    )


def meminfo() -> Mapping[str, int]:
    """/proc/meminfo's sizes in bytes."""
    with open("/proc/meminfo") as lines:
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


class SmallHost:
    """Makes the host small by `memory.reserve`, and keeps it as small while other programs come and go.

    The reserve is chosen so that the host lacks RECLAIM_BYTES to the share up to which the agent reclaims. What
    programs other than this rig's guests take or free afterwards goes to the account of the reserve (`steady`), so
    that a busy machine is no other scene than an idle one.
    """

    def __init__(self, host: KvmdHost) -> None:
        self._host = host
        memory = meminfo()
        used = memory["MemTotal"] - memory.get("Hugetlb", 0) - memory["MemAvailable"]
        # The agent's arithmetic: usable = used + spare, and it takes RECLAIM_AIM * usable - spare.
        spare = int((c.RECLAIM_AIM * used - RECLAIM_BYTES) / (1 - c.RECLAIM_AIM))
        self.reserve_bytes = memory["MemAvailable"] - spare
        self._others = self._used_by_others()
        self._write()

    def steady(self) -> None:
        """Call it now and then while waiting."""
        drift = self._used_by_others() - self._others
        if abs(drift) >= DRIFT_BYTES:
            self._others += drift
            self.reserve_bytes -= drift
            self._write()

    def _write(self) -> None:
        set_reserve(self._host, f"{self.reserve_bytes // MIB}MiB")

    def _used_by_others(self) -> int:
        memory = meminfo()
        pids = (guest["pid"] for guest in self._host.call("guest.list")["guests"])
        ours = sum(_rss_bytes(pid) for pid in pids if pid is not None)
        return memory["MemTotal"] - memory.get("Hugetlb", 0) - memory["MemAvailable"] - ours


def _rss_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def sizes(host: KvmdHost) -> dict[str, int]:
    """What the balloon leaves each guest, as the agent last saw it; guests it has not read yet are absent."""
    return {g["name"]: g["actual_bytes"] for g in status(host)["guests"] if g["actual_bytes"] is not None}


def status(host: KvmdHost) -> Any:
    """tune.status"""
    return host.call("tune.status")


def decisions(host: KvmdHost, name: str, since: float = 0.0) -> list[Any]:
    """What was decided about a guest after that time, oldest first."""
    found = host.call("tune.explain", name=name, limit=200)["decisions"]
    return [one for one in found if one["time"] > since]


def until(
    what: str, found: Callable[[], Any], host: KvmdHost, *, small: SmallHost | None = None, timeout_s: float = 60.0
) -> Any:
    """The first true answer; AssertionError with the agent's picture when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (answer := found()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what}\n{picture(host)}")
        if small:
            small.steady()
        time.sleep(0.25)
    return answer


def picture(host: KvmdHost) -> str:
    """Host and guests as the agent sees them, and its last decisions, for a failure."""
    now = status(host)
    lines = [f"host {now['host_state']}: {now['host']}"]
    lines += [str(guest) for guest in now["guests"]]
    for guest in now["guests"]:
        lines += [str(one) for one in decisions(host, guest["name"])[-6:]]
    return "\n".join(lines)


def all_movable(host: KvmdHost, *names: str) -> bool:
    """May the agent take from all of them now?"""
    guests = {guest["name"]: guest for guest in status(host)["guests"]}
    return all(name in guests and guests[name]["eligible"] for name in names)


def settled(host: KvmdHost, *names: str) -> bool:
    """No balloon of these guests is on its way."""
    guests = [guest for guest in status(host)["guests"] if guest["name"] in names]
    return all(abs(guest["actual_bytes"] - guest["target_bytes"]) < MIB for guest in guests)


def both_gave(host: KvmdHost, *names: str) -> dict[str, int]:
    """The sizes once something was taken from all of them and the host is out of need; before that nothing."""
    now = {name: size for name, size in sizes(host).items() if name in names}
    gave = all(size <= GUEST_BYTES - LEAST_BYTES for size in now.values())
    return now if gave and settled(host, *names) and status(host)["host_state"] in ("OK", "SOFT") else {}


def moved(host: KvmdHost, *, giver: str, taker: str, start: Mapping[str, int], least_bytes: int) -> dict[str, int]:
    """The sizes once the one has so much less, and the other so much more, than at the start; before that nothing."""
    now = sizes(host)
    enough = now[giver] <= start[giver] - least_bytes and now[taker] >= start[taker] + least_bytes
    return now if enough else {}


class Working:
    """A command that runs in a guest in the background."""

    def __init__(self, console: GuestConsole, command: str, *, timeout_s: float = 150.0) -> None:
        self._console, self._command, self._timeout_s = console, command, timeout_s
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._console.check(self._command, self._timeout_s)
        except (AssertionError, OSError) as error:
            self._error = error

    def wait(self) -> None:
        """Until it is done; what went wrong is raised."""
        self._thread.join(self._timeout_s + 5)
        if self._error:
            raise self._error
        assert not self._thread.is_alive(), f"{self._command} does not end"


def fill_cache(console: GuestConsole) -> Working:
    """Read the guest's disk once."""
    return Working(console, "dd if=/dev/vda of=/dev/null bs=1M")


def starve(console: GuestConsole) -> Working:
    """Take HUNGER_MIB at HUNGER_MIB_PER_S; done when the guest holds it all."""
    return Working(console, f"memactor hold {HUNGER_MIB} rate={HUNGER_MIB_PER_S}")
