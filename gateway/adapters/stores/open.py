"""Choosing a session store by its URL."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from attrs import frozen

from gateway.adapters.stores.memory import MemoryStore, open_memory_store
from gateway.adapters.stores.sqlite import SqliteStore, open_sqlite_store
from gateway.ports import Clock, Telemetry

_SUPPORTED = "supported are memory://, sqlite:///relative/path.db and sqlite:////absolute/path.db"


@frozen
class StoreLocation:
    """What a ``STORE_URL`` stands for."""

    scheme: str
    path: Path | None = None
    """The file of a ``sqlite`` store; None for ``memory``."""


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
    # Of an unknown URL only the scheme is repeated: the rest may hold a password.
    named = f"{scheme}://" if separator else "a text without ://"
    raise ValueError(f"STORE_URL is {named}, which is not supported: {_SUPPORTED}")


def open_session_store(
    url: str, *, full_sync: bool, dedupe_window: float, clock: Clock, telemetry: Telemetry
) -> AbstractAsyncContextManager[MemoryStore | SqliteStore]:
    """The store that ``url`` names, open inside the block. Raises ``ValueError`` for the URL at once.

    Entering raises ``StoreUnavailable``; see ``open_sqlite_store``.
    """
    location = parse_store_url(url)
    if location.path is None:
        return open_memory_store(dedupe_window=dedupe_window)
    return open_sqlite_store(
        location.path, full_sync=full_sync, dedupe_window=dedupe_window, clock=clock, telemetry=telemetry
    )
