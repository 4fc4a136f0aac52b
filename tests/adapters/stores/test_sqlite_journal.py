"""``gateway.adapters.stores.sqlite_journal``: a crash at any step of settling changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.adapters.stores import sqlite_journal
from gateway.adapters.stores.sqlite_journal_blocks import JournalBlocks
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


def journaled(db: apsw.Connection) -> int:
    """How many records of the journal are still to be settled."""
    settled: int = db.execute("SELECT ifnull((SELECT value FROM property WHERE name = 'journaled'), 0)").get
    in_blocks = [number for number, _ in JournalBlocks().read(db) if number > settled]
    return rows(db, "journal") + len(in_blocks)


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
    assert journaled(db) == 0
    commit(again, SessionCommit("s4", events=events(11, 11)))
    expected = again.load("s4")
    assert opened(db).load("s4") == expected


def test_what_is_trimmed_in_time_is_never_written_twice(db: apsw.Connection) -> None:
    """Acknowledged tokens leave with the journal."""
    tables = opened(db)
    tables.claim("s0", "ada", 1.0)
    for seq in range(1, 50):
        commit(tables, SessionCommit("s0", events=events(seq, seq), trimmed_to=seq))
    assert journaled(db) == 49
    while tables.journal.settle():
        pass

    assert (journaled(db), rows(db, "event_pack")) == (0, 0)
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

    assert journaled(db) <= 12


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
    commit(tables, SessionCommit("s0", events=events(1, 3, size=2_000)))
    whole: bytes = db.execute("SELECT parts FROM journal").get
    db.execute("UPDATE journal SET parts = ?", (whole[:-1] if damage is None else damage,))

    with pytest.raises(UnreadablePack):
        opened(db)


def test_large_and_small_records_are_replayed_in_their_order(db: apsw.Connection) -> None:
    """They are in two tables."""
    tables = opened(db)
    tables.claim("s0", "ada", 1.0)
    for seq in range(1, 9):
        size = 5_000 if seq in (3, 4, 7) else 10
        commit(tables, SessionCommit("s0", events=events(seq, seq, size=size), trimmed_to=max(0, seq - 3)))
    assert (rows(db, "journal"), rows(db, "journal_block")) == (3, 1)

    before = tables.load("s0")
    found = opened(db).load("s0")
    assert found == before
    assert found is not None
    assert [event.seq for event in found.events] == [6, 7, 8]


def test_under_a_steady_load_the_journal_grows_no_more(db: apsw.Connection) -> None:
    """What is settled makes room for what comes."""
    tables = opened(db)
    tables.claim("s0", "ada", 1.0)
    seq, counts = 0, []
    for _ in range(6):
        for _ in range(20):
            seq += 1
            commit(tables, SessionCommit("s0", events=events(seq, seq, size=3_000), trimmed_to=seq))
        while tables.journal.settle():
            pass
        counts.append(rows(db, "journal_block"))
    assert counts[0] == counts[-1]


def test_a_session_put_out_of_memory_by_another_of_its_group_loses_nothing(
    db: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only so many heads are kept at hand, and a group's parts are taken in after all of them were found."""
    monkeypatch.setattr(sqlite_journal, "_KNOWN_SESSIONS", 2)
    tables = opened(db)
    for name in NAMES[:3]:
        tables.claim(name, "ada", 1.0)
    commit(tables, SessionCommit("s0", events=events(1, 1)))
    while tables.journal.settle():
        pass
    assert tables.load("s1") is not None
    commit(tables, SessionCommit("s0", events=events(2, 2)), SessionCommit("s2", events=events(1, 1)))
    commit(tables, SessionCommit("s0", events=events(3, 3)))
    while tables.journal.settle():
        pass
    found = opened(db).load("s0")
    assert found is not None
    assert found.events == events(1, 3)


def test_a_file_of_the_first_schema_is_taken_over(tmp_path: Path) -> None:
    """With what is in its journal; an older version refuses it from then on."""
    older = apsw.Connection(str(tmp_path / "older.db"))
    configure(older, full_sync=False)
    ensure_schema(older)
    tables = opened(older)
    tables.claim("s0", "ada", 1.0)
    commit(tables, SessionCommit("s0", events=events(1, 3, size=2_000)))
    assert rows(older, "journal") == 1
    older.execute("DROP TABLE journal_block")
    older.pragma("user_version", 1)

    ensure_schema(older)
    again = opened(older)
    commit(again, SessionCommit("s0", events=events(4, 4)))
    found = opened(older).load("s0")
    older.close()
    assert found is not None
    assert found.events == (*events(1, 3, size=2_000), *events(4, 4))


# ---------------------------------------------------------------------- the short way of nearly every commit


@st.composite
def commits_of_events(draw: st.DrawFn) -> list[list[SessionCommit]]:
    """Rounds of commits that fit: events, trims and event ids of a few sessions."""
    ends = dict.fromkeys(NAMES[:3], 0)
    rounds = []
    for _ in range(draw(st.integers(1, 6))):
        commits = []
        for name in draw(st.lists(st.sampled_from(NAMES[:3]), unique=True, max_size=3)):
            new = draw(st.integers(0, 3))
            commits.append(
                SessionCommit(
                    name,
                    events=events(ends[name] + 1, ends[name] + new) if new else (),
                    trimmed_to=draw(st.none() | st.integers(0, 12)),
                    last_event_id=draw(st.none() | st.sampled_from(["", "a", "ä"])),
                )
            )
            ends[name] += new
        rounds.append(commits)
    return rounds


@given(commits_of_events(), st.booleans())
def test_the_short_way_stores_what_the_long_one_does(
    rounds: list[list[SessionCommit]], settles: bool
) -> None:
    """In memory, in the file, and after settling."""
    loaded = []
    for is_short in (True, False):
        with closing(apsw.Connection(":memory:")) as db:
            ensure_schema(db)
            tables = opened(db)
            for name in NAMES[:3]:
                tables.claim(name, "ada", 1.0)
                commit(tables, SessionCommit(name, last_event_id=None))
            for commits in rounds:
                if is_short:
                    assert tables.journal.store(commits)
                else:
                    commit(tables, *commits)
            if settles:
                while tables.journal.settle():
                    pass
            loaded.append((everything(tables), everything(opened(db))))
    assert loaded[0] == loaded[1]
    assert loaded[0][0] == loaded[0][1]


@pytest.mark.parametrize(
    "commits",
    [
        [SessionCommit("s0", events=events(3, 3))],
        [SessionCommit("s0", events=(*events(2, 2), *events(4, 4)))],
        [SessionCommit("s0", events=events(2, 2)), SessionCommit("s0", events=events(3, 3))],
        [SessionCommit("s0", events=events(2, 2)), SessionCommit("s0", trimmed_to=1)],
        [SessionCommit("s0", events=events(2, 2)), SessionCommit("stranger", events=events(1, 1))],
        [SessionCommit("s0", events=events(2, 2), last_event_id="\ud800")],
        [SessionCommit("s0", events=events(2, 2), queued=(message("t"),))],
        [SessionCommit("s0", events=events(2, 2), dequeued=("t",))],
        [SessionCommit("s0", events=events(1, 1), reset=True)],
    ],
    ids=["gap", "hole", "twice", "twice-trimmed", "unknown", "surrogate", "queued", "dequeued", "reset"],
)
def test_what_the_short_way_cannot_store_it_leaves_alone(
    db: apsw.Connection, commits: list[SessionCommit]
) -> None:
    """Wholly: the long way says what is wrong with it, or does it."""
    tables = opened(db)
    tables.claim("s0", "ada", 1.0)
    commit(tables, SessionCommit("s0", events=events(1, 1)))
    before = tables.load("s0")
    assert not tables.journal.store(commits)
    assert tables.load("s0") == opened(db).load("s0") == before


def test_a_neglected_journal_is_not_the_short_ways(
    db: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has to be settled first, which the long way does."""
    tables = opened(db)
    tables.claim("s0", "ada", 1.0)
    commit(tables, SessionCommit("s0", events=events(1, 1)))
    assert tables.journal.store([SessionCommit("s0", events=events(2, 2))])
    monkeypatch.setattr(sqlite_journal, "_OVERFULL_BYTES", 10)
    assert not tables.journal.store([SessionCommit("s0", events=events(3, 3))])
