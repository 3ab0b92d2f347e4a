"""kvmd/rpc/auth.py: who gets which role, from numbers alone."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.rpc.auth import Access, Peer, Role, resolve

USERS = {"root": 0, "alice": 1000, "bob": 1001, "carol": 1002}
GROUPS = {"adm": 4, "kvmd-admin": 900, "vm-ops": 901}


def access(**lists: list[str]) -> Access:
    made, unknown = resolve(find_user=USERS.get, find_group=GROUPS.get, **lists)
    assert unknown == ()
    return made


@pytest.mark.parametrize(("has", "needs"), list(itertools.product(Role, Role)))
def test_each_role_includes_the_lower_ones(has: Role, needs: Role) -> None:
    order = ["none", "viewer", "operator", "admin"]
    assert has.includes(needs) == (order.index(has) >= order.index(needs))


def test_without_lists_only_root_has_a_role() -> None:
    assert Access().role_of(Peer(0)) is Role.ADMIN
    assert Access().role_of(Peer(1000, frozenset((0, 4)))) is Role.NONE


def test_root_is_admin_whatever_the_lists_say() -> None:
    assert access(viewers=["root"]).role_of(Peer(0)) is Role.ADMIN


def test_users_and_groups() -> None:
    lists = access(admins=["@kvmd-admin"], operators=["alice", "@vm-ops"], viewers=["@adm", "bob"])
    assert lists.role_of(Peer(1000)) is Role.OPERATOR
    assert lists.role_of(Peer(1001)) is Role.VIEWER
    assert lists.role_of(Peer(1002)) is Role.NONE
    assert lists.role_of(Peer(1002, frozenset((4, 100)))) is Role.VIEWER
    assert lists.role_of(Peer(1002, frozenset((4, 901)))) is Role.OPERATOR
    assert lists.role_of(Peer(1001, frozenset((900,)))) is Role.ADMIN


def test_a_uid_is_not_a_gid() -> None:
    assert access(admins=["alice"]).role_of(Peer(5, frozenset((1000,)))) is Role.NONE
    assert access(admins=["@kvmd-admin"]).role_of(Peer(900)) is Role.NONE


def test_in_two_lists_the_higher_role_counts() -> None:
    lists = access(admins=["alice", "@adm"], operators=["alice"], viewers=["alice", "@adm"])
    assert lists.role_of(Peer(1000)) is Role.ADMIN
    assert lists.role_of(Peer(7, frozenset((4,)))) is Role.ADMIN


def test_unknown_names_grant_nothing_and_are_reported_once() -> None:
    made, unknown = resolve(
        admins=["dave", "alice"],
        operators=["@nogroup-here", "@alice", "adm"],
        viewers=["dave"],
        find_user=USERS.get,
        find_group=GROUPS.get,
    )
    assert unknown == ("dave", "@nogroup-here", "@alice", "adm")
    assert made.uids == {1000: Role.ADMIN}
    assert not made.gids


def test_the_pid_decides_nothing() -> None:
    lists = access(admins=["alice"])
    assert {lists.role_of(Peer(1001, pid=pid)) for pid in (0, 1, 1000)} == {Role.NONE}


def test_names_of_actors() -> None:
    lists = access(viewers=["alice", "@adm"])
    assert [lists.actor(Peer(uid)) for uid in (0, 1000, 1001)] == ["root", "alice", "uid 1001"]


_members = st.lists(st.sampled_from(["alice", "bob", "carol", "@adm", "@vm-ops"]))


@given(_members, _members, _members, st.sampled_from([1000, 1001, 1002]), st.frozensets(st.sampled_from([4, 901])))
def test_more_membership_never_means_less(
    admins: list[str], operators: list[str], viewers: list[str], uid: int, gids: frozenset[int]
) -> None:
    lists = access(admins=admins, operators=operators, viewers=viewers)
    role = lists.role_of(Peer(uid, gids))
    assert role.includes(lists.role_of(Peer(uid)))
    entries = {name for name, number in USERS.items() if number == uid}
    entries |= {f"@{name}" for name, number in GROUPS.items() if number in gids}
    wanted = Role.NONE
    for candidate, members in ((Role.VIEWER, viewers), (Role.OPERATOR, operators), (Role.ADMIN, admins)):
        if entries & set(members):
            wanted = candidate
    assert role is wanted
