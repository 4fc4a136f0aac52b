"""Every session store against the one suite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import trio
from attrs import define, field

from gateway.adapters.stores.memory import open_memory_store
from gateway.adapters.stores.redis import open_redis_store
from gateway.adapters.stores.redis_location import parse_redis_url
from gateway.adapters.stores.sqlite import SqliteStore, open_sqlite_store
from gateway.core.storage import SessionCommit
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
from tests.redis_groups import ClusterGroup, SentinelGroup
from tests.redis_server import RedisServer


@define
class MemoryPlace(StorePlace):
    """A memory store; another one each time."""

    clock: SettableClock = field(factory=SettableClock)

    def open(self) -> AbstractAsyncContextManager[MaintainedStore]:
        """Open a fresh store."""
        return open_memory_store(dedupe_window=DEDUPE_WINDOW)


async def commit_at_once(
    store: SqliteStore,
    commit: Callable[[Sequence[SessionCommit]], Awaitable[None]],
    commits: Sequence[SessionCommit],
) -> None:
    """Commit without the worker thread if that can be, as the engine does."""
    await trio.lowlevel.checkpoint_if_cancelled()
    if not store.commit_nowait(commits):
        await commit(commits)


@define
class SqlitePlace(StorePlace):
    """A SQLite store in one file."""

    path: Path
    full_sync: bool = False
    at_once: bool = False
    """Whether what can be committed without waiting is."""
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
            if self.at_once:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(store, "commit", partial(commit_at_once, store, store.commit))
                    yield store
            else:
                yield store
        # Where all processors are taken, a write may take as long as on a slow disk.
        assert [said for said in self.telemetry.said if said[0] != "store_disk_slow"] == []


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


class TestSqliteStoreAtOnce(SessionStoreConformance):
    """``sqlite:///`` committed to in the event loop's own thread."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> StorePlace:
        """A file that does not exist yet."""
        return SqlitePlace(tmp_path / "sessions.db", at_once=True)


class TestSqliteStoreFullSync(SessionStoreConformance):
    """``sqlite:///`` with ``STORE_SYNC=full``."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> StorePlace:
        """A file that does not exist yet."""
        return SqlitePlace(tmp_path / "sessions.db", full_sync=True)


class TestRedisStore(SessionStoreConformance):
    """``redis://`` on a real Redis."""

    servers: Sequence[RedisServer]
    keys_without_sessions = 4
    """An owner, the owner's sessions, the generation, the count."""

    @pytest.fixture
    def place(self, redis_server: RedisServer) -> StorePlace:
        """An empty Redis."""
        self.servers = [redis_server]
        return RedisPlace(redis_server.url)

    async def test_held_bytes_follow_what_is_held(self, place: StorePlace) -> None:
        """Redis holds no key of a session but its owner's once it expired."""
        assert isinstance(place, RedisPlace)
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([EVERYTHING])
            await store.expire(RECORD.touched_at + 1)
            await store.maintain()

        keys = sum(int(server.ask("DBSIZE")[1:]) for server in self.servers)
        assert keys == self.keys_without_sessions


class TestRedisStoreBySentinels(TestRedisStore):
    """``redis+sentinel://`` with a real master, replica and sentinels."""

    @pytest.fixture
    def place(self, redis_sentinels: SentinelGroup) -> StorePlace:
        """An empty Redis that they watch."""
        self.servers = [redis_sentinels.master]
        return RedisPlace(redis_sentinels.url)


class TestRedisStoreInACluster(TestRedisStore):
    """``redis+cluster://`` on a real cluster of three masters."""

    keys_without_sessions = 3
    """There is no count in a cluster."""

    @pytest.fixture
    def place(self, redis_cluster: ClusterGroup) -> StorePlace:
        """An empty cluster."""
        self.servers = redis_cluster.servers
        return RedisPlace(redis_cluster.url)
