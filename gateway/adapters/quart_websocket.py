"""IDE sockets over Quart-Trio's ``websocket``, for plain ``hypercorn … gateway.asgi:app``.

hypercorn's own WebSocket side tells an application neither about pongs nor about the peer's close code, and
its writes cannot be cancelled. So ``sends_pings`` is False here (``websocket_ping_interval`` and
``read_timeout`` of ``hypercorn.toml`` stand in), a peer that left always reads as 1006, and a task of its
own does the writing, so that the engine never hangs in it. The front door is the better way in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import quart
import trio
from quart.wrappers import Websocket
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIWebsocketConnection

from gateway.core.errors import GatewayError
from gateway.core.http_refusal import refusal_of
from gateway.core.websocket_protocol import CloseCode, Dialect
from gateway.ports import Admission, ConnectionClosed, ConnectionGate, Hear, Telemetry, UpgradeRequest

WEBSOCKET_RULES: Final = ("/api/v1/ws", "/api/v1/ws/<path:rest>", "/ws/<path:rest>")
"""protocol.md section 1. The gate decides about what follows; any other path is Quart's 404."""

GOODBYE_SECONDS: Final = 1.0
"""How long a close frame may take when the scope around it is already cancelled."""

_DISCONNECTED: Final = "gateway.disconnected"
_LOST: Final = 1006


class TellingWebsocketConnection(TrioASGIWebsocketConnection):
    """Quart-Trio's, but a peer that leaves ends ``receive`` instead of cancelling the whole handler.

    It also keeps empty binary messages, which Quart takes for missing ones.
    """

    def __init__(self, app: QuartTrio, scope: Any) -> None:
        super().__init__(app, scope)
        scope[_DISCONNECTED] = self._disconnected = trio.Event()

    async def handle_messages(  # type: ignore[override]
        self, nursery: trio.Nursery, receive: Callable[[], Awaitable[Any]]
    ) -> None:
        """Pass messages on until the peer is gone."""
        del nursery  # Quart-Trio's own version cancels it: then a peer that left looks like a shutdown
        async with self.send_channel:
            while True:
                event = await receive()
                if event["type"] == "websocket.disconnect":
                    self._disconnected.set()
                    return
                if event["type"] == "websocket.receive":
                    binary = event.get("bytes")
                    await self.send_channel.send(event["text"] if binary is None else binary)


class QuartWebSocketConnection:
    """``gateway.ports.ClientConnection`` over one accepted ``quart.websocket``."""

    def __init__(self, websocket: Websocket, dialect: Dialect, close_timeout: float) -> None:
        self._websocket = websocket
        self._is_binary = dialect.is_binary
        self._close_timeout = close_timeout
        self._disconnected: trio.Event = websocket.scope[_DISCONNECTED]  # type: ignore[typeddict-item]
        self._closed: ConnectionClosed | None = None
        self._is_closing = False  # the close frame is on its way; until then what is queued still goes out
        self._queue: deque[bytes] = deque()
        self._work = trio.Event()  # set when there is something to write
        self._changed = trio.Event()  # set when nothing is left to write, or nothing will be written

    @property
    def sends_pings(self) -> bool:
        """hypercorn does its own keep-alive."""
        return False

    @property
    def unsent(self) -> int:
        """See the port; a payload counts as sent when hypercorn has written it."""
        return len(self._queue)

    async def receive(self, hear: Hear | None = None) -> str | bytes:  # noqa: ARG002
        """See the port; a peer that left always reads as 1006."""
        if self._closed is not None:
            raise self._reason()
        try:
            message: str | bytes = await self._websocket.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise self._reason() from None
        return message

    def send_nowait(self, payloads: Sequence[bytes]) -> bool:
        """See the port; never True, because hypercorn can only be written to by waiting."""
        self._queue.extend(payloads)
        if self._closed is not None or self._disconnected.is_set():
            raise self._reason()
        if self._queue:
            self._work.set()
        return not self._queue

    async def wait_sent(self) -> None:
        """See the port."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._queue:
            if self._closed is not None or self._disconnected.is_set():
                raise self._reason()
            await self._changed.wait()

    async def ping(self) -> None:
        """Not to be called: ``sends_pings`` is False. Raises ``RuntimeError``."""
        await trio.lowlevel.checkpoint()
        raise RuntimeError("hypercorn sends the pings of this connection")

    async def close(self, code: int, reason: str = "") -> None:
        """See the port."""
        if self._closed is not None:
            return
        left = self._disconnected.is_set()
        self._closed = ConnectionClosed(_LOST) if left else ConnectionClosed(code, reason)
        deadline = trio.current_time() + self._close_timeout
        try:
            with trio.move_on_at(deadline):
                while self._queue and not self._disconnected.is_set():
                    await self._changed.wait()
        finally:
            self._is_closing = True
            self._changed.set()
            # The shield lets the frame out of a cancelled scope; hypercorn drops it when the peer is gone.
            with trio.move_on_after(GOODBYE_SECONDS, shield=True):
                await self._websocket.close(code, reason)
        with trio.move_on_at(deadline):
            await self._disconnected.wait()

    async def run_writer(self) -> None:
        """Write what is queued, one message at a time; ends with the peer."""
        while True:
            while self._queue:
                if self._is_closing:
                    return  # hypercorn takes no message behind its close frame
                payload = self._queue[0]
                await self._websocket.send(payload if self._is_binary else payload.decode())
                # hypercorn says nothing when a write fails, but passes a disconnect on: in the first pass of
                # the scheduler to our reader, in the second to us.
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
                if self._disconnected.is_set():
                    return
                self._queue.popleft()
            self._changed.set()
            self._changed = trio.Event()
            self._work = trio.Event()
            await self._work.wait()

    async def run_watcher(self) -> None:
        """Wake whoever waits for the writer when the peer leaves."""
        await self._disconnected.wait()
        self._changed.set()

    def _reason(self) -> ConnectionClosed:
        if self._closed is not None:
            return ConnectionClosed(self._closed.code, self._closed.reason)
        return ConnectionClosed(_LOST)


class QuartWebSockets:
    """Serves the WebSocket paths of a Quart-Trio application through a gate."""

    def __init__(
        self,
        gate: ConnectionGate,
        telemetry: Telemetry,
        *,
        close_timeout: float = 5.0,
        admission_timeout: float = 5.0,
    ) -> None:
        self._gate = gate
        self._telemetry = telemetry
        self._close_timeout = close_timeout
        self._admission_timeout = admission_timeout

    def register(self, app: QuartTrio) -> None:
        """Add the WebSocket routes to ``app``, which from then on uses ``TellingWebsocketConnection``."""
        app.asgi_websocket_class = TellingWebsocketConnection
        for number, rule in enumerate(WEBSOCKET_RULES):
            app.add_websocket(rule, f"gateway_websocket_{number}", self._handle)

    async def _handle(self, rest: str = "") -> quart.Response | None:
        """One socket; whatever goes wrong with it ends here, logged once."""
        del rest  # the gate reads the raw target, still percent-encoded
        websocket = quart.websocket._get_current_object()  # type: ignore[attr-defined]
        refusal: quart.Response | None = None
        try:
            admission = await self._admit(websocket)
            if isinstance(admission, quart.Response):
                refusal = admission
            elif admission is not None:
                await self._serve(websocket, admission)
        except* Exception as group:
            self._telemetry.error("websocket_crashed", cause=group)
            self._telemetry.count("gateway_bulkhead_catches_total", where="websocket")
        return refusal

    async def _admit(self, websocket: Websocket) -> Admission | quart.Response | None:
        scope = websocket.scope
        target = scope["raw_path"].decode("ascii")
        if scope["query_string"]:
            target += "?" + scope["query_string"].decode("ascii")
        headers = tuple(
            (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]
        )
        peer = (scope.get("client") or ("",))[0]
        with trio.move_on_after(self._admission_timeout):
            try:
                admission = await self._gate.admit(UpgradeRequest(target, headers, peer))
            except GatewayError as error:
                refusal = refusal_of(error)
                return quart.Response(refusal.body, refusal.status, dict(refusal.headers))
            await websocket.accept(subprotocol=admission.subprotocol)
            return admission
        self._telemetry.warning("upgrade_timed_out", peer=peer)
        return quart.Response("", 503)

    async def _serve(self, websocket: Websocket, admission: Admission) -> None:
        connection = QuartWebSocketConnection(websocket, admission.dialect, self._close_timeout)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run_writer)
            nursery.start_soon(connection.run_watcher)
            try:
                await self._gate.serve(connection, admission)
            except Exception:
                await connection.close(CloseCode.INTERNAL_ERROR)
                raise
            await connection.close(CloseCode.NORMAL)
            nursery.cancel_scope.cancel()
