"""Reads and writes of the SQLite store, as they run in its worker thread: plain, synchronous SQL.

Each method is one transaction, or none when it only reads: one thread at a time runs one method, so that a
method sees no other's halves. Whatever ends a method early, a cancellation included, rolls its transaction
back.

Every step of a statement gives the interpreter lock away and has to win it back from the event loop, so
the common case, token events of many sessions, is one statement.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import apsw

from gateway.adapters.stores.sqlite_journal import EventJournal, Head, Part
from gateway.adapters.stores.sqlite_schema import SEQ_BITS, SEQ_MASK, transaction
from gateway.core.packing import PackedCommit, unpack_message, unpack_record
from gateway.core.storage import NOBODY, Decision, LedgerEntry, SessionCommit, StoredSession, TurnState


class Abandoned(Exception):
    """The caller stopped waiting before the transaction was complete; it was rolled back."""


class _Group(NamedTuple):
    """What a group commit comes to, before it is safe."""

    refused: dict[str, str]
    begun: dict[str, Head]
    """Heads of the sessions that begin a new life."""
    ends: dict[str, int]
    """The last seq of each session so far."""
    parts: list[Part]


class SessionTables:
    """The tables behind one connection, used by one thread at a time (see ``SqliteConnection``)."""

    def __init__(self, db: apsw.Connection, *, dedupe_window: float) -> None:
        self._db = db
        self._dedupe_window = dedupe_window
        self.journal = EventJournal(db)
        newest: int = db.execute(
            "SELECT max((SELECT ifnull(max(number), 0) FROM session),"
            " (SELECT ifnull(max(number), 0) FROM discarded),"
            " (SELECT ifnull(max(key), 0) >> ? FROM event_pack))",
            (SEQ_BITS,),
        ).get
        self._next_number = newest + 1

    def use(self, db: apsw.Connection) -> apsw.Connection:
        """Use another connection to the same file, of the thread that calls; returns the former one."""
        former, self._db, self.journal.db = self._db, db, db
        return former

    # ------------------------------------------------------------------ commit

    def apply(self, steps: Sequence[PackedCommit], is_abandoned: Callable[[], bool]) -> dict[str, str]:
        """Store all steps that fit, in one transaction. Returns why others were refused, by session id.

        Raises ``Abandoned``, and nothing is stored, when ``is_abandoned()`` by the time of the end.
        """
        group = _Group({}, {}, {}, [])
        while self.journal.is_overfull and self.journal.settle():
            pass
        if all(step.more is None for step in steps):
            for step in steps:
                self._stage(step, group)
            if is_abandoned():
                raise Abandoned
            self.journal.write(group.parts)
        else:
            with transaction(self._db):
                for step in steps:
                    head = self._stage(step, group)
                    if head is not None and step.more is not None:
                        self._change(step, step.more, head.number)
                self.journal.write(group.parts)
                if is_abandoned():
                    raise Abandoned
        self.journal.applied(group.parts, group.begun)
        return group.refused

    def _stage(self, step: PackedCommit, group: _Group) -> Head | None:
        """Put the step's events into the group if the step fits; None if it does not."""
        session_id = step.session_id
        if session_id in group.refused:
            return None
        head = group.begun.get(session_id) or self.journal.head(session_id)
        if head is None:
            group.refused[session_id] = "the session is not known"
            return None
        is_reset = step.more is not None and step.more.reset
        last_seq = 0 if is_reset else group.ends.get(session_id, head.last_seq)
        if step.first_seq and step.first_seq != last_seq + 1:
            group.refused[session_id] = "its events do not follow the last one stored"
            return None
        if is_reset:
            keeps_record = step.more is not None and step.more.record is None
            number = self._discard(session_id, head.number, keeps_record=keeps_record)
            head = group.begun[session_id] = Head(session_id, number, 0, 0, None)
        if step.events is not None:
            last_seq = step.last_seq
        group.ends[session_id] = last_seq
        if step.events is not None or step.trimmed_to or step.last_event_id is not None:
            group.parts.append(
                (head, last_seq, min(step.trimmed_to, last_seq), step.last_event_id, step.events)
            )
        return head

    def _change(self, step: PackedCommit, commit: SessionCommit, number: int) -> None:
        """Apply what a commit changes besides events."""
        db = self._db
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

    def _discard(self, session_id: str, number: int, *, keeps_record: bool) -> int:
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
        if keeps_record:
            self._db.execute("UPDATE record SET number = ? WHERE number = ?", (fresh, number))
        else:
            self._db.execute("DELETE FROM record WHERE number = ?", (number,))
        return fresh

    # ------------------------------------------------------------------ reads and ownership

    def load(self, session_id: str) -> StoredSession | None:
        """All that is held of a session, or None. Raises ``UnreadablePack``: call ``forget``."""
        head = self.journal.head(session_id)
        if head is None:
            return None
        db, number = self._db, head.number
        events = self.journal.events(head)
        record = db.execute("SELECT packed FROM record WHERE number = ?", (number,)).get
        return StoredSession(
            session_id=session_id,
            owner=db.execute("SELECT owner FROM session WHERE session_id = ?", (session_id,)).get,
            record=None if record is None else unpack_record(record),
            first_seq=events[0].seq if events else head.last_seq + 1,
            last_seq=head.last_seq,
            events=tuple(events),
            last_event_id=head.last_event_id,
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
        if (head := self.journal.head(session_id)) is not None:
            with transaction(self._db):
                self._discard(session_id, head.number, keeps_record=False)
            self.journal.forget(head)

    def owner(self, session_id: str) -> str | None:
        """The session's owner, or None."""
        return self._claimed_by(session_id) or None

    def _claimed_by(self, session_id: str) -> str | None:
        found: str | None = self._db.execute(
            "SELECT owner FROM session WHERE session_id = ?", (session_id,)
        ).get
        return found

    def claim(self, session_id: str, subject: str, now: float) -> str:
        """Make ``subject`` the owner if there is none; returns the owner."""
        if (owner := self._claimed_by(session_id)) is not None:
            if owner == NOBODY != subject:
                self._db.execute(
                    "UPDATE session SET owner = ?, claimed_at = ? WHERE session_id = ?",
                    (subject, now, session_id),
                )
                return subject
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
        if subject == NOBODY:
            return frozenset()
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
        with transaction(self._db):
            found: list[tuple[str, int]] = []
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
                self._discard(session_id, number, keeps_record=False)
        for session_id, _ in found:
            if (head := self.journal.head(session_id)) is not None:
                self.journal.forget(head)
        return len(found)

    def delete_discarded(self, limit: int) -> bool:
        """Delete up to ``limit`` rows of each kind of a life that is over. Returns False when none is."""
        number = self._db.execute("SELECT number FROM discarded LIMIT 1").get
        if number is None:
            return False
        base = number << SEQ_BITS
        with transaction(self._db):
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
        free = db.pragma("freelist_count") + self.journal.blocks.free
        used: int = (db.pragma("page_count") - free) * db.pragma("page_size")
        return used

    def touch(self) -> None:
        """Write one cell, to prove that it can be done."""
        self._db.execute("INSERT OR REPLACE INTO property VALUES ('checked', random())")

    def set_generation(self, token: str) -> None:
        """Write the token that ties this file to its sidecar (see ``sqlite_recovery``)."""
        self._db.execute("INSERT OR REPLACE INTO property VALUES ('generation', ?)", (token,))
