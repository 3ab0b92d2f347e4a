import sqlite3

import pytest

from kvmd.effects.database import Schema, open_database
from kvmd.effects.history import _BUFFER, SCHEMA, History
from kvmd.effects.records import Sample

NOW = 1_800_000_000.0


@pytest.fixture
def opened(tmp_path):
    histories = []

    def open_history(now=NOW, directory=tmp_path):
        histories.append(History(directory, now=now))
        return histories[-1]

    yield open_history
    for one in histories:
        one.close()


@pytest.fixture
def history(opened):
    return opened()


def add(history, kind="guest.running", guest="web", time=NOW, data="{}"):
    return history.append(time=time, type=kind, guest=guest, actor="root", data=data)


def test_events_come_back_in_order_with_growing_cursors(opened, history):
    events = tuple(add(history, data=f'{{"n":{n}}}') for n in range(5))
    assert [e.cursor - events[0].cursor for e in events] == [0, 1, 2, 3, 4]
    assert history.cursor == events[-1].cursor
    assert history.events_since(0) == events
    assert history.events_since(events[2].cursor) == events[3:]
    assert history.events_since(0, limit=2) == events[:2]
    history.close()
    assert opened().events_since(0) == events


def test_types_are_filtered(history):
    started, stopped = add(history, "guest.running"), add(history, "guest.stopped")
    add(history, "host.applied", guest=None)
    assert history.events_since(0, {"guest.running", "guest.stopped"}) == (started, stopped)
    assert history.events_since(0, {"none"}) == ()


def test_nothing_is_written_before_the_flush_and_all_in_one(tmp_path, history):
    for _ in range(3):
        add(history)
    with sqlite3.connect(tmp_path / "history.db") as reader:
        assert reader.execute("SELECT count(*) FROM event").fetchone() == (0,)
        assert history.flush() is True
        assert reader.execute("SELECT count(*) FROM event").fetchone() == (3,)
    reader.close()
    assert history.flush() is True


def test_cursors_grow_over_a_crash_that_loses_the_last_batch(opened):
    before = opened(NOW)
    add(before)
    before.flush()
    lost = [add(before).cursor for _ in range(10)]
    before._events.clear()  # kvmd was killed here
    after = opened(NOW)
    assert add(after).cursor > max(lost)


def test_cursors_grow_over_deletion_of_the_file(tmp_path, opened):
    before = opened(NOW)
    last = [add(before).cursor for _ in range(1000)][-1]
    before.close()
    (tmp_path / "history.db").unlink()
    assert add(opened(NOW + 60)).cursor > last


def test_cursors_grow_when_the_clock_was_set_back(opened):
    before = opened(NOW)
    last = add(before).cursor
    before.close()
    assert add(opened(NOW - 86400)).cursor > last


def test_decisions_newest_first_by_guest(history):
    history.add_decision("web", '{"n":1}', NOW)
    history.add_decision(None, '{"n":2}', NOW + 1)
    history.flush()
    history.add_decision("web", '{"n":3}', NOW + 2)
    assert [d.data for d in history.decisions("web")] == ['{"n":3}', '{"n":1}']
    assert [d.data for d in history.decisions(None, limit=2)] == ['{"n":3}', '{"n":2}']


def test_prune_by_age(history):
    old, new = add(history, time=NOW - 100), add(history, time=NOW)
    history.add_decision("web", "{}", NOW - 100)
    assert history.oldest_cursor() == old.cursor
    assert history.prune(NOW, 50, 1 << 30) is True
    assert history.events_since(0) == (new,)
    assert history.decisions("web") == ()
    assert history.oldest_cursor() == new.cursor


def test_oldest_cursor_of_an_empty_history_is_the_next_one(history):
    assert history.oldest_cursor() == history.cursor + 1
    assert add(history).cursor == history.oldest_cursor()


def test_prune_by_size_shrinks_the_file_and_drops_the_oldest(tmp_path, history):
    events = [add(history, data='{"x":"' + "y" * 1000 + '"}') for _ in range(2000)]
    history.flush()
    history.prune(NOW, 1e9, 256 << 10)
    assert (tmp_path / "history.db").stat().st_size <= 256 << 10
    left = history.events_since(0)
    assert 0 < len(left) < 2000
    assert left[-1] == events[-1]
    history.prune(NOW, 1e9, 0)
    assert history.events_since(0) == ()


def test_file_deleted_while_open_is_made_again(tmp_path, history):
    add(history)
    history.flush()
    (tmp_path / "history.db").unlink()
    kept = add(history)
    assert history.flush() is True
    assert history.events_since(0) == (kept,)
    assert (tmp_path / "history.db").exists()


@pytest.mark.parametrize("content", [b"junk" * 5000, b"SQLite format 3\0" + b"\xff" * 9000, b""])
def test_a_damaged_file_is_begun_anew(tmp_path, opened, content):
    (tmp_path / "history.db").write_bytes(content)
    history = opened()
    event = add(history)
    assert history.flush() is True
    assert history.events_since(0) == (event,)


def test_damage_found_while_running_is_mended(tmp_path, opened, history):
    for _ in range(500):
        add(history, data='{"x":"' + "y" * 500 + '"}')
    history.close()
    raw = bytearray((tmp_path / "history.db").read_bytes())
    raw[8192:] = b"\xa5" * len(raw[8192:])
    (tmp_path / "history.db").write_bytes(bytes(raw))
    history = opened()
    history.events_since(0)
    event = add(history)
    history.flush()
    assert event in history.events_since(event.cursor - 1)
    assert history.flush() is True


def test_a_newer_schema_is_set_aside_not_overwritten(tmp_path, opened, history):
    add(history)
    history.close()
    with sqlite3.connect(tmp_path / "history.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    assert opened().events_since(0) == ()
    assert [entry.name for entry in tmp_path.iterdir() if ".newer-" in entry.name]


def test_without_a_directory_nothing_raises_and_memory_is_bounded(tmp_path, opened, caplog):
    history = opened(directory=tmp_path / "none")
    for _ in range(_BUFFER + 10):
        last = add(history)
        history.add_decision("web", "{}", NOW)
    assert history.flush() is False
    assert history.prune(NOW, 1, 1) is False
    assert (len(history._events), len(history._decisions), history.dropped) == (_BUFFER, _BUFFER, 20)
    assert history.events_since(last.cursor - 1) == (last,)
    assert len(history.decisions("web", limit=3)) == 3
    assert caplog.text.count("kept in memory") == 1
    (tmp_path / "none").mkdir()
    assert history.flush() is True
    assert history.events_since(last.cursor - 1) == (last,)


def test_samples_are_kept_summed_up_and_forgotten_after_their_time(opened, history):
    for n in range(20):
        history.add_sample(Sample(NOW + n, "web", n << 20, 5 << 20 if n else None))
    history.add_sample(Sample(NOW, "db", 7, None))
    usage = history.usage(NOW + 100)
    assert (usage["web"].samples, usage["web"].span_s, usage["web"].demand_p95_bytes) == (20, 100.0, 18 << 20)
    assert (usage["web"].overhead_bytes, usage["db"].overhead_bytes) == (5 << 20, None)
    history.close()
    again = opened()
    assert again.usage(NOW + 100) == usage
    assert again.prune(NOW + 20, 1e6, 1 << 30, samples_s=10)
    assert again.usage(NOW + 100)["web"].samples == 10
    assert "db" not in again.usage(NOW + 100)
    assert add(again) in again.events_since(0), "events have their own time"


def test_a_history_of_the_first_layout_gets_its_table_of_samples(opened, tmp_path):
    schema = Schema(SCHEMA.steps[:1], frozenset({"event", "decision"}))
    first = open_database(tmp_path / "history.db", schema, "NORMAL", check=False)
    first.execute("INSERT INTO event VALUES (5, 1.0, 'guest.running', 'web', 'root', '{}')")
    first.close()
    history = opened()
    history.add_sample(Sample(NOW, "web", 1))
    assert history.usage(NOW)["web"].samples == 1
    assert [event.cursor for event in history.events_since(0)] == [5]
