"""State in a SQLite file: survives restarts and ``kill -9`` (WAL, synchronous NORMAL)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

import apsw
import apsw.aio
import cattrs
import orjson
import trio

from gateway.reference_agent.history import Entry, entry_from_json, entry_to_json
from gateway.reference_agent.session import AuditRecord, SessionState
from gateway.reference_agent.state import KEYED_TURNS_KEPT, RUNNING, STOPPED, Change, StateStore, TurnRecord

CALL_DEADLINE = 10.0
"""Seconds after which a call gives up on the disk; a healthy commit takes well under a millisecond."""

AUDIT_KEPT = 100_000
"""Newest audit records kept: some 20 MB."""

APPLICATION_ID = 0x41674E74
"""Marks a file as ours, so that no other program's database is written into."""

SCHEMA_VERSION = 1

SCHEMA = """
CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY, user_id TEXT, updated_at TEXT NOT NULL, state TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE entries (
    session_id TEXT, number INTEGER, entry TEXT NOT NULL, PRIMARY KEY (session_id, number)) WITHOUT ROWID;
CREATE TABLE turns (
    turn_id INTEGER PRIMARY KEY AUTOINCREMENT, session_id TEXT NOT NULL, key TEXT NOT NULL,
    digest TEXT NOT NULL, status TEXT NOT NULL, settled INTEGER NOT NULL, UNIQUE (session_id, key));
CREATE TABLE events (
    turn_id INTEGER, number INTEGER, data BLOB NOT NULL, PRIMARY KEY (turn_id, number)) WITHOUT ROWID;
CREATE TABLE audit (
    audit_id INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, session_id TEXT NOT NULL,
    event_type TEXT NOT NULL, details TEXT NOT NULL);
CREATE INDEX sessions_by_change ON sessions (updated_at);
CREATE INDEX audit_by_session ON audit (session_id);
"""

ADD_EVENT = """
INSERT INTO events SELECT turn_id,
    1 + coalesce((SELECT max(number) FROM events WHERE events.turn_id = turns.turn_id), 0), ?1
FROM turns WHERE session_id = ?2 AND key = ?3
"""

Result = TypeVar("Result")
_CONVERTER = cattrs.Converter()


@asynccontextmanager
async def open_sqlite_state(path: str) -> AsyncIterator[SqliteState]:
    """Open (and create) the file; it is closed at the end, and locked against other processes until then.

    Raises `ValueError` when the file cannot be used, saying why.
    """
    # The controller's type asks for an instance where apsw takes the class.
    token = apsw.async_controller.set(cast(Any, apsw.aio.Trio))
    try:
        connection = await apsw.Connection.as_async(path)
    except apsw.Error as exc:
        raise ValueError(f"db: {path} cannot be opened: {exc}.") from exc
    finally:
        apsw.async_controller.reset(token)
    try:
        tables = _Tables(cast(apsw.Connection, connection))
        try:
            await connection.async_run(tables.prepare)
        except apsw.Error as exc:
            used = isinstance(exc, apsw.BusyError)
            what = "is used by another process" if used else f"cannot be used: {exc}"
            raise ValueError(f"db: {path} {what}.") from exc
        yield SqliteState(connection, tables)
    finally:
        with trio.CancelScope(shield=True):
            await connection.aclose()


class SqliteState(StateStore):
    """See `StateStore`. Each call is one hop to the connection's thread and at most one transaction there.

    A write that has begun is not cancelled: the cancellation strikes at the caller's next checkpoint. Calls
    raise `trio.TooSlowError` after ``CALL_DEADLINE``; whether a write was made is then unknown.
    """

    def __init__(self, connection: apsw.AsyncConnection, tables: _Tables) -> None:
        self._connection = connection
        self._tables = tables

    async def session(self, session_id: str) -> SessionState | None:
        """The state of one session, or None."""
        return await self._read(lambda: self._tables.session(session_id))

    async def history(self, session_id: str) -> list[Entry]:
        """All entries of one session, oldest first."""
        return await self._read(lambda: self._tables.history(session_id))

    async def sessions(self, user_id: str | None, limit: int, offset: int) -> tuple[list[SessionState], int]:
        """Sessions, last changed first."""
        return await self._read(lambda: self._tables.sessions(user_id, limit, offset))

    async def audit(
        self, session_id: str | None, event_type: str | None, limit: int, offset: int
    ) -> tuple[list[AuditRecord], int]:
        """Audit records, newest first."""
        return await self._read(lambda: self._tables.audit(session_id, event_type, limit, offset))

    async def audit_counts(self) -> Mapping[str, int]:
        """How many audit records there are of each type."""
        return await self._read(self._tables.audit_counts)

    async def metric_totals(self) -> Mapping[str, int]:
        """The counters of all sessions added up."""
        return await self._read(self._tables.metric_totals)

    async def turn(self, session_id: str, key: str) -> TurnRecord | None:
        """One keyed turn with its events, or None."""
        return await self._read(lambda: self._tables.turn(session_id, key))

    async def commit(self, change: Change) -> None:
        """Apply the change in one transaction."""
        await self._write(lambda: self._tables.apply(change))

    async def add_events(self, turn: TurnRecord, new_events: tuple[bytes, ...]) -> None:
        """Add events of the open step in one transaction."""
        await self._write(lambda: self._tables.add_events(turn, new_events))

    async def _read(self, call: Callable[[], Result]) -> Result:
        with trio.fail_after(CALL_DEADLINE):
            return cast(Result, await self._connection.async_run(call))

    async def _write(self, call: Callable[[], None]) -> None:
        # APSW carries a cancellation into its thread, where it may strike inside the transaction and leave
        # it open: later ones would then report success and be lost.
        with trio.fail_after(CALL_DEADLINE, shield=True):
            await self._connection.async_run(call)


class _Tables:
    """The SQL. Every method runs in the connection's thread, where the connection is an ordinary one."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection

    def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return list(self._connection.execute(sql, values))

    def prepare(self) -> None:
        """Lock the file, and make its tables if it is new. Raises `ValueError` for a foreign file."""
        run = self._connection.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = NORMAL")
        run("BEGIN IMMEDIATE")
        try:
            ours = self._rows("PRAGMA application_id")[0][0]
            version = self._rows("PRAGMA user_version")[0][0]
            if ours == 0 and version == 0 and not self._rows("SELECT 1 FROM sqlite_schema LIMIT 1"):
                run(SCHEMA)
                run(f"PRAGMA application_id = {APPLICATION_ID}")
                run(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif (ours, version) != (APPLICATION_ID, SCHEMA_VERSION):
                raise ValueError("db: the file belongs to another program or version; choose another file.")
        except BaseException:
            run("ROLLBACK")
            raise
        run("COMMIT")

    def session(self, session_id: str) -> SessionState | None:
        rows = self._rows("SELECT state FROM sessions WHERE session_id = ?", session_id)
        return _state(rows[0][0]) if rows else None

    def history(self, session_id: str) -> list[Entry]:
        rows = self._rows("SELECT entry FROM entries WHERE session_id = ? ORDER BY number", session_id)
        return [entry_from_json(orjson.loads(row[0])) for row in rows]

    def sessions(self, user_id: str | None, limit: int, offset: int) -> tuple[list[SessionState], int]:
        fits = "WHERE ?1 IS NULL OR user_id = ?1"
        rows = self._rows(
            f"SELECT state FROM sessions {fits} ORDER BY updated_at DESC, session_id DESC LIMIT ?2 OFFSET ?3",
            user_id,
            limit,
            offset,
        )
        total = self._rows(f"SELECT count(*) FROM sessions {fits}", user_id)[0][0]
        return [_state(row[0]) for row in rows], total

    def audit(
        self, session_id: str | None, event_type: str | None, limit: int, offset: int
    ) -> tuple[list[AuditRecord], int]:
        fits = "WHERE (?1 IS NULL OR session_id = ?1) AND (?2 IS NULL OR event_type = ?2)"
        rows = self._rows(
            f"SELECT at, session_id, event_type, details FROM audit {fits}"
            " ORDER BY audit_id DESC LIMIT ?3 OFFSET ?4",
            session_id,
            event_type,
            limit,
            offset,
        )
        total = self._rows(f"SELECT count(*) FROM audit {fits}", session_id, event_type)[0][0]
        return [AuditRecord(at, who, what, orjson.loads(details)) for at, who, what, details in rows], total

    def audit_counts(self) -> dict[str, int]:
        return dict(self._rows("SELECT event_type, count(*) FROM audit GROUP BY event_type"))

    def metric_totals(self) -> dict[str, int]:
        return dict(
            self._rows(
                "SELECT one.key, sum(one.value) FROM sessions, json_each(state, '$.metrics') AS one"
                " GROUP BY one.key"
            )
        )

    def turn(self, session_id: str, key: str) -> TurnRecord | None:
        rows = self._rows(
            "SELECT turn_id, digest, status, settled FROM turns WHERE session_id = ? AND key = ?",
            session_id,
            key,
        )
        if not rows:
            return None
        turn_id, digest, status, settled = rows[0]
        events = self._rows("SELECT data FROM events WHERE turn_id = ? ORDER BY number", turn_id)
        return TurnRecord(session_id, key, digest, status, settled, tuple(row[0] for row in events))

    def apply(self, change: Change) -> None:
        with self._connection:
            state = change.session
            self._connection.execute(
                "INSERT INTO sessions VALUES (?1, ?2, ?3, ?4) ON CONFLICT (session_id) DO UPDATE"
                " SET user_id = ?2, updated_at = ?3, state = ?4",
                (state.session_id, state.user_id, state.updated_at, _dumps(_CONVERTER.unstructure(state))),
            )
            first = state.entries - len(change.entries) + 1
            self._connection.executemany(
                "INSERT INTO entries VALUES (?, ?, ?)",
                [
                    (state.session_id, number, _dumps(entry_to_json(entry)))
                    for number, entry in enumerate(change.entries, first)
                ],
            )
            self._append_audit(change.audit)
            if change.starts_turn:
                self._begin_turn(state.session_id)
            if change.turn is not None:
                self._put_turn(change.turn, change.new_events)

    def add_events(self, turn: TurnRecord, new_events: tuple[bytes, ...]) -> None:
        values = [(data, turn.session_id, turn.key) for data in new_events]
        if len(values) == 1:  # nearly always: a token, one statement, which is a transaction of its own
            self._connection.execute(ADD_EVENT, values[0])
        else:
            with self._connection:
                self._connection.executemany(ADD_EVENT, values)

    def _append_audit(self, records: tuple[AuditRecord, ...]) -> None:
        if not records:
            return
        self._connection.executemany(
            "INSERT INTO audit (at, session_id, event_type, details) VALUES (?, ?, ?, ?)",
            [(one.at, one.session_id, one.event_type, _dumps(dict(one.details))) for one in records],
        )
        self._connection.execute(
            "DELETE FROM audit WHERE audit_id <= (SELECT max(audit_id) FROM audit) - ?", (AUDIT_KEPT,)
        )

    def _begin_turn(self, session_id: str) -> None:
        self._connection.execute(
            "UPDATE turns SET status = ? WHERE session_id = ? AND status = ?", (STOPPED, session_id, RUNNING)
        )
        old = self._rows(
            "SELECT turn_id FROM turns WHERE session_id = ? ORDER BY turn_id DESC LIMIT -1 OFFSET ?",
            session_id,
            KEYED_TURNS_KEPT - 1,
        )
        self._connection.executemany("DELETE FROM events WHERE turn_id = ?", old)
        self._connection.executemany("DELETE FROM turns WHERE turn_id = ?", old)

    def _put_turn(self, turn: TurnRecord, new_events: tuple[bytes, ...]) -> None:
        turn_id = self._rows(
            "INSERT INTO turns (session_id, key, digest, status, settled) VALUES (?1, ?2, ?3, ?4, ?5)"
            " ON CONFLICT (session_id, key) DO UPDATE SET status = ?4, settled = ?5 RETURNING turn_id",
            turn.session_id,
            turn.key,
            turn.digest,
            turn.status,
            turn.settled,
        )[0][0]
        if new_events:
            last = self._rows("SELECT coalesce(max(number), 0) FROM events WHERE turn_id = ?", turn_id)[0][0]
            self._connection.executemany(
                "INSERT INTO events VALUES (?, ?, ?)",
                [(turn_id, number, data) for number, data in enumerate(new_events, last + 1)],
            )


def _state(text: str) -> SessionState:
    return _CONVERTER.structure(orjson.loads(text), SessionState)


def _dumps(value: Any) -> str:
    return orjson.dumps(value).decode()
