"""Who may do what: a peer's role from its credentials and the `[access]` lists of kvmd.toml.

Pure: user and group names are looked up by the caller's functions, once, when the lists change. The decision
itself looks at numbers only, so it needs no user database and cannot block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

ROOT_UID = 0


class Role(StrEnum):
    """What a peer may do; each role includes the ones before it."""

    NONE = "none"
    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def includes(self, needed: Role) -> bool:
        """Whether this role may do what `needed` may do."""
        return _RANK[self] >= _RANK[needed]


_RANK: Mapping[Role, int] = MappingProxyType({role: rank for rank, role in enumerate(Role)})


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection as it was at connect time (unix(7), SO_PEERCRED and SO_PEERGROUPS).

    `pid` is for logs alone: it can be another process by the time it is read, so nothing is decided on it.
    """

    uid: int
    gids: frozenset[int] = frozenset()  # the primary group and all supplementary ones
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Access:
    """The access lists in numbers. The default lets root in and nobody else."""

    uids: Mapping[int, Role] = field(default_factory=lambda: MappingProxyType({}))
    gids: Mapping[int, Role] = field(default_factory=lambda: MappingProxyType({}))
    names: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))  # of the users listed

    def role_of(self, peer: Peer) -> Role:
        """The highest role any entry gives; root is admin whatever the lists say."""
        if peer.uid == ROOT_UID:
            return Role.ADMIN
        granted = [self.uids.get(peer.uid, Role.NONE)]
        granted += (self.gids[gid] for gid in peer.gids & self.gids.keys())
        return max(granted, key=_RANK.__getitem__)

    def actor(self, peer: Peer) -> str:
        """The peer's name in events and logs: "root", a listed user's name, or "uid 1000"."""
        return "root" if peer.uid == ROOT_UID else self.names.get(peer.uid, f"uid {peer.uid}")


def resolve(
    *,
    admins: Iterable[str] = (),
    operators: Iterable[str] = (),
    viewers: Iterable[str] = (),
    find_user: Callable[[str], int | None],
    find_group: Callable[[str], int | None],
) -> tuple[Access, tuple[str, ...]]:
    """The lists ("alice", "@adm") in numbers, and the entries that name nobody known.

    An unknown entry grants nothing and is reported, so that one missing group does not lock everyone out.
    """
    uids: dict[int, Role] = {}
    gids: dict[int, Role] = {}
    names: dict[int, str] = {}
    unknown: list[str] = []
    # Ascending, so that a name in two lists keeps the higher role.
    for role, entries in ((Role.VIEWER, viewers), (Role.OPERATOR, operators), (Role.ADMIN, admins)):
        for entry in entries:
            is_group = entry.startswith("@")
            number = find_group(entry[1:]) if is_group else find_user(entry)
            if number is None:
                unknown.append(entry)
            elif is_group:
                gids[number] = role
            else:
                uids[number] = role
                names[number] = entry
    access = Access(MappingProxyType(uids), MappingProxyType(gids), MappingProxyType(names))
    return access, tuple(dict.fromkeys(unknown))
