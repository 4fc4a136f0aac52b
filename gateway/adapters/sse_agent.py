"""The Agent Runtime over HTTP: one POST per turn, answered by a Server-Sent Events stream."""

from __future__ import annotations

import http.cookiejar
import ipaddress
import random
import ssl
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final

import httpx
import trio

from gateway.core.agent_request import event_id_value, header_value, loggable, post_body
from gateway.core.errors import (
    AgentFailure,
    AgentProtocolError,
    AgentRefused,
    AgentStreamInterrupted,
    AgentTimeout,
    AgentUnavailable,
)
from gateway.core.sse import ServerSentEvent, SseParser
from gateway.ports import Telemetry, TurnRequest

Send = Callable[[httpx.Request], Awaitable[httpx.Response]]
"""Sends a request; returns when the response's head has come. Raises ``httpx.HTTPError``."""

Receive = Callable[[], Awaitable[bytes]]
ReceiveEach = Callable[[Callable[[bytes], bool]], Awaitable[None]]

RETRY_DELAYS: Final = (0.5, 1.0)
"""Most seconds to wait before the second and the third try to connect; each wait is a random part of it.

A runtime that restarts is back within a second or two; who waits for it longer than that should be told.
"""

_EXCERPT_BYTES = 2048
_EXCERPT_SECONDS = 0.5
_STREAM_PATH = "/agent/message/stream"


@asynccontextmanager
async def agent_client(
    agent_url: str,
    transport: httpx.AsyncBaseTransport,
    *,
    verify: ssl.SSLContext | bool = True,
) -> AsyncIterator[Send]:
    """The process's one way to send requests to ``agent_url``; connections are closed in the end.

    ``transport`` carries plain HTTP to it, straight: httpx's client would spend 0.15 ms a request on cookies,
    redirects and credentials that there are not. TLS, and HTTP where ``HTTP_PROXY`` and ``NO_PROXY`` ask for
    a proxy (never to this machine, which a proxy would take for its own), go httpx's own way, without a bound
    on connections: a request cancelled at the wrong moment leaks a place in httpcore's pool (1.0.9), and a
    pool without places has none to lose. How many turns run at once is bounded in the engine.
    """
    url = httpx.URL(agent_url)
    is_local = _is_loopback(url.host)
    is_proxied = not is_local and bool({"http", "all"} & urllib.request.getproxies().keys())
    if url.scheme == "http" and (not is_proxied or bool(urllib.request.proxy_bypass(url.host))):
        async with transport:
            yield transport.handle_async_request
        return
    # Cookies of the runtime are nobody's: none is sent (``send`` merges nothing), and a jar would only fill.
    no_cookies = http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=()))
    async with httpx.AsyncClient(
        verify=verify,
        mounts={f"https://{url.netloc.decode('ascii')}": None} if is_local else None,
        cookies=no_cookies,
        follow_redirects=False,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=30.0),
    ) as client:
        yield partial(client.send, stream=True)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class SseAgentRuntime:
    """The ``AgentRuntime`` port (protocol.md section 3).

    ``send`` is ``agent_client``'s. ``connect_timeout`` and ``stream_timeout`` are in seconds; the latter is
    the longest silence, before the answer's head and in the stream. ``draw`` gives the random part of the
    waits between tries to connect, from 0 to 1.
    """

    def __init__(
        self,
        *,
        send: Send,
        agent_url: str,
        internal_key: str,
        connect_timeout: float,
        stream_timeout: float,
        max_event_bytes: int,
        telemetry: Telemetry,
        draw: Callable[[], float] = random.random,
    ) -> None:
        if header_value(internal_key) != internal_key.encode():
            raise ValueError("The internal API key must be visible ASCII without '%' to go into a header")
        self._send = send
        self._url = httpx.URL(agent_url.rstrip("/") + _STREAM_PATH)
        self._internal_key = internal_key
        timeout = httpx.Timeout(
            connect=connect_timeout, read=stream_timeout, write=stream_timeout, pool=connect_timeout
        )
        self._extensions = {"timeout": timeout.as_dict()}
        self._max_event_bytes = max_event_bytes
        self._telemetry = telemetry
        self._draw = draw

    @asynccontextmanager
    async def open_stream(self, request: TurnRequest) -> AsyncIterator[SseAgentStream]:
        """See ``ports.AgentRuntime.open_stream``."""
        response = await self._post(request)
        # StreamingTransport's way around httpx's generators: 2 µs less per read.
        receive: Receive | None = response.extensions.get("receive_body")
        chunks = None
        if receive is None:
            chunks = _Chunks(response)
            receive = chunks.receive
        try:
            await self._accept(response, receive, request)
            yield SseAgentStream(response, receive, self._max_event_bytes)
        finally:
            if chunks is not None:
                await chunks.finish()
            await response.aclose()

    async def _post(self, request: TurnRequest) -> httpx.Response:
        post = httpx.Request(
            "POST",
            self._url,
            content=post_body(request.session_id, request.message),
            headers=self._headers(request),
            extensions=self._extensions,
        )
        delays = iter(RETRY_DELAYS)
        while True:
            try:
                return await self._send(post)
            except httpx.ConnectTimeout as error:
                raise _unavailable() from error
            except (httpx.ConnectError, httpx.ProxyError) as error:
                limit = next(delays, None)
                if limit is None:
                    raise _unavailable() from error
                delay = limit * self._draw()
                self._telemetry.info(
                    "agent_connect_retried",
                    turn_id=request.turn_id,
                    delay_s=round(delay, 3),
                    reason=type(error.__cause__ or error).__name__,
                )
            except httpx.HTTPError as error:
                raise _failure(error, before_head=True) from error
            await trio.sleep(delay)

    def _headers(self, request: TurnRequest) -> list[tuple[bytes, bytes]]:
        headers = [
            (b"User-Agent", b"codelab-gateway"),
            (b"X-Internal-Auth", self._internal_key.encode()),
            (b"Accept", b"text/event-stream"),
            (b"Accept-Encoding", b"identity"),
            (b"Cache-Control", b"no-store"),
            (b"Content-Type", b"application/json"),
            (b"X-Request-ID", header_value(request.request_id)),
            (b"X-User-ID", header_value(request.subject)),
            (b"Idempotency-Key", header_value(request.turn_id)),
        ]
        if request.last_event_id:
            headers.append((b"Last-Event-ID", event_id_value(request.last_event_id)))
        if request.trace is not None:
            headers.append((b"traceparent", request.trace.traceparent.encode()))
            if request.trace.tracestate:
                headers.append((b"tracestate", request.trace.tracestate.encode()))
        return headers

    async def _accept(self, response: httpx.Response, receive: Receive, request: TurnRequest) -> None:
        status = response.status_code
        if status >= 400:
            self._telemetry.warning(
                "agent_refused",
                turn_id=request.turn_id,
                status=status,
                answer=loggable(await _excerpt(receive), request.message),
            )
            raise AgentRefused(status)
        if status != 200:
            raise AgentProtocolError(
                f"The Agent Runtime answered with HTTP status {status} where a stream was expected. "
                "Check AGENT_URL; redirects are not followed."
            )
        media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "text/event-stream":
            raise AgentProtocolError(
                "The Agent Runtime's answer is not an event stream (its Content-Type is not "
                "text/event-stream). Check AGENT_URL."
            )
        if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise AgentProtocolError(
                "The Agent Runtime's stream is compressed, which this gateway did not ask for. "
                "Switch compression off for event streams, in the runtime or in a proxy before it."
            )


class SseAgentStream:
    """The ``AgentStream`` port: the events of one answer."""

    def __init__(self, response: httpx.Response, receive: Receive, max_event_bytes: int) -> None:
        self._resumable: bool = response.headers.get("x-stream-resumable", "").strip() == "1"
        self._receive = receive
        self._receive_each: ReceiveEach | None = response.extensions.get("receive_each")
        self._parser = SseParser(max_event_bytes)

    @property
    def resumable(self) -> bool:
        """Whether the runtime said ``X-Stream-Resumable: 1``."""
        return self._resumable

    async def receive(self) -> Sequence[ServerSentEvent]:
        """See ``ports.AgentStream.receive``."""
        while True:
            if self._parser.overflowed:
                self._parser.feed(b"")
            try:
                data = await self._receive()
            except httpx.HTTPError as error:
                raise _failure(error, before_head=False) from error
            if not data:
                return ()
            events = self._parser.feed(data)
            if events:
                return events

    async def deliver(self, take: Callable[[Sequence[ServerSentEvent]], bool]) -> bool:
        """See ``ports.AgentStream.deliver``."""
        goes_on, parser = True, self._parser

        def take_body(data: bytes) -> bool:
            nonlocal goes_on
            events = parser.feed(data)
            if events:
                goes_on = take(events)
            return goes_on and not parser.overflowed

        while batch := await self.receive():
            if not take(batch):
                return False
            if self._receive_each is not None:
                try:
                    await self._receive_each(take_body)
                except httpx.HTTPError as error:
                    raise _failure(error, before_head=False) from error
                if not goes_on:
                    return False
        return True


class _Chunks:
    """A body read the way httpx offers it: for TLS, proxies, and transports that are not ours."""

    def __init__(self, response: httpx.Response) -> None:
        self._chunks = response.aiter_raw()

    async def receive(self) -> bytes:
        """The next bytes of the body; empty at its end."""
        return await anext(self._chunks, b"")

    async def finish(self) -> None:
        """End reading without waiting.

        httpx and httpcore nest four generators here, and closing the outermost leaves the others to the
        garbage collector. A cancelled read goes through all of them, and closes the connection too.
        """
        with trio.CancelScope(shield=True) as scope, suppress(httpx.HTTPError):
            scope.cancel()
            while await self.receive():
                pass


async def _excerpt(receive: Receive) -> bytes:
    """The first bytes of an error page, as far as they come in a moment."""
    excerpt = b""
    with trio.move_on_after(_EXCERPT_SECONDS), suppress(httpx.HTTPError):
        while len(excerpt) < _EXCERPT_BYTES and (data := await receive()):
            excerpt += data
    return excerpt[:_EXCERPT_BYTES]


def _unavailable() -> AgentUnavailable:
    return AgentUnavailable("The Agent Runtime cannot be reached. Try again in a moment.")


def _failure(error: httpx.HTTPError, *, before_head: bool) -> AgentFailure:
    if isinstance(error, httpx.TimeoutException):
        return AgentTimeout("The Agent Runtime has been silent for too long. Try again.")
    # httpcore calls a connection that closed without an answer a protocol error as well.
    is_not_http = isinstance(error, httpx.ProtocolError | httpx.UnsupportedProtocol) and (
        "disconnected" not in str(error)
    )
    if before_head and is_not_http:
        return AgentProtocolError("The Agent Runtime's answer is not HTTP. Check AGENT_URL.")
    if before_head:
        return AgentStreamInterrupted(
            "The Agent Runtime closed the connection without an answer; it may have seen the message or not."
        )
    return AgentStreamInterrupted("The Agent Runtime's answer was cut off before its end. Try again.")
