"""``GET /metrics`` on an address of its own (``METRICS_BIND``), for Prometheus alone.

Whoever can connect may read: no key is asked for, so that the key of services need not be given to what
scrapes. Nothing else is served there, and one request per connection, which is what a scrape every few
seconds needs; it keeps answering while the node drains.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio
from attrs import frozen

from gateway.core.errors import NotFound
from gateway.core.http_refusal import refusal_of
from gateway.core.request_head import RequestRefused, check_request_head, find_head_end
from gateway.ports import Telemetry

_METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MAX_HEAD: Final = 16 * 1024
"""Bytes of a request's head; scrapers send a few hundred."""


@frozen
class MetricsLimits:
    """What connections may take; times in seconds."""

    head: float = 5.0
    """For the whole request head."""
    answer: float = 10.0
    """For the answer to be taken, which is some ten kilobytes."""
    at_once: int = 32
    """Connections open; one more is closed unread."""


class MetricsListener:
    """Answers with what ``render`` gives, until cancelled."""

    def __init__(
        self,
        render: Callable[[], Awaitable[bytes]],
        telemetry: Telemetry,
        limits: MetricsLimits | None = None,
    ) -> None:
        self._render = render
        self._telemetry = telemetry
        self._limits = MetricsLimits() if limits is None else limits
        self._open = 0

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled; started when connections are accepted. Takes ownership of ``listeners``."""
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._handle, list(listeners))
            task_status.started()

    async def _handle(self, stream: trio.SocketStream) -> None:
        """One connection; nothing but cancellation leaves."""
        if self._open >= self._limits.at_once:
            return  # serve_listeners closes it
        self._open += 1
        try:
            await self._answer(stream)
        except* trio.BrokenResourceError:
            pass  # the scraper left in between
        except* Exception as group:
            self._telemetry.error("metrics_listener_crashed", cause=group)
            self._telemetry.count("gateway_bulkhead_catches_total", where="metrics_listener")
        finally:
            self._open -= 1

    async def _answer(self, stream: trio.SocketStream) -> None:
        response: bytes | None = None
        with trio.move_on_after(self._limits.head):
            response = await self._respond(stream)
        if response is not None:
            with trio.move_on_after(self._limits.answer):
                await stream.send_all(response)
                await stream.send_eof()

    async def _respond(self, stream: trio.SocketStream) -> bytes | None:
        """The whole response to the first request; None when none came."""
        buffer = b""
        try:
            while (end := find_head_end(buffer, MAX_HEAD)) is None:
                chunk = await stream.receive_some(MAX_HEAD)
                if not chunk:
                    return None
                buffer += chunk
            head = check_request_head(buffer[:end])
            if head.target.partition("?")[0] != "/metrics":
                return refusal_of(NotFound("Only /metrics is served at this address.")).as_response()
            if head.method != "GET":
                raise RequestRefused(405, "method", "Metrics are read with GET.")
        except RequestRefused as refusal:
            self._telemetry.count("gateway_front_door_refusals_total", reason=refusal.reason)
            return refusal_of(refusal).as_response()
        body = await self._render()
        lines = (
            "HTTP/1.1 200 OK",
            f"Content-Type: {_METRICS_TYPE}",
            f"Content-Length: {len(body)}",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            "Connection: close",
        )
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii") + body
