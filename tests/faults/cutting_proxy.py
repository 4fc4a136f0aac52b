"""A TCP proxy that cuts connections at random byte offsets, in every way that a connection can be cut."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

import trio

CUT_KINDS = ("reset", "close", "client_first", "server_first", "stall")
"""Reset or closed at both ends at once; one end learns of it before the other; or silence comes first."""


class CuttingProxy:
    """Forwards connections to one of ``target_ports`` on loopback, to any that listens.

    ``mean_bytes``: how many bytes a connection carries on average, both ways together, before it is cut;
    None: as many as it likes.
    """

    def __init__(
        self, target_ports: Sequence[int], randomness: random.Random, mean_bytes: float | None
    ) -> None:
        self._target_ports = target_ports
        self._random = randomness
        self.mean_bytes = mean_bytes
        self.cuts = 0
        self.connections = 0
        self.port = 0
        self._open: set[_Link] = set()

    async def serve(
        self, *, task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Forward until cancelled."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = int(listeners[0].socket.getsockname()[1])
        await trio.serve_listeners(self._forward, listeners, task_status=task_status)

    def cut_all(self) -> None:
        """Reset everything at once, as if the server behind had been killed."""
        for link in list(self._open):
            if not link.cut_at_once:
                self.cuts += 1
                link.cut_at_once = True
                link.scope.cancel()

    async def _connect(self) -> trio.SocketStream | None:
        for port in self._random.sample(self._target_ports, len(self._target_ports)):
            with suppress(OSError):
                return await trio.open_tcp_stream("127.0.0.1", port)
        return None

    async def _forward(self, client: trio.SocketStream) -> None:
        self.connections += 1
        server = await self._connect()
        if server is None:
            _reset(client)
            return
        link = _Link()
        if self.mean_bytes is not None:
            # Half of them early: handshakes, heads and first frames are where states change.
            mean = self.mean_bytes / (8 if self._random.random() < 0.5 else 0.5)
            link.budget = 1 + int(self._random.expovariate(1 / mean))
        self._open.add(link)
        try:
            with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                with link.scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(_pump, client, server, link)
                        nursery.start_soon(_pump, server, client, link)
                if link.is_spent and not link.cut_at_once:
                    self.cuts += 1
                    await self._cut(client, server)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # One end is gone by itself: so is the other, below.
        finally:
            self._open.discard(link)
            for stream in (client, server):
                if link.is_spent or link.cut_at_once:
                    _reset(stream)
                else:
                    stream.socket.close()

    async def _cut(self, client: trio.SocketStream, server: trio.SocketStream) -> None:
        kind = self._random.choice(CUT_KINDS)
        pause = self._random.uniform(0.0, 0.25)
        if kind == "reset":
            return
        if kind == "stall":
            await trio.sleep(pause)
            return
        first, second = (server, client) if kind == "server_first" else (client, server)
        first.socket.close()
        if kind == "close":
            second.socket.close()
        else:
            await trio.sleep(pause)


class _Link:
    """How much a connection may still carry."""

    def __init__(self) -> None:
        self.budget: int | None = None
        self.scope = trio.CancelScope()
        self.is_spent = False
        self.cut_at_once = False


async def _pump(source: trio.SocketStream, sink: trio.SocketStream, link: _Link) -> None:
    while data := await source.receive_some(65536):
        if link.budget is not None:
            if len(data) >= link.budget:
                with suppress(trio.BrokenResourceError):
                    await sink.send_all(data[: link.budget])
                link.is_spent = True
                link.scope.cancel()
                return
            link.budget -= len(data)
        await sink.send_all(data)
    link.scope.cancel()


def _reset(stream: trio.SocketStream) -> None:
    with suppress(OSError):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()
