"""``gateway.adapters.stores.redis_location``: which URL means what, and what is said of others."""

from __future__ import annotations

import pytest

from gateway.adapters.stores.redis_location import (
    RedisAddress,
    RedisLocation,
    Topology,
    is_redis_scheme,
    parse_redis_url,
)
from gateway.config_values import store_url

HERE = (RedisAddress("r", 6379),)
SENTINELS = (RedisAddress("a", 26379), RedisAddress("b", 5))


@pytest.mark.parametrize(
    ("url", "location"),
    [
        ("redis://localhost", RedisLocation((RedisAddress("localhost", 6379),))),
        ("redis://localhost:7000/3", RedisLocation((RedisAddress("localhost", 7000),), database=3)),
        ("rediss://[::1]:7000/", RedisLocation((RedisAddress("::1", 7000),), tls=True)),
        ("redis://:p%40ss@r", RedisLocation(HERE, password="p@ss")),
        ("redis://ada:x@r", RedisLocation(HERE, username="ada", password="x")),
        ("redis+sentinel://a,b:5/main", RedisLocation(SENTINELS, Topology.SENTINEL, "main")),
        (
            "rediss+sentinel://ada:x@a,b:5/main%20one/2?sentinel_username=s&sentinel_password=p%26",
            RedisLocation(
                SENTINELS,
                Topology.SENTINEL,
                "main one",
                2,
                username="ada",
                password="x",
                sentinel_username="s",
                sentinel_password="p&",
                tls=True,
            ),
        ),
        (
            "redis+cluster://:x@r,[fe80::1]:7000",
            RedisLocation(
                (RedisAddress("r", 6379), RedisAddress("fe80::1", 7000)), Topology.CLUSTER, password="x"
            ),
        ),
        ("rediss+cluster://r/0", RedisLocation(HERE, Topology.CLUSTER, tls=True)),
    ],
)
def test_urls_are_understood(url: str, location: RedisLocation) -> None:
    """Hosts, ports, service, database, percent-encoded credentials, TLS; the settings take them too."""
    assert parse_redis_url(url) == location
    assert store_url(url) == url


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://", "is written redis://"),
        ("redis://r/x", "is written redis://"),
        ("redis://r:99999", "is written redis://"),
        ("redis://r:0", "is written redis://"),
        ("redis://hunter2@r", "is written redis://"),
        ("redis://r/0?password=hunter2", "is written redis://"),
        ("redis://r#hunter2", "is written redis://"),
        ("redis://r,s", "is written redis://"),
        ("redis+sentinel://:hunter2@a,b", "is written redis.sentinel://.*SERVICE"),
        ("redis+sentinel://:hunter2@a,,b/main", "is written redis.sentinel://.*SERVICE"),
        ("redis+sentinel://:hunter2@a/main/x", "is written redis.sentinel://.*SERVICE"),
        ("rediss+sentinel://a/main?password=hunter2", "rediss.sentinel:// for TLS"),
        ("redis+cluster://:hunter2@a,b:x", "is written redis.cluster://"),
        ("redis+cluster://:hunter2@a,b/1", "only database 0"),
        ("redis+cluster://:hunter2@a?x=1", "is written redis.cluster://"),
    ],
)
def test_other_urls_are_refused_without_repeating_them(url: str, says: str) -> None:
    """They may hold a password; options would be passed over in silence. The settings refuse them too."""
    with pytest.raises(ValueError, match=says) as caught:
        parse_redis_url(url)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError, match="redis") as caught:
        store_url(url)
    assert "hunter2" not in str(caught.value)


def test_a_location_shows_no_password() -> None:
    """Neither that of the Redis nor that of the sentinels."""
    location = parse_redis_url("redis+sentinel://ada:hunter2@a/main?sentinel_password=hunter3")

    assert "hunter" not in repr(location)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [("redis", True), ("rediss+cluster", True), ("redis+proxy", False), ("redissentinel", False)],
)
def test_schemes_are_known(scheme: str, expected: bool) -> None:
    """Six of them."""
    assert is_redis_scheme(scheme) is expected
