"""The WebSocket side of the plain hypercorn deployment: routes, refusals, crashes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from quart_trio import QuartTrio

from gateway.adapters.quart_websocket import QuartWebSockets
from gateway.core.errors import NotAuthenticated
from gateway.ports import ClientConnection
from tests.adapters.socket_harness import (
    CLOSE,
    TEXT,
    RawClient,
    RecordingTelemetry,
    ScriptedGate,
    client_frame,
    listening,
    raw_client,
    upgrade_request,
)


@asynccontextmanager
async def quart_port(gate: ScriptedGate, telemetry: RecordingTelemetry) -> AsyncIterator[int]:
    """A Quart-Trio application with one REST route and the WebSockets, on hypercorn's own server."""
    app = QuartTrio("test")

    @app.get("/health")
    async def health() -> str:
        return "healthy"

    QuartWebSockets(gate, telemetry, close_timeout=0.2).register(app)
    config = Config()
    config.errorlog = None

    async def handle(stream: trio.SocketStream) -> None:
        context = WorkerContext(max_requests=None)
        await TCPServer(ASGIWrapper(app), config, context, ConnectionState({}), stream).run()  # type: ignore[arg-type]

    async with listening(handle) as port:
        yield port


async def ask(port: int, request: bytes) -> tuple[bytes, bytes]:
    """Head and body of the answer to a request, after which the connection ends."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        client = RawClient(stream)
        await client.send(request)
        return await client.read_head(), await client.read_to_end()


async def test_a_refusal_is_answered_in_http() -> None:
    """What the gate refuses gets its status, challenge and JSON body; the gate saw the raw target."""
    gate = ScriptedGate(refusal=NotAuthenticated("Present a token."))
    async with quart_port(gate, RecordingTelemetry()) as port:
        head, body = await ask(port, upgrade_request("/api/v1/ws/%73?a=%20b", "X-Extra: 1"))
    assert head.startswith(b"HTTP/1.1 401 ")
    assert b'www-authenticate: bearer realm="gateway"' in head.lower()
    assert b'{"error":"unauthorized","error_description":"Present a token."}' in body
    (request,) = gate.requests
    assert (request.target, request.header("x-extra"), request.peer) == (
        "/api/v1/ws/%73?a=%20b",
        "1",
        "127.0.0.1",
    )


async def test_all_websocket_paths_reach_the_gate_and_others_do_not() -> None:
    """The two generations of the path and the multiplexed endpoint; anything else is not found."""
    gate = ScriptedGate()
    async with quart_port(gate, RecordingTelemetry()) as port:
        for target in ("/api/v1/ws", "/api/v1/ws/a", "/ws/a"):
            async with raw_client(port, upgrade_request(target)) as client:
                await client.send(client_frame(TEXT, b"x"))
                assert await client.read_frame() == (TEXT, b"x")
        head, _ = await ask(port, upgrade_request("/elsewhere"))
        assert head.startswith(b"HTTP/1.1 404 ")
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await RawClient(stream).read_head()).startswith(b"HTTP/1.1 200 ")
    assert [request.target for request in gate.requests] == ["/api/v1/ws", "/api/v1/ws/a", "/ws/a"]


async def test_a_crash_closes_its_socket_with_1011_and_is_logged_once() -> None:
    """A bug in the engine ends the socket it happened on, and no other."""

    async def crash(connection: ClientConnection) -> None:
        await connection.receive()
        raise RuntimeError("a bug")

    telemetry = RecordingTelemetry()
    async with (
        quart_port(ScriptedGate(crash), telemetry) as port,
        raw_client(port) as client,
        raw_client(port) as bystander,
    ):
        await client.send(client_frame(TEXT, b"x"))
        assert await client.read_close() == 1011
        await client.send(client_frame(CLOSE, (1011).to_bytes(2, "big")))
        await telemetry.counted.wait()
        await bystander.send(client_frame(0x9, b"y"))
        assert await bystander.read_frame() == (0xA, b"y")
    assert telemetry.errors == ["websocket_crashed"]
