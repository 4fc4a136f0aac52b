"""Whether a socket's peer is still there: ping, wait for the pong, measure."""

from __future__ import annotations

from typing import Protocol

import trio

from gateway.core.limits import Limits
from gateway.core.websocket_protocol import CloseCode
from gateway.ports import ClientConnection, ConnectionClosed, Telemetry


class Pinged(Protocol):
    """A socket as its heartbeat sees it."""

    alive_at: float
    rtt: float | None

    def end(self, code: int, reason: str) -> None:
        """Close the socket soon."""
        ...


async def heartbeat(
    connection: ClientConnection, socket: Pinged, limits: Limits, telemetry: Telemetry
) -> None:
    """Ping every ``heartbeat_interval``; a peer silent for ``pong_timeout`` after that is gone (4408)."""
    try:
        while True:
            # Not ``trio.sleep``: its three frames and a generator are 1 KB that every idle socket would hold.
            with trio.CancelScope(deadline=trio.current_time() + limits.heartbeat_interval):
                await trio.sleep_forever()
            sent = trio.current_time()
            with trio.move_on_after(limits.pong_timeout) as deadline:
                await connection.ping()
            if deadline.cancelled_caught:
                socket.end(CloseCode.NO_PONG, "no pong in time")
                return
            socket.alive_at = sent
            socket.rtt = trio.current_time() - sent
            telemetry.observe("gateway_heartbeat_rtt_seconds", socket.rtt)
    except ConnectionClosed:
        return  # The reader learns it too, and says how it ended.
