"""When to acknowledge: cumulatively, after 100 events, 256 KiB or 1 s, whichever comes first. Pure."""

from __future__ import annotations

ACK_EVENTS = 100
ACK_SECONDS = 1.0
ACK_BYTES = 256 << 10
"""Half of what a gateway keeps unacknowledged by default, so that it never has to wait for us."""


class Acknowledgements:
    """What the application has taken of one epoch, and what the gateway was told of it."""

    __slots__ = ("_acked", "_bytes", "_due", "_taken")

    def __init__(self) -> None:
        self._taken = self._acked = 0
        self._bytes = 0
        self._due: float | None = None

    def start(self, seq: int) -> None:
        """Another epoch, or the place where this client came in: nothing up to ``seq`` is owed an ack."""
        self._taken = self._acked = seq
        self._bytes = 0
        self._due = None

    def taken(self, seq: int, size: int, now: float) -> None:
        """The application took the event ``seq``."""
        if seq <= self._taken:
            return
        self._taken = seq
        self._bytes += size
        if seq - self._acked >= ACK_EVENTS or self._bytes >= ACK_BYTES:
            self._due = now
        elif self._due is None:
            self._due = now + ACK_SECONDS

    @property
    def due(self) -> float | None:
        """When the next acknowledgement has to go out; None when none is owed."""
        return self._due

    def take(self, now: float, *, early: bool = False) -> int | None:
        """The seq to acknowledge if that is due (or owed at all, with ``early``), else None."""
        if self._due is None or (now < self._due and not early):
            return None
        self._due = None
        self._bytes = 0
        self._acked = self._taken
        return self._acked
