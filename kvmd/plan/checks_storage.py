"""Judgements about files: images, the space they and kvmd's own directories have, rights on sockets. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from kvmd.plan.hostreport import FileStat, Finding, HostReport, ImageReport, Unseen, count, fail, ok, skip, warn
from kvmd.units import Size

UNSEEN = "unseen"  # an ImageReport's slug where the path may not be looked at
_FULL_BYTES = 64 << 20  # below that a database, a log or a start fails soon
_OTHERS_WRITE, _GROUP_WRITE = 0o002, 0o020


def _shown(image: ImageReport) -> str:
    return f"guest {image.guest}: {image.key} {image.path}"


def images(report: HostReport) -> Iterator[Finding]:
    """Every file a guest names is there, in a declared root, and may be opened."""
    clean = True
    for image in report.images:
        match image.slug:
            case None | "refused":
                continue
            case "unseen":
                yield skip(f"{_shown(image)}: {image.message}")
            case "not-found":
                what = f"kvmd-cli image create {image.path}" if image.key.startswith("disk.") else f"ls {image.path}"
                yield fail(f"{_shown(image)} does not exist", image.hint or what)
            case _:
                yield fail(f"{_shown(image)}: {image.message}", image.hint or f"ls -ld {image.path}")
        clean = False
    if clean:
        yield (
            ok(f"{count(len(report.images), 'file')} of guests there") if report.images else skip("no guest has a disk")
        )


def image_format(report: HostReport) -> Iterator[Finding]:
    """Headers are what the guest's file declares (QEMU's docs/interop/qcow2.txt; guessing is how a guest gets out)."""
    broken = [image for image in report.images if image.slug == "refused"]
    for image in broken:
        yield fail(f"guest {image.guest}: {image.key}: {image.message}", image.hint or f"qemu-img info {image.path}")
    odd = [image for image in report.images if image.warnings]
    for image in odd:
        fix = f"qemu-img info {image.path}"
        if image.content == "qcow2":
            fix = (
                f'format = "qcow2" in [{image.key}] of guests.d/{image.guest}.toml, unless the guest wrote that header'
            )
        yield warn(f"{_shown(image)} {'; '.join(image.warnings)}", fix)
    if not broken and not odd:
        opened = sum(image.slug is None for image in report.images)
        yield ok(f"{count(opened, 'header')} as declared") if opened else skip("no image could be read")


def image_rights(report: HostReport) -> Iterator[Finding]:
    """Nobody but root and the owner writes to an image: whoever does owns the guest."""
    seen = [image for image in report.images if image.slug is None and not image.is_block]
    clean = True
    for image in seen:
        shown = f"{_shown(image)} has mode {image.mode:04o}"
        if image.mode & _OTHERS_WRITE:
            clean = False
            yield fail(f"{shown}: every user of this host can write to the guest's disk", f"chmod 0600 {image.path}")
        elif image.mode & _GROUP_WRITE:
            clean = False
            yield warn(f"{shown}: a group can write to the guest's disk", f"chmod 0600 {image.path}")
    if clean:
        yield ok("no image can be written by others") if seen else skip("no image file could be read")


def image_direct_io(report: HostReport) -> Iterator[Finding]:
    """cache "none" needs O_DIRECT (open(2)); not every file system has it."""
    disks = [image for image in report.images if image.slug is None and image.key.startswith("disk.")]
    without = [image for image in disks if not image.direct_io]
    clean = True
    for image in without:
        if image.cache in ("none", "directsync"):
            clean = False
            message = f'{_shown(image)}: cache = "{image.cache}", and this file system has no O_DIRECT'
            yield fail(message, f'cache = "writeback" in [{image.key}] of guests.d/{image.guest}.toml')
        elif image.cache is None:
            clean = False
            message = f"{_shown(image)}: this file system has no O_DIRECT, so the host caches what the guest caches"
            yield warn(message, "move it to ext4, xfs or a block device")
    if clean:
        yield ok(f"{count(len(disks), 'disk')} opened as the guests want") if disks else skip("no disk could be read")


def image_space(report: HostReport) -> Iterator[Finding]:
    """Images may grow to their full size where they lie; a guest stops when they cannot."""
    on: dict[int, list[ImageReport]] = {}
    for image in report.images:
        if image.slug is None and image.free_bytes is not None:
            on.setdefault(image.file_system, []).append(image)
    clean = True
    for group in on.values():
        growth = sum(image.growth_bytes for image in group)
        free = min(cast(int, image.free_bytes) for image in group)
        if growth > free:
            clean = False
            names = sorted({image.guest for image in group if image.growth_bytes})
            where = group[0].path.rpartition("/")[0]
            yield warn(
                f"images of {', '.join(names[:3])} may still grow by {Size(growth).human()}, and {where} has"
                f" {Size(free).human()} free: a guest that finds it full stops",
                f"df -h {where} && du -sh {where}/*",
            )
    if clean:
        yield ok("images can grow to their full size") if on else skip("no image file could be read")


def space(report: HostReport) -> Iterator[Finding]:
    """Room for kvmd's state and logs and for images."""
    low = float(report.desired.daemon.storage.low_space)
    clean = True
    for place in report.places:
        share = place.free_bytes / place.total_bytes if place.total_bytes else 1.0
        shown = f"{place.what} ({place.path}): {Size(place.free_bytes).human()} free, {share:.0%}"
        if place.is_readonly:
            clean = False
            yield fail(f"{place.what} ({place.path}) is mounted read-only", f"mount -o remount,rw {place.path}")
        elif place.total_bytes and place.free_bytes < _FULL_BYTES:
            clean = False
            yield fail(shown, f"du -xh --max-depth=2 {place.path} | sort -h | tail")
        elif share < low:
            clean = False
            fix = f"du -xh --max-depth=2 {place.path} | sort -h | tail"
            yield warn(f"{shown}; storage.low_space is {report.desired.daemon.storage.low_space}", fix)
    if clean:
        yield (
            ok(f"room in {count(len(report.places), 'place')}")
            if report.places
            else skip("no directory of kvmd's is there")
        )


def directories(report: HostReport) -> Iterator[Finding]:
    """kvmd's directories are no more open than kvmd makes them (`Paths.directories`)."""
    clean, seen = True, 0
    for path, mode in report.paths.directories:
        found = report.files.get(str(path))
        if isinstance(found, Unseen):
            clean = False
            yield skip(f"{path}: {found.reason}")
        if not isinstance(found, FileStat):
            continue
        seen += 1
        if found.uid not in report.trusted:
            clean = False
            yield fail(f"{path} belongs to uid {found.uid}, not to root", f"chown root:root {path}")
        elif found.mode & ~mode & 0o777:
            clean = False
            yield fail(f"{path} has mode {found.mode:04o}, wider than {mode:04o}", f"chmod {mode:04o} {path}")
    if clean:
        yield (ok(f"{seen} directories as kvmd makes them") if seen else skip("kvmd never ran here: no directory yet"))


def api_socket(report: HostReport) -> Iterator[Finding]:
    """Everybody may connect (roles decide what they may do), nobody may put another socket there."""
    path = report.paths.api_socket
    found, parent = report.files.get(str(path)), report.files.get(str(report.paths.run))
    if found is None:
        yield warn(f"kvmd is not running: there is no {path}", "systemctl enable --now kvmd")
        return
    if isinstance(found, Unseen):
        yield skip(f"{path}: {found.reason}")
        return
    if found.kind != "socket":
        yield fail(f"{path} is no socket", f"rm {path} && systemctl restart kvmd.socket kvmd")
    elif found.uid not in report.trusted:
        yield fail(f"{path} belongs to uid {found.uid}, not to root", "systemctl restart kvmd.socket kvmd")
    elif found.mode != 0o666:
        yield fail(f"{path} has mode {found.mode:04o}: clients need 0666", f"chmod 0666 {path}")
    elif isinstance(parent, FileStat) and parent.mode & (_GROUP_WRITE | _OTHERS_WRITE):
        yield fail(
            f"{report.paths.run} has mode {parent.mode:04o}: others can replace the socket",
            f"chmod 0755 {report.paths.run}",
        )
    elif not report.listening:
        yield fail(
            f"nobody answers on {path}: it was left by a kvmd that is gone", "systemctl restart kvmd.socket kvmd"
        )
    else:
        yield ok(f"kvmd listens on {path}")


def launch_socket(report: HostReport) -> Iterator[Finding]:
    """Only root may ask for a guest's descriptors."""
    path = report.paths.launch_socket
    found = report.files.get(str(path))
    if isinstance(found, Unseen):
        yield skip(f"{path}: {found.reason}")
    elif found is None:
        yield skip(f"kvmd is not running: there is no {path}")
    elif found.mode & 0o077:
        yield fail(
            f"{path} has mode {found.mode:04o}: another user could ask for a guest's disks", f"chmod 0600 {path}"
        )
    elif found.uid not in report.trusted:
        yield fail(f"{path} belongs to uid {found.uid}, not to root", "systemctl restart kvmd.socket kvmd")
    else:
        yield ok(f"{path} is root's alone")
