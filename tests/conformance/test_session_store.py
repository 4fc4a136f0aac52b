"""Every session store against the one suite."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from attrs import define, field

from gateway.adapters.stores.memory import open_memory_store
from gateway.adapters.stores.redis import open_redis_store
from gateway.adapters.stores.redis_location import parse_redis_url
from gateway.adapters.stores.sqlite import open_sqlite_store
from tests.conformance.session_store import (
    DEDUPE_WINDOW,
    EVERYTHING,
    RECORD,
    MaintainedStore,
    RecordingTelemetry,
    SessionStoreConformance,
    SettableClock,
    StorePlace,
)
from tests.redis_server import RedisServer


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


@define
class RedisPlace(StorePlace):
    """A Redis store; the server outlives it."""

    url: str
    clock: SettableClock = field(factory=SettableClock)
    telemetry: RecordingTelemetry = field(factory=RecordingTelemetry)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[MaintainedStore]:
        """Connect to it."""
        async with open_redis_store(
            parse_redis_url(self.url),
            full_sync=False,
            dedupe_window=DEDUPE_WINDOW,
            retention=DEDUPE_WINDOW,
            telemetry=self.telemetry,
        ) as store:
            # It counts no bytes: that is Redis' own to do.
            yield cast("MaintainedStore", store)
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


class TestRedisStore(SessionStoreConformance):
    """``redis://`` on a real Redis."""

    @pytest.fixture
    def place(self, redis_server: RedisServer) -> StorePlace:
        """An empty Redis."""
        self.server = redis_server
        return RedisPlace(redis_server.url)

    async def test_held_bytes_follow_what_is_held(self, place: StorePlace) -> None:
        """Redis holds no key of a session but its owner's once it expired."""
        assert isinstance(place, RedisPlace)
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([EVERYTHING])
            await store.expire(RECORD.touched_at + 1)
            await store.maintain()

        assert self.server.ask("DBSIZE") == ":4", "its owner, the owner's sessions, generation, count"
