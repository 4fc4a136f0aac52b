"""The bytes of one TCP connection, written without waiting for as long as the kernel takes them.

``trio.SocketStream.send_all`` passes through the scheduler on every call. A token is a hundred bytes on a
socket that is nearly always writable, so here a write is one ``send(2)``; only what the kernel refuses is
kept in a buffer and waited for. Everything that is written, by whomever, passes through that one buffer in
order: a frame is never cut by another.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final, Protocol, final

import trio

LINGER_SECONDS: Final = 2.0
"""How long a connection that we ended is read on, so that our last bytes are not lost to a reset (RFC 9112
section 9.6). nginx waits 5 s between reads (``lingering_timeout``); ours hold a task each, so less."""

LINGER_BYTES: Final = 16 * 2**20
"""How much is read and thrown away meanwhile: a message of the largest size that anyone sends by mistake."""

_RECEIVE_BYTES: Final = 16 * 2**10
_DISCARD_BYTES: Final = 64 * 2**10


class ReadyCalls(Protocol):
    """Calls back when a descriptor is readable, for all connections together."""

    async def call_each(self, descriptor: int, ready: Callable[[float], bool]) -> None:
        """Call ``ready`` with Trio's time whenever there is input, until it returns False or raises."""
        ...

    def release(self, descriptor: int) -> None:
        """End the wait for ``descriptor``, if there is one, with ``trio.ClosedResourceError``."""
        ...


@final
class DirectStream(trio.abc.Stream):
    """A stream over a connected socket, with ``write_nowait`` beside ``send_all``.

    Takes the socket out of a ``trio.SocketStream``, which is unusable afterwards. Any other
    ``trio.abc.Stream`` (memory streams) works too; there every write is buffered and ``flush`` hands it
    over, and a ``flush`` cancelled half-way leaves the stream broken, because it cannot be known how much
    went out.

    *Resource handling*: whoever made the stream calls ``release`` or ``close_nowait`` in the end. ``aclose``
    closes the descriptor as well, unless ``lingers`` is set: then it ends both directions and leaves the
    descriptor to ``release``.

    *Error handling*: ``trio.BrokenResourceError`` when the connection is lost, ``trio.ClosedResourceError``
    when we closed it. Afterwards ``written`` still says how far it came.
    """

    __slots__ = (
        "_arrived",
        "_broken",
        "_buffer",
        "_closed",
        "_descriptor",
        "_ended",
        "_flushing",
        "_inner",
        "_ready_calls",
        "_send",
        "_take",
        "_unread",
        "lingers",
        "socket",
        "written",
    )

    def __init__(self, transport: trio.abc.Stream) -> None:
        self.socket: socket.socket | None = None
        self._inner: trio.abc.Stream | None = None
        if isinstance(transport, trio.SocketStream):
            taken = transport.socket
            family, kind, protocol = taken.family, taken.type, taken.proto
            self.socket = socket.socket(family, kind, protocol, fileno=taken.detach())
            self.socket.setblocking(False)
            self._descriptor = self.socket.fileno()
            self._send: Callable[[bytes], int] = self.socket.send
        else:
            self._inner = transport
            self._descriptor = -1
            self._send = _take_nothing
        self._unread = b""
        self._buffer = bytearray()
        self._flushing: trio.Event | None = None
        self._broken = False
        self._ended = False
        self._closed = False
        self.lingers = False
        """Whether our last bytes deserve that the peer gets time to read them before the descriptor goes."""
        self._ready_calls: ReadyCalls | None = None
        self._take: Callable[[bytes], bool] = _take_none
        self._arrived = b""
        self.written = 0
        """How many bytes the kernel has taken since the connection began."""

    # ------------------------------------------------------------------ writing

    @property
    def buffered(self) -> int:
        """How many bytes were given to us and not taken by the kernel yet."""
        return len(self._buffer)

    def write_nowait(self, data: bytes) -> bool:
        """Write after all that was written before; True when the kernel took all of it.

        False: the rest is buffered, and somebody has to ``flush``. Raises as the class says; then nothing
        of ``data`` was taken.
        """
        if self._buffer:
            self._check_writable()
            self._buffer += data
            return False
        try:
            sent = self._send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._broken = True
            self._send = _raise_broken
            raise trio.BrokenResourceError from None
        self.written += sent
        if sent == len(data):
            return True
        self._buffer += memoryview(data)[sent:]
        return False

    async def flush(self) -> None:
        """Wait until the kernel has taken all that was written before this call.

        Cancellation loses and repeats nothing: what was not taken stays buffered. Several tasks may flush.
        """
        goal = self.written + len(self._buffer)
        if self.written >= goal:
            self._check_writable()
            await trio.lowlevel.checkpoint()
            return
        while self.written < goal:
            self._check_writable()
            if self._flushing is not None:
                # One descriptor has room for one waiter; when that one leaves, the next takes its place.
                await self._flushing.wait()
                continue
            self._flushing = trio.Event()
            try:
                await self._write_buffer()
            finally:
                left, self._flushing = self._flushing, None
                left.set()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write after all that was written before, and wait until the kernel has taken it.

        Cancelled while it waits, ``data`` stays in the buffer as a whole: a frame is never left half sent
        for another to follow.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if not data:
            return
        if not self.write_nowait(bytes(data)):
            await self.flush()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until nothing is buffered."""
        await self.flush()

    async def _write_buffer(self) -> None:
        if self.socket is None:
            assert self._inner is not None
            chunk = bytes(self._buffer)
            try:
                await self._inner.send_all(chunk)
            except BaseException:
                self._broken = True
                raise
            sent = len(chunk)
        else:
            await trio.lowlevel.wait_writable(self._descriptor)
            try:
                sent = self.socket.send(self._buffer)
            except BlockingIOError:
                return
            except OSError:
                self._check_writable()
                self._broken = True
                self._send = _raise_broken
                raise trio.BrokenResourceError from None
        self.written += sent
        if sent == len(self._buffer):
            self._buffer = bytearray()  # gives a large buffer back
        else:
            del self._buffer[:sent]

    def _check_writable(self) -> None:
        if self._ended:
            raise trio.ClosedResourceError
        if self._broken:
            raise trio.BrokenResourceError

    # ------------------------------------------------------------------ reading

    def unread(self, data: bytes) -> None:
        """Put ``data`` back: ``receive_some`` gives it first."""
        self._unread = data + self._unread

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """At least one byte and at most ``max_bytes``, or ``b""`` at the end. Cancelling loses nothing."""
        limit = _RECEIVE_BYTES if max_bytes is None else max_bytes
        if self._ended:
            raise trio.ClosedResourceError
        if self._unread:
            await trio.lowlevel.checkpoint()
            data, self._unread = self._unread[:limit], self._unread[limit:]
            return data
        if self.socket is None:
            assert self._inner is not None
            return bytes(await self._inner.receive_some(limit))
        if self._ready_calls is not None:
            await self._ready_calls.call_each(self._descriptor, partial(self._take_arrived, limit))
            data, self._arrived = self._arrived, b""
            return data
        while True:
            await trio.lowlevel.wait_readable(self._descriptor)
            with suppress(BlockingIOError):
                return self._receive_nowait(limit)

    def take_each(self, ready_calls: ReadyCalls, take: Callable[[bytes], bool]) -> None:
        """From now on show ``take`` what arrives while ``receive_some`` waits, which does not return what it
        takes: that costs no pass through the scheduler. Needs a socket below."""
        if self.socket is not None:
            self._ready_calls = ready_calls
            self._take = take

    def _take_arrived(self, limit: int, _: float) -> bool:
        try:
            data = self._receive_nowait(limit)
        except BlockingIOError:
            return True
        if data and self._take(data):
            return True
        self._arrived = data
        return False

    def _receive_nowait(self, limit: int) -> bytes:
        assert self.socket is not None
        try:
            return self.socket.recv(limit)
        except BlockingIOError:
            raise
        except OSError:
            if self._ended:
                raise trio.ClosedResourceError from None
            self._broken = True
            self._send = _raise_broken
            raise trio.BrokenResourceError from None

    # ------------------------------------------------------------------ ending

    async def aclose(self) -> None:
        """End both directions; close the descriptor too, unless ``lingers`` is set."""
        if self.lingers:
            self._end()
        else:
            self.close_nowait()
            if self._inner is not None:
                await self._inner.aclose()
                return
        await trio.lowlevel.checkpoint()

    def close_nowait(self) -> None:
        """Close at once. What the kernel has taken still goes out, if the peer has sent nothing unread."""
        self._end()
        if self._closed:
            return
        self._closed = True
        if self.socket is not None:
            if self.lingers:
                # Bytes left unread make the kernel send a reset, and a reset may overtake our last words.
                with suppress(OSError):
                    self.socket.shutdown(socket.SHUT_WR)
                    self.socket.recv(_DISCARD_BYTES)
            self._wake()
            self._ready_calls, self._take = None, _take_none  # they lead back here
            self.socket.close()

    async def release(self) -> None:
        """End the stream and give the descriptor back, after lingering if ``lingers`` is set.

        Takes at most ``LINGER_SECONDS``; cancelled, it closes at once.
        """
        try:
            if self.lingers and not self._closed and not self._broken:
                with (
                    trio.move_on_after(LINGER_SECONDS),
                    suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError),
                ):
                    await self._linger()
        finally:
            self.close_nowait()
            if self._inner is not None:
                await trio.aclose_forcefully(self._inner)

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._send = _raise_closed
        if self.socket is not None and not self._closed:
            self._wake()

    def _wake(self) -> None:
        trio.lowlevel.notify_closing(self._descriptor)
        if self._ready_calls is not None:
            self._ready_calls.release(self._descriptor)

    async def _linger(self) -> None:
        self._end()
        while self._buffer:
            await self._write_buffer()
        if self.socket is None:
            return
        self.socket.shutdown(socket.SHUT_WR)
        discarded = 0
        while discarded < LINGER_BYTES:
            await trio.lowlevel.wait_readable(self._descriptor)
            try:
                received = len(self.socket.recv(_DISCARD_BYTES))
            except BlockingIOError:
                continue
            if not received:
                return
            discarded += received


def _take_none(_data: bytes) -> bool:
    return False


def _take_nothing(_data: bytes) -> int:
    return 0


def _raise_broken(_data: bytes) -> int:
    raise trio.BrokenResourceError


def _raise_closed(_data: bytes) -> int:
    raise trio.ClosedResourceError
