"""An ``httpx`` transport for long streams over plain HTTP/1.1, on Trio's streams and httptools.

Why not httpx's own: it costs twice as much CPU per token (``docs/performance.md``), and a request that
is cancelled while it waits for or opens a connection takes a slot of its pool with it for good. Here a
connection belongs either to one request, which closes it on any way out but the good end, or to the
list of idle ones. There are no slots, so none can leak.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import httpx
import trio

from gateway.adapters.readiness import HAS_EPOLL, Readiness
from gateway.adapters.silence_watch import SilenceWatch
from gateway.adapters.tcp_stream import RECEIVE_BYTES, NothingSent, TcpStream, connect_tcp
from gateway.core.http_response import ResponseReader

Connect = Callable[[str, int], Awaitable[trio.abc.Stream]]

RECEIVE_BODY = "receive_body"
"""Response extension: ``ResponseBody.receive``, to read without httpx's generators in between."""

RECEIVE_EACH = "receive_each"
"""Response extension: ``ResponseBody.receive_each``, where the connection can do that."""

_IDLE_CONNECTIONS = 64

_T = TypeVar("_T")


class _Connection:
    """A stream and where it leads; compared by identity."""

    def __init__(self, stream: trio.abc.Stream, origin: tuple[str, int]) -> None:
        self.stream = stream
        self.origin = origin
        self.idle_since = 0.0

    @property
    def is_disturbed(self) -> bool:
        """Whether anything came while idle: the peer closed it, or talks out of turn."""
        return isinstance(self.stream, TcpStream) and self.stream.has_input()


class StreamingTransport(httpx.AsyncBaseTransport):
    """Requests over plain HTTP/1.1; connections are kept ``idle_expiry`` seconds, the newest reused first.

    ``request.extensions["timeout"]`` is exact on Trio's clock: ``connect`` bounds making a connection,
    ``write`` sending the request, ``read`` each wait for something to arrive while somebody is reading.

    Raises ``httpx.ConnectError`` (also when the peer went away before it can have seen a byte),
    ``ConnectTimeout``, ``WriteTimeout``, ``ReadTimeout``, ``ReadError`` (cut before the response's
    proper end) and ``RemoteProtocolError`` (not HTTP/1.1). A request is never sent twice unless not one
    byte of it can have been seen.

    Cancellation closes the connection at once, without waiting. Reading a body to its end gives its
    connection back; closing it before that closes the connection.
    """

    def __init__(
        self,
        *,
        connect: Connect = connect_tcp,
        max_head_bytes: int = 65536,
        idle_expiry: float = 30.0,
        readiness: Readiness | None = None,
    ) -> None:
        self._connect = connect
        self._max_head_bytes = max_head_bytes
        self._idle_expiry = idle_expiry
        self._idle: list[_Connection] = []
        """Oldest first."""
        self._open: set[_Connection] = set()
        self.silence = SilenceWatch()
        self.readiness = readiness or Readiness()

    @property
    def open_connections(self) -> int:
        """Connections that exist, in use or idle."""
        return len(self._open)

    @property
    def idle_connections(self) -> int:
        """Connections that wait for another request."""
        return len(self._idle)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request; return the response when its head has come."""
        if request.url.scheme != "http" or request.method in ("HEAD", "CONNECT"):
            raise httpx.UnsupportedProtocol(
                f"This transport takes no {request.method} over {request.url.scheme}", request=request
            )
        payload = _encode(request, await request.aread())
        timeouts = request.extensions.get("timeout", {})
        origin = (request.url.host, request.url.port or 80)
        connection = await self._reuse(origin)
        was_idle = connection is not None
        while True:
            if connection is None:
                connection = await self._open_connection(origin, timeouts.get("connect"))
            body = ResponseBody(self, connection, ResponseReader(self._max_head_bytes), timeouts.get("read"))
            try:
                await body.exchange(payload, timeouts.get("write"))
            except NothingSent as error:
                await body.settle()
                if not was_idle:
                    raise httpx.ConnectError("The peer closed the new connection") from error
                connection, was_idle = None, False
            except BaseException:
                await body.settle()
                raise
            else:
                return body.response()

    async def aclose(self) -> None:
        """Close every connection, also those in use."""
        for connection in list(self._open):
            await self.close(connection)

    async def _open_connection(self, origin: tuple[str, int], timeout: float | None) -> _Connection:
        try:
            stream = await _within(timeout, lambda: self._connect(*origin), httpx.ConnectTimeout)
        except OSError as error:
            raise httpx.ConnectError(f"No connection: {error}") from error
        connection = _Connection(stream, origin)
        self._open.add(connection)
        return connection

    async def _reuse(self, origin: tuple[str, int]) -> _Connection | None:
        expired = trio.current_time() - self._idle_expiry
        while self._idle and self._idle[0].idle_since < expired:
            await self.close(self._idle[0])
        for connection in reversed(self._idle.copy()):
            if connection.origin != origin or connection not in self._idle:
                continue
            self._idle.remove(connection)
            if not connection.is_disturbed:
                return connection
            await self.close(connection)
        return None

    async def release(self, connection: _Connection) -> None:
        """Keep a connection whose exchange is over for the next one."""
        if connection not in self._open:
            return
        connection.idle_since = trio.current_time()
        self._idle.append(connection)
        if len(self._idle) > _IDLE_CONNECTIONS:
            await self.close(self._idle[0])

    async def close(self, connection: _Connection) -> None:
        """Close a connection without waiting, whatever scope this runs in."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if isinstance(connection.stream, TcpStream):
            connection.stream.close()
            return
        # A foreign stream may fail to say goodbye; it is closed all the same, and nobody is left to tell.
        with trio.CancelScope(shield=True) as scope, suppress(Exception):
            scope.cancel()
            await connection.stream.aclose()


class ResponseBody(httpx.AsyncByteStream):
    """One exchange on a connection, and after the response's head its body."""

    def __init__(
        self,
        transport: StreamingTransport,
        connection: _Connection,
        reader: ResponseReader,
        read_timeout: float | None,
    ) -> None:
        self._transport = transport
        self._connection: _Connection | None = connection
        self._reader = reader
        self._was_wholly_sent = True
        self._has_timed_out = False
        self.silence_timeout = math.inf if read_timeout is None else read_timeout
        self.waiting_since = math.inf
        if read_timeout is not None:
            transport.silence.add(self)

    async def give_up(self) -> None:
        """Called by the silence watch: nothing came for ``silence_timeout``."""
        self._has_timed_out = True
        if self._connection is not None:
            await self._transport.close(self._connection)

    async def exchange(self, payload: bytes, write_timeout: float | None) -> None:
        """Send the request and wait for the response's head."""
        assert self._connection is not None
        stream = self._connection.stream
        try:
            await _within(write_timeout, lambda: stream.send_all(payload), httpx.WriteTimeout)
        except NothingSent:
            raise
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._was_wholly_sent = False  # the peer may have answered before it hung up
        while not self._reader.status:
            if self._reader.failure is not None:
                raise self._malformed()
            await self._receive()

    def response(self) -> httpx.Response:
        """The response whose head has come, with this as its body."""
        extensions: dict[str, object] = {"http_version": b"HTTP/1.1", RECEIVE_BODY: self.receive}
        if HAS_EPOLL and self._connection is not None and isinstance(self._connection.stream, TcpStream):
            extensions[RECEIVE_EACH] = self.receive_each
        return httpx.Response(
            self._reader.status, headers=self._reader.headers, stream=self, extensions=extensions
        )

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        data = await self.receive()
        if not data:
            raise StopAsyncIteration
        return data

    async def receive(self) -> bytes:
        """All of the body that has arrived, however much that is; empty at its end.

        Raises ``httpx.ReadTimeout``, ``ReadError`` (cut) and ``RemoteProtocolError``, each only after all
        that came before it was returned. After any of them, or a cancellation, the connection is closed.
        """
        reader = self._reader
        try:
            while True:
                data = reader.take_body()
                if reader.is_complete:
                    await self.settle()
                    return data
                if data:
                    return data
                if reader.failure is not None:
                    raise self._malformed()
                await self._receive()
        except BaseException:
            await self.settle()
            raise

    async def receive_each(self, take: Callable[[bytes], bool]) -> None:
        """Give ``take`` the body as it arrives, without a task switch per read.

        Returns when ``take`` returned False, and when it takes ``receive`` to say what comes next: the end of
        the body, or that it was cut. Raises what ``take`` does and what ``receive`` does.
        """
        reader, connection = self._reader, self._connection
        if connection is None or reader.is_complete or reader.failure is not None:
            return
        assert isinstance(connection.stream, TcpStream)

        def arrived(data: bytes, now: float) -> bool:
            self.waiting_since = now
            reader.feed(data)
            if reader.is_complete or reader.failure is not None:
                return False
            body = reader.take_body()
            return not body or take(body)

        self.waiting_since = trio.current_time()
        try:
            await connection.stream.receive_each(self._transport.readiness, arrived)
        except BaseException as error:
            await self.settle()
            if isinstance(error, trio.BrokenResourceError | trio.ClosedResourceError):
                raise self._lost(error) from error
            raise
        self.waiting_since = math.inf

    async def aclose(self) -> None:
        """End the exchange: at once, without waiting, in a cancelled scope too."""
        connection = self._connection
        if (
            connection is not None
            and isinstance(connection.stream, TcpStream)
            and not self._reader.is_complete
        ):
            # A runtime writes its last event and the end of the body one after the other. Whoever leaves
            # between the two finds the end in the kernel now, and saves the next turn a connect.
            rest = connection.stream.receive_nowait()
            if rest:
                self._reader.feed(rest)
        await self.settle()

    async def settle(self) -> None:
        """Let go of the connection: to be used again after the proper end, closed otherwise."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._transport.silence.discard(self)
        if self._was_wholly_sent and self._reader.leaves_connection_usable:
            await self._transport.release(connection)
        else:
            await self._transport.close(connection)

    async def _receive(self) -> None:
        if self._connection is None:
            raise httpx.ReadError("The response was closed")
        self.waiting_since = trio.current_time()
        try:
            data = await self._connection.stream.receive_some(RECEIVE_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise self._lost(error) from error
        self.waiting_since = math.inf
        if data:
            self._reader.feed(data)
            return
        self._reader.feed_eof()
        if not self._reader.is_complete and self._reader.failure is None:
            raise httpx.ReadError("The peer closed the connection before the end of its response")

    def _lost(self, error: Exception) -> httpx.TransportError:
        if self._has_timed_out:
            return httpx.ReadTimeout(f"Nothing came for {self.silence_timeout:g} s")
        return httpx.ReadError(f"The connection was lost: {error}")

    def _malformed(self) -> httpx.RemoteProtocolError:
        return httpx.RemoteProtocolError(f"The peer's answer is no use: {self._reader.failure}")


async def _within(
    timeout: float | None, operation: Callable[[], Awaitable[_T]], error: type[httpx.TimeoutException]
) -> _T:
    if timeout is None:
        return await operation()
    with trio.move_on_after(timeout):
        return await operation()
    raise error(f"Not done within {timeout:g} s")


_UNSAFE = re.compile(rb"[\r\n\0]")


def _encode(request: httpx.Request, body: bytes) -> bytes:
    """Head and body as one piece, to be sent with one system call (RFC 9112 sections 3 and 6)."""
    fields = [
        (name, value)
        for name, value in request.headers.raw
        if name.lower() not in (b"content-length", b"transfer-encoding")
    ]
    if body or request.method in ("POST", "PUT", "PATCH"):
        fields.append((b"Content-Length", b"%d" % len(body)))
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
    lines += [b"%b: %b" % field for field in fields]
    if any(_UNSAFE.search(line) for line in lines):
        raise httpx.LocalProtocolError("A line of the request's head holds a line end", request=request)
    return b"\r\n".join([*lines, b"", body])
