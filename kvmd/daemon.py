"""kvmd itself: builds its objects from the bottom to the top, runs them in one task group, and goes.

Stopping is the same as crashing: SIGTERM ends this process within a second and touches no guest; the next start
adopts what runs. READY=1 is sent once the host is prepared, WATCHDOG=1 as long as the event loop turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmd import __version__
from kvmd.effects import files, systemd
from kvmd.effects.apply import HostApplier
from kvmd.effects.dnsmasq import Dnsmasqs
from kvmd.effects.handover import Asking, HandoverServer, listen_private
from kvmd.effects.history import History
from kvmd.effects.linkwatch import watch_links
from kvmd.effects.netlink import Netlink
from kvmd.effects.observe import HostObserver
from kvmd.effects.statelock import lock_state
from kvmd.effects.store import Store
from kvmd.effects.sysfs import HostTree
from kvmd.effects.uplink import boot_s
from kvmd.errors import Conflict, KvmdError
from kvmd.guest.roster import Roster
from kvmd.guest.services import Publish, Services
from kvmd.manager import Manager
from kvmd.paths import CONFIG_DIR, RUN_DIR, STATE_DIR, Paths
from kvmd.rpc.auth import resolve
from kvmd.rpc.builtin import add_builtin
from kvmd.rpc.connection import ServerLimits
from kvmd.rpc.events import EventHub
from kvmd.rpc.listen import listen_unix
from kvmd.rpc.methods import Methods
from kvmd.rpc.networks import NetworkMethods
from kvmd.rpc.peers import find_group, find_user
from kvmd.rpc.protocol import Limits
from kvmd.rpc.registry import Registry
from kvmd.rpc.server import Server
from kvmd.rpc.standing import StandingMethods

if TYPE_CHECKING:
    from kvmd.tuning.agent import Agent

_log = logging.getLogger(__name__)
FLUSH_S = 0.5  # history is telemetry: half a second of it may be lost with the power
PRUNE_S = 600.0
ROTATE_S = 20.0  # a guest that writes 1 MiB/s to its console overshoots its cap by 20 MiB at most
RETRY_S = 0.2  # between two tries to take a NIC out of a bridge
REPAIR_S = 5.0  # between two passes that nobody asked for: whoever fights over a bridge is fought slowly


class Daemon:
    """All objects of one kvmd and their life."""

    def __init__(self, paths: Paths, log_level: str | None = None) -> None:
        self._paths = paths
        self._log_level = log_level  # None: as kvmd.toml says
        self._started_at = Services.now()

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. KvmdError when it cannot even begin (another kvmd, state of a newer version)."""
        paths = self._paths
        os.umask(0o077)
        for directory, mode in paths.directories:
            files.ensure_dir(directory, mode)
        passed = systemd.passed_sockets()
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock_state(paths.state))
            api = passed.get("kvmd.sock") or stack.enter_context(contextlib.closing(listen_unix(paths.api_socket))).sock
            launch = passed.get("launch.sock") or listen_private(paths.launch_socket)
            store = stack.enter_context(contextlib.closing(Store(paths.state)))
            history = stack.enter_context(contextlib.closing(History(paths.state, now=Services.now())))
            await self._serve(api, launch, store, history)

    async def _serve(self, api: socket.socket, launch: socket.socket, store: Store, history: History) -> None:
        stopping = asyncio.Event()
        reloading = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        loop.add_signal_handler(signal.SIGHUP, reloading.set)
        async with Netlink() as netlink, asyncio.TaskGroup() as group:
            tree = HostTree()
            hub = EventHub(
                lambda cursor, limit: history.events_since(cursor, limit=limit),
                cursor=history.cursor,
                oldest=history.oldest_cursor,
            )
            agent = LateAgent()
            services = Services(
                paths=self._paths,
                store=store,
                tree=tree,
                netlink=netlink,
                units=None,
                publish=_publisher(hub, history, agent),
            )
            dnsmasqs = Dnsmasqs(self._paths.run, self._paths.state)
            applier = HostApplier(tree, netlink, dnsmasqs, store)
            guests = Roster(services, lambda work, name: group.create_task(work, name=name))
            manager = Manager(guests, HostObserver(tree, netlink, dnsmasqs, applier.trials), applier)
            wish = guests.load().desired.daemon
            logging.getLogger("kvmd").setLevel((self._log_level or wish.log.level).upper())
            services.units = systemd.Units() if _with_units(wish.qemu.supervisor) else None
            dnsmasqs.units = systemd.Units() if systemd.supervised() else None
            agent.make = lambda: _make_agent(manager, applier, history)
            services.usage = lambda: history.usage(Services.now())
            registry = Registry()
            add_builtin(registry, hub, version=__version__)
            Methods(manager, agent, started_at=self._started_at).add_to(registry)
            StandingMethods(manager).add_to(registry)
            NetworkMethods(manager).add_to(registry)
            server = Server(registry, _access(manager), limits=_limits(manager))
            await guests.recover()
            tasks = [
                group.create_task(
                    HandoverServer(launch, partial(_hand_over, guests), guests.take_up).run(), name="handover"
                ),
                group.create_task(server.serve(api), name="rpc"),
                group.create_task(self._keep_history(guests, history), name="history"),
                group.create_task(_watchdog(), name="watchdog"),
            ]
            tasks.append(group.create_task(_guard_uplinks(manager), name="uplinks"))
            await guests.learn()
            # Guests' units are ordered after ours: we have to be ready before their starts can end.
            manager.prepared = lambda: systemd.notify("READY=1")
            await _reconcile(manager, "boot")
            systemd.notify("READY=1", f"STATUS={len(guests.supervisors)} guests")
            _log.info("kvmd %s is ready", __version__)
            gc.freeze()  # what is there now stays: no collection has to look at it again
            gc.enable()
            mender = Mender(manager)
            tasks.append(group.create_task(mender.run(), name="mender"))
            tasks.append(group.create_task(dnsmasqs.watch(mender.dnsmasq_ended), name="dnsmasq"))
            tasks.append(group.create_task(watch_links(mender.links_changed), name="links"))
            tasks.append(group.create_task(agent().run(), name="tuning"))
            tasks.append(group.create_task(_sample(manager, agent, history), name="samples"))
            tasks.append(group.create_task(_reload(reloading, manager, server), name="reload"))
            await stopping.wait()
            systemd.notify("STOPPING=1")
            guests.let_go()
            for task in tasks:
                task.cancel()

    async def _keep_history(self, guests: Roster, history: History) -> None:
        """Write what is buffered; drop what is too old or too much, of events and of guests' logs."""
        loop = asyncio.get_running_loop()
        next_prune = next_rotation = loop.time()
        while True:
            await asyncio.sleep(FLUSH_S)
            history.flush()
            if loop.time() >= next_rotation:
                next_rotation = loop.time() + ROTATE_S
                guests.services.memory_ran_out()  # so that an end is judged by what was before it
                for name in guests.supervisors:
                    guests.services.rotate_logs(name)
            if loop.time() >= next_prune:
                next_prune = loop.time() + PRUNE_S
                wish = guests.services.loaded.desired.daemon.history
                history.prune(Services.now(), wish.events, wish.max_size, wish.samples)


class LateAgent:
    """The tuning agent, loaded and made at its first use: a kvmd that comes back has to answer first."""

    def __init__(self) -> None:
        self.make: Callable[[], Agent] | None = None
        self._agent: Agent | None = None

    def __call__(self) -> Agent:
        if self._agent is None:
            assert self.make is not None
            self._agent = self.make()
        return self._agent

    def wake(self) -> None:
        """Look at once, if it looks already."""
        if self._agent:
            self._agent.wake()


def _make_agent(manager: Manager, applier: HostApplier, history: History) -> Agent:
    from kvmd.tuning.agent import Agent
    from kvmd.wiring import GuestMemory

    memory = GuestMemory(manager, applier)
    return Agent(memory, memory, history, memory.settings)


async def _sample(manager: Manager, agent: LateAgent, history: History) -> None:
    """Keep what each guest needs, for admission."""
    from kvmd.wiring import Sampler

    await Sampler(manager, agent(), history).run()


def _publisher(hub: EventHub, history: History, agent: LateAgent) -> Publish:
    """Where everything that happens is told: to the history, to subscribers, to the agent."""

    def publish(kind: str, guest: str | None, actor: str | None, data: Mapping[str, Any]) -> None:
        text = json.dumps(data, default=str)
        hub.publish(history.append(time=Services.now(), type=kind, guest=guest, actor=actor, data=text))
        if kind == "guest.running":
            agent.wake()

    return publish


async def _hand_over(guests: Roster, asking: Asking) -> None:
    """A launcher came: it asks for a guest, or says that a guest's unit is being stopped."""
    known = asking.name in guests.services.loaded.desired.guests or asking.name in guests.supervisors
    if asking.stop and known:
        guests.supervisor(asking.name).unit_stops(asking)
    elif known:
        await guests.supervisor(asking.name).asked(asking)
    else:
        asking.refuse(f"no guest is called {asking.name}")


async def _guard_uplinks(manager: Manager) -> None:
    """For ever: undo each uplink's trial at its deadline, also one that a kvmd before this one began."""
    trials = manager.trials
    while True:
        trials.changed.clear()
        await manager.undo_uplinks()
        pending = trials.pending()
        try:
            async with asyncio.timeout(max(RETRY_S, pending[0].deadline_s - boot_s()) if pending else None):
                await trials.changed.wait()
        except TimeoutError:
            continue


class Mender:
    """Reconciles when something of ours ended or changed without us; never more often than every REPAIR_S."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._wanted = asyncio.Event()
        self._not_before = 0.0

    def dnsmasq_ended(self, network: str, retry_in_s: float) -> None:
        """A network's DHCP server ended by itself."""
        _log.error("network %s: dnsmasq ended; kvmd starts it again in %g s", network, retry_in_s)
        self._manager.services.publish("network.degraded", None, None, {"network": network, "reason": "dnsmasq ended"})
        self._not_before = asyncio.get_running_loop().time() + retry_in_s
        self._wanted.set()

    def links_changed(self) -> None:
        """Some link came, went or changed."""
        self._wanted.set()

    async def run(self) -> None:
        """For ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wanted.wait()
            await asyncio.sleep(max(0.0, self._not_before - loop.time()))
            self._wanted.clear()
            if self._manager.services.loaded.desired.networks:
                await _reconcile(self._manager, "kvmd")
            self._not_before = loop.time() + REPAIR_S


def _with_units(supervisor: str) -> bool:
    """Whether guests are born by systemd, for `qemu.supervisor`."""
    return systemd.supervised() if supervisor == "auto" else supervisor == "systemd"


async def _reconcile(manager: Manager, actor: str) -> None:
    """A pass whose failure must not stop kvmd: guests and the API go on."""
    try:
        report = await manager.reconcile(actor)
    except KvmdError as error:
        _log.error("reconcile: %s", error)
        return
    for problem in report.plan.problems:
        if problem.needs:
            continue  # nothing a pass could do better; `kvmd-cli plan` shows it
        _log.warning("%s: %s", problem.subject, problem.message)


async def _reload(reloading: asyncio.Event, manager: Manager, server: Server) -> None:
    """SIGHUP: read the files again and reconcile."""
    while True:
        await reloading.wait()
        reloading.clear()
        await _reconcile(manager, "reload")
        server.set_access(_access(manager))


async def _watchdog() -> None:
    """Tell systemd that the loop turns."""
    interval = systemd.watchdog_interval_s()
    while interval:
        systemd.notify("WATCHDOG=1")
        await asyncio.sleep(interval)


def _access(manager: Manager) -> Any:
    wish = manager.services.loaded.desired.daemon.access
    access, unknown = resolve(
        admins=wish.admins,
        operators=wish.operators,
        viewers=wish.viewers,
        find_user=find_user,
        find_group=find_group,
    )
    if unknown:
        _log.warning("kvmd.toml: access: nobody is called %s on this host", ", ".join(unknown))
    return access


def _limits(manager: Manager) -> ServerLimits:
    wish = manager.services.loaded.desired.daemon.limits
    return ServerLimits(
        connections=wish.connections, in_flight=wish.in_flight, peer=Limits(request_bytes=int(wish.request_size))
    )


def parser() -> argparse.ArgumentParser:
    """The command line of `kvmd`."""
    arguments = argparse.ArgumentParser(prog="kvmd", description="One Linux KVM host and its guests.")
    arguments.add_argument("--config-dir", type=Path, default=CONFIG_DIR)
    arguments.add_argument("--state-dir", type=Path, default=STATE_DIR)
    arguments.add_argument("--run-dir", type=Path, default=RUN_DIR)
    arguments.add_argument("--log-dir", type=Path, default=None, help="default: /var/log/kvmd, or STATE_DIR/log")
    arguments.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="default: log.level")
    arguments.add_argument("--version", action="version", version=f"kvmd {__version__}")
    return arguments


def main() -> int:
    """Run the daemon in the foreground, or one command that needs none (`kvmd check`). Exit codes as `kvmd-cli`."""
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        os.execv(sys.executable, [sys.executable, "-P", "-m", "kvmd.cli.offline", *sys.argv[1:]])
    options = parser().parse_args()
    logging.basicConfig(level=logging.WARNING, handlers=[systemd.log_handler()])
    paths = Paths.of(options.config_dir, options.state_dir, options.run_dir, options.log_dir)
    logging.getLogger("kvmd").setLevel((options.log_level or "info").upper())  # until kvmd.toml is read
    try:
        asyncio.run(Daemon(paths, options.log_level).run())
    except Conflict as error:
        sys.stderr.write(f"kvmd: {error.message}\n")
        return error.exit_code
    except KvmdError as error:
        _log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
