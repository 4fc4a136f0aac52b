"""A small rolling restart: real processes, a real Redis, streams that go on."""

from __future__ import annotations

import asyncio

from tests.faults.rolling_restart import Options, describe, run
from tests.redis_server import require_redis


def test_a_rolling_restart_loses_nothing() -> None:
    """``python -m tests.faults.rolling_restart`` with a tenth of its streams; pauses are not judged."""
    require_redis()
    options = Options(streams=20, pace=0.02, settle=0.5)

    result = asyncio.run(asyncio.wait_for(run(options, lambda _: None), 100))

    assert not result.violations, describe(result)
    assert result.turns == {"completed": 20}
    assert result.joins >= 50, "each stream has begun, and moved once or twice"
