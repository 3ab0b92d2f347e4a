import sqlite3
import stat
import uuid as uuid_module
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmd.effects import store as store_module
from kvmd.effects.database import Schema
from kvmd.effects.records import EffectKind, GuestEnd, GuestRun, hugepages_key, knob_key
from kvmd.effects.store import SCHEMA, Store
from kvmd.errors import Conflict, HostFailed, Refused
from kvmd.facts import JournalEntry, Process, TunedKnob

BOOT, NEXT_BOOT = "boot-1", "boot-2"
KSM = knob_key("/sys/kernel/mm/ksm/run")


@pytest.fixture
def opened(tmp_path):
    """Open stores of one directory; all are closed at the end."""
    stores = []

    def open_store(schema=SCHEMA):
        stores.append(Store(tmp_path, schema=schema))
        return stores[-1]

    yield open_store
    for one in stores:
        one.close()


@pytest.fixture
def store(opened):
    return opened()


def run_of(name: str = "web", **changes) -> GuestRun:
    run = GuestRun(name=name, uuid=str(uuid_module.UUID(int=7)), uid=64100, boot_id=BOOT, nonce="n1", begun_at=10.0)
    return replace(run, **changes)


def reopened(opened, store):
    store.close()
    return opened()


# ---- journal ---------------------------------------------------------------------------------------------------


def test_journal_keeps_the_first_original_and_the_last_new_in_order(opened, store):
    store.journal(KSM, "0", "1", BOOT, "ksm.mode is kvmd")
    store.journal(hugepages_key(0, 2 << 20), "0", "512", BOOT, "guests need them")
    store.journal(KSM, "1", "2", BOOT, "unmerge")
    expected = (
        JournalEntry(KSM, "0", "2", BOOT, "unmerge"),
        JournalEntry("hugepages:0:2097152", "0", "512", BOOT, "guests need them"),
    )
    assert store.journalled(BOOT) == expected
    assert reopened(opened, store).journalled(BOOT) == expected
    assert [entry.kind for entry in expected] == [EffectKind.KNOB, EffectKind.HUGEPAGES]
    assert [entry.subject for entry in expected] == ["/sys/kernel/mm/ksm/run", "0:2097152"]


def test_an_original_of_another_boot_is_none(store):
    store.journal(KSM, "0", "1", BOOT, "a")
    store.journal("bridge:kvlan", "", "kvlan", BOOT, "b")
    store.journal(KSM, "5", "1", NEXT_BOOT, "c")
    assert store.journalled(NEXT_BOOT) == (JournalEntry(KSM, "5", "1", NEXT_BOOT, "c"),)
    assert store.drop_other_boots(NEXT_BOOT) == 1
    assert store.journalled(BOOT) == ()
    store.forget(KSM)
    store.forget(KSM)
    assert store.journalled(NEXT_BOOT) == ()


def test_tuned_knobs_are_of_one_boot_and_end_with_their_journal_entry(opened, store):
    knob = TunedKnob("/sys/kernel/mm/ksm/run", "1", "ksm.mode is kvmd")
    store.set_tuned(knob, BOOT)
    store.set_tuned(TunedKnob("/proc/sys/vm/swappiness", "10", "swap.swappiness is 10"), BOOT)
    store.set_tuned(replace(knob, theirs="0"), BOOT)
    store = reopened(opened, store)
    assert [one.theirs for one in store.tuned(BOOT)] == [None, "0"]
    assert store.tuned(NEXT_BOOT) == ()
    store.forget(KSM)
    assert [one.path for one in store.tuned(BOOT)] == ["/proc/sys/vm/swappiness"]
    store.drop_other_boots(NEXT_BOOT)
    assert store.tuned(BOOT) == ()


# ---- wanted, holds, meta ---------------------------------------------------------------------------------------


def test_wanted_and_holds_are_the_last_ones(opened, store):
    store.set_wanted("web", "running", "root", "start", 1.0)
    store.set_wanted("web", "stopped", "guest", "poweroff inside", 2.0)
    store.set_wanted("nas", "running", "kvmd", "start.auto", 3.0)
    store.set_hold("web", "root", "disk exchange", 4.0)
    store = reopened(opened, store)
    assert [(w.guest, w.state, w.actor) for w in store.all_wanted()] == [
        ("nas", "running", "kvmd"),
        ("web", "stopped", "guest"),
    ]
    assert store.wanted("web").reason == "poweroff inside"
    assert store.wanted("none") is None
    assert [hold.reason for hold in store.holds()] == ["disk exchange"]
    store.clear_hold("web")
    assert store.holds() == ()


def test_a_wanted_state_outside_the_two_is_refused_by_the_database(store):
    with pytest.raises(HostFailed):
        store.set_wanted("web", "sideways", "root", "", 1.0)
    assert store.all_wanted() == ()


def test_meta(opened, store):
    assert store.meta("boot") is None
    store.set_meta("boot", BOOT)
    store.set_meta("boot", NEXT_BOOT)
    assert reopened(opened, store).meta("boot") == NEXT_BOOT


# ---- runs ------------------------------------------------------------------------------------------------------


def test_a_run_from_intent_to_end(opened, store):
    intent = run_of(config_text='[guest]\ndescription = "é\\n"\n', argv=("qemu", "-name", "a,,b"))
    assert store.begin_start(intent) == intent
    assert store.runs() == (intent,)
    assert store.record_process("web", 4711, 99) == replace(intent, process=Process(4711, 99))
    running = store.record_running("web", 12.5)
    assert reopened(opened, store).runs() == (running,)
    store = opened()
    assert store.last_end("web") is None
    assert store.end_run("web", "guest-poweroff", "powered off inside", 20.0) is True
    assert store.runs() == ()
    end = GuestEnd("web", "guest-poweroff", "powered off inside", 20.0, 10.0, Process(4711, 99))
    assert reopened(opened, store).last_end("web") == end


def test_a_second_start_is_refused_until_the_first_has_ended(store):
    store.begin_start(run_of())
    with pytest.raises(Conflict, match="web"):
        store.begin_start(run_of(nonce="n2"))
    assert store.runs()[0].nonce == "n1"
    store.end_run("web", "start-failed", "no such bridge", 11.0)
    store.begin_start(run_of(nonce="n2"))
    assert store.runs()[0].nonce == "n2"


def test_steps_without_an_intent_are_refused(store):
    for step in (lambda: store.record_process("web", 1, 1), lambda: store.record_running("web", 1.0)):
        with pytest.raises(Conflict, match="no start"):
            step()
    store.begin_start(run_of())
    assert store.record_launch("web", "x = 1", ["qemu", "-S"]).argv == ("qemu", "-S")


def test_an_end_without_a_run_is_kept(store):
    store.end_run("web", "vanished", "", 1.0)
    assert store.last_end("web") == GuestEnd("web", "vanished", "", 1.0)


def test_crashes_are_counted_from_a_time_and_bounded(store):
    for second in range(150):
        store.record_crash("web", float(second))
    store.record_crash("nas", 149.0)
    assert store.crashes_since("web", 140.0) == 10
    assert store.crashes_since("web", 0.0) == 100
    store.clear_crashes("web")
    assert (store.crashes_since("web", 0.0), store.crashes_since("nas", 0.0)) == (0, 1)


# ---- uids ------------------------------------------------------------------------------------------------------


def test_uid_is_remembered_and_never_shared(opened, store):
    free = lambda uid: False  # noqa: E731
    first = [store.allot_uid(name, 64100, 64109, free) for name in ("web", "nas", "db")]
    assert first == [64100, 64101, 64102]
    store = reopened(opened, store)
    assert [store.allot_uid(name, 64100, 64109, free) for name in ("db", "nas", "web")] == [64102, 64101, 64100]


def test_uid_in_use_by_a_process_is_passed_over_even_the_guests_own(store):
    assert store.allot_uid("web", 64100, 64109, lambda uid: uid == 64100) == 64101
    assert store.allot_uid("web", 64100, 64109, lambda uid: uid == 64101) == 64100
    assert store.allot_uid("nas", 64100, 64109, lambda uid: False) == 64101  # web gave it back


def test_uid_range_that_moved_or_is_exhausted(store):
    store.allot_uid("web", 64100, 64101, lambda uid: False)
    assert store.allot_uid("web", 70000, 70001, lambda uid: False) == 70000
    store.allot_uid("nas", 70000, 70001, lambda uid: False)
    with pytest.raises(Refused, match="70000-70001: 2 belong to guests"):
        store.allot_uid("db", 70000, 70001, lambda uid: False)
    store.forget_guest("web")
    assert store.allot_uid("db", 70000, 70001, lambda uid: False) == 70000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.frozensets(st.integers(0, 9))), max_size=30))
def test_no_two_guests_ever_have_one_uid(tmp_path_factory, steps):
    store = Store(tmp_path_factory.mktemp("state"))
    try:
        held: dict[str, int] = {}
        for name, busy in steps:
            try:
                held[name] = store.allot_uid(name, 0, 9, busy.__contains__)
            except Refused:
                continue
            assert held[name] not in busy
            assert len(set(held.values())) == len(held)
    finally:
        store.close()


def test_forgetting_a_guest_takes_everything_but_not_while_it_runs(store):
    store.begin_start(run_of())
    store.set_wanted("web", "running", "root", "", 1.0)
    store.record_crash("web", 1.0)
    with pytest.raises(Conflict):
        store.forget_guest("web")
    store.end_run("web", "admin-stop", "", 2.0)
    store.forget_guest("web")
    assert (store.wanted("web"), store.last_end("web"), store.crashes_since("web", 0.0)) == (None, None, 0)


# ---- the file: private, damaged, newer, older -------------------------------------------------------------------


def test_files_are_private_and_a_new_store_is_no_loss(tmp_path, store):
    store.set_meta("a", "b")
    modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.iterdir()}
    assert modes == {"state.db": 0o600, "state.db-wal": 0o600, "state.db-shm": 0o600}
    assert (store.rebuilt, store.degraded, store.check()) == (None, None, ())


def test_every_commit_is_synced(store):
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def garbage(path):
    path.write_bytes(b"not a database at all, " * 100)


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 17])


def scribbled(path):
    raw = bytearray(path.read_bytes())
    raw[4096:12288] = b"\xa5" * 8192
    path.write_bytes(bytes(raw))


def without_a_table(path):
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE run")
    connection.close()


def of_someone_else(path):
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (a)")
    connection.close()


@pytest.mark.parametrize("damage", [garbage, half, scribbled, without_a_table, of_someone_else])
def test_damaged_file_is_set_aside_and_begun_anew_loudly(tmp_path, opened, store, damage, caplog):
    for number in range(200):
        store.set_meta(f"key-{number}", "x" * 100)
    store.close()
    damage(tmp_path / "state.db")
    bytes_before = (tmp_path / "state.db").read_bytes()
    store = opened()
    assert "state.db was damaged" in store.rebuilt
    assert store.meta("key-1") is None
    aside = next(entry for entry in tmp_path.iterdir() if entry.name.startswith("state.db.corrupt-"))
    assert aside.name in store.rebuilt
    assert aside.read_bytes() == bytes_before
    assert "adopts what runs" in caplog.text
    store.set_meta("a", "b")
    assert reopened(opened, store).rebuilt is None


def test_two_damaged_files_in_one_second_are_both_kept(tmp_path, opened):
    for _ in range(2):
        garbage(tmp_path / "state.db")
        opened().close()
    assert len([entry for entry in tmp_path.iterdir() if ".corrupt-" in entry.name]) == 2


def test_an_emptied_file_is_told(tmp_path, opened):
    (tmp_path / "state.db").write_bytes(b"")
    assert "was empty" in opened().rebuilt


def test_a_cut_log_loses_the_last_commits_only(tmp_path, opened, store):
    store.set_meta("old", "kept")
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    store.set_meta("new", "lost")
    copy = tmp_path / "copy"
    copy.mkdir()
    for suffix in ("", "-wal"):
        raw = (tmp_path / f"state.db{suffix}").read_bytes()
        (copy / f"state.db{suffix}").write_bytes(raw[:-100] if suffix else raw)
    found = Store(copy)
    assert (found.meta("old"), found.meta("new"), found.rebuilt) == ("kept", None, None)
    found.close()


def test_newer_schema_is_refused_and_not_touched(tmp_path, opened, store):
    store.set_meta("a", "b")
    store.close()
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = (tmp_path / "state.db").read_bytes()
    with pytest.raises(Refused, match=f"schema 99, this one knows {SCHEMA.version}"):
        opened()
    assert (tmp_path / "state.db").read_bytes() == before


def test_migration_keeps_a_copy_and_the_data(tmp_path, opened, store):
    store.set_meta("a", "b")
    store.close()
    later = Schema(
        steps=(*SCHEMA.steps, ("ALTER TABLE meta ADD COLUMN note TEXT", "UPDATE meta SET note = 'migrated'")),
        tables=SCHEMA.tables,
    )
    store = opened(later)
    assert store.meta("a") == "b"
    assert store._rows("SELECT note FROM meta") == [("migrated",)]
    copy = tmp_path / f"state.db.v{SCHEMA.version}"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    with sqlite3.connect(copy) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA.version,)
        assert connection.execute("SELECT * FROM meta").fetchall() == [("a", "b")]
    connection.close()


def test_failed_migration_changes_nothing(tmp_path, opened, store):
    store.set_meta("a", "b")
    store.set_meta("c", "b")
    store.close()
    step = ("DELETE FROM wanted", "CREATE UNIQUE INDEX one_value ON meta (value)")
    failed = opened(Schema(steps=(*SCHEMA.steps, step), tables=SCHEMA.tables))
    assert "UNIQUE" in failed.degraded
    failed.close()
    assert opened().meta("a") == "b"


def test_backup_is_complete_and_replaces(tmp_path, store):
    target = tmp_path / "backup.db"
    target.write_bytes(b"old")
    store.set_meta("a", "b")
    store.backup(target)
    copy_dir = tmp_path / "copy"
    copy_dir.mkdir()
    target.rename(copy_dir / "state.db")
    copy = Store(copy_dir)
    assert (copy.meta("a"), copy.rebuilt) == ("b", None)
    copy.close()


# ---- a directory that cannot be written -------------------------------------------------------------------------


def test_without_its_directory_reads_answer_writes_fail_and_it_recovers(tmp_path, caplog):
    lost = tmp_path / "not yet mounted"
    store = Store(lost)
    assert "cannot be written" in store.degraded
    assert (store.runs(), store.meta("a")) == ((), None)
    for _ in range(3):
        with pytest.raises(HostFailed, match="cannot record the start of guest web"):
            store.begin_start(run_of())
    assert caplog.text.count("nothing is recorded") == 1
    lost.mkdir()
    store.begin_start(run_of())
    assert store.degraded is None
    assert store.runs() == (run_of(),)
    store.close()


class FullDisk:
    """A connection whose commits fail as on a full disk, like SQLite itself does it: by rolling back."""

    def __init__(self, real: sqlite3.Connection) -> None:
        self._real = real

    def __getattr__(self, name):
        return getattr(self._real, name)

    def execute(self, sql, *values):
        if sql == "COMMIT":
            self._real.execute("ROLLBACK")
            raise sqlite3.OperationalError("database or disk is full")
        return self._real.execute(sql, *values)


def test_an_end_that_cannot_be_written_waits_and_does_not_block_the_next_start(opened, store):
    store.begin_start(run_of())
    real, store._db = store._db, FullDisk(store._db)
    with pytest.raises(HostFailed, match="disk is full"):
        store.set_meta("a", "b")
    assert store.end_run("web", "qemu-crash", "signal 9", 20.0) is False
    assert store.runs() == ()
    assert store.last_end("web").detail == "signal 9"
    store._db = real
    store.begin_start(run_of(nonce="n2"))
    store = reopened(opened, store)
    assert store.runs()[0].nonce == "n2"
    assert store.last_end("web").detail == "signal 9"


def test_all_records_are_exported_for_the_supervisor():
    assert set(store_module.__all__) >= {"GuestRun", "GuestEnd", "Store"}
