"""Reads and writes of the SQLite store, as they run in its worker thread: plain, synchronous SQL.

Each method is one transaction, or none when it only reads: the thread runs one method at a time on the one
connection that writes, so that a method sees no other's halves. Whatever ends a method early, a
cancellation included, rolls its transaction back.

Every step of a statement gives the interpreter lock away and has to win it back from the event loop, so
the common case, token events of many sessions, is one statement with all the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import apsw

from gateway.adapters.stores.sqlite_schema import SEQ_BITS, SEQ_MASK
from gateway.core.packing import unpack_events, unpack_message, unpack_record
from gateway.core.storage import Decision, LedgerEntry, SessionCommit, StoredSession, TurnState

_ROWS_PER_STATEMENT = 128
_KNOWN_SESSIONS = 50_000
"""How many sessions' heads are kept at hand (about 300 bytes each); a further one starts the set anew."""
_TRIM_ROWS = 1_000
"""What one trim deletes at most, so that a late ack of very much does not stall the tokens of others."""


class Abandoned(Exception):
    """The caller stopped waiting before the transaction was complete; it was rolled back."""


class Step(NamedTuple):
    """One ``SessionCommit`` made ready for the thread: everything that can be packed is."""

    session_id: str
    first_seq: int
    """0 without events."""
    last_seq: int
    last_event_id: str | None
    events: bytes | None
    more: SessionCommit | None
    """The commit itself when it changes more than events, which is rare."""
    record: bytes | None = None
    queued: tuple[bytes, ...] = ()


class _Head(NamedTuple):
    """Where a session stands."""

    number: int
    last_seq: int
    trimmed_to: int
    last_event_id: str | None


class SessionTables:
    """The tables behind one connection; used in its worker thread only."""

    def __init__(self, db: apsw.Connection, *, dedupe_window: float) -> None:
        self._db = db
        self._dedupe_window = dedupe_window
        self._heads: dict[str, _Head] = {}
        self._inserts: dict[int, str] = {}
        newest: int = db.execute(
            "SELECT max((SELECT ifnull(max(number), 0) FROM session),"
            " (SELECT ifnull(max(number), 0) FROM discarded),"
            " (SELECT ifnull(max(key), 0) >> ? FROM event_pack))",
            (SEQ_BITS,),
        ).get
        self._next_number = newest + 1

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # SQLite may have rolled back by itself, as it does on a full disk.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    # ------------------------------------------------------------------ commit

    def apply(self, steps: Sequence[Step], is_abandoned: Callable[[], bool]) -> dict[str, str]:
        """Store all steps that fit, in one transaction. Returns why others were refused, by session id.

        Raises ``Abandoned``, and nothing is stored, when ``is_abandoned()`` by the time of the end.
        """
        changed: dict[str, _Head] = {}
        refused: dict[str, str] = {}
        rows: list[Any] = []
        if len(steps) <= _ROWS_PER_STATEMENT and all(step.more is None for step in steps):
            for step in steps:
                self._append(step, changed, refused, rows)
            if is_abandoned():
                raise Abandoned
            self._insert(rows)
        else:
            with self._transaction():
                for step in steps:
                    if step.more is None:
                        self._append(step, changed, refused, rows)
                        continue
                    # What was said before about this session must be in the tables when it is changed.
                    self._insert(rows)
                    rows = []
                    self._change(step, step.more, changed, refused)
                self._insert(rows)
                if is_abandoned():
                    raise Abandoned
        if len(self._heads) > _KNOWN_SESSIONS:
            self._heads.clear()
        self._heads.update(changed)
        return refused

    def _head(self, session_id: str) -> _Head | None:
        found = self._db.execute(
            "SELECT number, last_seq, trimmed_to, last_event_id FROM session WHERE session_id = ?",
            (session_id,),
        ).fetchone()
        if found is None:
            return None
        head = _Head(*found)
        base = head.number << SEQ_BITS
        newest = self._db.execute(
            "SELECT max(key) FROM event_pack WHERE key BETWEEN ? AND ?",
            (base | head.last_seq, base | SEQ_MASK),
        ).get
        if newest is None or newest & SEQ_MASK == head.last_seq:
            return head
        named = self._db.execute(
            "SELECT last_event_id FROM event_pack WHERE key > ? AND key <= ? AND last_event_id IS NOT NULL"
            " ORDER BY key DESC LIMIT 1",
            (base | head.last_seq, newest),
        ).get
        return _Head(
            head.number, newest & SEQ_MASK, head.trimmed_to, head.last_event_id if named is None else named
        )

    def _fitting(
        self, step: Step, changed: dict[str, _Head], refused: dict[str, str], *, reset: bool = False
    ) -> _Head | None:
        session_id = step.session_id
        if session_id in refused:
            return None
        head = changed.get(session_id) or self._heads.get(session_id) or self._head(session_id)
        if head is None:
            refused[session_id] = "the session is not known"
        elif step.first_seq and step.first_seq != (1 if reset else head.last_seq + 1):
            refused[session_id] = "its events do not follow the last one stored"
            return None
        return head

    def _append(
        self, step: Step, changed: dict[str, _Head], refused: dict[str, str], rows: list[Any]
    ) -> None:
        head = self._fitting(step, changed, refused)
        if head is None:
            return
        number = head.number
        changed[step.session_id] = _Head(
            number,
            step.last_seq,
            head.trimmed_to,
            head.last_event_id if step.last_event_id is None else step.last_event_id,
        )
        rows += (number << SEQ_BITS | step.last_seq, step.last_event_id, step.events)

    def _insert(self, rows: list[Any]) -> None:
        if len(rows) > 3 * _ROWS_PER_STATEMENT:
            self._insert(rows[: 3 * _ROWS_PER_STATEMENT])
            self._insert(rows[3 * _ROWS_PER_STATEMENT :])
        elif rows:
            count = len(rows) // 3
            statement = self._inserts.get(count)
            if statement is None:
                places = ",".join(["(?,?,?)"] * count)
                statement = self._inserts[count] = f"INSERT INTO event_pack VALUES {places}"
            self._db.execute(statement, rows)

    def _change(
        self, step: Step, commit: SessionCommit, changed: dict[str, _Head], refused: dict[str, str]
    ) -> None:
        """Apply a commit that changes more than events. Rows of events before it are in the table."""
        db = self._db
        head = self._fitting(step, changed, refused, reset=commit.reset)
        if head is None:
            return
        number, last_seq, trimmed_to, last_event_id = head
        if commit.reset:
            number = self._discard(step.session_id, number, keep_record=commit.record is None)
            last_seq, trimmed_to, last_event_id = 0, 0, None
        if commit.record is not None:
            db.execute(
                "INSERT OR REPLACE INTO record VALUES (?, ?, ?, ?)",
                (
                    number,
                    commit.record.touched_at,
                    commit.record.turn_state is TurnState.RUNNING,
                    step.record,
                ),
            )
        if step.events is not None:
            self._insert([number << SEQ_BITS | step.last_seq, step.last_event_id, step.events])
            last_seq = step.last_seq
        if step.last_event_id is not None:
            last_event_id = step.last_event_id
        for message, packed in zip(commit.queued, step.queued, strict=True):
            db.execute(
                "INSERT INTO queue (number, turn_id, packed) VALUES (?, ?, ?)",
                (number, message.turn_id, packed),
            )
        for turn_id in commit.dequeued:
            db.execute("DELETE FROM queue WHERE number = ? AND turn_id = ?", (number, turn_id))
        for entry in commit.ledger:
            db.execute(
                "INSERT OR REPLACE INTO ledger (number, message_id, turn_id, accepted_at)"
                " VALUES (?, ?, ?, ?)",
                (number, entry.message_id, entry.turn_id, entry.accepted_at),
            )
        if commit.ledger:
            oldest = max(entry.accepted_at for entry in commit.ledger) - self._dedupe_window
            db.execute("DELETE FROM ledger WHERE number = ? AND accepted_at < ?", (number, oldest))
        for decision in commit.decisions:
            db.execute(
                "INSERT OR IGNORE INTO decision (number, call_id, decision, decided_at) VALUES (?, ?, ?, ?)",
                (number, decision.call_id, decision.decision, decision.decided_at),
            )
        if commit.trimmed_to is not None and min(commit.trimmed_to, last_seq) > trimmed_to:
            trimmed_to = min(commit.trimmed_to, last_seq)
            base = number << SEQ_BITS
            db.execute(
                "DELETE FROM event_pack WHERE key IN"
                " (SELECT key FROM event_pack WHERE key BETWEEN ? AND ? ORDER BY key LIMIT ?)",
                (base, base | trimmed_to, _TRIM_ROWS),
            )
        if commit.reset or commit.trimmed_to is not None or step.last_event_id is not None:
            db.execute(
                "UPDATE session SET last_seq = ?, trimmed_to = ?, last_event_id = ? WHERE session_id = ?",
                (last_seq, trimmed_to, last_event_id, step.session_id),
            )
        changed[step.session_id] = _Head(number, last_seq, trimmed_to, last_event_id)

    def _discard(self, session_id: str, number: int, *, keep_record: bool) -> int:
        """Begin a new life of the session and return its number; the old one's rows are deleted later."""
        fresh = self._next_number
        # A number that a rolled-back transaction took is not used again: cheaper than to find out.
        self._next_number += 1
        self._db.execute(
            "UPDATE session SET number = ?, last_seq = 0, trimmed_to = 0, last_event_id = NULL"
            " WHERE session_id = ?",
            (fresh, session_id),
        )
        self._db.execute("INSERT INTO discarded VALUES (?)", (number,))
        if keep_record:
            self._db.execute("UPDATE record SET number = ? WHERE number = ?", (fresh, number))
        else:
            self._db.execute("DELETE FROM record WHERE number = ?", (number,))
        return fresh

    # ------------------------------------------------------------------ reads and ownership

    def load(self, session_id: str) -> StoredSession | None:
        """All that is held of a session, or None. Raises ``UnreadablePack``: call ``forget``."""
        head = self._heads.get(session_id) or self._head(session_id)
        if head is None:
            return None
        db, (number, last_seq, trimmed_to, last_event_id) = self._db, head
        base = number << SEQ_BITS
        packs: list[Any] = db.execute(
            "SELECT key, packed FROM event_pack WHERE key > ? AND key <= ? ORDER BY key",
            (base | trimmed_to, base | SEQ_MASK),
        ).fetchall()
        events = [event for key, packed in packs for event in unpack_events(packed, key & SEQ_MASK)]
        while_trimmed = trimmed_to - events[0].seq + 1 if events else 0
        if while_trimmed > 0:
            del events[:while_trimmed]
        record = db.execute("SELECT packed FROM record WHERE number = ?", (number,)).get
        return StoredSession(
            session_id=session_id,
            owner=db.execute("SELECT owner FROM session WHERE session_id = ?", (session_id,)).get,
            record=None if record is None else unpack_record(record),
            first_seq=events[0].seq if events else last_seq + 1,
            last_seq=last_seq,
            events=tuple(events),
            last_event_id=last_event_id,
            queue=tuple(
                unpack_message(packed)
                for (packed,) in db.execute(
                    "SELECT packed FROM queue WHERE number = ? ORDER BY position", (number,)
                )
            ),
            ledger=tuple(
                LedgerEntry(*row)
                for row in db.execute(
                    "SELECT message_id, turn_id, accepted_at FROM ledger WHERE number = ? ORDER BY position",
                    (number,),
                )
            ),
            decisions=tuple(
                Decision(*row)
                for row in db.execute(
                    "SELECT call_id, decision, decided_at FROM decision WHERE number = ? ORDER BY position",
                    (number,),
                )
            ),
        )

    def forget(self, session_id: str) -> None:
        """Drop all but the ownership of a session."""
        with self._transaction():
            number = self._db.execute("SELECT number FROM session WHERE session_id = ?", (session_id,)).get
            self._heads.pop(session_id, None)
            if number is not None:
                self._discard(session_id, number, keep_record=False)

    def owner(self, session_id: str) -> str | None:
        """The session's owner, or None."""
        found: str | None = self._db.execute(
            "SELECT owner FROM session WHERE session_id = ?", (session_id,)
        ).get
        return found

    def claim(self, session_id: str, subject: str, now: float) -> str:
        """Make ``subject`` the owner if there is none; returns the owner."""
        if (owner := self.owner(session_id)) is not None:
            return owner
        number = self._next_number
        self._next_number += 1
        self._db.execute(
            "INSERT INTO session (session_id, number, owner, claimed_at) VALUES (?, ?, ?, ?)",
            (session_id, number, subject, now),
        )
        return subject

    def sessions_of(self, subject: str) -> frozenset[str]:
        """The ids of all sessions of ``subject``."""
        found = self._db.execute("SELECT session_id FROM session WHERE owner = ?", (subject,))
        return frozenset(session_id for (session_id,) in found)

    def unfinished(self) -> list[str]:
        """Sessions whose turn was running or that have messages queued."""
        found = self._db.execute(
            "SELECT session_id FROM session WHERE number IN"
            " (SELECT number FROM record WHERE running UNION SELECT number FROM queue)"
        )
        return [session_id for (session_id,) in found]

    # ------------------------------------------------------------------ housekeeping

    def expire_some(self, before: float, keep: Collection[str], limit: int) -> int:
        """Drop up to ``limit`` sessions last touched before ``before``; returns how many."""
        with self._transaction():
            found = []
            for session_id, number in self._db.execute(
                "SELECT session_id, number FROM record JOIN session USING (number)"
                " WHERE touched_at < ? ORDER BY touched_at",
                (before,),
            ):
                if session_id not in keep:
                    found.append((session_id, number))
                    if len(found) == limit:
                        break
            for session_id, number in found:
                self._heads.pop(session_id, None)
                self._discard(session_id, number, keep_record=False)
        return len(found)

    def delete_discarded(self, limit: int) -> bool:
        """Delete up to ``limit`` rows of each kind of a life that is over. Returns False when none is."""
        number = self._db.execute("SELECT number FROM discarded LIMIT 1").get
        if number is None:
            return False
        base = number << SEQ_BITS
        with self._transaction():
            self._db.execute(
                "DELETE FROM event_pack WHERE key IN"
                " (SELECT key FROM event_pack WHERE key BETWEEN ? AND ? LIMIT ?)",
                (base, base | SEQ_MASK, limit),
            )
            left = self._db.changes() == limit
            for table in ("queue", "ledger", "decision"):
                self._db.execute(
                    f"DELETE FROM {table} WHERE position IN"
                    f" (SELECT position FROM {table} WHERE number = ? LIMIT ?)",
                    (number, limit),
                )
                left = left or self._db.changes() == limit
            if not left:
                self._db.execute("DELETE FROM discarded WHERE number = ?", (number,))
        return True

    def vacuum_some(self, pages: int) -> bool:
        """Give up to ``pages`` free pages back to the file system. Returns False when few are left."""
        # A few free pages are about to be used again; giving them back would be work for nothing.
        if self._db.pragma("freelist_count") <= 4 * pages:
            return False
        self._db.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
        return True

    def held_bytes(self) -> int:
        """Bytes of the file that hold something."""
        db = self._db
        used: int = (db.pragma("page_count") - db.pragma("freelist_count")) * db.pragma("page_size")
        return used

    def touch(self) -> None:
        """Write one cell, to prove that it can be done."""
        self._db.execute("INSERT OR REPLACE INTO property VALUES ('checked', random())")

    def set_generation(self, token: str) -> None:
        """Write the token that ties this file to its sidecar (see ``sqlite_recovery``)."""
        self._db.execute("INSERT OR REPLACE INTO property VALUES ('generation', ?)", (token,))
