"""Events of the SQLite store: first into a journal, later, and only if still wanted, to their session.

A group commit writes the events, trims and event ids of all its sessions as *one* record of the journal: a
page or two, whereas a row per session would write a page per session (measured with 10 sessions a commit:
2 µs of CPU per event against 10). Small records go into blocks (``sqlite_journal_blocks``), others are rows
of ``journal``. What is in the journal is also in memory, so it is read only at start.

Every few seconds it is *settled*: each session's rest goes to ``event_pack`` as one row, and the journal is
emptied. Most tokens have been acknowledged and trimmed by then and are never written a second time.

Formats (numbers little-endian). A record: the format's number (1 byte), then per part the session's
number, its last seq after the part, the seq it is trimmed to (8 bytes each), the length of the event id or -1
and the length of the pack (4 bytes each), the id, the pack. ``event_pack.packs``: per pack its last seq
(8 bytes), its length (4 bytes), the pack.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import apsw

from gateway.adapters.stores.sqlite_journal_blocks import JournalBlocks
from gateway.adapters.stores.sqlite_schema import SEQ_BITS, SEQ_MASK, transaction
from gateway.core.events import Event
from gateway.core.packing import (
    ONE_EVENT_HEAD,
    UnreadablePack,
    one_event_head,
    pack_events,
    unpack_events,
)
from gateway.core.storage import SessionCommit

_FORMAT = b"\x01"
_PART = struct.Struct("<QQQiI")
_PART_OF_ONE = struct.Struct("<QQQiI" + ONE_EVENT_HEAD)
"""A part without event id, and the beginning of its pack of one event."""
_ONE_MORE_BYTES = _PART_OF_ONE.size - _PART.size
_PACK = struct.Struct("<QI")
_KNOWN_SESSIONS = 50_000
"""How many sessions' heads are kept at hand (about 300 bytes each)."""
_SETTLED_AT_ONCE = 1 << 20
"""Bytes after which a step of settling lets commits through."""
_DUE_BYTES = 4 << 20
_OVERFULL_BYTES = 64 << 20
_ROWS_AT_ONCE = 50


class Head:
    """Where a session stands, and its events that are only in the journal."""

    __slots__ = ("last_event_id", "last_seq", "number", "recent", "session_id", "trimmed_to")

    def __init__(
        self, session_id: str, number: int, last_seq: int, trimmed_to: int, last_event_id: str | None
    ) -> None:
        self.session_id = session_id
        self.number = number
        self.last_seq = last_seq
        self.trimmed_to = trimmed_to
        self.last_event_id = last_event_id
        self.recent: list[tuple[int, bytes | Event]] = []
        """Packs by their last seq, oldest first; a lone event as itself, for most are never settled."""

    def apply(
        self, last_seq: int, trimmed_to: int, last_event_id: str | None, pack: bytes | Event | None
    ) -> None:
        """Take in a part that is stored."""
        self.last_seq = last_seq
        if last_event_id is not None:
            self.last_event_id = last_event_id
        if pack is not None:
            self.recent.append((last_seq, pack))
        if trimmed_to > self.trimmed_to:
            self.trimmed_to = trimmed_to
            self.recent = [item for item in self.recent if item[0] > trimmed_to]


Part = tuple[Head, int, int, str | None, bytes | Event | None]
"""What a group commit does to the events of one session: its last seq afterwards, the seq that it is trimmed
to (0: none), its event id (None: as it was), and the new events, packed, or as itself when it is one."""


class EventJournal:
    """The events behind one connection, used by one thread at a time. Making one replays the journal.

    Raises ``UnreadablePack`` when the journal does not make sense: then the file is damaged.
    """

    def __init__(self, db: apsw.Connection) -> None:
        self.db = db
        """The connection in use (``SessionTables.use``)."""
        self._heads: dict[str, Head] = {}
        self._dirty: dict[int, Head] = {}
        self.blocks = JournalBlocks()
        self._last_id = 0
        self._bytes = 0
        self._settling: list[Head] = []
        self._settling_to = 0
        self._replay()

    def _replay(self) -> None:
        known: dict[int, tuple[Head, int] | None] = {}
        settled: int = self.db.execute(
            "SELECT ifnull((SELECT value FROM property WHERE name = 'journaled'), 0)"
        ).get
        rows: list[Any] = self.db.execute("SELECT id, parts FROM journal").fetchall()
        unsettled = [record for record in self.blocks.read(self.db) if record[0] > settled]
        journal: list[tuple[int, bytes]] = rows + unsettled
        journal.sort()
        self._last_id = max(settled, journal[-1][0] if journal else 0)
        for journal_id, parts in journal:
            for number, last_seq, trimmed_to, last_event_id, pack in _split_parts(parts):
                if number not in known:
                    row = self.db.execute(
                        "SELECT session_id, number, last_seq, trimmed_to, last_event_id, journaled"
                        " FROM session WHERE number = ?",
                        (number,),
                    ).fetchone()
                    known[number] = None if row is None else (Head(*row[:5]), row[5])
                # A number without session is a life that is over.
                if (found := known[number]) is not None and journal_id > found[1]:
                    found[0].apply(last_seq, trimmed_to, last_event_id, pack)
                    self._dirty[number] = found[0]
        self._heads = {head.session_id: head for head in self._dirty.values()}
        while self.settle():
            pass

    # ------------------------------------------------------------------ heads

    def head(self, session_id: str) -> Head | None:
        """Where the session stands, or None when it is not known. To be read, not changed."""
        head = self._heads.get(session_id)
        if head is None:
            row = self.db.execute(
                "SELECT session_id, number, last_seq, trimmed_to, last_event_id FROM session"
                " WHERE session_id = ?",
                (session_id,),
            ).fetchone()
            if row is None:
                return None
            if len(self._heads) >= _KNOWN_SESSIONS:
                self._heads = {head.session_id: head for head in self._dirty.values()}
            head = self._heads[session_id] = Head(*row)
        return head

    def forget(self, head: Head) -> None:
        """Let go of a life of a session that is over."""
        if self._heads.get(head.session_id) is head:
            del self._heads[head.session_id]
        self._dirty.pop(head.number, None)

    def events(self, head: Head) -> list[Event]:
        """All events held of a session, oldest first. Raises ``UnreadablePack``."""
        base, trimmed_to = head.number << SEQ_BITS, head.trimmed_to
        found: list[Any] = self.db.execute(
            "SELECT packs FROM event_pack WHERE key > ? AND key <= ? ORDER BY key",
            (base | trimmed_to, base | SEQ_MASK),
        ).fetchall()
        packs = [item for (row,) in found for item in _split_packs(row) if item[0] > trimmed_to]
        events = [event for seq, pack in packs for event in unpack_events(pack, seq)]
        for seq, recent in head.recent:
            events += unpack_events(recent, seq) if isinstance(recent, bytes) else (recent,)
        if events and events[0].seq <= trimmed_to:
            del events[: trimmed_to - events[0].seq + 1]
        return events

    # ------------------------------------------------------------------ writing

    def store(self, commits: Sequence[SessionCommit]) -> bool:
        """Store commits of nothing but events, trims and event ids, one of a session, outside a transaction.

        False, and nothing is done: one of them changes more, or does not fit, or the journal has to be
        settled first. It is what ``SessionTables.apply`` does in three times as many steps, which cost more
        than SQLite itself: nearly every token comes this way.
        """
        if self.is_overfull:
            return False
        parts: list[Part] = []
        for commit in commits:
            head = self._heads.get(commit.session_id)
            if head is None or not commit.is_of_events:
                return False
            events, trimmed_to = commit.events, commit.trimmed_to or 0
            last_seq, pack = head.last_seq, None
            if events:
                if events[0].seq != last_seq + 1:
                    return False
                last_seq = events[-1].seq
                try:
                    pack = events[0] if len(events) == 1 else pack_events(events)
                except ValueError:
                    return False
            parts.append((head, last_seq, min(trimmed_to, last_seq), commit.last_event_id, pack))
        if len(set(map(_number_of, parts))) < len(parts):
            return False
        try:
            self.write(parts)
        except UnicodeEncodeError:
            return False
        self.applied(parts, {})
        return True

    def write(self, parts: list[Part]) -> None:
        """Write the parts of one group commit, as a single statement. Call ``applied`` once they are safe."""
        if not parts:
            return
        pieces = [_FORMAT]
        for head, last_seq, trimmed_to, last_event_id, pack in parts:
            if last_event_id is None and isinstance(pack, Event):
                data = pack.data
                size = _ONE_MORE_BYTES + len(data)
                pieces += (
                    _PART_OF_ONE.pack(head.number, last_seq, trimmed_to, -1, size, *one_event_head(pack)),
                    data,
                )
                continue
            event_id = b"" if last_event_id is None else last_event_id.encode()
            id_length = -1 if last_event_id is None else len(event_id)
            data = pack_events((pack,)) if isinstance(pack, Event) else pack or b""
            pieces += (_PART.pack(head.number, last_seq, trimmed_to, id_length, len(data)), event_id, data)
        row = b"".join(pieces)
        if not self.blocks.write(self.db, self._last_id + 1, row):
            self.db.execute("INSERT INTO journal VALUES (?, ?)", (self._last_id + 1, row))
        self._bytes += len(row)

    def applied(self, parts: list[Part], begun: dict[str, Head]) -> None:
        """Take in what is now safe: the parts written, and the heads of sessions that begin a new life."""
        for session_id, head in begun.items():
            if (former := self._heads.get(session_id)) is not None:
                self.forget(former)
            self._heads[session_id] = head
        if parts:
            self._last_id += 1
            self.blocks.written()
        for head, last_seq, trimmed_to, last_event_id, pack in parts:
            # It may have been put out by the head of another session in this very group.
            if self._heads.setdefault(head.session_id, head) is head:
                head.apply(last_seq, trimmed_to, last_event_id, pack)
                self._dirty[head.number] = head

    # ------------------------------------------------------------------ settling

    def replenish(self) -> bool:
        """Make some of the blocks that commits will need. Returns False when there are enough."""
        return self.blocks.replenish(self.db)

    @property
    def is_due(self) -> bool:
        """Whether there is enough in the journal to settle it before its time."""
        return self._bytes >= _DUE_BYTES or bool(self._settling)

    @property
    def is_overfull(self) -> bool:
        """Whether settling was neglected for so long that commits have to wait for it."""
        return self._bytes >= _OVERFULL_BYTES

    def settle(self) -> bool:
        """Do one small step of settling. Returns False when all that was in the journal is settled."""
        if not self._settling:
            self._settling, self._settling_to = list(self._dirty.values()), self._last_id
            self.blocks.begin_settling()
            self._bytes = 0
        step: list[Head] = []
        size = 0
        while self._settling and len(step) < _ROWS_AT_ONCE and size < _SETTLED_AT_ONCE:
            head = self._settling.pop()
            if self._dirty.get(head.number) is head:
                step.append(head)
                size += sum(
                    len(pack) if isinstance(pack, bytes) else len(pack.data) for _, pack in head.recent
                )
        try:
            with transaction(self.db):
                for head in step:
                    self._settle_head(head)
                is_more = bool(self._settling)
                if not is_more:
                    # Ids must go on from here after the journal was emptied, also when it is opened again.
                    self.db.execute(
                        "INSERT OR REPLACE INTO property VALUES ('journaled', ?)", (self._settling_to,)
                    )
                    self.db.execute(
                        "DELETE FROM journal WHERE id IN"
                        " (SELECT id FROM journal WHERE id <= ? ORDER BY id LIMIT 1000)",
                        (self._settling_to,),
                    )
                    is_more = self.db.changes() == 1000
                    self.blocks.drop_surplus(self.db)
        except BaseException:
            self._settling += step
            raise
        for head in step:
            head.recent = []
            del self._dirty[head.number]
        if not self._settling:
            self.blocks.settled()
        return is_more

    def _settle_head(self, head: Head) -> None:
        base = head.number << SEQ_BITS
        self.db.execute(
            "DELETE FROM event_pack WHERE key IN"
            " (SELECT key FROM event_pack WHERE key BETWEEN ? AND ? ORDER BY key LIMIT ?)",
            (base, base | head.trimmed_to, _ROWS_AT_ONCE),
        )
        if head.recent:
            pieces: list[bytes] = []
            for seq, recent in head.recent:
                pack = recent if isinstance(recent, bytes) else pack_events((recent,))
                pieces += (_PACK.pack(seq, len(pack)), pack)
            self.db.execute(
                "INSERT INTO event_pack VALUES (?, ?)", (base | head.recent[-1][0], b"".join(pieces))
            )
        self.db.execute(
            "UPDATE session SET last_seq = ?, trimmed_to = ?, last_event_id = ?, journaled = ?"
            " WHERE number = ?",
            (head.last_seq, head.trimmed_to, head.last_event_id, self._last_id, head.number),
        )


def _number_of(part: Part) -> int:
    return part[0].number


def _split_parts(row: bytes) -> Iterator[tuple[int, int, int, str | None, bytes | None]]:
    if row[:1] != _FORMAT:
        raise UnreadablePack("a journal row in a format that this version does not read")
    at = 1
    try:
        while at < len(row):
            number, last_seq, trimmed_to, id_length, pack_length = _PART.unpack_from(row, at)
            at += _PART.size
            end = at + max(id_length, 0)
            last_event_id = None if id_length < 0 else row[at:end].decode()
            at = end + pack_length
            yield number, last_seq, trimmed_to, last_event_id, row[end:at] if pack_length else None
    except (struct.error, UnicodeDecodeError):
        raise UnreadablePack("a journal row that is cut short") from None
    if at != len(row):
        raise UnreadablePack("a journal row that is cut short")


def _split_packs(row: bytes) -> list[tuple[int, bytes]]:
    packs, at = [], 0
    try:
        while at < len(row):
            seq, length = _PACK.unpack_from(row, at)
            at += _PACK.size + length
            packs.append((seq, row[at - length : at]))
    except struct.error:
        raise UnreadablePack("a row of packs that is cut short") from None
    return packs
