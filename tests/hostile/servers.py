"""A small HTTP server on loopback whose answers a test writes byte by byte."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import trio
from attrs import frozen


@frozen
class Request:
    """One request as it came."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        """The first value of the field ``name`` (lower case), or None."""
        return next((value for key, value in self.headers if key == name), None)


Handler = Callable[[Request, trio.SocketStream], Awaitable[None]]
"""Writes the whole answer; the connection is closed after it."""


def answer(
    body: bytes, *, status: str = "200 OK", content_type: str = "application/json", headers: str = ""
) -> bytes:
    """A whole answer; ``headers`` are further lines that end in CRLF."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{headers}"
    return f"{head}Connection: close\r\n\r\n".encode("latin-1") + body


async def _read_request(stream: trio.SocketStream) -> Request | None:
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = await stream.receive_some(65_536)
        if not chunk:
            return None
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = tuple(
        (name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)
    )
    length = next((int(value) for name, value in headers if name == "content-length"), 0)
    while len(body) < length:
        chunk = await stream.receive_some(65_536)
        if not chunk:
            return None
        body += chunk
    return Request(method, target, headers, body)


async def _serve_one(handler: Handler, stream: trio.SocketStream) -> None:
    async with stream:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            request = await _read_request(stream)
            if request is not None:
                await handler(request, stream)


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """A server, by its URL; gone at the end."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=1024)
        nursery.start_soon(partial(trio.serve_listeners, partial(_serve_one, handler), listeners))
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()
