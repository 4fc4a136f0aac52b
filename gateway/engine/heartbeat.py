"""Whether a socket's peer is still there: ping, wait for the pong, measure.

A heartbeat is a task of its connection's nursery that runs while a pong is awaited. Between two pings there
is none: one task for all sockets starts them when they are due. A task that only sleeps is 3 KB that every
idle socket would hold, and a timer that runs out costs more than the ping.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from gateway.core.limits import Limits
from gateway.core.websocket_protocol import CloseCode
from gateway.ports import ClientConnection, ConnectionClosed, Telemetry

TOGETHER = 0.05
"""Seconds that a ping may come before its time: at 500 a second, 25 are sent in one pass."""


class Pinged(Protocol):
    """A socket as its heartbeat sees it."""

    alive_at: float
    rtt: float | None

    def end(self, code: int, reason: str) -> None:
        """Close the socket soon."""
        ...


class Heartbeats:
    """The heartbeats of all sockets that this process holds."""

    def __init__(self, limits: Limits, telemetry: Telemetry) -> None:
        self.limits = limits
        self.telemetry = telemetry
        self._waiting: deque[Heartbeat] = deque()
        """Sorted, because all wait equally long: who comes last is due last."""
        self._wakeup = trio.lowlevel.ParkingLot()

    def add(self, heartbeat: Heartbeat) -> None:
        """Have ``heartbeat`` beat after the interval."""
        heartbeat.due = trio.current_time() + self.limits.heartbeat_interval
        self._waiting.append(heartbeat)
        if len(self._waiting) == 1:
            self._wakeup.unpark()

    async def run(self) -> None:
        """Start the heartbeats that are due, until cancelled."""
        while True:
            while not self._waiting:
                await self._wakeup.park()
            await trio.sleep_until(self._waiting[0].due)
            soon = trio.current_time() + TOGETHER
            while self._waiting and self._waiting[0].due <= soon:
                self._waiting.popleft().start()


class Heartbeat:
    """One socket's; ``begin_task`` starts ``beat`` in the connection's nursery."""

    __slots__ = ("_begin_task", "_connection", "_heartbeats", "_socket", "due")

    def __init__(
        self,
        heartbeats: Heartbeats,
        connection: ClientConnection,
        socket: Pinged,
        begin_task: Callable[[Callable[[], Awaitable[None]]], object],
    ) -> None:
        self._heartbeats = heartbeats
        self._connection: ClientConnection | None = connection
        self._socket: Pinged | None = socket
        self._begin_task: Callable[[Callable[[], Awaitable[None]]], object] | None = begin_task
        self.due = 0.0
        if connection.sends_pings:
            heartbeats.add(self)

    def start(self) -> None:
        """It is time."""
        if self._begin_task is not None:
            self._begin_task(self._beat)

    def finish(self) -> None:
        """The connection's nursery is about to close: from now on nothing can be started in it."""
        # Until it would have been due it stays in the row, and a socket must not stay with it.
        self._begin_task = self._connection = self._socket = None

    async def _beat(self) -> None:
        """Ping; a peer silent for ``pong_timeout`` after that is gone (4408)."""
        connection, socket, sent = self._connection, self._socket, trio.current_time()
        if connection is None or socket is None:
            return  # It ended in the very pass in which this was to begin.
        try:
            with trio.move_on_after(self._heartbeats.limits.pong_timeout) as deadline:
                await connection.ping()
        except ConnectionClosed:
            return  # The reader learns it too, and says how it ended.
        if deadline.cancelled_caught:
            socket.end(CloseCode.NO_PONG, "no pong in time")
            return
        socket.alive_at = sent
        socket.rtt = trio.current_time() - sent
        self._heartbeats.telemetry.observe("gateway_heartbeat_rtt_seconds", socket.rtt)
        self._heartbeats.add(self)
