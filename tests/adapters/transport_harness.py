"""What the tests of the transport share: a POST through httpx, and what becomes of its body."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import trio
import trio.testing

from gateway.adapters.streaming_transport import RECEIVE_BODY, StreamingTransport
from tests.adapters.agent_harness import (
    END,
    HEAD,
    chunk,
)

WHOLE = HEAD + chunk(b"abc") + END
TIMEOUT = httpx.Timeout(connect=3, read=10, write=7, pool=None)


class Kept(httpx.AsyncBaseTransport):
    """Stands between a transport and a client, which would close it with itself."""

    def __init__(self, transport: StreamingTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Hand on."""
        return await self._transport.handle_async_request(request)


@asynccontextmanager
async def post(
    transport: StreamingTransport, url: str = "http://agent:80/x", timeout: httpx.Timeout = TIMEOUT
) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
    """POST through httpx; give the function that receives the body."""
    async with (
        httpx.AsyncClient(transport=Kept(transport), timeout=timeout) as client,
        client.stream("POST", url, content=b'{"a":1}', headers={"X-A": "b"}) as response,
    ):
        yield response.extensions[RECEIVE_BODY]


async def read_all(receive: Callable[[], Awaitable[bytes]]) -> bytes:
    """The rest of a body."""
    data = b""
    while more := await receive():
        data += more
    return data


async def answer_whole(stream: trio.abc.Stream, _request: bytes) -> None:
    """Answer at once and completely."""
    await stream.send_all(WHOLE)
