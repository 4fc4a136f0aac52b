"""What passes through this process, as plain integers: what the hot path counts, and when it takes a sample.

A labelled counter costs 0.6 µs, a tenth of the engine's share of a token; an addition to an attribute costs a
twentieth of that. Whoever publishes the numbers takes them from here once a second.
"""

from __future__ import annotations

from typing import Final

EVENTS_PER_SAMPLE: Final = 64
"""One event in so many is timed on its way through, and the first of every turn."""
MAX_TIMED: Final = 1000
"""Timings kept until they are taken: more than a second brings."""


class Flow:
    """Totals since the process began; they only rise."""

    __slots__ = (
        "_added",
        "acks_received",
        "bytes_received",
        "bytes_sent",
        "events",
        "frames_received",
        "frames_sent",
        "replayed_events",
        "tokens",
        "until_sample",
    )

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens of the Agent Runtime put into logs; many sockets may see each."""
        self.events = 0
        """Events of the Agent Runtime put into logs, tokens among them."""
        self.frames_sent = 0
        """Data frames given to sockets."""
        self.bytes_sent = 0
        """Their payload: before compression, without frame heads."""
        self.frames_received = 0
        """Data frames from sockets."""
        self.bytes_received = 0
        """Their payload, after decompression."""
        self.acks_received = 0
        """v2 acknowledgements among what was received."""
        self.replayed_events = 0
        """Events sent to sockets that came back for them."""
        self.until_sample = EVENTS_PER_SAMPLE
        """Events until the next one is timed."""
        self._added: list[float] = []

    def takes_sample(self, events: int) -> bool:
        """Count ``events`` against the sampling; whether the last of them is to be timed."""
        self.until_sample -= events
        if self.until_sample > 0:
            return False
        self.until_sample = EVENTS_PER_SAMPLE
        return True

    def note_received(self, frame: str | bytes) -> None:
        """A data frame came from a socket."""
        self.frames_received += 1
        if isinstance(frame, bytes) or frame.isascii():
            self.bytes_received += len(frame)
        else:
            self.bytes_received += len(frame.encode("utf-8", "surrogatepass"))

    def note_added(self, seconds: float) -> None:
        """A timed event took so long."""
        if len(self._added) < MAX_TIMED:
            self._added.append(seconds)

    def take_added(self) -> tuple[float, ...]:
        """What was noted since the last call, in seconds."""
        added, self._added = tuple(self._added), []
        return added

    def totals(self) -> dict[str, int]:
        """The totals by name."""
        return {name: getattr(self, name) for name in TOTALS}


TOTALS: Final = tuple(name for name in Flow.__slots__ if name not in ("_added", "until_sample"))
"""The names of the totals."""
