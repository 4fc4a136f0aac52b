"""How long one event takes from the read off the Agent Runtime's stream to the kernel: what we add to it."""

from __future__ import annotations

import trio

from gateway.core.flow import Flow
from gateway.ports import Telemetry


class EventTiming:
    """Times at most one event of a session at once; each is over when the first socket has it."""

    __slots__ = ("_flow", "_is_first", "_started", "_telemetry", "seq")

    def __init__(self, flow: Flow, telemetry: Telemetry) -> None:
        self._flow = flow
        self._telemetry = telemetry
        self.seq = 0
        """The event that is timed; 0 when none is."""
        self._started = 0.0
        self._is_first = False

    def begin(self, seq: int, received_at: float, *, is_first: bool) -> None:
        """Time the event ``seq``, which was read at ``received_at`` (Trio's clock)."""
        self.seq = seq
        self._started = received_at
        self._is_first = is_first

    def end(self) -> None:
        """The timed event is in the kernel's hands."""
        self.seq = 0
        took = trio.current_time() - self._started
        metric = "gateway_first_event_added_seconds" if self._is_first else "gateway_event_added_seconds"
        self._telemetry.observe(metric, took)
        self._flow.note_added(took)
