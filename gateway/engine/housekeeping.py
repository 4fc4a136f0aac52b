"""Keeps memory and store within bounds, every few seconds, off the token path."""

from __future__ import annotations

from collections.abc import Mapping

import trio

from gateway.core.errors import StoreUnavailable
from gateway.core.limits import Limits
from gateway.engine.bulkhead import bulkhead
from gateway.engine.session_runner import SessionRunner
from gateway.ports import Clock, SessionStore, Telemetry

HOUSEKEEPING_SECONDS = 5.0


async def keep_house(
    store: SessionStore,
    runners: Mapping[str, SessionRunner],
    *,
    limits: Limits,
    telemetry: Telemetry,
    clock: Clock,
) -> None:
    """Drop what is too old or too much, until cancelled."""
    while True:
        await trio.sleep(HOUSEKEEPING_SECONDS)
        with bulkhead(telemetry, "housekeeping"):
            now = clock.now()
            held = sum(runner.age(now) for runner in runners.values())
            telemetry.set_gauge("gateway_replay_held_bytes", held)
            if held > limits.replay_total_bytes:
                _relieve_memory(runners, held - limits.replay_total_bytes)
            try:
                # The ledger goes with its session, and its promise is the longer one.
                kept = max(limits.replay_retention, limits.dedupe_window)
                await store.expire(now - kept, keep=runners.keys())
                await store.maintain()
            except StoreUnavailable:
                telemetry.count("gateway_store_failures_total")


def _relieve_memory(runners: Mapping[str, SessionRunner], excess: int) -> None:
    """Trim what every attached socket has acknowledged, of the largest sessions first."""
    for runner in sorted(runners.values(), key=lambda runner: -runner.session.log.held_bytes):
        if excess <= 0:
            return
        excess -= runner.trim_confirmed()
