"""One answer for each way a guest can end, and for each way it can be alive."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmd.effects.oom import OomWatch
from kvmd.effects.records import GuestEnd
from kvmd.effects.tree import Tree
from kvmd.guest import why
from kvmd.guest.lifecycle import ALIVE, Cause, Life, State


def test_each_cause_and_each_state_has_an_answer_of_its_own() -> None:
    ends = {cause: why.answer(Life(State.FAILED, "", cause), None) for cause in Cause}
    lives = {state: why.answer(Life(state), None) for state in ALIVE}
    never = why.answer(Life(State.STOPPED), None)
    answers = [*ends.values(), *lives.values(), never]
    assert len(set(answers)) == len(answers)
    assert never == "it was never started"


def test_words_that_were_recorded_are_added_where_they_say_more() -> None:
    assert why.answer(Life(State.STOPPED, "stop asked by alice", Cause.ADMIN_STOP), None) == (
        "it was asked to power off: stop asked by alice"
    )
    same = Life(State.STOPPED, "the guest powered itself off", Cause.GUEST_POWEROFF)
    assert why.answer(same, None) == "the guest powered itself off"
    hung = Life(State.UNREACHABLE, "monitor silent")
    assert why.answer(hung, None).endswith("monitor silent")
    assert why.cause_of(hung, GuestEnd("web", "qemu-crash", "", 1.0)) is None


def test_a_kvmd_that_came_back_answers_from_the_record() -> None:
    off = Life(State.STOPPED)
    end = GuestEnd("web", "out-of-memory", "no memory was left on the host", 1.0)
    assert why.cause_of(off, end) is Cause.OUT_OF_MEMORY
    assert why.answer(off, end) == "the kernel killed its QEMU: out of memory: no memory was left on the host"
    assert why.cause_of(off, GuestEnd("web", "eaten-by-a-grue", "", 1.0)) is None


@pytest.mark.parametrize("text", ["", "pgfault 1\n", "oom_kill 3\n"])
def test_only_what_is_killed_from_now_on_counts_and_only_for_a_while(tmp_path: Path, text: str) -> None:
    vmstat = tmp_path / "proc/vmstat"
    vmstat.parent.mkdir()
    vmstat.write_text(text)
    watch = OomWatch(Tree(tmp_path))
    assert not watch.look(0.0)
    vmstat.write_text("oom_kill 4\n")
    assert watch.look(10.0)
    assert watch.look(30.0)  # a second QEMU of the same moment
    assert not watch.look(41.0)
