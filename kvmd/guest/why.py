"""What happened to a guest, in one sentence: the answer of `kvmd-cli why`. Pure."""

from __future__ import annotations

from kvmd.effects.records import GuestEnd
from kvmd.guest.lifecycle import ALIVE, Cause, Life, State

_ENDS = {
    Cause.GUEST_POWEROFF: "the guest powered itself off",
    Cause.GUEST_PANIC: "the guest's kernel panicked",
    Cause.ADMIN_STOP: "it was asked to power off",
    Cause.ADMIN_KILL: "its plug was pulled",
    Cause.QEMU_CRASH: "its QEMU crashed",
    Cause.OUT_OF_MEMORY: "the kernel killed its QEMU: out of memory",
    Cause.START_FAILED: "its start failed",
    Cause.HOST_SHUTDOWN: "the host went down",
    Cause.VANISHED: "it ended while kvmd was away, and left no word",
}
_LIVES = {
    State.STARTING: "it is being started",
    State.RUNNING: "it runs",
    State.PAUSED: "it is paused",
    State.STOPPING: "it is ending",
    State.UNREACHABLE: "its QEMU runs and does not answer: it hangs, or the host is too busy for it",
}


def cause_of(life: Life, end: GuestEnd | None) -> Cause | None:
    """Why it is off; None while it is alive, or when it never ran."""
    if life.state in ALIVE:
        return None
    if life.cause is not None:
        return life.cause
    try:
        return Cause(end.reason) if end else None
    except ValueError:
        return None  # of a later kvmd


def answer(life: Life, end: GuestEnd | None) -> str:
    """What is so, and the words that were recorded with it where they add something."""
    cause = cause_of(life, end)
    if life.state in ALIVE:
        said, words = _LIVES[life.state], life.reason
    else:
        said = _ENDS[cause] if cause else "it was never started"
        words = life.reason or (end.detail if end else "")
    return f"{said}: {words}" if words and words != said else said
