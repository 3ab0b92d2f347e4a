"""What a run was started with, whatever its guest's file says now: read from the run's record."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from kvmd.config.guest import DEFAULT_PAGE_SIZE
from kvmd.effects.records import GuestRun
from kvmd.units import CpuSet


def started_config(run: GuestRun) -> Mapping[str, Any]:
    """The guest's tables as they were when it was started; empty when the record is older than that."""
    try:
        found = json.loads(run.config_text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def started_pages(run: GuestRun) -> int | None:
    """Bytes of a hugepage of the running QEMU's memory; None when it has none, whatever its file asks for.

    A guest whose pages were missing runs without (memory.fallback): its command line says which it is.
    """
    memory = started_memory(run)
    backend = next((word for word in run.argv if word.startswith('{"qom-type":"memory-backend')), None)
    if memory.get("backing") not in ("hugepages", "file") or (backend and '"memory-backend-ram"' in backend):
        return None
    page = memory.get("page_size") or (DEFAULT_PAGE_SIZE if memory["backing"] == "hugepages" else None)
    return int(page) if page else None


def started_nics(run: GuestRun) -> tuple[str, ...]:
    """Names of the cards a run was started with."""
    return _nic_names(run.config_text)


@functools.lru_cache(maxsize=512)
def _nic_names(config_text: str) -> tuple[str, ...]:
    try:
        found = json.loads(config_text or "{}").get("nic", {})
    except (ValueError, AttributeError):
        return ()
    return tuple(found) if isinstance(found, dict) else ()


def started_memory(run: GuestRun) -> Mapping[str, Any]:
    """The [memory] table of `started_config`: looked at for every guest at every tick of the tuning agent."""
    return _memory_table(run.config_text)


def started_nodes(run: GuestRun) -> CpuSet | None:
    """cpu.nodes as it was when the guest was started."""
    found = started_config(run).get("cpu", {}).get("nodes")
    return CpuSet.parse(found) if isinstance(found, str) else None


@functools.lru_cache(maxsize=512)
def _memory_table(config_text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(config_text or "{}").get("memory", {})
    except (ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}
