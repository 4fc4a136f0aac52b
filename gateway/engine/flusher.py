"""A task that waits for a socket only while there is something to wait for: most sockets take all at once.

Whoever owns the socket gives its nursery by ``begin``; a socket that is to be closed needs the task as well.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from gateway.core.websocket_protocol import CloseCode
from gateway.ports import ClientConnection

Ending = tuple[int, str]
"""Code and reason to close a socket with."""


class Flusher:
    """``is_blocked``: whether the socket does not take all it is given.

    ``wait_taken`` waits until it does, and sends what was kept meanwhile; what it returns is an ending.
    """

    __slots__ = ("_is_blocked", "_is_running", "_start", "_wait_taken", "_waiting", "closing")

    def __init__(
        self, is_blocked: Callable[[], bool], wait_taken: Callable[[], Awaitable[Ending | None]]
    ) -> None:
        self._is_blocked = is_blocked
        self._wait_taken = wait_taken
        self._start: Callable[[], None] | None = None
        self._is_running = False
        self._waiting: trio.CancelScope
        """Around ``run``, so that ``end`` does not wait behind a dead peer."""
        self.closing: Ending | None = None
        """What the socket is to be closed with; the first call of ``end`` decides."""

    def begin(self, start: Callable[[], None]) -> None:
        """From now on ``start`` has ``run`` started when it is needed.

        A socket that takes what it is given has none: a task that only waits costs 3 KB a socket.
        """
        self._start = start
        if self._is_blocked() or self.closing is not None:
            self.need()

    def finish(self) -> None:
        """From now on nothing can be started, and what waits has waited long enough."""
        self._start = None
        # They lead back to the socket, which would keep its session's events until the next full collection.
        self._is_blocked, self._wait_taken = _takes_all, _take_none
        if self._is_running:  # A multiplexed socket's nursery goes on, and would hold it.
            self._waiting.cancel()

    def need(self) -> None:
        """The socket took not all."""
        if not self._is_running and self._start is not None:
            self._is_running = True
            self._waiting = trio.CancelScope()
            self._start()

    def end(self, code: int, reason: str) -> None:
        """Close the socket soon."""
        if self.closing is None:
            self.closing = (code, reason)
            if self._is_running:
                self._waiting.cancel()
            else:
                self.need()

    async def run(self) -> Ending | None:
        """Wait until the socket takes more; returns what to close it with, if it is to be closed.

        Raises ``ConnectionClosed``.
        """
        with self._waiting:
            while self.closing is None:
                if not self._is_blocked():
                    self._is_running = False
                    return None
                ending = await self._wait_taken()
                if ending is not None:
                    return ending
        return self.closing


async def wait_sent_in_time(connection: ClientConnection, send_timeout: float) -> Ending | None:
    """Wait until everything is in the kernel's hands; an ending when nothing moved for so many seconds.

    Raises ``ConnectionClosed``.
    """
    while True:
        unsent = connection.unsent
        with trio.move_on_after(send_timeout) as patience:
            await connection.wait_sent()
        if not patience.cancelled_caught:
            return None
        if connection.unsent >= unsent:
            return CloseCode.TOO_SLOW, "too slow: nothing was taken in time; resume when ready"


def _takes_all() -> bool:
    return False


async def _take_none() -> None:
    await trio.lowlevel.checkpoint()
