"""Passes of kvmd on the real kernel, each by a process of its own that is gone afterwards, or killed on the way.

    with real_host() as host:
        host.write("host.toml", ...)
        host.run(apply)                     # what a person's `apply` does, in a new kvmd
        host.run(apply, dies_at=3)          # SIGKILL at the third step: a record written, an effect done

The manager is the real one on real effects, in a network namespace; there are no guests. Pages and knobs are the
whole machine's: hold `machine_lock`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from kvmd.actions import Disruption, HostAction
from kvmd.effects import files
from kvmd.effects.apply import HostApplier
from kvmd.effects.dnsmasq import Dnsmasqs
from kvmd.effects.netlink import Netlink
from kvmd.effects.observe import HostObserver
from kvmd.effects.statelock import lock_state
from kvmd.effects.store import Store
from kvmd.effects.sysfs import HostTree
from kvmd.guest.roster import Roster
from kvmd.guest.services import Services
from kvmd.manager import Manager
from kvmd.paths import Paths
from tests.rig.netns import Namespace, inside, private_namespace

Work = Callable[[Manager], Awaitable[Any]]
ALL = frozenset(Disruption)
importlib.import_module("pyroute2.iproute.linux")  # half a second that no child has to spend


class _Mortal(HostApplier):
    """Dies by SIGKILL at one of its steps: behind each record in the journal, and behind each effect."""

    left: list[int]

    async def apply(self, action: HostAction) -> None:
        await super().apply(action)
        self._step()

    def _journal(self, key: str, original: str, new: str, why: str) -> None:
        super()._journal(key, original, new, why)
        self._step()

    def _step(self) -> None:
        self.left[0] -= 1
        if self.left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class RealHost:
    """Directories and a namespace; a kvmd only while `run` lasts."""

    def __init__(self, base: Path, namespace: Namespace) -> None:
        self.paths = Paths(base / "etc", base / "state", base / "run", base / "log")
        self.namespace = namespace
        self.events: list[tuple[str, Any]] = []  # what the last run published
        for directory in (self.paths.config / "guests.d", self.paths.config / "networks.d"):
            directory.mkdir(parents=True)

    def write(self, name: str, text: str | None) -> None:
        """A file of the configuration; None removes it."""
        path = self.paths.config / name
        if text is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(text)
            path.chmod(0o644)

    def forget(self) -> None:
        """kvmd as it was before its first start; the host must have been released."""
        shutil.rmtree(self.paths.state, ignore_errors=True)

    def run(self, work: Work, *, dies_at: int = 0) -> Any:
        """What `work` returns, through JSON; None if it was killed. AssertionError with the reason if it failed."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            answer: dict[str, Any] = {}
            try:
                with inside(self.namespace):
                    answer = asyncio.run(self._live(work, dies_at))
            except BaseException as error:
                answer = {"failed": repr(error)}
            finally:
                with os.fdopen(writer, "w") as pipe:
                    pipe.write(json.dumps(answer))
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
        if dies_at and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return None
        answer = json.loads(text)
        assert "failed" not in answer, answer["failed"]
        self.events = [tuple(event) for event in answer["events"]]
        return answer["result"]

    async def _live(self, work: Work, dies_at: int) -> dict[str, Any]:
        os.umask(0o077)
        for directory, mode in self.paths.directories:
            files.ensure_dir(directory, mode)
        events: list[tuple[str, Any]] = []
        with lock_state(self.paths.state), contextlib.closing(Store(self.paths.state)) as store:
            async with Netlink() as netlink, asyncio.TaskGroup() as group:
                tree, dnsmasqs = HostTree(), Dnsmasqs(self.paths.run, self.paths.state)
                services = Services(
                    paths=self.paths,
                    store=store,
                    tree=tree,
                    netlink=netlink,
                    units=None,
                    publish=lambda kind, _guest, _actor, data: events.append((kind, dict(data))),
                )
                applier = _Mortal(tree, netlink, dnsmasqs, store)
                applier.left = [dies_at]

                def spawn(task: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
                    return group.create_task(task, name=name)

                guests = Roster(services, spawn)
                manager = Manager(guests, HostObserver(tree, netlink, dnsmasqs, applier.trials), applier)
                guests.load()
                await guests.recover()
                await guests.learn()
                result = await work(manager)
        return {"result": result, "events": events}


async def plan(manager: Manager) -> dict[str, list[str]]:
    """Lines of a person's plan, what anyone else's pass would leave to others, and problems."""
    shown = await manager.plan(retake=True)
    return {
        "lines": [action.line() for action in shown.actions],
        "yielded": [knob.path for knob in (await manager.plan()).yielded],
        "problems": [problem.message for problem in shown.problems],
    }


async def apply(manager: Manager) -> list[str]:
    """A person's apply: what was done. AssertionError when something failed."""
    return _done((await manager.apply(ALL, "test", prune=True)).outcomes)


async def reconcile(manager: Manager) -> list[str]:
    """What cron does."""
    return _done((await manager.reconcile("test")).outcomes)


async def release(manager: Manager) -> list[str]:
    """What was put back."""
    return (await manager.release("test"))[0]


def _done(outcomes: Any) -> list[str]:
    failed = [f"{one.action.line()}: {one.error}" for one in outcomes if one.error]
    assert not failed, failed
    return [one.action.line() for one in outcomes]


@contextlib.contextmanager
def real_host() -> Iterator[RealHost]:
    """A RealHost that leaves no directory, namespace or server behind."""
    base = Path(tempfile.mkdtemp(prefix="kvmd-test-", dir="/var/tmp"))
    base.chmod(0o755)
    try:
        with private_namespace("real") as namespace:
            yield RealHost(base, namespace)
    finally:
        shutil.rmtree(base, ignore_errors=True)
