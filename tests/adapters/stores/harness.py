"""What the tests of the SQLite store share: a place to open it at, and a way to hold up its thread."""

from __future__ import annotations

import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import apsw
import trio
from attrs import define, field

from gateway.adapters.stores.sqlite import SqliteStore, open_sqlite_store
from gateway.adapters.stores.sqlite_tables import SessionTables
from tests.conformance.session_store import DEDUPE_WINDOW, RecordingTelemetry, SettableClock


@define
class Place:
    """A file, with a clock and telemetry that outlive the store, and tokens that can be foretold."""

    path: Path
    full_sync: bool = False
    call_deadline: float = 10.0
    clock: SettableClock = field(factory=SettableClock)
    telemetry: RecordingTelemetry = field(factory=RecordingTelemetry)
    tokens: Iterator[str] = field(factory=lambda: map("token-{}".format, itertools.count()))

    @asynccontextmanager
    async def open(self) -> AsyncIterator[SqliteStore]:
        """Open the store there."""
        async with open_sqlite_store(
            self.path,
            full_sync=self.full_sync,
            dedupe_window=DEDUPE_WINDOW,
            clock=self.clock,
            telemetry=self.telemetry,
            call_deadline=self.call_deadline,
            new_token=lambda: next(self.tokens),
        ) as store:
            yield store

    def beside(self, suffix: str) -> Path:
        """One of the files next to the store's."""
        return self.path.with_name(self.path.name + suffix)


async def in_thread(store: SqliteStore, sql: str, *bindings: Any) -> Any:
    """Run a statement on the store's own connection, in its thread."""

    def run(tables: SessionTables) -> list[Any]:
        db: apsw.Connection = tables._db
        return db.execute(sql, bindings).fetchall()

    return await store._connection.run(run)


@contextmanager
def stuck_disk(store: SqliteStore, nursery: trio.Nursery) -> Iterator[threading.Event]:
    """Hold up the store's thread, as a stuck disk would, until the block is left or the event set."""
    release = threading.Event()

    async def hold() -> None:
        with trio.CancelScope(shield=True):
            await store._connection.run_unbounded(lambda _: release.wait(30))

    nursery.start_soon(hold)
    try:
        yield release
    finally:
        release.set()
