"""A client's TCP connection as a Trio stream, read and written with as few system calls as there can be."""

from __future__ import annotations

import socket
from collections.abc import Callable

import trio

from gateway.adapters.readiness import Readiness

RECEIVE_BYTES = 65536
"""Most that one read takes: more than a burst brings between two passes of the scheduler."""


class NothingSent(trio.BrokenResourceError):
    """The connection was gone before the kernel took one byte: the peer cannot have seen the request."""


class TcpStream(trio.abc.Stream):
    """A connected TCP socket, read with one system call per wake-up.

    ``trio.SocketStream`` tries to read before it waits. Between two tokens there is nothing to read, so
    that try costs a system call and an exception every time: 5 µs of 33 per token.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._readiness: Readiness | None = None
        """Where a task waits in ``receive_each``."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What has arrived, at least one byte; empty at the end. Cancelling loses nothing."""
        if self._socket.fileno() == -1:
            # wait_readable would raise ValueError, and leave Trio's table of waiters in disorder.
            raise trio.ClosedResourceError("this stream was closed before")
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return self._socket.recv(max_bytes or RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError(f"receiving failed: {error}") from error

    async def receive_each(self, readiness: Readiness, take: Callable[[bytes, float], bool]) -> None:
        """Give ``take`` what arrives, with Trio's time, until it returns False or the connection has ended.

        Raises what ``take`` does, ``trio.BrokenResourceError`` and ``trio.ClosedResourceError``. Of the end
        only the next ``receive_some`` tells. Cancelling loses nothing.
        """
        receive = self._socket.recv

        def ready(now: float) -> bool:
            try:
                data = receive(RECEIVE_BYTES)
            except BlockingIOError:
                return True
            except OSError as error:
                raise trio.BrokenResourceError(f"receiving failed: {error}") from error
            return bool(data) and take(data, now)

        descriptor = self._socket.fileno()
        if descriptor == -1:
            raise trio.ClosedResourceError("this stream was closed before")
        self._readiness = readiness
        try:
            await readiness.call_each(descriptor, ready)
        finally:
            self._readiness = None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Give all of ``data`` to the kernel. Raises ``NothingSent`` when it took none of it."""
        await trio.lowlevel.checkpoint()
        if self._socket.fileno() == -1:
            raise trio.ClosedResourceError("this stream was closed before")
        unsent = memoryview(data)
        while unsent:
            try:
                unsent = unsent[self._socket.send(unsent) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)
            except OSError as error:
                kind = NothingSent if len(unsent) == len(data) else trio.BrokenResourceError
                raise kind(f"sending failed: {error}") from error

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the kernel may take more."""
        await trio.lowlevel.wait_writable(self._socket)

    def has_input(self) -> bool:
        """Whether a read would not wait: data, the peer's end of stream, or an error."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def receive_nowait(self) -> bytes:
        """What has arrived by now; empty when nothing has, or nothing will."""
        try:
            return self._socket.recv(RECEIVE_BYTES)
        except OSError:
            return b""

    def close(self) -> None:
        """Close the socket at once; who waits on it gets ``trio.ClosedResourceError``."""
        if self._socket.fileno() != -1:
            if self._readiness is not None:
                self._readiness.release(self._socket.fileno())
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    async def aclose(self) -> None:
        """Close the socket; it is closed even when this is cancelled."""
        self.close()
        await trio.lowlevel.checkpoint()


async def connect_tcp(host: str, port: int) -> trio.abc.Stream:
    """Connect to the first address of ``host`` that answers (RFC 8305). Raises ``OSError``."""
    opened = await trio.open_tcp_stream(host, port)
    return TcpStream(socket.socket(fileno=opened.socket.detach()))
