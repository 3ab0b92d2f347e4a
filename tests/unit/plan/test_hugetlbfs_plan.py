"""The hugetlbfs behind memory.path: mounted where it is missing, never over what is there, gone when nobody asks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import Action, MountHugetlbfs, UnmountHugetlbfs
from kvmd.config.guest import Guest
from kvmd.facts import Facts, MemoryPath
from kvmd.plan.hugetlbfs import plan_hugetlbfs
from kvmd.plan.release import plan_release

P2, P1 = 2 << 20, 1 << 30
PATH = "/srv/pages"


def guest(size: str = "64MiB", page: str | None = "2MiB", path: str = PATH) -> Guest:
    table: dict[str, Any] = {"size": size, "backing": "file", "path": path}
    return Guest.model_validate({"memory": table | ({"page_size": page} if page else {})})


def facts(*paths: MemoryPath) -> Facts:
    return Facts(memory_paths=paths)


def kernel(before: Facts, actions: Iterable[Action]) -> Facts:
    there = {path.path: path for path in before.memory_paths}
    for action in actions:
        match action:
            case MountHugetlbfs(path=path, page_bytes=page, limit_bytes=limit):
                old = there.get(path, MemoryPath(path))
                assert old.ours or (old.page_bytes is None and old.is_empty and old.kind != "file")
                there[path] = MemoryPath(path, "directory", page_bytes=page, limit_bytes=limit, ours=True)
            case UnmountHugetlbfs(path=path):
                assert there[path].ours
                there[path] = MemoryPath(path, "directory")
            case _:
                raise AssertionError(action)
    return Facts(memory_paths=tuple(there.values()))


def test_one_mount_for_all_guests_of_a_path() -> None:
    guests = {"web": guest(), "db": guest("128MiB", path=f"{PATH}/"), "plain": guest(page=None, path="/srv/files")}
    (action,), problems = plan_hugetlbfs(guests, facts(MemoryPath(PATH)))
    assert not problems
    assert action.line() == f"+ hugetlbfs {PATH}: 2MiB pages, at most 192MiB"
    assert action.why == "memory.path of db, web"
    assert action == MountHugetlbfs(path=PATH, page_bytes=P2, limit_bytes=192 << 20, kind="absent", why=action.why)


def test_another_size_is_a_new_mount_and_no_guest_is_none() -> None:
    ours = MemoryPath(PATH, "directory", page_bytes=P2, limit_bytes=64 << 20, ours=True)
    assert plan_hugetlbfs({"web": guest()}, facts(ours)) == ((), ())
    (action,), _ = plan_hugetlbfs({"web": guest("128MiB")}, facts(ours))
    assert action.line() == f"~ hugetlbfs {PATH}: 2MiB pages, at most 128MiB (another size)"
    (action,), _ = plan_hugetlbfs({}, facts(ours))
    assert action.line() == f"- hugetlbfs {PATH}"


def test_what_others_mounted_is_used_or_refused_and_never_touched() -> None:
    theirs = MemoryPath(PATH, "directory", page_bytes=P2)
    assert plan_hugetlbfs({"web": guest()}, facts(theirs)) == ((), ())
    assert plan_hugetlbfs({}, facts(theirs)) == ((), ())
    actions, problems = plan_hugetlbfs({"web": guest("2GiB", "1GiB")}, facts(theirs))
    assert not actions
    assert "is a hugetlbfs of 2MiB pages that kvmd did not mount, web asks for 1GiB" in problems[0].message
    assert problems[0].guests == {"web"}


def test_nothing_is_hidden_by_a_mount() -> None:
    for there in (MemoryPath(PATH, "file", is_empty=False), MemoryPath(PATH, "directory", is_empty=False)):
        actions, problems = plan_hugetlbfs({"web": guest()}, facts(there))
        assert not actions
        assert problems[0].guests == {"web"}


def test_release_removes_the_directory_only_if_kvmd_made_it() -> None:
    ours = facts(MemoryPath(PATH, "directory", page_bytes=P2, ours=True))
    for original, remove in (("absent", True), ("directory", False)):
        (undo,) = plan_release([("hugetlbfs", PATH, original, str(P2))], ours)
        assert undo.action == UnmountHugetlbfs(path=PATH, remove=remove, why="kvmd lets go of the host")
    assert plan_release([("hugetlbfs", PATH, "absent", "")], facts(MemoryPath(PATH)))[0].action is None


paths_st = st.builds(
    MemoryPath,
    path=st.just(PATH),
    kind=st.sampled_from(["absent", "directory", "file"]),
    is_empty=st.booleans(),
    page_bytes=st.sampled_from([None, P2, P1]),
    limit_bytes=st.sampled_from([None, 64 << 20]),
    ours=st.booleans(),
).filter(lambda path: path.page_bytes is not None or not path.ours)


sizes_st = st.dictionaries(st.sampled_from("abc"), st.sampled_from(["64MiB", "1GiB"]))


@given(paths_st, sizes_st, st.sampled_from(["2MiB", "1GiB"]))
def test_applied_once_it_is_done(there: MemoryPath, sizes: dict[str, str], page: str) -> None:
    guests = {name: guest(size, page) for name, size in sizes.items()}
    actions, problems = plan_hugetlbfs(guests, facts(there))
    after = kernel(facts(there), actions)
    assert plan_hugetlbfs(dict(reversed(guests.items())), after) == ((), problems)
