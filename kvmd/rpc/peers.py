"""Who is at the other end of a Unix socket, as the kernel tells it, and the user database for the access lists."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import struct

from kvmd.rpc.auth import Peer

_SO_PEERGROUPS = 59  # asm-generic/socket.h, Linux 4.13; Python 3.11 has no name for it
_OPTION_BYTES = 1024  # the most Python's getsockopt gives: 256 groups
_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid


def observe_peer(connection: socket.socket) -> Peer:
    """The credentials the peer had when it connected; later setuid or exec changes nothing (unix(7)).

    Supplementary groups come from the kernel; from the user database only where the kernel cannot say (more than
    256 of them). OSError when the socket is no connected Unix socket.
    """
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _OPTION_BYTES)
        groups = struct.unpack(f"={len(raw) // 4}I", raw)
    except OSError:
        groups = _database_groups(uid, gid)
    return Peer(uid, frozenset((gid, *groups)), pid)


def _database_groups(uid: int, gid: int) -> tuple[int, ...]:
    """The groups a user has by name; none for a uid without one."""
    try:
        return tuple(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
    except KeyError:
        return ()


def find_user(name: str) -> int | None:
    """The uid of a user; None when there is none."""
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def find_group(name: str) -> int | None:
    """The gid of a group; None when there is none."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None
