"""One WebSocket to the gateway, over trio-websocket, with what trio-websocket lacks.

* A stream that is lost during the handshake ends it: trio-websocket would wait for ever.
* Every wait for the peer has a deadline; ``aclose`` waits for the peer's close frame.
* A fault in trio-websocket or wsproto (a malformed handshake, a reset at the wrong moment) leaves as the end
  of this socket, not as an exception through the application.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Sequence

import trio
import trio_websocket
from attrs import frozen

from gateway.client.address import Address
from gateway.client.reconnect import ABNORMAL, Ending, close_code_of_status
from gateway.core.codec import decode_json_object
from gateway.core.errors import InvalidMessage

RECEIVE_BYTES = 64 * 2**10
MESSAGE_QUEUE_SIZE = 4
"""Frames read ahead of the application. Pings are answered only while there is room."""


@frozen
class TransportSettings:
    """Times in seconds, sizes in bytes."""

    open_timeout: float = 10.0
    """For name, TCP, TLS and WebSocket handshake together."""
    send_timeout: float = 20.0
    """For the peer to take one message."""
    pong_timeout: float = 10.0
    close_timeout: float = 2.0
    """For the peer's close frame."""
    max_message_size: int = 64 * 2**20
    """A frame that is larger ends the session (1009): the next socket would be sent the same."""
    ssl_context: ssl.SSLContext | None = None


class SocketLost(Exception):
    """The socket is over; ``ending`` says how."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.reason)
        self.ending = ending


class Socket:
    """A live WebSocket."""

    def __init__(self, websocket: trio_websocket.WebSocketConnection, settings: TransportSettings) -> None:
        self._websocket = websocket
        self._settings = settings

    async def receive(self) -> str | bytes:
        """The next frame. Raises ``SocketLost``."""
        try:
            return await self._websocket.get_message()
        except trio_websocket.ConnectionClosed as closed:
            raise SocketLost(_ending_of(closed)) from None

    async def send(self, frame: str | bytes) -> None:
        """Send a frame. Raises ``SocketLost``, also when the peer does not take it in time."""
        with trio.move_on_after(self._settings.send_timeout) as deadline:
            try:
                await self._websocket.send_message(frame)
            except trio_websocket.ConnectionClosed as closed:
                raise SocketLost(_ending_of(closed)) from None
        if deadline.cancelled_caught:
            raise SocketLost(Ending(ABNORMAL, "the gateway took nothing in time"))

    async def ping(self) -> None:
        """Ping and wait for the pong. Raises ``SocketLost``, also when it does not come in time."""
        with trio.move_on_after(self._settings.pong_timeout) as deadline:
            try:
                await self._websocket.ping()
            except trio_websocket.ConnectionClosed as closed:
                raise SocketLost(_ending_of(closed)) from None
        if deadline.cancelled_caught:
            raise SocketLost(Ending(ABNORMAL, "the gateway did not answer a ping in time"))

    async def close(self, code: int, reason: str) -> None:
        """Close; waits for the peer for a short while."""
        with trio.move_on_after(self._settings.close_timeout):
            await self._websocket.aclose(code, reason)


async def run_socket(
    address: Address,
    target: str,
    *,
    subprotocols: Sequence[str],
    headers: Sequence[tuple[bytes, bytes]],
    settings: TransportSettings,
    use: Callable[[Socket], Awaitable[Ending]],
) -> Ending:
    """Open a socket, ``use`` it until that returns how to close it or raises ``SocketLost``; say how it was.

    Cancelled, it drops the socket without a close frame. What ``use`` raises else is raised from here.
    """
    stream: _Stream | None = None
    outcome = _Outcome()
    try:
        with trio.move_on_after(settings.open_timeout) as opening:
            try:
                stream = _Stream(await _connect(address, settings))
            except OSError as error:
                return Ending(ABNORMAL, f"cannot connect: {error}")
        if stream is None:
            return Ending(ABNORMAL, "cannot connect: no answer in time")
        try:
            async with trio.open_nursery() as nursery:
                with _handshake_scope(opening.deadline, stream) as handshake:
                    websocket = await trio_websocket.wrap_client_stream(
                        nursery,
                        stream,  # type: ignore[arg-type]  # It asks for no more than a trio.abc.Stream.
                        address.host_header,
                        target,
                        subprotocols=subprotocols,
                        extra_headers=list(headers),
                        message_queue_size=MESSAGE_QUEUE_SIZE,
                        max_message_size=settings.max_message_size,
                        receive_buffer_size=RECEIVE_BYTES,
                    )
                if handshake.cancelled_caught:
                    outcome.ending = Ending(ABNORMAL, "the connection was lost during the handshake")
                elif websocket.subprotocol != subprotocols[0]:
                    outcome.ending = Ending(4400, "the gateway does not speak protocol v2")
                else:
                    await outcome.of(use, Socket(websocket, settings))
                nursery.cancel_scope.cancel()
        except* trio_websocket.ConnectionRejected as group:
            outcome.ending = outcome.ending or _refusal(group)
        except* Exception as group:
            outcome.ending = outcome.ending or Ending(ABNORMAL, f"the connection failed: {_first(group)!r}")
    finally:
        if stream is not None:
            await trio.aclose_forcefully(stream)
    if outcome.crash is not None:
        raise outcome.crash
    assert outcome.ending is not None
    return outcome.ending


def _handshake_scope(deadline: float, stream: _Stream) -> trio.CancelScope:
    """A scope that ends at ``deadline`` or when ``stream`` is lost."""
    scope = trio.CancelScope(deadline=deadline)
    stream.on_lost = scope.cancel
    return scope


class _Outcome:
    """What became of a socket, kept apart from what trio-websocket may raise around it."""

    def __init__(self) -> None:
        self.ending: Ending | None = None
        self.crash: Exception | None = None

    async def of(self, use: Callable[[Socket], Awaitable[Ending]], socket: Socket) -> None:
        try:
            ending = await use(socket)
            await socket.close(ending.code, ending.reason)
            self.ending = ending
        except SocketLost as lost:
            self.ending = lost.ending
        except Exception as crash:
            self.crash = crash


class _Stream(trio.abc.Stream):
    """The stream below the WebSocket, which tells when it is lost."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.on_lost: Callable[[], None] | None = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._stream.receive_some(max_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._lost()
            raise
        if not data:
            self._lost()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def _lost(self) -> None:
        if self.on_lost is not None:
            self.on_lost()


async def _connect(address: Address, settings: TransportSettings) -> trio.abc.Stream:
    stream = await trio.open_tcp_stream(address.host, address.port)
    if not address.secure:
        return stream
    context = settings.ssl_context or ssl.create_default_context()
    secure = trio.SSLStream(stream, context, server_hostname=address.host, https_compatible=True)
    try:
        await secure.do_handshake()
    except trio.BrokenResourceError as error:
        await trio.aclose_forcefully(stream)
        raise OSError(f"TLS: {error.__cause__ or error}") from None
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return secure


def _ending_of(closed: trio_websocket.ConnectionClosed) -> Ending:
    if closed.reason is None:
        return Ending(ABNORMAL, "the connection was lost")
    return Ending(closed.reason.code, closed.reason.reason or "")


def _refusal(group: BaseExceptionGroup[trio_websocket.ConnectionRejected]) -> Ending:
    rejected = _first(group)
    assert isinstance(rejected, trio_websocket.ConnectionRejected)
    status = rejected.status_code
    wait = next((value for name, value in rejected.headers or () if name.lower() == b"retry-after"), b"")
    return Ending(
        close_code_of_status(status),
        _message_of(bytes(rejected.body or b"")) or f"the upgrade was refused with HTTP status {status}",
        float(wait) if wait.isdigit() else None,
    )


def _message_of(body: bytes) -> str:
    """What the gateway says about a refusal, for a person; empty when the body is not the gateway's."""
    try:
        content = decode_json_object(body)
    except InvalidMessage:
        return ""
    text = content.get("detail") or content.get("error_description")
    return text if isinstance(text, str) else ""


def _first(group: BaseExceptionGroup[Exception]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
