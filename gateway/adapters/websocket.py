"""IDE sockets over trio-websocket: the handshake, and the ``ClientConnection`` that the engine holds.

trio-websocket does the handshake, reads, answers pings and closes. Data frames, pings and the close frame
that we begin are written here, straight to the ``DirectStream`` below it (docs/decisions, *one write per
token*): what the kernel takes at once costs no pass through the scheduler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import trio
import trio_websocket
from attrs import frozen
from wsproto.events import Request

from gateway.adapters.direct_stream import DirectStream, ReadyCalls
from gateway.adapters.guarded_wsproto import GuardedConnection
from gateway.core.errors import GatewayError
from gateway.core.http_refusal import refusal_of
from gateway.core.message_compression import Deflater
from gateway.core.request_head import RequestHead
from gateway.core.websocket_frames import FrameEncoder, binary_frame, text_frame
from gateway.core.websocket_protocol import CloseCode, Dialect
from gateway.ports import Admission, ConnectionClosed, ConnectionGate, Hear, Telemetry, UpgradeRequest

MESSAGE_QUEUE_SIZE: Final = 16
"""Messages read ahead of the engine's reader. Pongs are seen only while there is room, so more than one; the
memory that a client can take with it is this times the largest message."""

RECEIVE_BYTES: Final = 16 * 2**10
"""Per read; a client message is seldom larger, and the buffer is only taken while something is there."""

_LOST: Final = 1006  # RFC 6455 section 7.1.5: ended without a close frame


@frozen
class WebSocketSettings:
    """What sockets may do; times in seconds, sizes in bytes."""

    max_message_size: int = 2**20
    close_timeout: float = 5.0
    """How long to wait for the peer's close frame."""
    compresses: bool = False
    """Whether permessage-deflate is agreed to when a client offers it (``WS_COMPRESSION``)."""
    admission_timeout: float = 5.0
    """How long deciding about an upgrade and answering it may take: clients give up after 5 s."""


class WebSocketServer:
    """Takes a stream whose request head asks for a WebSocket through the whole life of the socket."""

    def __init__(
        self,
        gate: ConnectionGate,
        telemetry: Telemetry,
        settings: WebSocketSettings,
        ready_calls: ReadyCalls | None = None,
    ) -> None:
        self._gate = gate
        self._telemetry = telemetry
        self._settings = settings
        self._unawaited = trio.Event()
        self._ready_calls = ready_calls

    async def serve(self, stream: DirectStream, head: RequestHead, peer: str) -> None:
        """Decide, upgrade, and hand the socket to the gate until it is over; or answer the refusal.

        ``stream`` gives what followed ``head``. It is released on every way out.

        *Error handling*: whatever goes wrong with this socket ends here, logged once; only cancellation and
        interrupts leave.
        """
        try:
            opened = await self._open(stream, head, peer)
            del head  # kilobytes of header fields that would live as long as the socket
            if opened is not None:
                await self._live(*opened)
        except* Exception as group:
            self._telemetry.error("websocket_crashed", cause=_only(group))
            self._telemetry.count("gateway_bulkhead_catches_total", where="websocket")
        finally:
            await stream.release()

    async def _open(
        self, stream: DirectStream, head: RequestHead, peer: str
    ) -> tuple[TrioWebSocketConnection, Admission] | None:
        with trio.move_on_after(self._settings.admission_timeout):
            try:
                admission = await self._gate.admit(UpgradeRequest(head.target, head.headers, peer))
                return await self._upgrade(stream, head, admission), admission
            except GatewayError as refusal:
                stream.lingers = True
                with suppress(trio.BrokenResourceError):  # who reset meanwhile is owed no answer
                    await stream.send_all(refusal_of(refusal).as_response())
                return None
            except (trio.BrokenResourceError, trio_websocket.ConnectionClosed):
                return None  # gone before it was open
        self._telemetry.warning("upgrade_timed_out", peer=peer)
        return None

    async def _live(self, connection: TrioWebSocketConnection, admission: Admission) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run_reader)
            try:
                await self._gate.serve(connection, admission)
            except Exception:
                await connection.close(CloseCode.INTERNAL_ERROR)
                raise
            except BaseException:
                connection.leave(CloseCode.GOING_AWAY)
                raise
            await connection.close(CloseCode.NORMAL)
            nursery.cancel_scope.cancel()

    async def _upgrade(
        self, stream: DirectStream, head: RequestHead, admission: Admission
    ) -> TrioWebSocketConnection:
        protocol = GuardedConnection(
            stream, self._settings.max_message_size, compresses=self._settings.compresses
        )
        protocol.receive_data(head.raw)
        (request,) = protocol.events()
        assert isinstance(request, Request)
        websocket = trio_websocket.WebSocketConnection(
            stream,
            protocol,
            message_queue_size=MESSAGE_QUEUE_SIZE,
            # The guard counts bytes and answers 1009 itself; characters are never more.
            max_message_size=self._settings.max_message_size,
            receive_buffer_size=RECEIVE_BYTES,
        )
        proposal = trio_websocket.WebSocketRequest(websocket, request)
        await proposal.accept(subprotocol=admission.subprotocol)
        protocol.forget_handshake()
        # On a server nobody waits for these two: one for all sockets saves each of them 0.6 KB.
        websocket._open_handshake = websocket._for_testing_peer_closed_connection = self._unawaited
        connection = TrioWebSocketConnection(
            websocket, protocol, stream, admission.dialect, self._settings.close_timeout
        )
        if self._ready_calls is not None:
            stream.take_each(self._ready_calls, connection.take)
        return connection


class TrioWebSocketConnection:
    """``gateway.ports.ClientConnection`` over trio-websocket."""

    __slots__ = (
        "_close_timeout",
        "_closed_by_us",
        "_encode",
        "_ends",
        "_hear",
        "_protocol",
        "_refused",
        "_stream",
        "_websocket",
    )

    def __init__(
        self,
        websocket: trio_websocket.WebSocketConnection,
        protocol: GuardedConnection,
        stream: DirectStream,
        dialect: Dialect,
        close_timeout: float,
    ) -> None:
        self._websocket = websocket
        self._protocol = protocol
        self._stream = stream
        self._encode = _frame_encoder(dialect, protocol)
        self._close_timeout = close_timeout
        self._closed_by_us: ConnectionClosed | None = None
        self._hear: Hear | None = None
        """While somebody waits in ``receive``, and so all that came before is dealt with."""
        self._ends: deque[int] | None = None  # where in the stream each payload that was buffered ends
        self._refused = 0

    @property
    def sends_pings(self) -> bool:
        """Pings are the engine's business here."""
        return True

    @property
    def unsent(self) -> int:
        """See the port. Payloads of a ``send_nowait`` that raised count as unsent."""
        return self._forget_sent() + self._refused

    async def receive(self, hear: Hear | None = None) -> str | bytes:
        """See the port."""
        self._hear = hear
        try:
            return await self._websocket.get_message()
        except trio_websocket.ConnectionClosed:
            raise self._closed() from None
        finally:
            self._hear = None

    def take(self, data: bytes) -> bool:
        """Deal with ``data`` here and now if it needs no more than that; False: nothing was done."""
        # What is in the channel, or on its way out of it, came first.
        is_waiting = self._websocket._recv_channel.statistics().tasks_waiting_receive
        return self._protocol.take_short(data, self._hear if is_waiting else None)

    def send_nowait(self, payloads: Sequence[bytes]) -> bool:
        """See the port."""
        if self._closed_by_us is not None or self._websocket.closed is not None:
            self._refused += len(payloads)
            raise self._closed()
        if len(payloads) == 1:
            data = self._encode(payloads[0])
            frames: Sequence[bytes] = (data,)
        else:
            frames = [self._encode(payload) for payload in payloads]
            data = b"".join(frames)
        try:
            if self._stream.write_nowait(data):
                return True
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._refused += len(payloads)
            raise self._closed() from None
        if self._ends is None:
            self._ends = deque()
        end = self._stream.written + self._stream.buffered - len(data)
        for frame in frames:
            end += len(frame)
            self._ends.append(end)
        return False

    async def wait_sent(self) -> None:
        """See the port."""
        try:
            await self._stream.flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise self._closed() from None
        self._forget_sent()

    async def ping(self) -> None:
        """See the port."""
        if self._closed_by_us is not None or self._websocket.closed is not None:
            raise self._closed()
        try:
            if await self._protocol.ping():
                return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        raise self._closed()

    async def close(self, code: int, reason: str = "") -> None:
        """See the port. A second call returns at once, whether or not the first has finished."""
        if self._closed_by_us is not None:
            return
        self._closed_by_us = self._closed() if self._websocket.closed else ConnectionClosed(code, reason)
        # Before anything that could be cancelled, so that the peer learns the code in any case.
        self._protocol.begin_close(code, reason)
        answered = False
        try:
            with trio.move_on_after(self._close_timeout):
                await self._stream.flush()
                await self._websocket.aclose()
                answered = True
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            answered = True
        finally:
            if not answered:
                self._stream.close_nowait()

    def leave(self, code: int) -> None:
        """Say goodbye without waiting, when there is no time left: cancelled from above."""
        self._protocol.begin_close(code, "")

    async def run_reader(self) -> None:
        """Read until the connection ends; owned by the server beside the gate's ``serve``."""
        try:
            await self._websocket._reader_task()
        finally:
            self._protocol.end()

    def _closed(self) -> ConnectionClosed:
        if self._closed_by_us is not None:
            return ConnectionClosed(self._closed_by_us.code, self._closed_by_us.reason)
        reason = self._websocket.closed
        if reason is None:
            return ConnectionClosed(_LOST)
        return ConnectionClosed(reason.code, reason.reason or "")

    def _forget_sent(self) -> int:
        """Drop the payloads that the kernel has taken by now; returns how many remain."""
        if self._ends is None:
            return 0
        written = self._stream.written
        while self._ends and self._ends[0] <= written:
            self._ends.popleft()
        remaining = len(self._ends)
        if not remaining:
            self._ends = None
        return remaining


def _frame_encoder(dialect: Dialect, protocol: GuardedConnection) -> FrameEncoder:
    if protocol.deflate is not None and protocol.deflate.terms is not None:
        return Deflater(protocol.deflate.terms, is_binary=dialect.is_binary).frame
    return binary_frame if dialect.is_binary else text_frame


def _only(group: BaseExceptionGroup[Exception]) -> BaseException:
    """The one exception in ``group``, or the group."""
    cause: BaseException = group
    while isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
        cause = cause.exceptions[0]
    return cause
