"""Every session store against the one suite, and SQLite against the memory store as its model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from attrs import define, field

from gateway.adapters.stores.memory import open_memory_store
from gateway.adapters.stores.sqlite import open_sqlite_store
from tests.conformance.session_store import (
    DEDUPE_WINDOW,
    MaintainedStore,
    RecordingTelemetry,
    SessionStoreConformance,
    SettableClock,
    StorePlace,
)


@define
class MemoryPlace(StorePlace):
    """A memory store; another one each time."""

    clock: SettableClock = field(factory=SettableClock)

    def open(self) -> AbstractAsyncContextManager[MaintainedStore]:
        """Open a fresh store."""
        return open_memory_store(dedupe_window=DEDUPE_WINDOW)


@define
class SqlitePlace(StorePlace):
    """A SQLite store in one file."""

    path: Path
    full_sync: bool = False
    clock: SettableClock = field(factory=SettableClock)
    telemetry: RecordingTelemetry = field(factory=RecordingTelemetry)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[MaintainedStore]:
        """Open the file."""
        async with open_sqlite_store(
            self.path,
            full_sync=self.full_sync,
            dedupe_window=DEDUPE_WINDOW,
            clock=self.clock,
            telemetry=self.telemetry,
        ) as store:
            yield store
        assert self.telemetry.said == []


class TestMemoryStore(SessionStoreConformance):
    """``memory://``."""

    @pytest.fixture
    def place(self) -> StorePlace:
        """RAM."""
        return MemoryPlace()


class TestSqliteStore(SessionStoreConformance):
    """``sqlite:///`` as it is by default."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> StorePlace:
        """A file that does not exist yet."""
        return SqlitePlace(tmp_path / "sessions.db")


class TestSqliteStoreFullSync(SessionStoreConformance):
    """``sqlite:///`` with ``STORE_SYNC=full``."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> StorePlace:
        """A file that does not exist yet."""
        return SqlitePlace(tmp_path / "sessions.db", full_sync=True)
