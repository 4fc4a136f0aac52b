"""A session's numbered events: append at one end, trim at the other, read after a position."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from gateway.core.events import Event, EventKind

EVENT_OVERHEAD = 160
"""Bytes that CPython needs for an event beside its data, counted so that bounds mean real memory."""


class EventLog:
    """The events of one epoch that are still held: contiguous, ``first_seq`` … ``last_seq``."""

    __slots__ = ("_ends", "_events", "_skipped", "_total", "_trimmed", "first_seq", "last_seq")

    def __init__(self, *, last_seq: int = 0, events: Iterable[Event] = ()) -> None:
        self._events: list[Event] = []
        self._ends = array("Q")
        """Bytes ever appended as of the end of each entry, so that any span's size is one subtraction."""
        self._total = 0
        self._trimmed = 0
        self._skipped = 0
        """Trimmed entries still at the front of the lists: ``del list[:n]`` moves all, so it waits."""
        self.first_seq = last_seq + 1
        self.last_seq = last_seq
        for event in events:
            if not self._events:
                self.first_seq = event.seq
                self.last_seq = event.seq - 1
            self.append(event.kind, event.data)

    def __len__(self) -> int:
        return self.last_seq - self.first_seq + 1

    @property
    def held_bytes(self) -> int:
        """Memory that the held events need, in bytes."""
        return self._total - self._trimmed

    def append(self, kind: EventKind, data: bytes) -> int:
        """Add an event and return its seq."""
        seq = self.last_seq + 1
        self._events.append(Event(seq, kind, data))
        self._total += len(data) + EVENT_OVERHEAD
        self._ends.append(self._total)
        self.last_seq = seq
        return seq

    def holds_after(self, seq: int) -> bool:
        """Whether every event after ``seq`` is still held (also when there is none)."""
        return self.first_seq - 1 <= seq <= self.last_seq

    def between(self, after: int, upto: int) -> list[Event]:
        """The held events with ``after < seq <= upto``, in order."""
        base = self.first_seq - self._skipped
        start = max(after + 1, self.first_seq) - base
        return self._events[start : max(upto + 1 - base, start)]

    @property
    def newest(self) -> Event:
        """The event ``last_seq``; there must be one."""
        return self._events[-1]

    def bytes_after(self, seq: int) -> int:
        """How much memory the held events after ``seq`` need, in bytes."""
        if seq >= self.last_seq:
            return 0
        if seq < self.first_seq:
            return self.held_bytes
        return self._total - self._ends[seq - self.first_seq + self._skipped]

    def bytes_between(self, after: int, upto: int) -> int:
        """How much memory the events ``after < seq <= upto`` need, in bytes; ``upto <= last_seq``."""
        start = self.first_seq - 1
        base = start - self._skipped
        begin = self._ends[after - base - 1] if after > start else self._trimmed
        return self._ends[upto - base - 1] - begin if upto > start else 0

    def trim_to(self, seq: int) -> list[Event]:
        """Drop the events up to and including ``seq``; returns them."""
        seq = min(seq, self.last_seq)
        count = seq - self.first_seq + 1
        if count <= 0:
            return []
        dropped = self._events[self._skipped : self._skipped + count]
        self._trimmed = self._ends[self._skipped + count - 1]
        self._skipped += count
        self.first_seq = seq + 1
        if self._skipped * 2 >= len(self._events):
            del self._events[: self._skipped]
            del self._ends[: self._skipped]
            self._skipped = 0
        return dropped

    def overflow(self, max_events: int, max_bytes: int) -> int | None:
        """The seq to trim to so that the log keeps within its bounds with a tenth to spare, or None."""
        # Asked once per token, so no calls: 0.1 µs instead of 0.3.
        if self.last_seq - self.first_seq < max_events and self._total - self._trimmed <= max_bytes:
            return None
        seq = max(self.first_seq, self.last_seq - max_events * 9 // 10)
        while seq < self.last_seq and self.bytes_after(seq) > max_bytes * 9 // 10:
            seq += 1
        # The newest stays, however large: there may be nobody yet who has seen it.
        return min(seq, self.last_seq - 1)
