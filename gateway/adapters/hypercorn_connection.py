"""One connection as hypercorn gets to see it: checked heads only, bodies in time, readers that read.

hypercorn's Trio worker cuts neither slow bodies nor slow readers, takes request heads that two parsers read
differently, and ends the process on some. It reads later requests of a kept-alive connection by itself, so
checking the first head is not enough: every byte passes through ``CheckedStream``, which gives it one whole
checked request at a time.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio
from attrs import frozen
from hypercorn.config import Config
from hypercorn.events import Event, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState

from gateway.adapters.direct_stream import LINGER_SECONDS, DirectStream
from gateway.core.http_refusal import refusal_of
from gateway.core.request_body import RequestBody
from gateway.core.request_head import RequestHead, RequestRefused, check_request_head, find_head_end

MINIMUM_RATE: Final = 1024
"""Bytes per second below which a body or a response uses up its allowance of time; Apache's
``mod_reqtimeout`` asks for 500."""

_SEND_BYTES: Final = 64 * 2**10


@frozen
class HttpLimits:
    """What a request may cost; times in seconds, sizes in bytes."""

    head_bytes: int = 16 * 2**10
    head_timeout: float = 8.0
    """From a head's first byte to its last."""
    progress_timeout: float = 7.0
    """How long we wait for a client that sends its body, or reads its response, below ``MINIMUM_RATE``."""


class CheckedStream(trio.abc.Stream):
    """A stream for ``hypercorn.trio.tcp_server.TCPServer`` that begins with ``head``.

    When a later request asks for a WebSocket, hypercorn is told that the connection ended, and ``upgrade``
    holds the head: the stream below is untouched and gives what follows it.

    It has no ``send_eof``, and must not get one: hypercorn would wait in it before it closes, and Quart-Trio
    cancels it right there, so that a connection with ``Connection: close`` would stay open for good.
    """

    def __init__(
        self,
        stream: DirectStream,
        head: RequestHead,
        limits: HttpLimits,
        refused: Callable[[RequestRefused], None],
    ) -> None:
        assert stream.socket is not None
        self.socket: socket.socket = stream.socket
        """Where hypercorn reads the addresses from."""
        self.upgrade: RequestHead | None = None
        self._stream = stream
        self._limits = limits
        self._refused = refused
        self._buffer = b""
        self._closed = False
        self._idle = trio.Event()
        self._begin_request(head)

    def _begin_request(self, head: RequestHead) -> None:
        self._head = head.raw
        self._body = RequestBody(head)
        self._idle = trio.Event()
        self._has_response = False
        self._body_clock = _Patience(self._limits.progress_timeout)
        self._response_clock = _Patience(self._limits.progress_timeout)

    def end_request(self) -> None:
        """The response is complete: the next head may be looked at."""
        self._has_response = False
        self._idle.set()

    # ------------------------------------------------------------------ reading

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next bytes of the current request, or the whole head of the next; ``b""`` at the end."""
        if self._closed:
            raise trio.ClosedResourceError
        try:
            if self._head:
                await trio.lowlevel.checkpoint()
                return self._take_head()
            if not self._body.is_complete:
                return await self._receive_body(max_bytes)
            return await self._receive_head()
        except RequestRefused as refusal:
            await self._answer(refusal)
            return b""

    def _take_head(self) -> bytes:
        head, self._head = self._head, b""
        return head

    async def _receive_body(self, max_bytes: int | None) -> bytes:
        if not self._buffer:
            chunk = None
            with self._body_clock.limit():
                chunk = await self._stream.receive_some(max_bytes)
            if chunk is None:
                raise RequestRefused(408, "slow_body", "The request body came too slowly; send it again.")
            self._body_clock.progress(len(chunk))
            self._buffer = chunk
        taken = self._body.take(self._buffer)
        data, self._buffer = self._buffer[:taken], self._buffer[taken:]
        return data

    async def _receive_head(self) -> bytes:
        deadline = trio.CancelScope()
        with deadline:
            while True:
                if self._buffer and not self._idle.is_set():
                    # Pipelined. It waits, so that no answer of ours can get into the middle of a response.
                    await self._idle.wait()
                end = find_head_end(self._buffer, self._limits.head_bytes)
                if end is not None:
                    return self._accept(check_request_head(self._buffer[:end]), self._buffer[end:])
                if self._buffer and deadline.deadline == float("inf"):
                    deadline.deadline = trio.current_time() + self._limits.head_timeout
                chunk = await self._stream.receive_some(self._limits.head_bytes)
                if not chunk:
                    return b""
                self._buffer += chunk
        raise RequestRefused(408, "slow_head", "The request head came too slowly; send it again.")

    def _accept(self, head: RequestHead, rest: bytes) -> bytes:
        if head.is_websocket:
            self.upgrade = head
            self._closed = True
            self._stream.unread(rest)
            return b""
        self._begin_request(head)
        self._buffer = rest
        return self._take_head()

    # ------------------------------------------------------------------ writing

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send; a client that reads too slowly loses its connection (``trio.BrokenResourceError``).

        Bounded also where hypercorn shields it from cancellation.
        """
        if self._closed:
            raise trio.ClosedResourceError
        if bytes(data[:10]) != b"HTTP/1.1 1":  # 100 Continue is not the response yet
            self._has_response = True
        with memoryview(data) as view:
            # In pieces, so that what the client does not take is not kept twice.
            for start in range(0, len(view), _SEND_BYTES):
                await self._send_piece(bytes(view[start : start + _SEND_BYTES]))

    async def _send_piece(self, piece: bytes) -> None:
        sent = False
        with self._response_clock.limit():
            await self._stream.send_all(piece)
            sent = True
        if not sent:
            self._refused(RequestRefused(408, "slow_reader", "The response was not read."))
            self._closed = True
            self._stream.close_nowait()
            raise trio.BrokenResourceError
        self._response_clock.progress(len(piece))

    async def wait_send_all_might_not_block(self) -> None:
        """See ``trio.abc.SendStream``."""
        await self._stream.flush()

    async def aclose(self) -> None:
        """Close for hypercorn; the stream below goes on if it was handed over with ``upgrade``."""
        if self.upgrade is None:
            if not self._body.is_complete:
                self._stream.lingers = True  # answered before the body was read
            self._closed = True
            await self._stream.aclose()
        else:
            await trio.lowlevel.checkpoint()

    async def _answer(self, refusal: RequestRefused) -> None:
        self._refused(refusal)
        self._closed = True  # from here on hypercorn writes nothing
        if not self._has_response:
            self._stream.lingers = True
            with trio.move_on_after(LINGER_SECONDS), suppress(trio.BrokenResourceError):
                await self._stream.send_all(refusal_of(refusal).as_response())


class _Patience:
    """How long one side of one request may keep us waiting: used up by waits, earned by bytes that move.

    Never more than the allowance, or megabytes that the kernel took at once would pay for hours.
    """

    def __init__(self, allowance: float) -> None:
        self._allowance = self._left = allowance
        self._since = 0.0

    def limit(self) -> trio.CancelScope:
        """A scope that ends when patience does; to be used for the next wait, before ``progress``."""
        self._since = trio.current_time()
        return trio.CancelScope(deadline=self._since + self._left)

    def progress(self, count: int) -> None:
        """The wait is over and ``count`` bytes have moved."""
        waited = trio.current_time() - self._since
        self._left = min(self._allowance, self._left - waited + count / MINIMUM_RATE)


class CheckedServer(TCPServer):
    """hypercorn's server of one connection, which tells its stream when a response is complete."""

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        state: ConnectionState,
        stream: CheckedStream,
    ) -> None:
        super().__init__(app, config, context, state, stream)  # type: ignore[arg-type]  # not TLS: duck-typed
        self._checked = stream

    async def protocol_send(self, event: Event) -> None:
        """Pass on what the protocol says."""
        if not isinstance(event, Updated):
            await super().protocol_send(event)
            return
        if event.idle:
            self._checked.end_request()
        # It comes in the application's task, which Quart-Trio has cancelled by then; unshielded, the
        # keep-alive timeout would never be armed again.
        with trio.CancelScope(shield=True):
            await super().protocol_send(event)

    async def _read_data(self) -> None:
        await super()._read_data()
        # Without this the connection's task lives on until the keep-alive timeout.
        await self.idle_task.stop()
