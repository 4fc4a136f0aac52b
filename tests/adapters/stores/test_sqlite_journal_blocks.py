"""``gateway.adapters.stores.sqlite_journal_blocks``: whatever happens, the unsettled records are there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.adapters.stores.sqlite_journal_blocks import BLOCK_BYTES, JournalBlocks
from gateway.adapters.stores.sqlite_schema import ensure_schema, transaction
from gateway.core.packing import UnreadablePack

HEAD_BYTES = 12


@contextmanager
def database() -> Iterator[apsw.Connection]:
    """One in memory, with the schema."""
    db = apsw.Connection(":memory:")
    ensure_schema(db)
    try:
        yield db
    finally:
        db.close()


def store(blocks: JournalBlocks, db: apsw.Connection, journal_id: int, record: bytes) -> None:
    """Write a record that fits, and take it as safe."""
    assert blocks.write(db, journal_id, record)
    blocks.written()


def settle(blocks: JournalBlocks, db: apsw.Connection) -> None:
    """Settle all that is there."""
    blocks.begin_settling()
    with transaction(db):
        blocks.drop_surplus(db)
    blocks.settled()


def count(db: apsw.Connection) -> int:
    """How many blocks there are."""
    number: int = db.execute("SELECT count(*) FROM journal_block").get
    return number


SIZES = st.one_of(
    st.integers(1, 60), st.integers(1, BLOCK_BYTES - HEAD_BYTES), st.just(BLOCK_BYTES - HEAD_BYTES)
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), SIZES),
        st.tuples(st.just("rolled back"), SIZES),
        st.tuples(st.just("begin"), st.just(0)),
        st.tuples(st.just("settled"), st.just(0)),
        st.tuples(st.just("replenish"), st.just(0)),
        st.tuples(st.just("crash"), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_what_is_not_settled_is_read_and_nothing_else_is_newer(steps: list[tuple[str, int]]) -> None:
    """Over writes, roll-backs, settling in any order and crashes at any point."""
    with database() as db:
        blocks = JournalBlocks()
        expected: dict[int, bytes] = {}
        journal_id = settled = settling_to = 0
        for step, size in steps:
            record = bytes([1 + journal_id % 255]) * size
            if step == "write":
                journal_id += 1
                store(blocks, db, journal_id, record)
                expected[journal_id] = record
            elif step == "rolled back":
                db.execute("BEGIN")
                assert blocks.write(db, journal_id + 1, record)
                db.execute("ROLLBACK")
            elif step == "begin":
                settling_to = journal_id
                blocks.begin_settling()
            elif step == "settled":
                settled = settling_to
                with transaction(db):
                    blocks.drop_surplus(db)
                blocks.settled()
            elif step == "replenish":
                blocks.replenish(db)
            else:
                blocks = JournalBlocks()
                blocks.read(db)
                settling_to = settled
        found = JournalBlocks().read(db)
        assert {number: record for number, record in found if number > settled} == {
            number: record for number, record in expected.items() if number > settled
        }
        assert len({number for number, _ in found if number > settled}) == sum(
            number > settled for number, _ in found
        )


def test_a_record_that_is_too_large_is_left_alone() -> None:
    """It is for a row of its own."""
    with database() as db:
        blocks = JournalBlocks()
        assert not blocks.write(db, 1, bytes(BLOCK_BYTES - HEAD_BYTES + 1))
        assert count(db) == 0
        assert blocks.write(db, 1, bytes(BLOCK_BYTES - HEAD_BYTES))


def test_a_record_too_large_after_one_that_was_rolled_back_confirms_nothing() -> None:
    """What a failed commit left behind is not taken for written by the next one."""
    with database() as db:
        blocks = JournalBlocks()
        store(blocks, db, 1, b"first")
        db.execute("BEGIN")
        assert blocks.write(db, 2, b"lost")
        db.execute("ROLLBACK")
        assert not blocks.write(db, 2, bytes(BLOCK_BYTES))
        blocks.written()
        store(blocks, db, 3, b"third")
        assert JournalBlocks().read(db) == [(1, b"first"), (3, b"third")]


def test_small_records_share_a_block() -> None:
    """A trickle of single tokens does not take a page each."""
    with database() as db:
        blocks = JournalBlocks()
        for number in range(1, 31):
            store(blocks, db, number, bytes([number]) * 100)
        assert count(db) == 1
        assert [number for number, _ in JournalBlocks().read(db)] == list(range(1, 31))


def test_a_steady_load_makes_no_new_blocks() -> None:
    """Those of the last round are used again, and the file does not grow."""
    with database() as db:
        blocks = JournalBlocks()
        number, counts = 0, []
        for _ in range(10):
            for _ in range(50):
                number += 1
                store(blocks, db, number, bytes(3000))
            while blocks.replenish(db):
                pass
            settle(blocks, db)
            counts.append(count(db))
        assert counts[-1] == counts[1]


def test_after_a_burst_the_blocks_are_given_back() -> None:
    """All but half a megabyte, in steps."""
    with database() as db:
        blocks = JournalBlocks()
        for number in range(1, 2001):
            store(blocks, db, number, bytes(3900))
        assert count(db) == 2000
        for _ in range(10):
            settle(blocks, db)
        assert count(db) == blocks.free == 128
        number = 2001
        store(blocks, db, number, b"goes on")
        assert (number, b"goes on") in JournalBlocks().read(db)


def test_enough_blocks_are_made_ahead() -> None:
    """As many as are in use, and some: commits find them."""
    with database() as db:
        blocks = JournalBlocks()
        for number in range(1, 201):
            store(blocks, db, number, bytes(3900))
        while blocks.replenish(db):
            pass
        assert blocks.free == 128 + 200
        before = count(db)
        for number in range(201, 501):
            store(blocks, db, number, bytes(3900))
        assert count(db) == before


def test_a_block_that_is_cut_short_is_not_guessed_at() -> None:
    """The file is damaged."""
    with database() as db:
        store(JournalBlocks(), db, 1, b"whole")
        db.execute("UPDATE journal_block SET records = substr(records, 1, 15)")
        with pytest.raises(UnreadablePack):
            JournalBlocks().read(db)
