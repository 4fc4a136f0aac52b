"""What the tests of the upstream adapters share: a runtime behind memory streams or on loopback."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import trio
import trio.testing

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"

Handler = Callable[[trio.abc.Stream, bytes], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    """``data`` as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def open_files() -> int:
    """How many file descriptors this process holds."""
    return len(os.listdir("/proc/self/fd"))


async def read_request(stream: trio.abc.ReceiveStream) -> bytes:
    """One whole request, head and body; empty when the peer closed instead."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = await stream.receive_some()
        if not data:
            return b""
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(
        (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
    )
    while len(body) < length:
        data = await stream.receive_some()
        if not data:
            return b""
        body += data
    return head + b"\r\n\r\n" + body


class MemoryAgent:
    """A runtime reached over memory streams: pass ``connect`` to the transport.

    ``handler`` is called for every request with the server's end; when it returns the next request is
    read from the same connection.
    """

    def __init__(self, nursery: trio.Nursery, handler: Handler) -> None:
        self._nursery = nursery
        self._handler = handler
        self.connects: list[tuple[str, int]] = []
        self.requests: list[bytes] = []
        self.closed = 0
        """Connections whose client went away."""

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        """A new connection, already made."""
        client, server = trio.testing.memory_stream_pair()
        self.connects.append((host, port))
        self._nursery.start_soon(self._serve, server)
        return client

    async def _serve(self, stream: trio.abc.Stream) -> None:
        async with stream:
            try:
                while request := await read_request(stream):
                    self.requests.append(request)
                    await self._handler(stream, request)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            self.closed += 1


@asynccontextmanager
async def memory_agent(handler: Handler) -> AsyncIterator[MemoryAgent]:
    """A ``MemoryAgent`` that lives as long as the block."""
    async with trio.open_nursery() as nursery:
        yield MemoryAgent(nursery, handler)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def loopback_agent(handle: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
    """Serve ``handle`` for every connection on a loopback port, which is given."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await handle(stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()
