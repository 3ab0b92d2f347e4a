"""Devices of the host for guests that start and end: settled from fresh facts, taken and given back as actions."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from kvmd.actions import BindDevice, LoadModule
from kvmd.effects import modules
from kvmd.effects.apply import HostApplier
from kvmd.effects.observe import HostObserver
from kvmd.errors import Conflict, KvmdError, Refused
from kvmd.guest.lifecycle import ALIVE
from kvmd.guest.roster import Roster
from kvmd.plan import vfio
from kvmd.plan.vfio import Grant

_log = logging.getLogger(__name__)


class Passthrough:
    """What `Services.devices` is in a running kvmd."""

    def __init__(self, guests: Roster, observer: HostObserver, applier: HostApplier) -> None:
        self._guests = guests
        self._observer = observer
        self._applier = applier

    async def settle(self, name: str, macs: Mapping[str, str]) -> tuple[Grant, ...]:
        """The devices a guest that is off would get now; `macs` by NIC. Refused with the reason."""
        services = self._guests.services
        guest = services.declared(name)
        if not guest.passthrough:
            return ()
        facts = await self._observer.observe_devices(services.store.journalled(services.tree.boot_id()))
        supervisors = self._guests.supervisors
        alive = {other for other, found in supervisors.items() if found.state in ALIVE and other != name}
        settled = vfio.settle(
            name,
            guest,
            services.loaded.desired.host,
            facts,
            macs={(name, nic): mac for nic, mac in macs.items()},
            taken={address: owner for address, owner in facts.reservations.items() if owner in alive},
        )
        if settled.problems:
            first, *more = settled.problems
            shown = "".join(f"; {problem.message}" for problem in more)
            raise Refused(f"guest {name}: {first.message}{shown}", hint=first.hint)
        return settled.grants

    async def take(self, name: str, uid: int, grants: tuple[Grant, ...]) -> None:
        """Bind all of them for the guest, whose run is on record. KvmdError; what was taken is given back later."""
        await self._load_driver(name, grants[0].key)
        for grant in grants:
            action = BindDevice(
                device=grant.device.address,
                guest=name,
                key=grant.key,
                group=grant.group,
                uid=uid,
                driver=grant.device.driver,
                port=grant.port,
                why=f"{grant.key} of a guest that starts",
            )
            await self._applier.apply(action)
            _log.info("%s  (%s)", action.line(), action.why, extra={"KVMD_GUEST": name})

    async def _load_driver(self, name: str, key: str) -> None:
        """A guest may be started before any pass has seen its file."""
        found = modules.observe(self._guests.services.tree, [vfio.MODULE])[vfio.MODULE]
        if found.state == "available":
            why = f"guest {name} is given {key}"
            await self._applier.apply(LoadModule(name=vfio.MODULE, why=why))

    async def give_back(self, name: str) -> None:
        """Return what a guest that is off still holds. What fails is tried again by every pass."""
        services = self._guests.services
        journal = services.store.journalled(services.tree.boot_id())
        for action in vfio.releases(self._observer.reservations(journal), lambda owner: owner != name):
            try:
                await self._applier.apply(action)
            except Conflict as error:  # it starts again already, or its device is still closing
                _log.info("%s: %s", action.line(), error, extra={"KVMD_GUEST": name})
            except KvmdError as error:
                _log.error("%s failed: %s", action.line(), error, extra={"KVMD_GUEST": name})
            else:
                _log.info("%s  (%s)", action.line(), action.why, extra={"KVMD_GUEST": name})
