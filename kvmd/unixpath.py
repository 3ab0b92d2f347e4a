"""Paths of Unix sockets, however long. The client loads this at every start: `os` and nothing else."""

from __future__ import annotations

import os

PATH_BYTES = 107  # sun_path holds 108 with the final NUL (unix(7))


class ShortPath:
    """`with ShortPath(path) as address:` an address to bind or connect to, through the directory's descriptor where
    the path is too long for one. OSError when there is no such directory."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._directory = -1

    def __enter__(self) -> str:
        if len(os.fsencode(self._path)) <= PATH_BYTES:
            return self._path
        head, tail = os.path.split(self._path)
        self._directory = os.open(head or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._directory}/{tail}"

    def __exit__(self, *_exc: object) -> None:
        if self._directory >= 0:
            os.close(self._directory)
        self._directory = -1
