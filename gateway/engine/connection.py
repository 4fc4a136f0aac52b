"""One socket on one session: reader, flusher, heartbeat and expiry, siblings in one nursery.

    connection nursery
    ├── client reader      socket → session
    ├── buffer flusher     log → socket, while the socket does not take all it is given
    ├── heartbeat          ping, wait for the pong, measure; every HEARTBEAT_INTERVAL
    └── identity watch     asks for a new token, closes at expiry

Resource handling: the nursery ends when the reader or the flusher does: the peer is gone, or the socket
is to be closed. The caller closes it, under a deadline.

Error handling: ``ConnectionClosed`` ends the socket quietly; any other exception is a bug and goes up, to
the hub's bulkhead.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from gateway.engine.client_reader import ClientReader
from gateway.engine.heartbeat import Heartbeat, Heartbeats
from gateway.engine.identity_watch import IdentityWatch
from gateway.engine.multiplexed import MultiplexedReader
from gateway.engine.session_socket import SessionSocket
from gateway.engine.shared_socket import SharedSocket
from gateway.ports import ClientConnection, ConnectionClosed


async def run_connection(
    connection: ClientConnection,
    socket: SessionSocket | SharedSocket,
    reader: ClientReader | MultiplexedReader,
    identity: IdentityWatch,
    heartbeats: Heartbeats,
) -> tuple[int, str]:
    """Run a socket's tasks until it is over; returns the code and reason to close it with."""
    ending: list[tuple[int, str]] = []
    async with trio.open_nursery() as nursery:

        async def until_over(task: Callable[[], Awaitable[tuple[int, str] | None]]) -> None:
            try:
                code_and_reason = await task()
                if code_and_reason is None:
                    return  # a flusher that is not needed any more
                ending.append(code_and_reason)
            except ConnectionClosed as closed:
                ending.append((closed.code, closed.reason))
            nursery.cancel_scope.cancel()

        socket.begin(partial(nursery.start_soon, until_over, socket.flush))
        heartbeat = Heartbeat(heartbeats, connection, socket, nursery.start_soon)
        if identity.identity.expires_at is not None:
            nursery.start_soon(identity.run)
        try:
            await until_over(reader.run)
        finally:
            socket.finish()
            heartbeat.finish()
    return ending[0]
