"""What a guest's file wants run when its TAP comes and when the guest has gone, remembered in between.

The record is written before the script is run and forgotten after the other one was: a kvmd that is killed anywhere
between finds it, and runs the downscript that is due. By then the TAP is gone, unless it was there before the guest.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable

from kvmd.effects import programs
from kvmd.effects.records import EffectKind, tap_script_key
from kvmd.effects.store import Store
from kvmd.errors import KvmdError
from kvmd.facts import JournalEntry

_log = logging.getLogger(__name__)


class TapScripts:
    """The scripts of all guests' TAPs. `boot_id` is asked each time."""

    def __init__(self, store: Store, boot_id: Callable[[], str]) -> None:
        self._store = store
        self._boot_id = boot_id
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def up(self, guest: str, nic: str, tap: str, *, script: str | None, downscript: str | None) -> None:
        """Run `script TAP`. Raises what programs.run raises; `downscript` is due from here on, also then."""
        for program in filter(None, (script, downscript)):
            programs.check_program(program)
        key = tap_script_key(guest, nic)
        self._store.journal(key, downscript or "", tap, self._boot_id(), f"TAP {tap} of guest {guest}")
        if script:
            await programs.run((script, tap))
            _log.info("guest %s: ran %s %s", guest, script, tap, extra={"KVMD_GUEST": guest})

    async def down(self, guest: str) -> None:
        """Run every downscript that is due for a guest that has ended. One that fails is told, and not run again."""
        async with self._turns[guest]:
            for entry in self._due(guest):
                if entry.original:
                    try:
                        await programs.run((entry.original, entry.new))
                        _log.info("guest %s: ran %s %s", guest, entry.original, entry.new, extra={"KVMD_GUEST": guest})
                    except KvmdError as error:
                        _log.error("guest %s: %s", guest, error, extra={"KVMD_GUEST": guest})
                self._store.forget(entry.key)

    def guests(self) -> tuple[str, ...]:
        """Guests for which a downscript is due once they have ended."""
        return tuple(sorted({entry.subject.partition(":")[0] for entry in self._due(None)}))

    def _due(self, guest: str | None) -> tuple[JournalEntry, ...]:
        found = (e for e in self._store.journalled(self._boot_id()) if e.kind == EffectKind.TAP_SCRIPT)
        return tuple(e for e in found if guest is None or e.subject.partition(":")[0] == guest)
