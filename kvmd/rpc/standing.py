"""Methods about what shall become of a guest (held, started with the host) and about what has (why, wait)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from kvmd.errors import Conflict, Refused
from kvmd.guest import why
from kvmd.guest.lifecycle import ALIVE, State
from kvmd.manager import Manager
from kvmd.rpc import results
from kvmd.rpc.registry import Call, Handler, Registry


class StandingMethods:
    """guest.hold, unhold, enable, disable, wait and why."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def add_to(self, registry: Registry) -> None:
        """Register them."""
        table: tuple[tuple[str, str, type[BaseModel], type[BaseModel], Handler[Any]], ...] = (
            ("guest.hold", "operator", results.HoldParams, results.GuestVerbResult, self.hold),
            ("guest.unhold", "operator", results.GuestParams, results.GuestVerbResult, self.unhold),
            ("guest.enable", "operator", results.GuestParams, results.GuestVerbResult, self.enable),
            ("guest.disable", "operator", results.GuestParams, results.GuestVerbResult, self.disable),
            ("guest.wait", "viewer", results.WaitParams, results.GuestVerbResult, self.wait),
            ("guest.why", "viewer", results.GuestParams, results.Why, self.why),
        )
        for name, role, params, result, handler in table:
            registry.method(name, role=role, params=params, result=result)(handler)

    async def hold(self, params: results.HoldParams, call: Call) -> results.GuestVerbResult:
        """Keep automatic hands off a guest: no start, restart or reconcile until unhold"""
        self._manager.guests.known(params.name)
        changed = self._manager.services.hold(params.name) is None
        self._manager.services.store.set_hold(params.name, call.actor, params.reason, self._manager.services.now())
        self._tell(params.name, "guest.held", call.actor, params.reason)
        return self._result(params.name, changed=changed)

    async def unhold(self, params: results.GuestParams, call: Call) -> results.GuestVerbResult:
        """Lift a hold"""
        self._manager.guests.known(params.name)
        changed = self._manager.services.hold(params.name) is not None
        self._manager.services.store.clear_hold(params.name)
        if changed:
            self._tell(params.name, "guest.unheld", call.actor, "")
        return self._result(params.name, changed=changed)

    async def enable(self, params: results.GuestParams, call: Call) -> results.GuestVerbResult:
        """Start a guest with the host from now on"""
        return self._enable(params.name, call.actor, on=True)

    async def disable(self, params: results.GuestParams, call: Call) -> results.GuestVerbResult:
        """Start a guest with the host no more"""
        return self._enable(params.name, call.actor, on=False)

    def _enable(self, name: str, actor: str, *, on: bool) -> results.GuestVerbResult:
        self._manager.guests.load_changes()
        auto, units, word = (
            self._manager.services.declared(name).start.auto,
            self._manager.services.units,
            str(on).lower(),
        )
        if auto is not None and auto is not on:
            raise Conflict(
                f"guest {name}: its file decides, with start.auto = {str(auto).lower()}",
                hint=f"kvmd-cli set {name} start.auto {word}",
            )
        if units is None and auto is None:
            raise Refused(
                f"guest {name}: without systemd only its file can say so", hint=f"kvmd-cli set {name} start.auto {word}"
            )
        changed = units is not None and units.enabled(name) is not on
        if units is not None and changed:
            units.enable(name, on=on)
            self._tell(name, "guest.enabled" if on else "guest.disabled", actor, "")
        return self._result(name, changed=changed)

    async def wait(self, params: results.WaitParams, _call: Call) -> results.GuestVerbResult:
        """Answer when a guest is up or off; timed-out when it is not in time"""
        supervisor = self._manager.guests.known(params.name)
        changed = not _reached(supervisor.state, params.until)
        await supervisor.reach(lambda state: _reached(state, params.until), params.timeout_s, params.until)
        return self._result(params.name, changed=changed)

    async def why(self, params: results.GuestParams, _call: Call) -> results.Why:
        """What happened to a guest, who asked for it, and what kvmd makes of it"""
        name, services = params.name, self._manager.services
        supervisor = self._manager.guests.known(name)
        life, run, end = supervisor.status.life, supervisor.record, services.store.last_end(name)
        wanted, hold, guest = services.store.wanted(name), services.hold(name), services.guest(name)
        cause = why.cause_of(life, end)
        since = services.now() - guest.restart.within if guest else 0.0
        return results.Why(
            name=name,
            state=life.state.value,
            since=supervisor.status.since or None,
            answer=why.answer(life, end),
            cause=cause.value if cause else None,
            begun_at=run.begun_at if run else end.begun_at if end else None,
            ended_at=end.time if end and life.state not in ALIVE else None,
            wanted=wanted.state if wanted else None,
            wanted_by=wanted.actor if wanted else None,
            wanted_because=wanted.reason if wanted else None,
            wanted_at=wanted.time if wanted else None,
            held_by=hold.actor if hold else None,
            held_because=hold.reason if hold else None,
            crashes=services.store.crashes_since(name, since) if guest else 0,
            crashes_allowed=guest.restart.limit if guest else 0,
            last_words=services.last_words(name) or None,
        )

    def _tell(self, name: str, kind: str, actor: str, reason: str) -> None:
        self._manager.services.publish(kind, name, actor, {"reason": reason} if reason else {})
        self._manager.guests.touch(name)

    def _result(self, name: str, *, changed: bool) -> results.GuestVerbResult:
        return results.GuestVerbResult(name=name, state=self._manager.guests.known(name).state.value, changed=changed)


def _reached(state: State, until: str) -> bool:
    return state is State.RUNNING if until == "running" else state not in ALIVE
