"""Both ``ClientConnection`` adapters keep the same contract."""

from __future__ import annotations

from collections.abc import AsyncIterator

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from quart_trio import QuartTrio

from gateway.adapters.quart_websocket import QuartWebSockets
from gateway.adapters.websocket import WebSocketSettings
from tests.adapters.socket_harness import RecordingTelemetry, ScriptedGate, listening, websocket_port
from tests.conformance.client_connection import CLOSE_TIMEOUT, ClientConnectionContract


class TestOverTrioWebSocket(ClientConnectionContract):
    """The adapter behind the front door."""

    tells_close_codes = True

    async def port(self, gate: ScriptedGate, telemetry: RecordingTelemetry) -> AsyncIterator[int]:
        """Serve through ``WebSocketServer``."""
        settings = WebSocketSettings(close_timeout=CLOSE_TIMEOUT)
        async with websocket_port(gate, telemetry, settings) as port:
            yield port


class TestOverQuart(ClientConnectionContract):
    """The adapter for plain hypercorn."""

    tells_close_codes = False

    async def port(self, gate: ScriptedGate, telemetry: RecordingTelemetry) -> AsyncIterator[int]:
        """Serve a Quart-Trio application through hypercorn's own server of connections."""
        app = QuartTrio("test")
        QuartWebSockets(gate, telemetry, close_timeout=CLOSE_TIMEOUT).register(app)
        config = Config()
        config.errorlog = None
        context = WorkerContext(max_requests=None)

        async def handle(stream: trio.SocketStream) -> None:
            server = TCPServer(ASGIWrapper(app), config, context, ConnectionState({}), stream)  # type: ignore[arg-type]
            await server.run()

        async with listening(handle) as port:
            yield port
