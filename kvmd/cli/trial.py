"""Checking a change to a file before it is made: the whole directory is loaded with the file in its new form."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from kvmd.config.desired import Fault, Loaded
from kvmd.config.files import DIRECTORIES, FILES
from kvmd.config.load import load
from kvmd.errors import ConfigInvalid, NotFound


def with_changes(config_dir: Path, changes: Mapping[str, bytes]) -> Loaded:
    """What `check` would say of the directory if these files, by relative name, had this content.

    Works on a copy: faults between files (two guests with one MAC) are found as well as those in one.
    """
    with tempfile.TemporaryDirectory(prefix="kvmd-check-") as text:
        copy = Path(text)
        for name in ("", *DIRECTORIES):
            (copy / name).mkdir(exist_ok=True)
            for file in _files(config_dir / name, FILES if not name else None):
                with suppress(OSError):  # what cannot be read is a fault of its own, not of this change
                    (copy / name / file.name).write_bytes(file.read_bytes())
        for file_name, data in changes.items():
            (copy / file_name).write_bytes(data)
        # What is there now counts as what was good before: a clash is the change's fault, not its neighbour's.
        return load(copy, last_good_dir=config_dir)


def new_errors(before: Loaded, after: Loaded) -> tuple[Fault, ...]:
    """Errors the change brings. A file may have had others, which are not held against it; lines may have moved."""
    known = {(fault.file, fault.key, fault.message) for fault in before.errors}
    return tuple(fault for fault in after.errors if (fault.file, fault.key, fault.message) not in known)


def faulty(faults: Iterable[Fault], what: str) -> ConfigInvalid:
    """The refusal of a change, with its faults."""
    return ConfigInvalid(what, faults=[str(fault) for fault in faults])


def guest_file(config_dir: Path, name: str) -> Path:
    """The file of a guest that is there. Raises NotFound with the nearest name."""
    path = config_dir / "guests.d" / f"{name}.toml"
    if not path.exists():
        from kvmd.cli.arguments import nearest

        near = nearest(name, (file.stem for file in _files(config_dir / "guests.d", None) if file.suffix == ".toml"))
        raise NotFound(
            f"there is no {path}", hint=f"did you mean {near}?" if near else f"kvmd-cli create {name} makes one"
        )
    return path


def mode_of(path: Path) -> int:
    """The rights a replaced file keeps."""
    return path.stat().st_mode & 0o777 if path.exists() else 0o644


def _files(directory: Path, only: Iterable[str] | None) -> list[Path]:
    """Regular files, also through links, that could matter."""
    try:
        found = sorted(directory.iterdir())
    except OSError:
        return []
    return [file for file in found if file.is_file() and (only is None or file.name in only)]
