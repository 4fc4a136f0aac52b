"""An httpx transport whose connections cannot be lost to cancelled requests."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable

import httpx
import trio

KEEP_ALIVE = 2.0
"""Seconds that an idle connection is used again. Below the 5 s after which common servers (uvicorn,
hypercorn, Node.js) close theirs, so that a request seldom meets a connection that is about to go."""


class LaneTransport(httpx.AsyncBaseTransport):
    """Gives every request in flight a connection pool of its own, and throws that away when anything fails.

    httpcore's pool keeps a request's place for good when the request is cancelled while it waits for a
    connection or opens one. A pool that serves one request at a time and is dropped after any exception has
    no place to lose. How many requests there are at once is for the caller to bound.
    """

    def __init__(self, new_lane: Callable[[], httpx.AsyncBaseTransport]) -> None:
        self._new_lane = new_lane
        self._idle: list[httpx.AsyncBaseTransport] = []
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See ``httpx.AsyncBaseTransport``."""
        lane = self._idle.pop() if self._idle else self._new_lane()
        try:
            response = await lane.handle_async_request(request)
        except BaseException:
            await _drop(lane)
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _LaneStream(response.stream, lane, self._give_back)
        return response

    async def aclose(self) -> None:
        """Close idle connections; those in use are closed when their responses are."""
        self._closed = True
        while self._idle:
            await _drop(self._idle.pop())

    def _give_back(self, lane: httpx.AsyncBaseTransport) -> bool:
        if not self._closed:
            self._idle.append(lane)
        return not self._closed


class _LaneStream(httpx.AsyncByteStream):
    """A response body that gives its lane back when it was read to the end, and else drops it."""

    def __init__(
        self,
        stream: httpx.AsyncByteStream,
        lane: httpx.AsyncBaseTransport,
        give_back: Callable[[httpx.AsyncBaseTransport], bool],
    ) -> None:
        self._stream = stream
        self._lane = lane
        self._give_back = give_back
        self._complete = False
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            yield chunk
        self._complete = True

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        reusable = False
        try:
            await self._stream.aclose()
            reusable = self._complete and self._give_back(self._lane)
        finally:
            if not reusable:
                await _drop(self._lane)


async def _drop(lane: httpx.AsyncBaseTransport) -> None:
    # Closing has to happen in a cancelled task too, and for TLS it talks to the peer: shielded, and bounded.
    with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
        await lane.aclose()


def agent_client(agent_url: str) -> httpx.AsyncClient:
    """The client of REST calls to the Agent Runtime; close it after use (it is a context manager).

    Proxies and credentials of this process's environment are not used, and redirects are not followed: the
    host is ``agent_url``'s and no other. How many calls there are at once is for the caller to bound.
    """
    context: ssl.SSLContext | bool = ssl.create_default_context() if agent_url.startswith("https:") else False

    def new_lane() -> httpx.AsyncBaseTransport:
        return httpx.AsyncHTTPTransport(
            verify=context,
            trust_env=False,
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=1, keepalive_expiry=KEEP_ALIVE
            ),
        )

    return httpx.AsyncClient(
        base_url=agent_url,
        transport=LaneTransport(new_lane),
        timeout=None,
        trust_env=False,
        follow_redirects=False,
    )
