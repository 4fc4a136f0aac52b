"""A short run of the fault harness: real processes, real sockets, kills and cuts, and no broken promise."""

from __future__ import annotations

import trio

from tests.faults.run import Options, run
from tests.faults.summary import describe


async def test_kills_and_cuts_break_no_promise() -> None:
    """``python -m tests.faults`` with a twentieth of its kills and cuts; CI runs all of them besides."""
    with trio.fail_after(100):
        result = await run(Options(seed=20, kills=10, cuts=100, slots=6), lambda _: None)
    assert not result.violations, describe(result)
    assert (result.kills, result.cuts >= 100) == (10, True)
    assert result.turns["completed"]
