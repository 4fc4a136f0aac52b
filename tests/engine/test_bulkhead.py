"""Containment of crashes."""

from __future__ import annotations

import pytest
import trio

from gateway.engine.bulkhead import bulkhead
from tests.engine.fakes import RecordingTelemetry

COUNTER = ("gateway_bulkhead_catches_total", (("where", "connection"),))


async def test_a_crash_ends_here_and_is_logged_once_with_its_one_cause() -> None:
    """However deep in nurseries it happened; its context goes along."""
    telemetry = RecordingTelemetry()
    bug = ValueError("bug")

    async def crash() -> None:
        raise bug

    with bulkhead(telemetry, "connection", session_id="s"):
        async with trio.open_nursery() as outer, trio.open_nursery() as inner:
            inner.start_soon(crash)
            outer.start_soon(trio.sleep_forever)
    assert telemetry.entries == [("error", "connection_crashed", {"session_id": "s", "cause": bug})]
    assert telemetry.counts[COUNTER] == 1


async def test_a_cancellation_passes() -> None:
    """It is not a crash, and whoever cancelled sees it arrive."""
    telemetry = RecordingTelemetry()
    with trio.CancelScope() as scope:
        with bulkhead(telemetry, "connection"):
            scope.cancel()
            await trio.sleep_forever()
        pytest.fail("not reached")
    assert scope.cancelled_caught
    assert telemetry.entries == []


async def test_an_interrupt_passes_without_the_crash_beside_it() -> None:
    """Ctrl-C ends the process also when a bug strikes at the same moment."""
    telemetry = RecordingTelemetry()
    with pytest.raises(BaseExceptionGroup) as caught, bulkhead(telemetry, "connection"):
        raise BaseExceptionGroup("both", [ValueError("bug"), KeyboardInterrupt()])
    assert caught.group_contains(KeyboardInterrupt)
    assert not caught.group_contains(ValueError)
    assert telemetry.events() == ["connection_crashed"]


def test_two_causes_are_logged_as_the_group_they_are() -> None:
    """Neither is lost."""
    telemetry = RecordingTelemetry()
    with bulkhead(telemetry, "connection"):
        raise ExceptionGroup("two", [ValueError("a"), TypeError("b")])
    (entry,) = telemetry.errors()
    assert isinstance(entry["cause"], ExceptionGroup)
    assert len(entry["cause"].exceptions) == 2
