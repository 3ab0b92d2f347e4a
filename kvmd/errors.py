"""Every failure kvmd reports, as a closed list of classes.

A message names what failed, on what and with which value; the hint says what to do next. The slug is the
API: it reaches JSON-RPC clients as `data.slug` and never changes. Exit codes are those `kvmd-cli` promises.
Nothing here imports anything, so the client can use it without paying for the daemon's dependencies.
"""

from __future__ import annotations

TYPE_CHECKING = False  # the client must not pay for importing typing; type checkers take this for true
if TYPE_CHECKING:
    from typing import Any


class KvmdError(Exception):
    """Root of all reported failures.

    `slug` identifies the kind in JSON, `rpc_code` is the JSON-RPC 2.0 error code, `exit_code` what
    `kvmd-cli` returns. `details` must be JSON values.
    """

    slug: str = "failed"
    rpc_code: int = -32000
    exit_code: int = 1

    def __init__(self, message: str, *, hint: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details: dict[str, Any] = details

    def to_data(self) -> dict[str, Any]:
        """The `data` member of a JSON-RPC error object."""
        return {"slug": self.slug, "hint": self.hint, "details": self.details}


class NotFound(KvmdError):
    """No guest, network, file or device of that name."""

    slug = "not-found"
    rpc_code = -32004
    exit_code = 3


class Conflict(KvmdError):
    """Asked for something the present state does not allow (already running, image in use, busy)."""

    slug = "conflict"
    rpc_code = -32005
    exit_code = 4


class Refused(KvmdError):
    """A rule says no (admission, placement, missing capability); the message carries the arithmetic."""

    slug = "refused"
    rpc_code = -32006
    exit_code = 4


class NotSupported(KvmdError):
    """Known to the model, not done by this version, this QEMU or this kernel."""

    slug = "not-supported"
    rpc_code = -32007
    exit_code = 4


class Denied(KvmdError):
    """The peer's role does not allow the method, or a path lies outside what was declared."""

    slug = "denied"
    rpc_code = -32003
    exit_code = 5


class Unreachable(KvmdError):
    """Daemon or guest does not answer."""

    slug = "unreachable"
    rpc_code = -32008
    exit_code = 6


class TimedOut(KvmdError):
    """Asked, and the deadline passed."""

    slug = "timed-out"
    rpc_code = -32009
    exit_code = 7


class ConfigInvalid(KvmdError):
    """One or more faults in the files; `details["faults"]` lists them as file, line, key, message."""

    slug = "config-invalid"
    rpc_code = -32010
    exit_code = 8


class PartlyFailed(KvmdError):
    """Some of many failed; `details["failed"]` says which and why."""

    slug = "partly-failed"
    rpc_code = -32011
    exit_code = 9


class HostFailed(KvmdError):
    """The kernel or a host tool refused: sysfs, netlink, nft, dnsmasq, systemd, a file system."""

    slug = "host-failed"
    rpc_code = -32012


class QemuFailed(KvmdError):
    """QEMU exited, would not start, or answered a QMP command with an error."""

    slug = "qemu-failed"
    rpc_code = -32013


class ProtocolFault(KvmdError):
    """A peer broke JSON-RPC or one of its limits. `rpc_code` is one of the standard's own."""

    slug = "protocol"
    exit_code = 2

    def __init__(self, rpc_code: int, message: str, *, hint: str | None = None, **details: Any) -> None:
        super().__init__(message, hint=hint, **details)
        self.rpc_code = rpc_code
