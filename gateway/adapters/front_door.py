"""One port for everything: accept, check the request head, hand over to the WebSocket or the REST side.

serve
├── lifespan of the ASGI application
├── accept loops, one per listener      ← stop_accepting() ends these
└── connection, one task each
    ├── head: read and checked under a deadline
    ├── WebSocketServer.serve           (until the gate is done with it)
    └── hypercorn                       (until idle, refused, or asked for a WebSocket)
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import trio
from attrs import field, frozen
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState, LifespanState

from gateway.adapters.direct_stream import LINGER_SECONDS, DirectStream, ReadyCalls
from gateway.adapters.hypercorn_connection import CheckedServer, CheckedStream, HttpLimits
from gateway.adapters.websocket import WebSocketServer, WebSocketSettings
from gateway.core.http_refusal import refusal_of
from gateway.core.request_head import RequestHead, RequestRefused, check_request_head, find_head_end
from gateway.ports import ConnectionGate, Telemetry

ACCEPT_RETRY_DELAY: Final = 0.1
"""Seconds to wait when the process or the machine is out of descriptors or memory; ``trio.serve_listeners``
waits as long."""

_CAPACITY_ERRORS: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))


@frozen
class FrontDoorLimits:
    """What connections may do before anybody has taken them over; times in seconds."""

    http: HttpLimits = field(factory=HttpLimits)
    heads_at_once: int = 1024
    """Connections whose head is still being read; one more, and the one that has taken longest goes."""
    rest_grace: float = 10.0
    """How long REST calls in flight may go on after ``stop_accepting``."""


class FrontDoor:
    """Serves listeners until ``stop_accepting`` and the end of every connection, or until cancelled."""

    def __init__(
        self,
        gate: ConnectionGate,
        telemetry: Telemetry,
        app: ASGIFramework,
        config: Config,
        limits: FrontDoorLimits,
        websocket: WebSocketSettings,
        ready_calls: ReadyCalls | None = None,
    ) -> None:
        self._telemetry = telemetry
        self._app = ASGIWrapper(app)
        self._config = config
        self._limits = limits
        self._websockets = WebSocketServer(gate, telemetry, websocket, ready_calls)
        self._context = WorkerContext(max_requests=None)
        self._lifespan_state: LifespanState = {}
        self._accepting = trio.CancelScope()
        self._reading_heads: dict[trio.CancelScope, None] = {}  # in the order they began
        self._http_scopes: set[trio.CancelScope] = set()
        self._http_deadline = float("inf")

    def stop_accepting(self) -> None:
        """Close the listeners; REST calls in flight get ``rest_grace``, WebSockets stay the gate's business.

        Idempotent, may be called before ``serve``, which then serves nobody.
        """
        self._accepting.cancel()

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve; started when connections are accepted and the application's start-up is done.

        Takes ownership of ``listeners``. Raises ``hypercorn.utils.LifespanFailureError`` when the
        application cannot start. Cancelling tears every connection down.
        """
        lifespan = Lifespan(self._app, self._config, self._lifespan_state)
        async with trio.open_nursery() as nursery:
            await nursery.start(lifespan.handle_lifespan)
            await lifespan.wait_for_startup()
            async with trio.open_nursery() as connections:
                try:
                    with self._accepting:
                        async with trio.open_nursery() as accepting:
                            for listener in listeners:
                                accepting.start_soon(self._accept, listener, connections)
                            task_status.started()
                finally:
                    for listener in listeners:
                        listener.socket.close()
                await self._context.terminated.set()
                self._http_deadline = trio.current_time() + self._limits.rest_grace
                for scope in self._http_scopes:
                    scope.deadline = self._http_deadline
            await lifespan.wait_for_shutdown()
            nursery.cancel_scope.cancel()

    async def _accept(self, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        failures = 0
        while True:
            try:
                transport = await listener.accept()
            except OSError as error:
                if error.errno not in _CAPACITY_ERRORS:
                    raise
                if not failures:  # once per spell, not ten times a second
                    self._telemetry.error("accept_failed", cause=error)
                failures += 1
                await trio.sleep(ACCEPT_RETRY_DELAY)
            else:
                failures = 0
                connections.start_soon(self._handle, transport)

    async def _handle(self, transport: trio.SocketStream) -> None:
        """One connection from its first byte to its last; nothing but cancellation leaves."""
        stream = DirectStream(transport)
        del transport
        try:
            head = await self._serve_until_upgrade(stream)
            if head is not None:
                socket = self._websockets.serve(stream, head, _peer(stream))
                del head  # neither this nor the transport is to live as long as the socket
                await socket
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client left in between
        except* Exception as group:
            self._telemetry.error("front_door_crashed", cause=group)
            self._telemetry.count("gateway_bulkhead_catches_total", where="front_door")
        finally:
            await stream.release()

    async def _serve_until_upgrade(self, stream: DirectStream) -> RequestHead | None:
        """Answer REST requests and refusals; the head of a WebSocket upgrade, or None when that was all."""
        try:
            head = await self._read_head(stream)
        except RequestRefused as refusal:
            self._count_refusal(refusal)
            stream.lingers = True
            with trio.move_on_after(LINGER_SECONDS):
                await stream.send_all(refusal_of(refusal).as_response())
            return None
        if head is None or head.is_websocket:
            return head
        return await self._serve_http(stream, head)

    async def _read_head(self, stream: DirectStream) -> RequestHead | None:
        """The first head of a connection; None when the client left, or said nothing at all in time."""
        limits = self._limits.http
        buffer = b""
        with trio.move_on_after(limits.head_timeout) as scope:
            self._reading_heads[scope] = None
            if len(self._reading_heads) > self._limits.heads_at_once:
                next(iter(self._reading_heads)).cancel()
            try:
                while (end := find_head_end(buffer, limits.head_bytes)) is None:
                    chunk = await stream.receive_some(limits.head_bytes)
                    if not chunk:
                        return None
                    buffer += chunk
            finally:
                self._reading_heads.pop(scope, None)
            stream.unread(buffer[end:])
            return check_request_head(buffer[:end])
        if not buffer:
            return None
        raise RequestRefused(408, "slow_head", "The request head came too slowly; send it again.")

    async def _serve_http(self, stream: DirectStream, head: RequestHead) -> RequestHead | None:
        """REST until the connection ends, or until it asks for a WebSocket: then that request's head."""
        checked = CheckedStream(stream, head, self._limits.http, self._count_refusal)
        state = ConnectionState(self._lifespan_state.copy())
        server = CheckedServer(self._app, self._config, self._context, state, checked)
        with trio.CancelScope(deadline=self._http_deadline) as scope, suppress(OSError):
            self._http_scopes.add(scope)
            try:
                await server.run()
            finally:
                self._http_scopes.discard(scope)
        return checked.upgrade

    def _count_refusal(self, refusal: RequestRefused) -> None:
        self._telemetry.count("gateway_front_door_refusals_total", reason=refusal.reason)
        self._telemetry.debug("request_refused", reason=refusal.reason, status=refusal.status)


def _peer(stream: DirectStream) -> str:
    """The peer's address; empty when it is already gone, or has none (a Unix socket)."""
    assert stream.socket is not None
    try:
        address = stream.socket.getpeername()
    except OSError:
        return ""
    return str(address[0]) if isinstance(address, tuple) else ""
