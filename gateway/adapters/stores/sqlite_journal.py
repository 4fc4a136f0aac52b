"""Events of the SQLite store: first into a journal, later, and only if still wanted, to their session.

A group commit writes the events, trims and event ids of all its sessions as *one* row of ``journal``: one or
two pages, whereas a row per session would write a page per session (measured with 10 sessions a commit:
2 µs of CPU per event against 10). What is in the journal is also in memory, so it is read only at start.

Every few seconds it is *settled*: each session's rest goes to ``event_pack`` as one row, and the journal is
emptied. Most tokens have been acknowledged and trimmed by then and are never written a second time.

Formats (numbers little-endian). ``journal.parts``: the format's number (1 byte), then per part the session's
number, its last seq after the part, the seq it is trimmed to (8 bytes each), the length of the event id or -1
and the length of the pack (4 bytes each), the id, the pack. ``event_pack.packs``: per pack its last seq
(8 bytes), its length (4 bytes), the pack.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import apsw

from gateway.adapters.stores.sqlite_schema import SEQ_BITS, SEQ_MASK, transaction
from gateway.core.events import Event
from gateway.core.packing import UnreadablePack, unpack_events

_FORMAT = b"\x01"
_PART = struct.Struct("<QQQiI")
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
        self.recent: list[tuple[int, bytes]] = []
        """Packs by their last seq, oldest first."""

    def apply(self, last_seq: int, trimmed_to: int, last_event_id: str | None, pack: bytes | None) -> None:
        """Take in a part that is stored."""
        self.last_seq = last_seq
        if last_event_id is not None:
            self.last_event_id = last_event_id
        if pack is not None:
            self.recent.append((last_seq, pack))
        if trimmed_to > self.trimmed_to:
            self.trimmed_to = trimmed_to
            self.recent = [item for item in self.recent if item[0] > trimmed_to]


class Part(NamedTuple):
    """What a group commit does to the events of one session."""

    head: Head
    last_seq: int
    trimmed_to: int
    """0 when the part trims nothing."""
    last_event_id: str | None
    pack: bytes | None


class EventJournal:
    """The events behind one connection, used by one thread at a time. Making one replays the journal.

    Raises ``UnreadablePack`` when the journal does not make sense: then the file is damaged.
    """

    def __init__(self, db: apsw.Connection) -> None:
        self.db = db
        """The connection in use (``SessionTables.on``)."""
        self._heads: dict[str, Head] = {}
        self._dirty: dict[int, Head] = {}
        self._last_id: int = db.execute(
            "SELECT max(ifnull((SELECT max(id) FROM journal), 0),"
            " ifnull((SELECT value FROM property WHERE name = 'journaled'), 0))"
        ).get
        self._bytes = 0
        self._settling: list[Head] = []
        self._settling_to = 0
        self._replay()

    def _replay(self) -> None:
        known: dict[int, tuple[Head, int] | None] = {}
        for journal_id, parts in self.db.execute("SELECT id, parts FROM journal ORDER BY id"):
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
        events = [event for seq, pack in packs + head.recent for event in unpack_events(pack, seq)]
        if events and events[0].seq <= trimmed_to:
            del events[: trimmed_to - events[0].seq + 1]
        return events

    # ------------------------------------------------------------------ writing

    def write(self, parts: list[Part]) -> None:
        """Write the parts of one group commit, as a single statement. Call ``applied`` once they are safe."""
        if not parts:
            return
        pieces = [_FORMAT]
        for head, last_seq, trimmed_to, last_event_id, pack in parts:
            event_id = b"" if last_event_id is None else last_event_id.encode()
            pieces += (
                _PART.pack(
                    head.number,
                    last_seq,
                    trimmed_to,
                    -1 if last_event_id is None else len(event_id),
                    0 if pack is None else len(pack),
                ),
                event_id,
                pack or b"",
            )
        row = b"".join(pieces)
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
        for head, last_seq, trimmed_to, last_event_id, pack in parts:
            if self._heads.get(head.session_id) is head:
                head.apply(last_seq, trimmed_to, last_event_id, pack)
                self._dirty[head.number] = head

    # ------------------------------------------------------------------ settling

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
            self._bytes = 0
        step: list[Head] = []
        size = 0
        while self._settling and len(step) < _ROWS_AT_ONCE and size < _SETTLED_AT_ONCE:
            head = self._settling.pop()
            if self._dirty.get(head.number) is head:
                step.append(head)
                size += sum(len(pack) for _, pack in head.recent)
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
        except BaseException:
            self._settling += step
            raise
        for head in step:
            head.recent = []
            del self._dirty[head.number]
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
            for seq, pack in head.recent:
                pieces += (_PACK.pack(seq, len(pack)), pack)
            self.db.execute(
                "INSERT INTO event_pack VALUES (?, ?)", (base | head.recent[-1][0], b"".join(pieces))
            )
        self.db.execute(
            "UPDATE session SET last_seq = ?, trimmed_to = ?, last_event_id = ?, journaled = ?"
            " WHERE number = ?",
            (head.last_seq, head.trimmed_to, head.last_event_id, self._last_id, head.number),
        )


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
