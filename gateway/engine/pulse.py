"""The pulse of the process: how late the event loop is, and the totals of the hot path, once a second.

Resource handling: one task that wakes four times a second and keeps ten minutes of samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import trio

from gateway.core.flow import TOTALS
from gateway.core.overview import PulseSample
from gateway.engine.bulkhead import bulkhead
from gateway.engine.hub import Hub
from gateway.engine.turn import TurnRunner
from gateway.ports import Clock, Telemetry

LAG_SECONDS: Final = 0.25
"""Between two looks at the event loop."""
LOOKS_PER_SAMPLE: Final = 4
SAMPLES_KEPT: Final = 600
"""Ten minutes."""
SOCKETS_PER_STEP: Final = 500
"""Sockets looked at before everybody else gets a turn."""
UNACKED_SECONDS: Final = 5
"""Between two surveys of all sockets."""

_PUBLISHED: Final = {
    "tokens": "gateway_tokens_total",
    "events": "gateway_events_total",
    "frames_sent": "gateway_socket_frames_sent_total",
    "bytes_sent": "gateway_socket_bytes_sent_total",
    "frames_received": "gateway_socket_frames_received_total",
    "bytes_received": "gateway_socket_bytes_received_total",
    "acks_received": "gateway_acks_received_total",
    "replayed_events": "gateway_replayed_events_total",
}


class Pulse:
    """Measures and publishes; ``samples`` are what a dashboard draws."""

    def __init__(self, hub: Hub, turns: TurnRunner, telemetry: Telemetry, clock: Clock, version: str) -> None:
        self._hub = hub
        self._turns = turns
        self._telemetry = telemetry
        self._clock = clock
        self._published = dict.fromkeys(TOTALS, 0)
        self._samples: deque[PulseSample] = deque(maxlen=SAMPLES_KEPT)
        self._worst_lag = 0.0
        telemetry.set_gauge("gateway_info", 1, version=version)

    @property
    def samples(self) -> Sequence[PulseSample]:
        """The last ten minutes, one a second, oldest first."""
        return self._samples

    async def run(self) -> None:
        """Measure until cancelled."""
        looks = seconds = 0
        while True:
            due = trio.current_time() + LAG_SECONDS
            await trio.sleep_until(due)
            with bulkhead(self._telemetry, "pulse"):
                lag = trio.current_time() - due
                self._worst_lag = max(self._worst_lag, lag)
                self._telemetry.observe("gateway_event_loop_lag_seconds", lag)
                looks += 1
                if looks % LOOKS_PER_SAMPLE == 0:
                    self.publish()
                    self._samples.append(self._sample())
                    seconds += 1
                    if seconds % UNACKED_SECONDS == 0:
                        await self._survey_sockets()

    def publish(self) -> None:
        """Bring the metrics up to date; also called when they are asked for."""
        telemetry, hub = self._telemetry, self._hub
        totals = hub.flow.totals()
        for name, metric in _PUBLISHED.items():
            grown = totals[name] - self._published[name]
            if grown:
                telemetry.count(metric, grown)
        self._published = totals
        telemetry.set_gauge("gateway_sessions_live", hub.session_count)
        telemetry.set_gauge("gateway_turns_running", self._turns.running)
        telemetry.set_gauge("gateway_turns_waiting", self._turns.waiting)
        telemetry.set_gauge("gateway_draining", hub.draining)

    def _sample(self) -> PulseSample:
        lag, self._worst_lag = self._worst_lag, 0.0
        flow = self._hub.flow
        return PulseSample(
            at=self._clock.now(),
            tokens=flow.tokens,
            frames_sent=flow.frames_sent,
            bytes_sent=flow.bytes_sent,
            bytes_received=flow.bytes_received,
            sockets=self._hub.socket_count,
            sessions=self._hub.session_count,
            turns_running=self._turns.running,
            turns_waiting=self._turns.waiting,
            lag=lag,
            added=flow.take_added(),
        )

    async def _survey_sockets(self) -> None:
        unacked = 0
        for number, socket in enumerate(tuple(self._hub.sockets)):
            unacked += socket.unacked_bytes
            if number % SOCKETS_PER_STEP == SOCKETS_PER_STEP - 1:
                await trio.lowlevel.checkpoint()
        self._telemetry.set_gauge("gateway_socket_unacked_bytes", unacked)
