"""Ask an emulator what it can do, and the host whether guests can have KVM.

The probed QEMU is expendable: it has no guest, no file, no deadline but ours, and is killed when it has answered. What
it said is kept as JSON, keyed by everything that could change the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import hashlib
import json
import os
import shutil
import stat
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from kvmd.errors import KvmdError, QemuFailed, TimedOut
from kvmd.qemu.caps import COMMANDS, Accel, Capabilities, Kvm, device_queries, from_data, parse, to_data

DEADLINE_S = 20.0  # an answer takes 0.4 s here; a busy host booting twenty guests may need longer
LONGEST_REPLY = 4 << 20  # query-qmp-schema is 207 kB in QEMU 7.2
KVM_GROUP = "kvm"


async def probe(
    emulator: str, accel: Accel, cache_dir: Path | None, *, uid: int | None = None, gid: int | None = None
) -> Capabilities:
    """What `emulator` can do under `accel`; from `cache_dir` when nothing relevant changed since.

    With `uid` the emulator runs under that id with the kvm group, as a guest would.
    Raises QemuFailed (not there, will not start, odd answers), TimedOut, NotSupported (too old).
    """
    path = _resolve(emulator)
    cached = cache_dir / f"qemu-{_fingerprint(path, accel)}.json" if cache_dir else None
    if cached:
        found = await asyncio.to_thread(_load, cached)
        if found:
            return found
    caps = parse(await ask(path, accel, uid=uid, gid=gid))
    if cached:
        await asyncio.to_thread(_save, cached, to_data(caps))
    return caps


async def ask(path: Path, accel: Accel, *, uid: int | None = None, gid: int | None = None) -> dict[str, Any]:
    """The raw replies `caps.parse` takes, by query. Raises QemuFailed or TimedOut."""
    replies: dict[str, Any] = {}
    machine = "none" if accel == "tcg" else "none,accel=kvm"
    async with _expendable(path, "-machine", machine, uid=uid, gid=gid) as dialogue:
        for label, arguments in COMMANDS:
            replies[label] = await dialogue.execute(label.partition(":")[0], arguments)
        for label, arguments in device_queries(replies):
            replies[label] = await dialogue.execute(label.partition(":")[0], arguments)
    return replies


async def kvm_usable(
    emulator: str,
    *,
    uid: int | None = None,
    gid: int | None = None,
    root: Path = Path("/"),
    machine: str = "q35",
) -> Kvm:
    """Whether a guest under this uid can run under KVM here: module, device, and a QEMU that really does it.

    A /dev/kvm alone proves nothing: some hosts have one that cannot run a Linux kernel, and it then comes without
    kvm_intel or kvm_amd. `root` is where sys/ and dev/ are looked for.
    """
    arch = os.uname().machine
    if arch in ("x86_64", "i686"):
        loaded = [name for name in ("kvm_intel", "kvm_amd") if (root / "sys/module" / name).exists()]
        if not loaded:
            return Kvm(
                usable=False,
                reason="neither kvm_intel nor kvm_amd is loaded",
                fix="switch VT-x or AMD-V on in the firmware, then `modprobe kvm_intel` or `modprobe kvm_amd`",
            )
    elif not (root / "sys/module/kvm").exists():
        return Kvm(usable=False, reason="the kernel has no kvm", fix="boot a kernel with KVM")
    device = root / "dev/kvm"
    try:
        status = device.stat()
    except OSError as error:
        return Kvm(usable=False, reason=f"{device}: {error.strerror}", fix="load the kvm module; udev makes the device")
    denied = _denied(status, uid, gid)
    try:
        async with _expendable(
            _resolve(emulator), "-machine", f"{machine},accel=kvm", "-cpu", "host", "-m", "16", uid=uid, gid=gid
        ) as dialogue:
            reply = await dialogue.execute("query-kvm", {})
    except KvmdError as error:
        return Kvm(usable=False, reason=denied or error.message, fix=_fix(denied))
    if not (isinstance(reply, dict) and reply.get("enabled") is True):
        return Kvm(
            usable=False, reason="QEMU started without KVM though it was asked for", fix="install a QEMU built with KVM"
        )
    return Kvm(usable=True, reason="a QEMU ran under KVM" + (f" as uid {uid}" if uid is not None else ""))


def _denied(status: os.stat_result, uid: int | None, gid: int | None) -> str | None:
    """Why this uid cannot open the device by its mode bits, None when it can (an ACL may still let it in)."""
    if uid in (None, 0):
        return None
    need = stat.S_IROTH | stat.S_IWOTH
    if status.st_uid == uid:
        need = stat.S_IRUSR | stat.S_IWUSR
    elif status.st_gid in {gid, *_kvm_group()}:
        need = stat.S_IRGRP | stat.S_IWGRP
    if status.st_mode & need == need:
        return None
    return (
        f"/dev/kvm is {stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid}, closed to the guest's uid {uid}"
    )


def _fix(denied: str | None) -> str:
    if denied:
        return f"chgrp {KVM_GROUP} /dev/kvm && chmod 0660 /dev/kvm (udev's 50-udev-default.rules does it)"
    return "run `kvmd-cli doctor`; nested hosts need nested virtualization switched on outside"


def _kvm_group() -> tuple[int, ...]:
    try:
        return (grp.getgrnam(KVM_GROUP).gr_gid,)
    except KeyError:
        return ()


class Dialogue:
    """A QMP session over an expendable QEMU's stdin and stdout."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise QemuFailed("the probe has no pipes")
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr

    async def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """The `return` value. Raises QemuFailed when QEMU refuses, ends or answers something else."""
        request = {"execute": command, "arguments": dict(arguments)}
        try:
            self._stdin.write(json.dumps(request).encode() + b"\n")
            await self._stdin.drain()
        except ConnectionError as error:
            raise QemuFailed(f"the probed QEMU ended before {command}: {await self.last_words()}") from error
        message = await self.read()
        while "event" in message:
            message = await self.read()
        if "return" not in message:
            raise QemuFailed(f"the probed QEMU refused {command}: {message.get('error')}")
        return message["return"]

    async def read(self) -> dict[str, Any]:
        """One message. Raises QemuFailed."""
        try:
            line = await self._stdout.readuntil(b"\n")
            message = json.loads(line)
        except asyncio.IncompleteReadError as error:
            raise QemuFailed(f"the probed QEMU ended: {await self.last_words()}") from error
        except (asyncio.LimitOverrunError, ValueError, RecursionError) as error:
            raise QemuFailed(f"the probed QEMU does not speak QMP: {error}") from error
        if not isinstance(message, dict):
            raise QemuFailed("the probed QEMU does not speak QMP: a message is not an object")
        return message

    async def last_words(self) -> str:
        """The last line on its stderr."""
        lines = (await self._stderr.read(1 << 16)).decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


@contextlib.asynccontextmanager
async def _expendable(path: Path, *options: str, uid: int | None, gid: int | None) -> AsyncIterator[Dialogue]:
    """A QEMU without guest, past the greeting; killed and reaped on leaving, whatever happened."""
    identity: dict[str, Any] = {}
    if uid is not None:
        identity = {"user": uid, "group": gid if gid is not None else uid, "extra_groups": list(_kvm_group())}
    try:
        process = await asyncio.create_subprocess_exec(
            path, "-S", "-nodefaults", "-no-user-config", "-display", "none", *options, "-qmp", "stdio",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={}, cwd="/", start_new_session=True, limit=LONGEST_REPLY, **identity,
        )  # fmt: skip
    except OSError as error:
        raise QemuFailed(f"cannot run {path}: {error.strerror}", hint="see qemu.emulator in kvmd.toml") from error
    try:
        async with asyncio.timeout(DEADLINE_S):
            dialogue = Dialogue(process)
            await dialogue.read()  # the greeting
            await dialogue.execute("qmp_capabilities", {})
            yield dialogue
    except TimeoutError as error:
        raise TimedOut(f"{path} did not answer the probe within {DEADLINE_S:g} s") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        if process.stdin:
            process.stdin.close()
        await process.wait()


def _resolve(emulator: str) -> Path:
    """The binary itself behind a name on PATH and any symlinks. Raises QemuFailed."""
    found = shutil.which(emulator, path=os.environ.get("PATH") or os.defpath)
    if not found:
        raise QemuFailed(
            f"no emulator {emulator} on this host",
            hint="apt install qemu-system-x86, or set qemu.emulator in kvmd.toml",
        )
    return Path(found).resolve()


def _fingerprint(path: Path, accel: Accel) -> str:
    """Everything that may change what QEMU answers: binary, accelerator, kernel and microcode."""
    status = path.stat()
    microcode = ""
    if accel == "kvm":
        with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="ascii", errors="replace") as cpuinfo:
            microcode = next((line for line in cpuinfo if line.startswith("microcode")), "")
    facts = (str(path), status.st_mtime_ns, status.st_size, accel, os.uname().release, microcode)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _load(path: Path) -> Capabilities | None:
    try:
        return from_data(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError, QemuFailed):
        return None  # a cache that cannot be read is no cache: ask again


def _save(path: Path, data: Mapping[str, Any]) -> None:
    """Atomically; a cache that cannot be written costs the next start a probe and nothing else."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft.write_text(json.dumps(data))
        draft.replace(path)
