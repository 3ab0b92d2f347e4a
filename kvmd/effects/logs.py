"""Guests' logs kept within their cap while QEMU goes on writing them.

QEMU and its launcher hold their logs open with O_APPEND, so a log is rotated by copying it aside and cutting it to
nothing: the next line lands at the start. What is written between the two steps is lost; a log never stops a guest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


def rotate(path: Path, *, max_bytes: int, keep: int) -> bool:
    """Move a log that has grown past `max_bytes` to PATH.1 (and that to PATH.2, up to `keep` files in all).

    False when it has not, or could not be; a full disk cuts the log without keeping it.
    """
    try:
        if path.stat().st_size <= max_bytes:
            return False
    except OSError:
        return False
    with contextlib.suppress(OSError):
        for number in range(keep - 1, 1, -1):
            older = path.with_name(f"{path.name}.{number - 1}")
            if older.exists():
                older.replace(path.with_name(f"{path.name}.{number}"))
        if keep > 1:
            shutil.copyfile(path, path.with_name(f"{path.name}.1"), follow_symlinks=False)
    with contextlib.suppress(OSError):
        os.truncate(path, 0)
        return True
    return False
