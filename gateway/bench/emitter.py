"""An Agent Runtime that only emits: the load behind a measured gateway, in a process of its own.

    python -m gateway.bench.emitter

Prints ``Listening on http://127.0.0.1:PORT``. Every POST gets one event stream, as the message's content asks
for it (``plan``). Each token is one chunk and carries ``t``, this machine's monotonic clock in nanoseconds,
so that a receiver on the same machine can tell how long the token was on its way.

asyncio's protocols and no more: a token costs less here than in what is measured.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from typing import NamedTuple

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)
_DONE = b'event: done\ndata: {"status":"completed"}\n\n'
_END = b"%x\r\n%b\r\n0\r\n\r\n" % (len(_DONE), _DONE)
_WRITE_BYTES = 64 << 10
"""Unpaced, so much is written at a time: more only waits in buffers and makes ``t`` old."""
_PLAN = re.compile(rb"bench tokens=(\d+) pace=([\d.]+) wait=([\d.]+) size=(\d+)")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Plan(NamedTuple):
    """What one message asks for."""

    tokens: int
    pace: float = 0.0
    """Seconds from token to token; 0: as fast as they are taken."""
    wait: float = 0.0
    """Seconds between the first token and the others."""
    size: int = 0
    """Bytes that are added to each token."""

    def __str__(self) -> str:
        return f"bench tokens={self.tokens} pace={self.pace} wait={self.wait} size={self.size}"


def parse_plan(body: bytes) -> Plan:
    """The plan in a POST's body, whatever is around it; three tokens when there is none."""
    found = _PLAN.search(body)
    return Plan(int(found[1]), float(found[2]), float(found[3]), int(found[4])) if found else Plan(3)


def token_chunk(index: int, count: int, stamp: int, padding: bytes = b"") -> bytes:
    """One token as a chunk, ``padding`` in its text.

    Written the way Python's ``json.dumps`` does, as many runtimes send it.
    """
    data = (
        b'event: message\ndata: {"type": "assistant_message", "content": null, "token": "tok%d %b", '
        b'"is_final": %b, "t": %d}\n\n' % (index, padding, b"true" if index == count - 1 else b"false", stamp)
    )
    return b"%x\r\n%b\r\n" % (len(data), data)


class EmitterConnection(asyncio.Protocol):
    """One connection of the gateway's: a POST after the other."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._received = b""
        self._plan = Plan(0)
        self._padding = b""
        self._next = 0
        self._timer: asyncio.TimerHandle | None = None
        self._is_paused = False
        self._is_streaming = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, _error: Exception | None) -> None:
        """Called by asyncio."""
        self._is_streaming = False
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self._received += data
        if not self._is_streaming:
            self._take_request()

    def pause_writing(self) -> None:
        """Called by asyncio."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """Called by asyncio."""
        self._is_paused = False
        if self._is_streaming and not self._plan.pace and self._timer is None:
            self._burst()

    def _take_request(self) -> None:
        head, end, rest = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        length = _LENGTH.search(head)
        size = int(length[1]) if length else 0
        if len(rest) < size:
            return
        self._plan, self._received = parse_plan(rest[:size]), rest[size:]
        self._is_streaming = True
        self._next = 1
        self._padding = b"x" * self._plan.size
        self._transport.write(HEAD + (self._token(0) if self._plan.tokens else b""))
        if self._plan.wait:
            self._timer = self._loop.call_later(self._plan.wait, self._go_on)
        else:
            self._go_on()

    def _go_on(self) -> None:
        self._timer = None
        if self._plan.pace:
            self._timer = self._loop.call_later(self._plan.pace, self._tick)
        else:
            self._burst()

    def _tick(self) -> None:
        if self._next >= self._plan.tokens:
            self._finish()
            return
        self._transport.write(self._token(self._next))
        self._next += 1
        self._timer = self._loop.call_later(self._plan.pace, self._tick)

    def _burst(self) -> None:
        self._timer = None
        chunks: list[bytes] = []
        size, tokens = 0, self._plan.tokens
        while self._next < tokens and size < _WRITE_BYTES:
            chunk = self._token(self._next)
            chunks.append(chunk)
            size += len(chunk)
            self._next += 1
        self._transport.write(b"".join(chunks))
        if self._next >= tokens:
            self._finish()
        elif not self._is_paused:
            # The other streams' turn; when the peer is slow, resume_writing goes on.
            self._timer = self._loop.call_later(0, self._burst)

    def _token(self, index: int) -> bytes:
        return token_chunk(index, self._plan.tokens, time.monotonic_ns(), self._padding)

    def _finish(self) -> None:
        self._is_streaming = False
        self._timer = None
        self._transport.write(_END)
        if self._received:
            self._take_request()


async def serve(port: int) -> None:
    """Serve on loopback until cancelled; says where on standard output."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(EmitterConnection, "127.0.0.1", port, backlog=4096)
    host, bound = server.sockets[0].getsockname()
    sys.stdout.write(f"Listening on http://{host}:{bound}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
