"""The tables of the SQLite store, and how a file is recognised, created and refused.

One row of ``session`` per session ever claimed. Everything else hangs on its *number*, which stands for one
life of the session: a reset or an expiry gives the session a new number and leaves the old one's rows to
be deleted later in small steps (``discarded``), so that neither costs the token path more than one row.

``journal`` and ``journal_block`` hold one record per group commit and ``event_pack`` what is settled of them
(``sqlite_journal`` says why and how). The key of ``event_pack`` is ``number << 36 | last_seq``, so that a
trim and a load are ranges of one B-tree without a second index. A ``session`` row is as of the journal's
record ``journaled``; what newer records say of the session comes on top, so that tokens do not have to write
its row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import apsw

SEQ_BITS = 36
"""Room for 6·10¹⁰ events per epoch, and for 10⁸ sessions' lives."""
SEQ_MASK = (1 << SEQ_BITS) - 1

SCHEMA_VERSION = 2
"""Kept in ``PRAGMA user_version``."""
APPLICATION_ID = 0x43474753
"""``CGGS`` in ``PRAGMA application_id``: tells our files from other programs' (sqlite.org/fileformat2)."""

_TABLES = """
CREATE TABLE session (
    session_id TEXT PRIMARY KEY,
    number INTEGER NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    claimed_at REAL NOT NULL,
    last_seq INTEGER NOT NULL DEFAULT 0,
    trimmed_to INTEGER NOT NULL DEFAULT 0,
    last_event_id TEXT,
    journaled INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE INDEX session_by_owner ON session (owner);

CREATE TABLE record (
    number INTEGER PRIMARY KEY,
    touched_at REAL NOT NULL,
    running INTEGER NOT NULL,
    packed BLOB NOT NULL
) STRICT;
CREATE INDEX record_by_touch ON record (touched_at, number);
CREATE INDEX record_running ON record (number) WHERE running;

CREATE TABLE journal (id INTEGER PRIMARY KEY, parts BLOB NOT NULL) STRICT;
CREATE TABLE event_pack (key INTEGER PRIMARY KEY, packs BLOB NOT NULL) STRICT;

CREATE TABLE queue (position INTEGER PRIMARY KEY, number INTEGER NOT NULL, turn_id TEXT NOT NULL,
    packed BLOB NOT NULL) STRICT;
CREATE INDEX queue_by_session ON queue (number, turn_id);

CREATE TABLE ledger (position INTEGER PRIMARY KEY, number INTEGER NOT NULL, message_id TEXT NOT NULL,
    turn_id TEXT NOT NULL, accepted_at REAL NOT NULL, UNIQUE (number, message_id)) STRICT;

CREATE TABLE decision (position INTEGER PRIMARY KEY, number INTEGER NOT NULL, call_id TEXT NOT NULL,
    decision TEXT NOT NULL, decided_at REAL NOT NULL, UNIQUE (number, call_id)) STRICT;

CREATE TABLE discarded (number INTEGER PRIMARY KEY) STRICT;
CREATE TABLE property (name TEXT PRIMARY KEY, value ANY) STRICT, WITHOUT ROWID;
"""


_ADDED_IN_2 = "CREATE TABLE journal_block (number INTEGER PRIMARY KEY, records BLOB NOT NULL) STRICT;"


class ForeignFile(Exception):
    """The file is sound but not ours to use; ``str(error)`` says why."""


def configure(db: apsw.Connection, *, full_sync: bool) -> None:
    """Set what has to be set on every connection that writes."""
    db.set_busy_timeout(1000)
    if not db.pragma("page_count"):
        # Only an empty file takes it, and a file that may have to be kept as it is must not be written.
        db.pragma("auto_vacuum", "INCREMENTAL")
    db.pragma("journal_mode", "WAL")
    db.pragma("synchronous", "FULL" if full_sync else "NORMAL")
    db.pragma("journal_size_limit", 16 << 20)
    # Checkpoints are made off the token path; this one only bounds the log if nobody makes them.
    db.wal_autocheckpoint(16_384)
    db.pragma("trusted_schema", False)


def ensure_schema(db: apsw.Connection) -> None:
    """Create the tables in an empty file, add those that an older version's has not.

    Raises ``ForeignFile`` for a newer version's file or another program's.
    """
    version = db.pragma("user_version")
    if version == SCHEMA_VERSION and db.pragma("application_id") == APPLICATION_ID:
        return
    if version == 1 and db.pragma("application_id") == APPLICATION_ID:
        with transaction(db):
            db.execute(_ADDED_IN_2)
            db.pragma("user_version", SCHEMA_VERSION)
        return
    if version or db.execute("SELECT count(*) FROM sqlite_schema").get:
        if db.pragma("application_id") == APPLICATION_ID and version > SCHEMA_VERSION:
            raise ForeignFile(
                f"it was written by a newer version of the gateway (schema {version}, this one knows "
                f"{SCHEMA_VERSION}): start that version, or give this one another file"
            )
        raise ForeignFile("it is a database of another program: give the gateway a file of its own")
    with transaction(db):
        db.execute(_TABLES + _ADDED_IN_2)
        db.pragma("application_id", APPLICATION_ID)
        db.pragma("user_version", SCHEMA_VERSION)


@contextmanager
def transaction(db: apsw.Connection) -> Iterator[None]:
    """A transaction that whatever ends the block early rolls back. Not for the block of another one."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        # SQLite may have rolled back by itself, as it does on a full disk.
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
