"""Fixtures that tests in several places share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.redis_groups import ClusterGroup, SentinelGroup
from tests.redis_server import RedisServer


def pytest_configure() -> None:
    """Examples of Hypothesis have no deadline: that a machine is busy is no reason to fail."""
    settings.register_profile("timeless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("timeless")


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for all tests that only need it to be there."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """The shared Redis, empty."""
    shared_redis.empty()
    return shared_redis


@pytest.fixture(scope="session")
def shared_sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelGroup]:
    """One master with a replica and sentinels for all tests that hurt none of them."""
    group = SentinelGroup(tmp_path_factory.mktemp("sentinels"))
    group.start()
    try:
        yield group
    finally:
        group.kill()


@pytest.fixture
def redis_sentinels(shared_sentinels: SentinelGroup) -> SentinelGroup:
    """The shared sentinels; their Redis is empty."""
    shared_sentinels.empty()
    return shared_sentinels


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterGroup]:
    """One cluster for all tests that do not hurt it."""
    group = ClusterGroup(tmp_path_factory.mktemp("cluster"))
    group.start()
    try:
        yield group
    finally:
        group.kill()


@pytest.fixture
def redis_cluster(shared_cluster: ClusterGroup) -> ClusterGroup:
    """The shared cluster, empty."""
    shared_cluster.empty()
    return shared_cluster


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[SentinelGroup]:
    """A master, a replica and sentinels of the test's own, to be hurt."""
    group = SentinelGroup(tmp_path)
    group.start()
    try:
        yield group
    finally:
        group.kill()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ClusterGroup]:
    """Three masters of the test's own, to be hurt; the first has a replica."""
    group = ClusterGroup(tmp_path, 3, 1)
    group.start()
    try:
        yield group
    finally:
        group.kill()
