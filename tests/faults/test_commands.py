"""The commands that judge one fault each, with small numbers: what they judge holds; times are not asked."""

from __future__ import annotations

import asyncio

from tests.faults import cancelled_calls, redis_outage, stop_under_load
from tests.redis_server import require_redis


def test_nothing_is_left_of_cancelled_calls() -> None:
    """``python -m tests.faults.cancelled_calls`` with three hundred calls."""
    options = cancelled_calls.Options(calls=300, sessions=60)

    result = asyncio.run(asyncio.wait_for(cancelled_calls.run(options, lambda _: None), 100))

    assert not result.violations, cancelled_calls.describe(result)
    assert result.calls == 300
    assert result.posts > 0


def test_a_stop_closes_every_socket_and_loses_nothing() -> None:
    """``python -m tests.faults.stop_under_load`` with sixty sockets."""
    options = stop_under_load.Options(sockets=60, talking=20)

    result = asyncio.run(asyncio.wait_for(stop_under_load.run(options, lambda _: None), 100))

    assert not result.violations, stop_under_load.describe(result)
    assert result.codes == {1012: 60}
    assert result.acked > 0


def test_redis_away_refuses_what_is_new_and_loses_nothing() -> None:
    """``python -m tests.faults.redis_outage`` with a second and a half."""
    require_redis()
    options = redis_outage.Options(seconds=1.5, talkers=5, streams=5)

    result = asyncio.run(asyncio.wait_for(redis_outage.run(options, lambda _: None), 100))

    assert not result.violations, redis_outage.describe(result)
    assert result.answers["STORE_UNAVAILABLE"] > 0
    assert len(result.recovered) == 10
