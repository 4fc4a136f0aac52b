"""``gateway.adapters.stores.sqlite_journal``: a crash at any step of settling changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from gateway.adapters.stores import sqlite_journal
from gateway.adapters.stores.sqlite_schema import configure, ensure_schema, transaction
from gateway.adapters.stores.sqlite_tables import Abandoned, SessionTables
from gateway.core.packing import UnreadablePack, pack_commit
from gateway.core.storage import SessionCommit, StoredSession
from tests.conformance.session_store import events, message

NAMES = [f"s{number}" for number in range(7)]


@pytest.fixture
def db(tmp_path: Path) -> Iterator[apsw.Connection]:
    """A file with the schema."""
    connection = apsw.Connection(str(tmp_path / "sessions.db"))
    configure(connection, full_sync=False)
    ensure_schema(connection)
    yield connection
    connection.close()


def opened(db: apsw.Connection) -> SessionTables:
    """The tables as a process finds them that has just started."""
    return SessionTables(db, dedupe_window=100.0)


def commit(tables: SessionTables, *commits: SessionCommit) -> None:
    """Commit without refusal."""
    assert tables.apply([pack_commit(each) for each in commits], lambda: False) == {}


def everything(tables: SessionTables) -> list[StoredSession | None]:
    """What is held of all sessions."""
    return [tables.load(name) for name in NAMES]


def rows(db: apsw.Connection, table: str) -> int:
    """How many rows a table has."""
    count: int = db.execute(f"SELECT count(*) FROM {table}").get
    return count


@pytest.mark.parametrize("steps", range(6))
def test_a_crash_between_steps_of_settling_changes_nothing(
    db: apsw.Connection, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """With some sessions settled and some not, trims, ids and resets in the journal, all is replayed once."""
    monkeypatch.setattr(sqlite_journal, "_ROWS_AT_ONCE", 2)
    tables = opened(db)
    for name in NAMES:
        tables.claim(name, "ada", 1.0)
    commit(tables, *(SessionCommit(name, events=events(1, 6), last_event_id="a") for name in NAMES))
    while tables.journal.settle():
        pass
    commit(tables, *(SessionCommit(name, events=events(7, 9), trimmed_to=2) for name in NAMES))
    commit(
        tables, SessionCommit("s1", reset=True, events=events(1, 2)), SessionCommit("s2", last_event_id="b")
    )
    commit(tables, SessionCommit("s3", trimmed_to=9), SessionCommit("s1", events=events(3, 3)))
    before = everything(tables)
    for _ in range(steps):
        tables.journal.settle()
    commit(tables, SessionCommit("s4", events=events(10, 10)))
    before[4] = tables.load("s4")
    assert everything(tables) == before

    again = opened(db)
    assert everything(again) == before
    assert rows(db, "journal") == 0
    commit(again, SessionCommit("s4", events=events(11, 11)))
    expected = again.load("s4")
    assert opened(db).load("s4") == expected


def test_what_is_trimmed_in_time_is_never_written_twice(db: apsw.Connection) -> None:
    """Acknowledged tokens leave with the journal."""
    tables = opened(db)
    tables.claim("s0", "ada", 1.0)
    for seq in range(1, 50):
        commit(tables, SessionCommit("s0", events=events(seq, seq), trimmed_to=seq))
    assert rows(db, "journal") == 49
    while tables.journal.settle():
        pass

    assert (rows(db, "journal"), rows(db, "event_pack")) == (0, 0)
    assert opened(db).load("s0") == StoredSession("s0", "ada", None, first_seq=50, last_seq=49)


def test_a_life_that_ends_in_the_commit_it_began_in_leaves_no_rows(db: apsw.Connection) -> None:
    """Events that a reset in the same group drops are not settled: nobody would delete them."""
    tables = opened(db)
    tables.claim("s0", "ada", 1.0)
    while tables.delete_discarded(100):
        pass
    commit(tables, SessionCommit("s0", events=events(1, 3)), SessionCommit("s0", reset=True))
    while tables.delete_discarded(100):
        pass
    while tables.journal.settle():
        pass

    assert (rows(db, "event_pack"), rows(db, "discarded")) == (0, 0)


def test_journal_ids_go_on_after_the_journal_was_emptied(db: apsw.Connection) -> None:
    """An id that is used again would be taken for settled and skipped."""
    for seq in range(1, 6):
        tables = opened(db)
        tables.claim("s0", "ada", 1.0)
        commit(tables, SessionCommit("s0", events=events(seq, seq)))
        if seq % 2:
            while tables.journal.settle():
                pass

    found = opened(db).load("s0")
    assert found is not None
    assert found.events == events(1, 5)


def test_a_settling_that_fails_is_done_again(db: apsw.Connection) -> None:
    """On a full disk nothing is lost from memory, and it works when there is room."""
    tables = opened(db)
    tables.claim("s0", "ada", 1.0)
    commit(tables, SessionCommit("s0", events=events(1, 200, size=500)))
    before = everything(tables)
    db.pragma("max_page_count", db.pragma("page_count"))
    with pytest.raises(apsw.FullError):
        tables.journal.settle()
    assert everything(tables) == before

    db.pragma("max_page_count", 1_000_000)
    assert tables.journal.is_due
    while tables.journal.settle():
        pass
    assert everything(tables) == everything(opened(db)) == before


def test_a_journal_that_is_neglected_is_settled_by_commits(
    db: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory stays bounded when nobody calls for housekeeping."""
    monkeypatch.setattr(sqlite_journal, "_OVERFULL_BYTES", 10_000)
    tables = opened(db)
    tables.claim("s0", "ada", 1.0)
    for seq in range(1, 101):
        commit(tables, SessionCommit("s0", events=events(seq, seq, size=1_000)))

    assert rows(db, "journal") <= 12


def test_an_abandoned_commit_is_not_stored(db: apsw.Connection) -> None:
    """Neither in the tables nor in what is kept at hand, be it tokens only or more."""
    tables = opened(db)
    tables.claim("s0", "ada", 1.0)
    for given_up in (
        SessionCommit("s0", events=events(1, 2)),
        SessionCommit("s0", events=events(1, 2), reset=True, queued=(message("t"),)),
    ):
        with pytest.raises(Abandoned):
            tables.apply([pack_commit(given_up)], lambda: True)

    empty = StoredSession("s0", "ada", None, first_seq=1, last_seq=0)
    assert tables.load("s0") == opened(db).load("s0") == empty
    commit(tables, SessionCommit("s0", events=events(1, 1)))


def test_whatever_ends_a_transaction_early_rolls_it_back(db: apsw.Connection) -> None:
    """A transaction left open would swallow all later ones when the connection is closed."""

    def interrupted() -> None:
        with transaction(db):
            db.execute("INSERT INTO property VALUES ('x', 1)")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert not db.in_transaction
    assert rows(db, "property") == 0


@pytest.mark.parametrize("damage", [b"", b"\x02rest", b"\x01cut", None])
def test_a_damaged_journal_is_not_guessed_at(db: apsw.Connection, damage: bytes | None) -> None:
    """The error says so at start: the file is damaged."""
    tables = opened(db)
    tables.claim("s0", "ada", 1.0)
    commit(tables, SessionCommit("s0", events=events(1, 3)))
    whole: bytes = db.execute("SELECT parts FROM journal").get
    db.execute("UPDATE journal SET parts = ?", (whole[:-1] if damage is None else damage,))

    with pytest.raises(UnreadablePack):
        opened(db)
