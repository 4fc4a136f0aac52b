"""``hypercorn -c hypercorn.toml gateway.asgi:app``: the same gateway, sockets included, in plain hypercorn.

The engine runs beside the application, in the task of ASGI's lifespan, and not in Quart-Trio's own
nursery: when a task crashed there, REST went on answering 200 and the process exited 0. Here a crash of
the engine is logged and ends the process at once with status 70; clients reconnect and resume.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any, NoReturn

import trio

from gateway.adapters.quart_websocket import QuartWebSockets
from gateway.app import Gateway, make_telemetry, open_gateway, serve_metrics
from gateway.config import ConfigError, load_configuration
from gateway.core.errors import StoreUnavailable
from gateway.ports import Telemetry

EX_SOFTWARE = 70
EX_CONFIG = 78
"""The exit statuses of ``sysexits.h`` for an internal error, and for a configuration that cannot be used."""


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
        try:
            await self._serve_lifespan(scope, receive, send)
        except Exception as error:
            if self._gateway is not None:
                raise
            _refuse_to_start(error)

    async def _serve_lifespan(self, scope: Any, receive: Any, send: Any) -> None:
        configuration = load_configuration(os.environ)
        telemetry = make_telemetry(configuration.settings)
        with telemetry.route_standard_logging():
            async with open_gateway(configuration, telemetry) as gateway, trio.open_nursery() as nursery:
                await nursery.start(serve_metrics, gateway)
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


def _refuse_to_start(error: Exception) -> NoReturn:
    """End the worker. To hypercorn an exception here means that the application has no lifespan: it would go
    on, and answer everything with 500; ``lifespan.startup.failed`` it answers with a traceback of its own."""
    reason: BaseException = error
    while isinstance(reason, BaseExceptionGroup) and len(reason.exceptions) == 1:
        reason = reason.exceptions[0]
    if isinstance(reason, ConfigError | StoreUnavailable | OSError):
        sys.stderr.write(f"gateway: {reason}\n")
        code = EX_CONFIG if isinstance(reason, ConfigError) else 1
    else:
        traceback.print_exception(error)
        code = EX_SOFTWARE
    sys.stderr.flush()
    os._exit(code)


def _end_process(telemetry: Telemetry, crash: Exception) -> None:
    telemetry.error("engine_crashed", cause=crash)
    os._exit(EX_SOFTWARE)


app = GatewayApplication()
