"""``hypercorn -c hypercorn.toml gateway.asgi:app``: the same gateway, sockets included, in plain hypercorn.

The engine runs beside the application, in the task of ASGI's lifespan, and not in Quart-Trio's own
nursery: when a task crashed there, REST went on answering 200 and the process exited 0. Here a crash of
the engine is logged and ends the process at once with status 70; clients reconnect and resume.
"""

from __future__ import annotations

import os
from typing import Any

import trio

from gateway.adapters.quart_websocket import QuartWebSockets
from gateway.app import Gateway, make_telemetry, open_gateway
from gateway.config import load_configuration
from gateway.ports import Telemetry

EX_SOFTWARE = 70
"""The exit status of ``sysexits.h`` for an internal error."""


class GatewayApplication:
    """An ASGI application that wires its gateway when the server starts it, never at import."""

    def __init__(self) -> None:
        self._gateway: Gateway | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One ASGI connection, or the lifespan."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        assert self._gateway is not None, "the server did not run the lifespan; hypercorn does"
        await self._gateway.rest(scope, receive, send)

    async def _live(self, scope: Any, receive: Any, send: Any) -> None:
        configuration = load_configuration(os.environ)
        telemetry = make_telemetry(configuration.settings)
        with telemetry.route_standard_logging():
            async with open_gateway(configuration, telemetry) as gateway, trio.open_nursery() as nursery:
                if gateway.jwks is not None:
                    await nursery.start(gateway.jwks.run)
                await nursery.start(_supervise, gateway)
                nursery.start_soon(gateway.pulse.run)
                settings = configuration.settings
                QuartWebSockets(gateway.hub, telemetry, close_timeout=settings.ws_close_timeout).register(
                    gateway.rest
                )
                self._gateway = gateway

                async def receive_then_drain() -> Any:
                    message = await receive()
                    if message["type"] == "lifespan.shutdown":
                        await gateway.hub.drain()
                    return message

                await gateway.rest(scope, receive_then_drain, send)
                nursery.cancel_scope.cancel()


async def _supervise(
    gateway: Gateway, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    try:
        await gateway.hub.run(task_status=task_status)
    except Exception as crash:
        _end_process(gateway.telemetry, crash)


def _end_process(telemetry: Telemetry, crash: Exception) -> None:
    telemetry.error("engine_crashed", cause=crash)
    os._exit(EX_SOFTWARE)


app = GatewayApplication()
