"""The swap file and the zram device: made, kept, replaced, taken away, and never another's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import Action, EnsureSwapFile, EnsureZram, RemoveSwapFile, RemoveZram
from kvmd.config.host import Host
from kvmd.facts import Facts, Memory, SwapArea, SwapFile, Zram
from kvmd.plan.release import plan_release
from kvmd.plan.swap import plan_swap
from tests.rig.hosts import GIB

PATH = "/var/lib/kvmd/swap"
OTHERS = SwapArea("/dev/vda2", GIB, 0, -2)


def host(file: str | None = None, zram: str | None = None, **more: Any) -> Host:
    wish: dict[str, Any] = {}
    if file:
        wish["file"] = {"size": file, **more}
    if zram:
        wish["zram"] = {"size": zram}
    return Host.model_validate({"swap": wish})


def facts(
    *,
    files: Iterable[SwapFile] = (SwapFile(PATH, free_bytes=100 * GIB),),
    areas: Iterable[SwapArea] = (OTHERS,),
    zrams: tuple[Zram, ...] | None = (),
    available: int = 4 * GIB,
) -> Facts:
    memory = Memory(total_bytes=16 * GIB, available_bytes=available)
    return Facts(memory=memory, swap_files=tuple(files), swaps=tuple(areas), zrams=zrams)


def ours(size: int = GIB) -> SwapFile:
    return SwapFile(PATH, size, ours=True, free_bytes=100 * GIB)


def area(path: str, used: int = 0) -> SwapArea:
    return SwapArea(path, GIB - 4096, used, -3)


def kernel(before: Facts, actions: Iterable[Action]) -> Facts:
    """The host after the actions."""
    files = {file.path: file for file in before.swap_files}
    areas = {each.path: each for each in before.swaps or ()}
    zrams = {zram.number: zram for zram in before.zrams or ()}
    for action in actions:
        match action:
            case RemoveSwapFile(path=path):
                assert files[path].ours
                areas.pop(path, None)
                files[path] = replace(files[path], size_bytes=None, ours=False)
            case EnsureSwapFile(path=path, size_bytes=size):
                assert files[path].size_bytes is None or files[path].ours
                files[path] = replace(files[path], size_bytes=size, ours=True)
                areas[path] = area(path)
            case RemoveZram(number=number):
                assert zrams.pop(number).ours
                areas.pop(f"/dev/zram{number}", None)
            case EnsureZram(size_bytes=size, number=number):
                new = number if number is not None else max(zrams, default=-1) + 1
                zrams[new] = Zram(new, size, ours=True)
                areas[f"/dev/zram{new}"] = area(f"/dev/zram{new}")
            case _:
                raise AssertionError(action)
    kept = tuple(zrams.values()) if before.zrams is not None else None
    return replace(before, swap_files=tuple(files.values()), swaps=tuple(areas.values()), zrams=kept)


def test_nothing_asked_for_is_nothing_done() -> None:
    foreign = SwapFile(PATH, GIB, free_bytes=GIB)
    assert plan_swap(host(), facts(files=[foreign], zrams=(Zram(0, GIB),))) == ((), ())


def test_both_are_made_and_then_there_is_nothing_to_do() -> None:
    wish = host(file="2GiB", zram="1GiB")
    actions, problems = plan_swap(wish, facts())
    assert not problems
    assert [action.line() for action in actions] == ["+ swap zram: 1GiB", f"+ swap file {PATH}: 2GiB"]
    assert [action.why for action in actions] == ["swap.zram.size is 1GiB", "swap.file.size is 2GiB"]
    assert plan_swap(wish, kernel(facts(), actions)) == ((), ())


def test_ours_that_is_whole_and_not_used_is_taken_up_again() -> None:
    """What a reboot, or a kill between making and using, leaves."""
    actions, _ = plan_swap(host(file="1GiB", zram="1GiB"), facts(files=[ours()], zrams=(Zram(3, GIB, ours=True),)))
    assert actions == (
        EnsureZram(size_bytes=GIB, number=3, why="swap.zram.size is 1GiB"),
        EnsureSwapFile(path=PATH, size_bytes=GIB, why="swap.file.size is 1GiB"),
    )


def test_what_is_no_longer_asked_for_goes_first() -> None:
    old = replace(ours(), path="/srv/swap")
    before = facts(files=[old, SwapFile(PATH, free_bytes=100 * GIB)], areas=[OTHERS, area("/srv/swap", GIB // 2)])
    actions, problems = plan_swap(host(file="2GiB"), before)
    assert not problems
    assert [action.line() for action in actions] == ["- swap file /srv/swap", f"+ swap file {PATH}: 2GiB"]
    zrams = (Zram(0, GIB), Zram(1, GIB, ours=True))
    actions, _ = plan_swap(host(), facts(zrams=zrams, areas=[area("/dev/zram0"), area("/dev/zram1")]))
    assert [action.line() for action in actions] == ["- swap zram1"]


def test_without_room_for_what_it_holds_it_stays_and_nothing_is_made_beside_it() -> None:
    before = facts(files=[ours()], areas=[area(PATH, GIB)], available=GIB // 2)
    actions, problems = plan_swap(host(file="2GiB"), before)
    assert not actions
    assert [problem.message for problem in problems] == [
        f"{PATH} cannot be taken out of use: it holds 1 GiB, and 512 MiB of RAM are available for that"
    ]
    zram = facts(zrams=(Zram(0, GIB, ours=True),), areas=[area("/dev/zram0", GIB)], available=GIB // 2)
    actions, problems = plan_swap(host(zram="2GiB"), zram)
    assert (actions, len(problems)) == ((), 1)


def test_a_foreign_file_at_the_path_is_never_touched() -> None:
    before = facts(files=[SwapFile(PATH, GIB, free_bytes=GIB)], areas=[area(PATH)])
    actions, problems = plan_swap(host(file="1GiB"), before)
    assert not actions
    assert "kvmd did not make it" in problems[0].message


def test_what_this_host_cannot_do_is_named() -> None:
    actions, problems = plan_swap(host(zram="1GiB"), facts(zrams=None))
    assert not actions
    assert "this kernel has no zram (there is no /sys/class/zram-control)" in problems[0].message
    actions, problems = plan_swap(host(file="1GiB", zram="1GiB"), replace(facts(), swaps=None))
    assert not actions
    assert all("cannot swap" in problem.message for problem in problems)
    _, problems = plan_swap(host(file="97GiB"), facts())
    assert "would take 97 GiB, its file system has 100 GiB free" in problems[0].message
    _, problems = plan_swap(host(file="1GiB"), facts(files=[SwapFile(PATH)]))
    assert "there is no directory /var/lib/kvmd" in problems[0].message


def test_release_takes_ours_and_keeps_what_has_no_room() -> None:
    journal = [("swapfile", PATH, "", str(GIB)), ("zram", "swap", "0", "1")]
    zrams = (Zram(0, GIB), Zram(1, GIB, ours=True))
    there = facts(files=[ours()], areas=[area(PATH), area("/dev/zram1", GIB)], zrams=zrams)
    assert [undo.action for undo in plan_release(journal, there)] == [
        RemoveZram(number=1, why="kvmd lets go of the host"),
        RemoveSwapFile(path=PATH, why="kvmd lets go of the host"),
    ]
    tight = replace(there, memory=Memory(total_bytes=GIB, available_bytes=0))
    kept = plan_release(journal, tight)[0]
    assert kept.action is None
    assert "/dev/zram1: it holds 1 GiB" in (kept.kept or "")
    gone = facts()
    assert [undo.action for undo in plan_release(journal, gone)] == [None, None]


sizes_st = st.none() | st.integers(1, 3).map(lambda gib: f"{gib}GiB")
files_st = st.sampled_from([None, 1, 2]).flatmap(
    lambda gib: st.builds(
        SwapFile,
        path=st.just(PATH),
        size_bytes=st.just(gib and gib * GIB),
        ours=st.booleans() if gib else st.just(False),
        free_bytes=st.sampled_from([None, GIB, 50 * GIB]),
    )
)
zrams_st = st.none() | st.lists(
    st.builds(Zram, number=st.integers(0, 3), size_bytes=st.sampled_from([GIB, 2 * GIB]), ours=st.booleans()),
    unique_by=lambda zram: zram.number,
).map(tuple)


@given(sizes_st, sizes_st, files_st, zrams_st, st.sets(st.sampled_from([PATH, *(f"/dev/zram{n}" for n in range(4))])),
       st.integers(0, GIB), st.integers(0, 2 * GIB))  # fmt: skip
def test_applied_once_it_is_done_and_others_are_untouched(
    file: str | None, zram: str | None, there: SwapFile, zrams: Any, used: set[str], held: int, available: int
) -> None:
    wish = host(file=file, zram=zram)
    before = facts(
        files=[there], areas=[OTHERS, *(area(path, held) for path in sorted(used))], zrams=zrams, available=available
    )
    actions, problems = plan_swap(wish, before)
    after = kernel(before, actions)  # asserts that only ours is written to
    assert plan_swap(wish, after)[0] == ()
    assert [f for f in after.swap_files if f.path == PATH] == [there] or there.size_bytes is None or there.ours
    for each in before.zrams or ():
        assert each.ours or each in (after.zrams or ())
    if not problems and zrams is not None and zram:
        assert sum(z.ours for z in after.zrams or ()) == 1
