"""Choosing a session store by its URL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from attrs import frozen

from gateway.adapters.stores.memory import open_memory_store
from gateway.adapters.stores.redis_location import RedisLocation, is_redis_scheme, parse_redis_url
from gateway.adapters.stores.sqlite import open_sqlite_store
from gateway.ports import Clock, SessionStore, Telemetry

_SUPPORTED = (
    "supported are memory://, sqlite:///relative/path.db, sqlite:////absolute/path.db, "
    "redis://host:port/0, redis+sentinel://host:port,host:port/service and "
    "redis+cluster://host:port,host:port (rediss for TLS)"
)


@frozen
class StoreLocation:
    """What a ``STORE_URL`` stands for."""

    scheme: str
    path: Path | None = None
    """The file of a ``sqlite`` store; None for others."""
    redis: RedisLocation | None = None
    """The servers of a Redis store."""


def parse_store_url(url: str) -> StoreLocation:
    """Understand a ``STORE_URL``. Raises ``ValueError`` with what is supported."""
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "memory":
        if rest.strip("/"):
            raise ValueError("STORE_URL memory:// takes nothing after it: what it holds is in RAM")
        return StoreLocation(scheme)
    if separator and scheme == "sqlite":
        path = rest[1:]
        if not rest.startswith("/") or path in ("", "/") or path.endswith("/"):
            raise ValueError(f"STORE_URL names no file: {_SUPPORTED}")
        if path == ":memory:":
            raise ValueError("STORE_URL sqlite:///:memory: is written memory://")
        if "?" in path or "\0" in path:
            raise ValueError("STORE_URL sqlite:/// takes a path and no options; STORE_SYNC sets how it syncs")
        return StoreLocation(scheme, Path(path))
    if separator and is_redis_scheme(scheme):
        return StoreLocation(scheme, redis=parse_redis_url(url))
    # Of an unknown URL only the scheme is repeated: the rest may hold a password.
    named = f"{scheme}://" if separator else "a text without ://"
    raise ValueError(f"STORE_URL is {named}, which is not supported: {_SUPPORTED}")


def open_session_store(
    url: str,
    *,
    full_sync: bool,
    dedupe_window: float,
    clock: Clock,
    telemetry: Telemetry,
    retention: float = 0.0,
    node_lease: float = 4.0,
) -> AbstractAsyncContextManager[SessionStore]:
    """The store that ``url`` names, open inside the block. Raises ``ValueError`` for the URL at once.

    ``retention``: seconds that events are kept for, of which only a store that forgets by itself has to know.
    ``node_lease``: seconds that a silent node keeps its sessions, where several share the store.

    Entering raises ``StoreUnavailable``; see ``open_sqlite_store`` and ``open_redis_store``.
    """
    location = parse_store_url(url)
    if location.redis is not None:
        return _open_redis(
            location.redis,
            full_sync=full_sync,
            dedupe_window=dedupe_window,
            retention=retention,
            node_lease=node_lease,
            telemetry=telemetry,
        )
    if location.path is None:
        return open_memory_store(dedupe_window=dedupe_window)
    return open_sqlite_store(
        location.path, full_sync=full_sync, dedupe_window=dedupe_window, clock=clock, telemetry=telemetry
    )


@asynccontextmanager
async def _open_redis(
    location: RedisLocation,
    *,
    full_sync: bool,
    dedupe_window: float,
    retention: float,
    node_lease: float,
    telemetry: Telemetry,
) -> AsyncIterator[SessionStore]:
    # Here, for it brings a client that takes 1.5 s and 35 MB to import, which no other store needs.
    from gateway.adapters.stores.redis import open_redis_store

    async with open_redis_store(
        location,
        full_sync=full_sync,
        dedupe_window=dedupe_window,
        retention=retention,
        lease_seconds=node_lease,
        telemetry=telemetry,
    ) as store:
        yield store
