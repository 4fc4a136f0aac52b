"""Small group commits of the SQLite store's journal, in blocks of a page each that are written over again.

A commit of ten tokens is a kilobyte or two. As a row of its own it makes SQLite take a page from the free
list, link it into the tree and later give it back: four pages in the write-ahead log, 27 to 37 µs. Written
into a blob that is there already (sqlite.org/c3ref/blob_open) it changes one page: 6 µs. It is as much in a
transaction as before, and as safe.

A *block* holds records one after the other, each with the journal's id for it, until the next one does not
fit. Blocks whose records are all settled are free, and used again from their beginning; a length of zero ends
what is valid. What stands behind it, and in free blocks, are records that were settled long ago.

Format (numbers little-endian), per record: its length (4 bytes), its id in the journal (8 bytes), the record.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import apsw

from gateway.adapters.stores.sqlite_schema import transaction
from gateway.core.packing import UnreadablePack

BLOCK_BYTES: Final = 4000
"""What fits into a page of 4 096 bytes with the tree's own, so that a block is one page."""

_HEAD = struct.Struct("<IQ")
_END = bytes(4)
_KEPT_BLOCKS: Final = 128
"""Free blocks that are kept whatever the load: half a megabyte."""
_MADE_AT_ONCE: Final = 64
_DROPPED_AT_ONCE: Final = 500


class JournalBlocks:
    """Where the next record goes; used by one thread at a time, with the connection that it is given."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._used: list[int] = []
        """With records that nobody has begun to settle; the last one is being filled."""
        self._settling: list[int] = []
        self._end = BLOCK_BYTES
        """Where the records of the block that is being filled end."""
        self._highest = 0
        self._pending: tuple[int, int] | None = None
        """Block and end of the record that was written and may yet be rolled back."""
        self._used_last = 0
        self._surplus: list[int] = []

    @property
    def free(self) -> int:
        """How many blocks hold nothing that is wanted."""
        return len(self._free)

    def read(self, db: apsw.Connection) -> list[tuple[int, bytes]]:
        """All records with their ids, settled ones too. Every block counts as used. See ``_split``."""
        found: list[tuple[int, bytes]] = []
        for number, block in db.execute("SELECT number, records FROM journal_block"):
            found += _split(block)
            self._used.append(number)
            self._highest = max(self._highest, number)
        self._end = BLOCK_BYTES
        return found

    def write(self, db: apsw.Connection, journal_id: int, record: bytes) -> bool:
        """Write a record; False, and nothing is done, when it is too large. ``written`` once it is safe."""
        self._pending = None
        size = _HEAD.size + len(record)
        if size > BLOCK_BYTES:
            return False
        is_begun = self._end + size <= BLOCK_BYTES
        start = self._end if is_begun else 0
        data = _HEAD.pack(len(record), journal_id) + record
        if start + size + _HEAD.size <= BLOCK_BYTES:
            data += _END
        if is_begun or self._free:
            block = self._used[-1] if is_begun else self._free[-1]
            blob = db.blob_open("main", "journal_block", "records", block, True)
            try:
                blob.seek(start)
                blob.write(data)
            except BaseException:
                blob.close(True)
                raise
            blob.close()  # commits, outside a transaction
        else:
            block = self._highest + 1
            db.execute(
                "INSERT OR REPLACE INTO journal_block VALUES (?, ?)", (block, data.ljust(BLOCK_BYTES, b"\0"))
            )
        self._pending = (block, start + size)
        return True

    def written(self) -> None:
        """What ``write`` wrote last is safe."""
        if self._pending is None:
            return
        (block, self._end), self._pending = self._pending, None
        if not self._used or self._used[-1] != block:
            self._used.append(block)
            if self._free and self._free[-1] == block:
                self._free.pop()
            self._highest = max(self._highest, block)

    def replenish(self, db: apsw.Connection) -> bool:
        """Make some free blocks, so that commits need not. Returns False when there are enough.

        As many as are in use: with twice the load there would just be enough until the next call.
        """
        lacking = _KEPT_BLOCKS + len(self._used) - len(self._free)
        if lacking <= 0:
            return False
        made = range(self._highest + 1, self._highest + 1 + min(lacking, _MADE_AT_ONCE))
        with transaction(db):
            db.executemany(
                "INSERT OR REPLACE INTO journal_block VALUES (?, zeroblob(?))",
                [(number, BLOCK_BYTES) for number in made],
            )
        self._free[:0] = made
        self._highest = made[-1]
        return True

    def begin_settling(self) -> None:
        """What was written until now is being settled; what comes goes into other blocks."""
        self._used_last = len(self._used)
        self._settling += self._used
        self._used = []
        self._end = BLOCK_BYTES

    def drop_surplus(self, db: apsw.Connection) -> None:
        """Delete some of the free blocks that are more than the load of late needs."""
        surplus = len(self._free) - _KEPT_BLOCKS - self._used_last
        self._surplus = self._free[: max(0, min(surplus, _DROPPED_AT_ONCE))]
        if self._surplus:
            db.executemany(
                "DELETE FROM journal_block WHERE number = ?", [(number,) for number in self._surplus]
            )

    def settled(self) -> None:
        """What was to be settled is, and the surplus is gone."""
        del self._free[: len(self._surplus)]
        self._surplus = []
        self._free += self._settling
        self._settling = []


def _split(block: bytes) -> Iterator[tuple[int, bytes]]:
    """The records of a block with their ids. Raises ``UnreadablePack``."""
    at = 0
    while at + _HEAD.size <= len(block):
        length, journal_id = _HEAD.unpack_from(block, at)
        if not length:
            return
        at += _HEAD.size + length
        if at > len(block):
            raise UnreadablePack("a block of the journal that is cut short")
        yield journal_id, block[at - length : at]
