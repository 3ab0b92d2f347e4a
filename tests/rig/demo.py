"""`scripts/demo`: the main job, on this machine, in front of your eyes. Also an integration test.

A kvmd with directories and a network namespace of its own makes the host ready from a directory of TOML files
(tests/rig/demofiles), boots three Linux guests, moves memory between two of them, is killed and comes back, and puts
everything back. Each step prints what it proves and fails loudly when it cannot. The guests are emulated (TCG), so that
it runs anywhere; hugepages and page merging are this machine's own and are put back.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvmd.errors import KvmdError
from kvmd.plan.ksm import KSM
from tests.rig import memoryscene as scene
from tests.rig.guestconsole import GuestConsole
from tests.rig.guestimage import cache, guest_kernel
from tests.rig.internet import HOST_ADDRESS, PAGE, SERVER_ADDRESS, internet
from tests.rig.kvmdhost import KvmdHost
from tests.rig.machinestate import Memory, Net, differences, machine_lock, processes_about
from tests.rig.netns import Namespace

FILES = Path(__file__).resolve().parent / "demofiles"
GUESTS = ("huge", "hungry", "idle")
HUGE_PAGES = 64
MOVED_BYTES = 64 * scene.MIB  # at least so much has to change hands
MIB = scene.MIB
PLAN_HAS_ACTIONS = 10  # exit code of `kvmd-cli plan`
INTERRUPTED = 130


class Failed(Exception):
    """A step did not prove what it is there to prove."""


class Demo:
    """The steps, in order; each uses what the ones before it left."""

    def __init__(self, host: KvmdHost) -> None:
        assert host.namespace
        self.host = host
        self.inside = Namespace(host.namespace)
        self.consoles: dict[str, GuestConsole] = {}
        self.addresses: dict[str, str] = {}
        self.memory_before = Memory.observe()
        self.net_before = Net.observe(self.inside)
        self._filling: list[scene.Working] = []
        self._begun = time.monotonic()
        self._number = 0

    # ---- telling ----

    def step(self, title: str) -> None:
        """A new step begins."""
        self._number += 1
        print(f"\n{self._number:2}. {title}  [{time.monotonic() - self._begun:.1f} s]", flush=True)

    def proved(self, text: str) -> None:
        """One thing that is now known to be so."""
        print(textwrap.fill(text, 116, initial_indent="    ok  ", subsequent_indent="        "), flush=True)

    def shows(self, text: str) -> None:
        """Output of a program, or a decision."""
        print(textwrap.indent(text.rstrip(), "    | "), flush=True)

    def cli(self, *arguments: str, expect: int = 0) -> str:
        """Run kvmd-cli in front of the reader."""
        print(f"    $ kvmd-cli {' '.join(arguments)}", flush=True)
        done = self.host.cli(*arguments, check=False)
        text = done.stdout + done.stderr
        if text.strip():
            self.shows(text)
        need(done.returncode == expect, f"kvmd-cli {arguments[0]} exited {done.returncode}, not {expect}")
        return done.stdout

    # ---- the steps ----

    def run(self) -> None:
        """All of it."""
        for step in (
            self.files,
            self.plan,
            self.apply,
            self.boot,
            self.network,
            self.hugepages,
            self.memory,
            self.nothing_to_do,
            self.killed,
            self.all_stopped,
        ):
            step()

    def files(self) -> None:
        """The directory of TOML files."""
        self.step("A host and its guests are a directory of text")
        self.host.start()
        self.proved("kvmd runs, with nothing to do yet; now somebody puts files into its directory")
        kernel, initrd = guest_kernel()
        words = {"DIR": self.host.base, "CACHE": cache(), "KERNEL": kernel, "INITRD": initrd}
        for source in sorted(FILES.rglob("*.toml")):
            text = re.sub("@([A-Z]+)@", lambda word: str(words[word[1]]), source.read_text())
            self.host.write(str(source.relative_to(FILES)), text)
        for name in ("hungry", "idle"):
            with (self.host.images / f"{name}.img").open("wb") as disk:
                disk.truncate(scene.CACHE_MIB * MIB)
        self.shows(
            "\n".join(sorted(str(path.relative_to(self.host.base)) for path in self.host.config.rglob("*.toml")))
        )
        self.cli("check")
        self.proved("no faults")
        self.host.guest("typo", "[memory]\nsise = '1GiB'\n")
        found = self.cli("check", expect=8)
        need("guests.d/typo.toml:2" in found and "memory.size" in found, "the misspelt key is not named")
        (self.host.config / "guests.d/typo.toml").unlink()
        self.proved("a misspelt key is told with file, line and what was meant")

    def plan(self) -> None:
        """What separates the host from the files."""
        self.step("kvmd says what it would do before it does it")
        self.cli("plan", expect=PLAN_HAS_ACTIONS)
        need(differences(self.memory_before, Memory.observe()) == [], "planning changed the host's memory settings")
        need(differences(self.net_before, Net.observe(self.inside)) == [], "planning changed the network")
        self.proved("a plan with reasons, and nothing changed yet")

    def apply(self) -> None:
        """Pages, knobs, network."""
        self.step("The host is made ready")
        self.cli("apply", "--yes")
        pages = Memory.observe()
        need(
            pages.pages() - self.memory_before.pages() == HUGE_PAGES or _free_pages() >= HUGE_PAGES,
            f"{HUGE_PAGES} pages of 2 MiB are not there",
        )
        self.proved(f"2 MiB pages: {self.memory_before.pages()} -> {pages.pages()}, read back from /sys")
        run = f"{KSM}/run"
        if run in pages.knobs:
            need(pages.knobs[run] == "1", "page merging does not run")
            self.proved(f"page merging: {self.memory_before.knobs[run]} -> 1")
        net = Net.observe(self.inside)
        need("kvlan" in net.links and "192.168.50.1/24" in net.links, f"no bridge with its address: {net.links}")
        need("masquerade" in net.nft and net.forwarding.strip() == "1", "no NAT")
        self.proved("bridge kvlan with 192.168.50.1/24, forwarding on, one nft table for NAT, DHCP and DNS by dnsmasq")
        self._empty_plan()

    def boot(self) -> None:
        """Three guests with leases."""
        self.step("Three Linux guests are booted")
        self.cli("start", *GUESTS)
        for name in GUESTS:
            self.consoles[name] = GuestConsole(self.host.run / f"guests/{name}/serial-console.sock")
        for name in GUESTS:
            ready = self.consoles[name].wait_ready(timeout_s=120)
            self.addresses[name] = self.consoles[name].wait_lease(timeout_s=60)[2]
            need(ready[1] == name, f"{name} says it is {ready[1]}")
        self.cli("list")
        leases = ", ".join(f"{name} {address}" for name, address in self.addresses.items())
        self.proved(f"userspace is up in all three, with leases: {leases}")
        uids = {Path(f"/proc/{self._pid(name)}").stat().st_uid for name in GUESTS}
        need(len(uids) == len(GUESTS) and 0 not in uids, f"the QEMUs run as {uids}")
        self.proved(f"each QEMU runs under a uid of its own: {', '.join(map(str, sorted(uids)))}")
        # What the memory step needs, while the network step runs anyway: page cache that the guests could spare.
        self._filling = [scene.fill_cache(self.consoles[name]) for name in ("hungry", "idle")]

    def network(self) -> None:
        """Between guests, and out."""
        self.step("They reach each other, and one reaches the internet")
        self._ping("huge", "hungry")
        page = self.consoles["huge"].check(f"timeout 20 wget -q -O - http://{SERVER_ADDRESS}/")
        self.shows(f"huge# wget -O - http://{SERVER_ADDRESS}/\n{page}")
        need(page == PAGE.format(client=HOST_ADDRESS), f"not the page, or not translated: {page}")
        self.proved(f"a page from a server in another namespace, which saw only the host's address {HOST_ADDRESS}")
        for filling in self._filling:
            filling.wait()
        self._ping("hungry", "idle")
        self._ping("idle", "huge")

    def hugepages(self) -> None:
        """The pages are really used."""
        self.step("One of them runs on hugepages")
        rss = _hugetlb_bytes(self._pid("huge"))
        need(rss == HUGE_PAGES * (2 << 20), f"{rss} bytes of huge's QEMU are in 2 MiB pages")
        self.proved(f"huge's QEMU has {rss // MIB} MiB in mappings with KernelPageSize: 2048 kB (/proc/PID/smaps)")
        need(_hugetlb_bytes(self._pid("idle")) == 0, "idle uses hugepages")
        seen = {guest["name"]: guest for guest in scene.status(self.host)["guests"]}["huge"]
        need(not seen["eligible"] and "hugepages" in seen["reason"], f"huge is ballooned: {seen}")
        self.proved(f'tuning leaves it alone: "{seen["reason"]}"')

    def memory(self) -> None:
        """From the idle guest to the starving one."""
        self.step("Memory goes where it is needed")
        host, pair = self.host, ("hungry", "idle")
        scene.until("both guests may be asked for memory", lambda: scene.all_movable(host, *pair), host, timeout_s=90)
        used = {name: console.memory()["available_kib"] // 1024 for name, console in self.consoles.items()}
        self.proved(f"hungry and idle have 512 MiB each and could spare {used['hungry']} and {used['idle']} MiB")
        since = time.time()
        small = scene.SmallHost(host)
        print(f'    $ edit host.toml: memory.reserve = "{small.reserve_bytes // MIB}MiB", kvmd-cli reconcile')
        settled = scene.until("both gave some", lambda: scene.both_gave(host, *pair), host, small=small)
        self._decisions("idle", since, "take")
        self.proved(f"the host was short, so both gave: {_sizes(settled)}")

        since = time.time()
        hunger = scene.starve(self.consoles["hungry"])
        print(f"    hungry# memactor hold {scene.HUNGER_MIB} rate={scene.HUNGER_MIB_PER_S}")
        moved = scene.until(
            "memory moved from idle to hungry",
            lambda: scene.moved(host, giver="idle", taker="hungry", start=settled, least_bytes=MOVED_BYTES),
            host,
            small=small,
        )
        self._decisions("idle", since, "take")
        self._decisions("hungry", since, "give")
        hunger.wait()
        need("held_mib" in self.consoles["hungry"].memory(), "hungry does not answer")
        self.proved(
            f"idle {settled['idle'] // MIB} -> {moved['idle'] // MIB} MiB, "
            f"hungry {settled['hungry'] // MIB} -> {moved['hungry'] // MIB} MiB; "
            f"hungry holds all the {scene.HUNGER_MIB} MiB it asked for"
        )

    def nothing_to_do(self) -> None:
        """The second plan."""
        self.step("A host that is as wanted plans nothing")
        self._empty_plan()

    def killed(self) -> None:
        """SIGKILL, and back."""
        self.step("kvmd is killed with SIGKILL, and no guest notices")
        pids = {name: self._pid(name) for name in GUESTS}
        births = {name: _start_time(pid) for name, pid in pids.items()}
        scene.until("no balloon is on its way", lambda: scene.settled(self.host, "hungry", "idle"), self.host)
        sizes = scene.sizes(self.host)
        self.host.kill()
        need(all(Path(f"/proc/{pid}").exists() for pid in pids.values()), "a guest died with kvmd")
        self.consoles["idle"].check(f"ping -c 1 -W 5 {self.addresses['hungry']}")
        self.proved("with no kvmd at all, idle still pings hungry")
        begun = time.monotonic()
        self.host.start()
        for name in GUESTS:
            self.host.wait_state(name, "running", 20)
        took = time.monotonic() - begun
        self.cli("list")
        now = {name: self._pid(name) for name in GUESTS}
        need(now == pids, f"other processes: {pids} -> {now}")
        need({name: _start_time(pid) for name, pid in now.items()} == births, "a pid was reused")
        self.proved(f"{took:.2f} s later the new kvmd knows all three, the same processes: {now}")
        scene.until("the sizes are read again", lambda: {"hungry", "idle"} <= scene.sizes(self.host).keys(), self.host)
        kept = scene.sizes(self.host)
        need(kept["idle"] < scene.GUEST_BYTES - MOVED_BYTES, f"idle has all its memory back: {_sizes(kept)}")
        self.proved(f"tuning goes on from the sizes it finds: {_sizes(sizes)} before, {_sizes(kept)} after")
        self._empty_plan()

    def all_stopped(self) -> None:
        """Polite stops, release, as before."""
        self.step("Everything is stopped, and the host is as before")
        for console in self.consoles.values():
            console.close()
        self.cli("stop", *GUESTS)
        for name in GUESTS:
            need("KVMD-GUEST POWERBUTTON" in self.host.serial(name), f"{name} was not asked to power off")
        self.proved("all three were asked by their power button and powered off")
        self.cli("host", "release", "--yes")
        self.host.terminate()
        found = differences(self.memory_before, Memory.observe())
        found += differences(self.net_before, Net.observe(self.inside))
        found += [f"still running: {line}" for line in processes_about(str(self.host.base))]
        need(not found, "not as before: " + "; ".join(found))
        self.proved("2 MiB pages, page merging, links, addresses, nft, forwarding: as before; no process is left")

    # ---- parts of steps ----

    def _pid(self, name: str) -> int:
        return int(self.host.show(name)["pid"])

    def _empty_plan(self) -> None:
        drift = [action["line"] for action in self.host.call("host.plan")["actions"]]
        if drift and all(f" {KSM}/" in line for line in drift):
            # The machine's only, so another program may turn it at any time; what is ours nobody else changes.
            self.shows("another program on this machine has changed page merging meanwhile: " + "; ".join(drift))
            self.cli("reconcile")
        self.cli("plan")
        need(self.host.call("host.plan")["actions"] == [], "there is something to do")
        self.proved("planning again finds nothing to do")

    def _ping(self, source: str, target: str) -> None:
        for whom in (self.addresses[target], f"{target}.demo.test"):
            self.consoles[source].check(f"ping -c 1 -W 5 {whom}")
        self.proved(f"{source} pings {target} at {self.addresses[target]} and by its name {target}.demo.test")

    def _decisions(self, name: str, since: float, action: str) -> None:
        """Those that were carried out; none of them is a failure."""
        found = [d for d in scene.decisions(self.host, name, since) if d["applied"] and d["action"] == action]
        need(bool(found), f"no decision to {action} is recorded for {name}")
        for one in found:
            text = f"{action} {name}: {one['from_bytes'] // MIB} -> {one['to_bytes'] // MIB} MiB, because {one['why']}"
            self.shows(textwrap.fill(text, 112, subsequent_indent="    "))


def need(condition: bool, otherwise: str) -> None:
    """The step fails unless this is so."""
    if not condition:
        raise Failed(otherwise)


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size // MIB} MiB" for name, size in sorted(sizes.items()) if name != "huge")


def _free_pages() -> int:
    pools = Memory.observe().pools
    return sum(pool.total - pool.used for pool in pools if pool.page_bytes == 2 << 20)


def _start_time(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _hugetlb_bytes(pid: int) -> int:
    """What a process has in mappings of 2 MiB pages (proc(5): such pages are not in Rss)."""
    total, is_huge = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "KernelPageSize":
            is_huge = value.split() == ["2048", "kB"]
        elif is_huge and key in ("Shared_Hugetlb", "Private_Hugetlb"):
            total += int(value.split()[0]) * 1024
    return total


def _last_words(host: KvmdHost) -> Iterator[str]:
    """The ends of all logs."""
    for path in (host.log, *sorted((host.state / "log").glob("*/*.log"))):
        if path.exists() and (lines := path.read_text(errors="replace").splitlines()):
            yield f"--- {path.relative_to(host.base)}"
            yield from lines[-(40 if path == host.log else 8) :]


@contextlib.contextmanager
def _put_back(memory: Memory) -> Iterator[None]:
    """Whatever happens, also Ctrl-C twice: the machine's pages and knobs are as they were."""
    try:
        yield
    finally:
        memory.restore()


@contextlib.contextmanager
def _stage() -> Iterator[KvmdHost]:
    """Directories and a namespace; at the end no guest, no process, no file is left of them."""
    with tempfile.TemporaryDirectory(prefix="kvmd-demo-", dir="/var/tmp") as base:
        host = KvmdHost(Path(base))
        try:
            yield host
        finally:
            host.close()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block inside, not its cleaning up."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _play() -> None:
    """Build the stage, play, strike it."""
    machine = Net.observe()
    with machine_lock(lambda: print("waiting for another run of kvmd's tests to end", flush=True)):
        memory = Memory.observe()
        with _put_back(memory), _stage() as host:
            assert host.namespace
            with internet(Namespace(host.namespace)):
                demo = Demo(host)
                try:
                    demo.run()
                except (Failed, AssertionError, KvmdError, OSError, subprocess.SubprocessError) as error:
                    print("\n".join(_last_words(host)), file=sys.stderr)
                    raise Failed(str(error)) from error
        found = differences(machine, Net.observe()) + differences(memory, Memory.observe())
    need(not found, "this machine is not as before: " + "; ".join(found))


def main() -> int:
    """Exit code: 0 all proved, 1 not, 130 interrupted."""
    if os.geteuid() != 0:
        print("demo: must run as root", file=sys.stderr)
        return 1
    begun = time.monotonic()
    # A daemon of our own in the terminal's foreground must not hear the Ctrl-C that ends the demo before we do.
    with _undisturbed():
        try:
            _play()
        except KeyboardInterrupt:
            print("\ndemo: interrupted; guests, namespaces and files are gone, pages are as they were", file=sys.stderr)
            return INTERRUPTED
        except Failed as error:
            print(f"\ndemo: FAILED: {error}", file=sys.stderr)
            return 1
    print(f"\nAll of it is proved, in {time.monotonic() - begun:.0f} s. This machine is as before.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
