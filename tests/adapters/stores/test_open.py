"""``gateway.adapters.stores.open``: which URL names which store, and what is said of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.adapters.stores.memory import MemoryStore
from gateway.adapters.stores.open import StoreLocation, open_session_store, parse_store_url
from gateway.adapters.stores.redis import RedisStore
from gateway.adapters.stores.redis_location import RedisAddress, RedisLocation
from gateway.adapters.stores.sqlite import SqliteStore
from tests.conformance.session_store import RecordingTelemetry, SettableClock
from tests.redis_groups import ClusterGroup, SentinelGroup
from tests.redis_server import RedisServer


@pytest.mark.parametrize(
    ("url", "location"),
    [
        ("memory://", StoreLocation("memory")),
        ("memory:///", StoreLocation("memory")),
        ("sqlite:///gateway.db", StoreLocation("sqlite", Path("gateway.db"))),
        ("sqlite:///var/gateway.db", StoreLocation("sqlite", Path("var/gateway.db"))),
        ("sqlite:////var/lib/gateway.db", StoreLocation("sqlite", Path("/var/lib/gateway.db"))),
        (
            "redis://r:1/2",
            StoreLocation("redis", redis=RedisLocation((RedisAddress("r", 1),), database=2)),
        ),
        ("rediss://r", StoreLocation("rediss", redis=RedisLocation((RedisAddress("r", 6379),), tls=True))),
    ],
)
def test_supported_urls_are_understood(url: str, location: StoreLocation) -> None:
    """Three slashes begin a relative path, four an absolute one."""
    assert parse_store_url(url) == location


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgres://user:hunter2@host/db", "postgres://, which is not supported.*memory://.*sqlite:///"),
        ("gateway.db", "without ://.*sqlite:///"),
        ("", "without ://"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite://host/gateway.db", "names no file"),
        ("sqlite:///directory/", "names no file"),
        ("sqlite:///:memory:", "memory://"),
        ("sqlite:///gateway.db?mode=ro", "no options"),
        ("memory://gateway", "takes nothing"),
        ("redis://:hunter2@r/0?ssl=1", "is written redis://"),
        ("redis+proxy://:hunter2@r", "redis\\+proxy://, which is not supported.*redis\\+cluster://"),
    ],
)
def test_other_urls_are_refused_with_what_is_supported(url: str, says: str) -> None:
    """The error says what to write, and never repeats a password."""
    with pytest.raises(ValueError, match=f"(?s){says}") as caught:
        parse_store_url(url)

    assert "hunter2" not in str(caught.value)


async def test_the_url_decides_the_store(
    tmp_path: Path,
    redis_server: RedisServer,
    redis_sentinels: SentinelGroup,
    redis_cluster: ClusterGroup,
) -> None:
    """One scheme for each store; the file's directory is made for it."""
    for url, kind in (
        ("memory://", MemoryStore),
        (f"sqlite:///{tmp_path}/new/gateway.db", SqliteStore),
        (redis_server.url, RedisStore),
        (redis_sentinels.url, RedisStore),
        (redis_cluster.url, RedisStore),
    ):
        async with open_session_store(
            url, full_sync=False, dedupe_window=1.0, clock=SettableClock(), telemetry=RecordingTelemetry()
        ) as store:
            assert isinstance(store, kind)

    assert (tmp_path / "new" / "gateway.db").exists()
