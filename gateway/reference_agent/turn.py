"""One running request: its events, numbered from 1, and those who listen to them."""

import trio

from gateway.reference_agent.events import COMPLETED, HEARTBEAT, encode_event, error, frame_event

CHUNK_BYTES = 65_536
"""Events that are ready are joined up to this size: one write instead of many, no event held back."""

JOIN_WITHIN = 10.0
"""Seconds within which somebody must listen: a connection may be gone before its answer begins."""


class Turn:
    """The events of one request while it is worked on, apart from the connection that asked for it.

    Resource handling: the work runs in ``scope``. When the last listener leaves, work without a key is
    stopped at once. Work with a key pauses at its next word (`wait_heard`), as nobody can tell a cut from a
    stop, and is stopped ``grace`` seconds later unless somebody comes back.
    """

    def __init__(
        self, session_id: str, *, key: str | None = None, digest: str = "", grace: float = 0.0
    ) -> None:
        self.session_id = session_id
        self.key = key
        self.digest = digest
        self.scope = trio.CancelScope(deadline=trio.current_time() + JOIN_WITHIN)
        self._grace = grace
        self._events: list[bytes] = []
        self._finished = False
        self._listeners = 0
        self._was_joined = False
        self._news = trio.lowlevel.ParkingLot()
        self._end = trio.Event()

    def __len__(self) -> int:
        """How many events there are."""
        return len(self._events)

    @property
    def finished(self) -> bool:
        """No event will be added."""
        return self._finished

    @property
    def abandoned(self) -> bool:
        """Somebody listened, and nobody does any more."""
        return self._was_joined and self._listeners == 0

    def add(self, *events: bytes) -> None:
        """Make events (their JSON) visible to all listeners."""
        self._events.extend(events)
        self._news.unpark_all()

    def fail(self, code: str, message: str, *, retryable: bool) -> None:
        """Make an error visible that concerns this request only and is not recorded."""
        self.add(encode_event(error(code, message, retryable=retryable)))

    def finish(self) -> None:
        """Make the end visible to all listeners."""
        self._finished = True
        self._end.set()
        self._news.unpark_all()

    def stop(self) -> None:
        """Cancel the work for good."""
        self.scope.cancel()

    async def wait_heard(self) -> None:
        """Return at once unless listeners have been there and left; then when one is back."""
        while self.abandoned:
            await self._news.park()

    async def wait_abandoned(self) -> None:
        """Return once nobody listens any more, or no event will be added."""
        while not (self._finished or self.abandoned):
            await self._news.park()

    async def wait_finished(self) -> None:
        """Return once no event will be added."""
        await self._end.wait()

    def join(self) -> None:
        """Count one more listener."""
        self._listeners += 1
        self._was_joined = True
        self._news.unpark_all()
        self.scope.deadline = float("inf")

    def leave(self) -> None:
        """Count one listener less; never blocks, so that it also runs while the listener is cancelled."""
        self._listeners -= 1
        self._news.unpark_all()
        if self._listeners or self._finished:
            return
        if self.key is None:
            self.stop()
        else:
            self.scope.deadline = trio.current_time() + self._grace

    async def next_chunk(self, after: int, heartbeat_interval: float) -> tuple[bytes, int]:
        """The SSE bytes of the events that follow number ``after``, and the number of the last of them.

        Waits for an event; a heartbeat comment comes instead after ``heartbeat_interval`` seconds of silence.
        Returns empty bytes at the end.
        """
        with trio.move_on_after(heartbeat_interval):
            while after >= len(self._events) and not self._finished:
                await self._news.park()
        parts: list[bytes] = []
        size = 0
        while after < len(self._events) and size < CHUNK_BYTES:
            after += 1
            parts.append(frame_event(after, self._events[after - 1]))
            size += len(parts[-1])
        if not parts and after == len(self._events) and self._finished:
            parts.append(frame_event(after + 1, COMPLETED, last=True))
            after += 1
        if not parts and not self._finished:
            parts.append(HEARTBEAT)
        return b"".join(parts), after
