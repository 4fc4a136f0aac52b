"""Groups of Redis servers of a test's own, to be hurt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.redis_groups import ClusterGroup, SentinelGroup


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ClusterGroup]:
    """Three masters; the first has a replica."""
    group = ClusterGroup(tmp_path, 3, 1)
    group.start()
    try:
        yield group
    finally:
        group.kill()


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[SentinelGroup]:
    """A master, a replica and sentinels."""
    group = SentinelGroup(tmp_path)
    group.start()
    try:
        yield group
    finally:
        group.kill()
