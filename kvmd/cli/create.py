"""init and create: files a person will read, written only where there are none."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvmd.cli.arguments import Parsed, UsageError, nearest
from kvmd.cli.session import Session
from kvmd.cli.trial import faulty, new_errors, with_changes
from kvmd.config.edit import NewGuest, new_guest
from kvmd.config.files import guess_format
from kvmd.config.load import check
from kvmd.errors import Conflict, HostFailed, NotFound
from kvmd.units import Size

_LAN = """\
# A NAT network: guests reach out through the host, nothing reaches in. Guests name it: nic.NAME.network = "lan".

[network]
mode = "nat"
description = "guests behind this host"

[ipv4]
address = "192.168.50.1/24"  # the host's own

[ipv4.dhcp]
range = ["192.168.50.100", "192.168.50.200"]
"""
_HOST = """\
# What this machine gives to its guests. Take the "#" away from a setting to change it; all keys: docs/reference.md.
# `kvmd-cli plan` shows what a change would do, `kvmd-cli host release` puts the host back as it was.

[memory]
#reserve = "auto"  # kept for the host itself; "auto" is 1 GiB and 2 % of RAM

# Pages for guests with memory.backing = "hugepages"; "auto" is what they need together.
#[hugepages.2MiB]
#pages = "auto"

[tuning]
#mode = "advise"  # off | advise | apply
"""
_DAEMON = """\
# The daemon itself. Take the "#" away from a setting to change it; all keys: docs/reference.md.

[access]
#admins = ["root", "@kvmd-admin"]
#operators = ["@kvmd-operator"]

# Images are opened below these directories (or are these devices) and nowhere else.
[storage]
#roots = ["/var/lib/kvmd/images", "/srv/vm"]
"""
EXAMPLES = {"kvmd.toml": _DAEMON, "host.toml": _HOST, "networks.d/lan.toml": _LAN}
_DIRECTORIES = ("", "guests.d", "networks.d", "profiles.d")


def init(session: Session, _parsed: Parsed) -> int:
    """Directories, a NAT network and commented examples, each only if it is not there."""
    root = Path(session.config_dir)
    has_networks = any((root / "networks.d").glob("*.toml"))
    missing = {
        file: text
        for file, text in EXAMPLES.items()
        if not os.path.lexists(root / file) and not (file.startswith("networks.d/") and has_networks)
    }
    if not session.dry_run:
        for name in _DIRECTORIES:
            (root / name).mkdir(mode=0o755, parents=True, exist_ok=True)
        for file, text in missing.items():
            write_new(root / file, text)
    session.result({"written": sorted(missing)}, lambda: "\n".join(f"+ {root / file}" for file in missing))
    if not session.json:
        if not missing:
            session.say(f"{root}: everything is there, nothing was written")
        session.say(f"next: kvmd-cli create NAME --image FILE --network {_network(root)}")
    return 0


def _network(root: Path) -> str:
    """A network to be named in the next command."""
    return next((file.stem for file in sorted((root / "networks.d").glob("*.toml"))), "lan")


def create(session: Session, parsed: Parsed) -> int:
    """guests.d/NAME.toml from what was given; checked with all other files before it is written."""
    root, name = Path(session.config_dir), parsed.word("NAME")
    file = f"guests.d/{name}.toml"
    if os.path.lexists(root / file):
        raise Conflict(f"{root / file} exists", hint=f"kvmd-cli edit {name} changes it")
    _require(root, parsed)
    text = new_guest(_wanted(parsed))
    loaded = with_changes(root, {file: text.encode()})
    if wrong := new_errors(check(root) if root.is_dir() else loaded, loaded):
        raise faulty(wrong, f"guest {name} was not made:")
    if not session.dry_run:
        (root / "guests.d").mkdir(mode=0o755, parents=True, exist_ok=True)
        write_new(root / file, text)
    shown = f"+ {root / file}" + (f"\n{text}" if session.dry_run else "")
    session.result({"file": str(root / file), "text": text, "written": not session.dry_run}, lambda: shown)
    if not session.json:
        for fault in loaded.faults:
            if fault.file == file:
                session.say(str(fault))
        first = "kvmd-cli apply && " if parsed.text("--network") else ""
        session.say(f"next: {first}kvmd-cli start {name}")
    return 0


def write_new(path: Path, text: str) -> None:
    """Write a file that must not be there: Conflict if it is. Raises HostFailed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o644)
    except FileExistsError:
        raise Conflict(f"{path} exists", hint="it was left as it is") from None
    with os.fdopen(fd, "wb") as out:
        try:
            os.fchmod(fd, 0o644)
            out.write(text.encode())
            out.flush()
            os.fsync(fd)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise HostFailed(f"cannot write {path}: {error.strerror}") from error


def _wanted(parsed: Parsed) -> NewGuest:
    image, kernel = _path(parsed, "--image"), _path(parsed, "--kernel")
    if image is None and kernel is None and parsed.text("--cdrom") is None:
        raise UsageError("create: from what?", hint="--image FILE, --cdrom FILE or --kernel FILE")
    if kernel is None and (parsed.text("--initrd") or parsed.text("--cmdline")):
        raise UsageError("create: --initrd and --cmdline need --kernel")
    try:
        memory = Size.parse(parsed.text("--memory") or "1GiB")
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from None
    vcpus = parsed.text("--vcpus") or "1"
    if not vcpus.isdecimal() or int(vcpus) < 1:
        raise UsageError("--vcpus: a number from 1")
    return NewGuest(
        uuid=str(uuid.uuid4()),
        memory=memory,
        vcpus=int(vcpus),
        description=parsed.text("--description") or "",
        accel=parsed.text("--accel") or "kvm",
        image=image,
        image_format=_format(image, parsed.text("--format")) if image else None,
        kernel=kernel,
        initrd=_path(parsed, "--initrd"),
        cmdline=parsed.text("--cmdline"),
        cdrom=_path(parsed, "--cdrom"),
        network=parsed.text("--network"),
        auto=True if parsed.on("--auto") else None,
    )


def _path(parsed: Parsed, option: str) -> str | None:
    """An absolute path, as files have it; what was typed is relative to where it was typed."""
    text = parsed.text(option)
    return str(Path(text).absolute()) if text is not None else None


def _format(image: str, given: str | None) -> str:
    """As given, else what the first bytes say: asked of a person's own image once, and written down."""
    if given:
        return given
    guess = guess_format(image)
    if guess is None:
        raise UsageError(f"create: what format has {image}?", hint="--format raw or --format qcow2")
    return guess


def _require(root: Path, parsed: Parsed) -> None:
    """The files named exist. NotFound."""
    for option in ("--image", "--cdrom", "--kernel", "--initrd"):
        path = _path(parsed, option)
        if path is not None and not Path(path).exists():
            raise NotFound(f"{option}: {path} does not exist")
    network = parsed.text("--network")
    there: Mapping[str, Path] = {file.stem: file for file in _networks(root)}
    if network is not None and network not in there:
        near = nearest(network, there)
        hint = f"did you mean {near}?" if near else f"there is: {', '.join(sorted(there)) or 'none; kvmd-cli init'}"
        raise NotFound(f"there is no network {network}", hint=hint)


def _networks(root: Path) -> Iterator[Path]:
    return (root / "networks.d").glob("*.toml")
