"""kvmd's nftables tables, read and replaced by nft(8). What is in them is decided in plan/nft.py and plan/guard.py.

The replacement is one `nft -f -`, which the kernel carries out wholly or not at all.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess

from kvmd.actions import ReplaceRuleset
from kvmd.errors import HostFailed
from kvmd.plan.firewall import forwarding_tables
from kvmd.plan.nfttable import read_fingerprint, remove_text

_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
_DEADLINE_S = 30.0  # the first use of a kind of rule loads its modules
_ABSENT = "No such file or directory"


def _run(arguments: tuple[str, ...], text: str = "") -> subprocess.CompletedProcess[str] | None:
    """nft with these arguments; None if it is not installed. HostFailed if it hangs."""
    program = shutil.which("nft", path=_PATH)
    if program is None:
        return None
    try:
        return subprocess.run(
            (program, *arguments),
            input=text,
            capture_output=True,
            text=True,
            env={"PATH": _PATH, "LC_ALL": "C"},
            timeout=_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        message = f"nft {' '.join(arguments)}: no answer within {_DEADLINE_S:g} s"
        raise HostFailed(message, hint="it was killed and is tried again at the next pass") from None
    except OSError as error:
        raise HostFailed(f"cannot run {program}: {error.strerror}") from None


def _refused(what: str, done: subprocess.CompletedProcess[str]) -> HostFailed:
    reason = re.sub(r"\s+", " ", done.stderr).strip()[:500] or f"exit code {done.returncode}"
    hint = (
        "kvmd needs CAP_NET_ADMIN"
        if "not permitted" in reason
        else "does this kernel have nf_tables with inet NAT, limit and bridge?"
    )
    return HostFailed(f"nft refused {what}: {reason}", hint=hint)


async def observe(table: str) -> str | None:
    """The fingerprint of a table of ours (plan/nfttable.py), None if it is not there. Raises HostFailed.

    Without nft nothing can have made the table: None too, and the plan's `replace` says what is missing.
    """
    done = await asyncio.to_thread(_run, ("-j", "list", "table", *table.split()))
    if done is None:
        return None
    if done.returncode:
        if _ABSENT in done.stderr:
            return None
        raise _refused(f"to list table {table}", done)
    try:
        return read_fingerprint(done.stdout)
    except ValueError as error:
        raise HostFailed(f"cannot read what nft says of table {table}: {error}") from None


async def replace(action: ReplaceRuleset) -> None:
    """Make the table exactly the action's text, or remove it for an empty one. Raises HostFailed."""
    done = await asyncio.to_thread(_run, ("-f", "-"), action.text or remove_text(action.table))
    if done is None:
        raise HostFailed("nft is not installed", hint="apt-get install nftables")
    if done.returncode:
        raise _refused(f"table {action.table}", done)


async def list_foreign() -> str | None:
    """Other tables that see forwarded packets, as JSON; None where they cannot be listed. Raises HostFailed.

    Chains are listed first: a table that only translates (Kubernetes' has tens of thousands of rules) is left out.
    """
    done = await asyncio.to_thread(_run, ("-j", "list", "chains"))
    if done is None or done.returncode:
        return None
    items: list[object] = []
    for table in forwarding_tables(done.stdout):
        listed = await asyncio.to_thread(_run, ("-j", "list", "table", *table.split()))
        if listed is not None and not listed.returncode:  # gone meanwhile: it drops nothing
            items += json.loads(listed.stdout)["nftables"]
    return json.dumps({"nftables": items})


async def list_ruleset() -> str:
    """All tables of the host as JSON, for `doctor` (plan/firewall.py reads it). Raises HostFailed."""
    done = await asyncio.to_thread(_run, ("-j", "list", "ruleset"))
    if done is None:
        raise HostFailed("nft is not installed", hint="apt-get install nftables")
    if done.returncode:
        raise _refused("to list the ruleset", done)
    return done.stdout
