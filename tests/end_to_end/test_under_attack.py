"""Short forms of ``python -m tests.fuzz`` and ``python -m tests.hostile.slow_clients``."""

from __future__ import annotations

from tests.fuzz.campaign import TARGETS, run
from tests.hostile.slow_clients import CUT_WITHIN, SLACK, measure, percentile_99

BUSY = 5.0
"""How far tests beside these may stretch times."""


async def test_twenty_seconds_of_damaged_input_break_nothing() -> None:
    """No exception reaches a bulkhead, and no bystander loses its socket or its answers."""
    outcome = await run(20, 7, None, lambda _: None)
    assert outcome.broken == []
    assert set(outcome.cases) == set(TARGETS)
    assert outcome.answers > 0


async def test_slow_connections_are_cut_and_do_not_slow_others_down() -> None:
    """Slow heads, bodies and readers at once; healthy calls go on."""
    result = await measure(90, 2)
    assert result.failed == 0
    assert max(max(times) for times in result.lasted.values()) < CUT_WITHIN + SLACK + BUSY
    assert percentile_99(result.attacked) < max(1.0, BUSY * percentile_99(result.quiet))
