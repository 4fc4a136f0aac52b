"""The address of its own for metrics: what it answers, and what it does not put up with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import open_stream_to_socket_listener

from gateway.adapters.metrics_listener import MAX_HEAD, MetricsLimits, MetricsListener
from tests.adapters.socket_harness import RecordingTelemetry

SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


def giving(page: bytes) -> Callable[[], Awaitable[bytes]]:
    """What renders this page."""

    async def render() -> bytes:
        await trio.lowlevel.checkpoint()
        return page

    return render


@asynccontextmanager
async def listening(
    listener: MetricsListener,
) -> AsyncIterator[trio.SocketListener]:
    """The listener on a free port."""
    (socket,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.serve, [socket])
        yield socket
        nursery.cancel_scope.cancel()


async def ask(socket: trio.SocketListener, request: bytes) -> bytes:
    """Everything that comes back until the connection is closed."""
    async with await open_stream_to_socket_listener(socket) as stream:
        await stream.send_all(request)
        answer = b""
        async for chunk in stream:
            answer += chunk
        return answer


async def test_gives_the_metrics_to_who_asks() -> None:
    """No key; the answer is whole, and the connection closed after it."""
    async with listening(MetricsListener(giving(b"up 1\n"), RecordingTelemetry())) as socket:
        head, _, body = (await ask(socket, SCRAPE)).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4")
    assert b"Content-Length: 5\r\n" in head
    assert body == b"up 1\n"


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /health HTTP/1.1", b"404"),
        (b"GET /api/v1/sessions HTTP/1.1", b"404"),
        (b"POST /metrics HTTP/1.1", b"405"),
        (b"\x16\x03\x01", b"400"),
        (b"GET /metrics HTTP/1.1\nX: y", b"400"),
    ],
)
async def test_serves_nothing_else(request_line: bytes, status: bytes) -> None:
    """Neither another path, nor another method, nor what is no HTTP."""
    async with listening(MetricsListener(giving(b"up 1\n"), RecordingTelemetry())) as socket:
        answer = await ask(socket, request_line + b"\r\nHost: localhost\r\n\r\n")

    assert answer.split(b" ")[1] == status
    assert b"up 1" not in answer


async def test_reads_no_endless_head() -> None:
    """What is too large for a head is refused, and counted."""
    telemetry = RecordingTelemetry()
    async with listening(MetricsListener(giving(b""), telemetry)) as socket:
        answer = await ask(socket, b"GET /" + b"a" * MAX_HEAD)

    assert answer.split(b" ")[1] == b"431"
    assert telemetry.counts[("gateway_front_door_refusals_total", (("reason", "head_too_large"),))] == 1


async def test_waits_for_nobody_forever() -> None:
    """Who does not say what it wants is closed in time, and then others are answered."""
    listener = MetricsListener(giving(b"up 1\n"), RecordingTelemetry(), MetricsLimits(head=0.01, at_once=1))
    async with listening(listener) as socket:
        assert await ask(socket, b"GET /met") == b""
        assert (await ask(socket, SCRAPE)).endswith(b"up 1\n")


async def test_holds_few_connections() -> None:
    """One more than may be is closed unread."""
    listener = MetricsListener(giving(b"up 1\n"), RecordingTelemetry(), MetricsLimits(at_once=1))
    async with listening(listener) as socket, await open_stream_to_socket_listener(socket) as first:
        await first.send_all(b"GET /met")
        await trio.testing.wait_all_tasks_blocked()
        async with await open_stream_to_socket_listener(socket) as second:
            assert await second.receive_some() == b""
        await first.send_all(b"rics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await first.receive_some()).startswith(b"HTTP/1.1 200")


async def test_a_crash_ends_one_scrape() -> None:
    """It is logged and counted; the next scrape is answered."""
    telemetry = RecordingTelemetry()
    crashes = iter([True, False])

    async def render() -> bytes:
        await trio.lowlevel.checkpoint()
        if next(crashes):
            raise ValueError("cannot be rendered")
        return b"up 1\n"

    async with listening(MetricsListener(render, telemetry)) as socket:
        assert await ask(socket, SCRAPE) == b""
        assert (await ask(socket, SCRAPE)).endswith(b"up 1\n")

    assert ("error", "metrics_listener_crashed") in telemetry.events
    assert telemetry.counts[("gateway_bulkhead_catches_total", (("where", "metrics_listener"),))] == 1


async def test_a_scraper_that_leaves_is_no_crash() -> None:
    """Not even with a reset in the middle of the answer."""
    telemetry = RecordingTelemetry()
    async with listening(MetricsListener(giving(b"x" * (1 << 22)), telemetry)) as socket:
        stream = await open_stream_to_socket_listener(socket)
        await stream.send_all(SCRAPE)
        await stream.receive_some(10)
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert (await ask(socket, SCRAPE))[:15] == b"HTTP/1.1 200 OK"

    assert telemetry.events == []
