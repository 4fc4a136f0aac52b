"""A short run of the fault harness: real processes, real sockets, kills and cuts, and no broken promise."""

from __future__ import annotations

import trio

from tests.faults.run import Options, run
from tests.faults.summary import describe
from tests.redis_server import require_redis


async def test_kills_and_cuts_break_no_promise() -> None:
    """``python -m tests.faults`` with a twentieth of its kills and cuts; CI runs all of them besides."""
    with trio.fail_after(100):
        result = await run(Options(seed=20, kills=10, cuts=100, slots=6), lambda _: None)
    assert not result.violations, describe(result)
    assert (result.kills, result.cuts >= 100) == (10, True)
    assert result.turns["completed"]


async def test_kills_and_pauses_of_two_nodes_break_no_promise() -> None:
    """The same on two gateways and one Redis, which are paused and killed too."""
    require_redis()
    with trio.fail_after(100):
        result = await run(Options(seed=4, kills=10, cuts=100, slots=6, nodes=2), lambda _: None)
    assert not result.violations, describe(result)
    assert result.kills == 10
    assert result.turns["completed"]
