"""wsproto's connection with its sharp edges covered, as trio-websocket uses it for one server socket.

What it adds to ``wsproto.WSConnection``: a broken rule costs the peer its socket *with a close frame that
says why*; a message in many pieces costs no more memory than its bytes; floods of control frames or tiny
fragments end; a legal ping during a close that we began raises nothing; a pong is told to whoever waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import trio
import wsproto
from wsproto.connection import ConnectionState, ConnectionType
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Message,
    Ping,
    Pong,
    TextMessage,
)

from gateway.adapters.direct_stream import DirectStream
from gateway.adapters.permessage_deflate import BoundedDeflate
from gateway.core.websocket_frames import ping_frame, short_client_frame
from gateway.ports import Hear

MAX_CONTROL_FRAMES_PER_SECOND: Final = 50
"""Pings and pongs together. Clients ping every few seconds and answer one ping of ours every 20 s; each ping
costs us a write. Go's HTTP/2 server, which met such floods (CVE-2019-9512), counts queued answers instead."""

MAX_TINY_FRAGMENTS_PER_SECOND: Final = 200
"""Unfinished frames below ``TINY_FRAGMENT`` bytes. A sender that streams a message cuts it in kilobytes: 200
of those a second would be a client typing faster than it can render."""

TINY_FRAGMENT: Final = 256
"""Bytes (of text: characters) below which a fragment costs us more than it costs its sender."""

_TEXT: Final = 1  # RFC 6455 section 5.2
_BINARY: Final = 2
_PONG: Final = 10
_POLICY_VIOLATION: Final = 1008  # RFC 6455 section 7.4.1
_MESSAGE_TOO_BIG: Final = 1009


class _FewEvents(list[Event]):
    """What wsproto needs of a deque for the one or two events of a read, in a tenth of its memory."""

    __slots__ = ()

    def popleft(self) -> Event:
        """The oldest."""
        return self.pop(0)


class GuardedConnection(wsproto.WSConnection):
    """The protocol of one server socket; frames of its own go out through ``stream`` without waiting."""

    def __init__(self, stream: DirectStream, max_message_size: int, *, compresses: bool = False) -> None:
        super().__init__(ConnectionType.SERVER)
        self.deflate = BoundedDeflate(max_message_size) if compresses else None
        """permessage-deflate, where it is allowed; agreed on if it has terms after the handshake."""
        self._stream = stream
        self._max_message_size = max_message_size
        self._pieces: bytearray | None = None
        self._fragment_size = 0
        self._window_ends = 0.0
        self._control_frames = 0
        self._tiny_fragments = 0
        self._pings_sent = 0
        self._pong_awaited: tuple[bytes, trio.Event] | None = None

    # ------------------------------------------------------------------ what goes out

    def send(self, event: Event) -> bytes:
        """The bytes of ``event``; none for a pong that may no longer be sent because we are closing."""
        if isinstance(event, Pong) and self.state is not ConnectionState.OPEN:
            return b""
        if isinstance(event, AcceptConnection) and self.deflate is not None:
            event = replace(event, extensions=[*event.extensions, self.deflate])
        if isinstance(event, CloseConnection):
            # When the close begins here, the peer may still be sending.
            self._stream.lingers = self.state is ConnectionState.OPEN
        return super().send(event)

    def begin_close(self, code: int, reason: str) -> None:
        """Write a close frame if none was written or received yet. Never waits, never raises."""
        if self.state is ConnectionState.OPEN:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                self._stream.write_nowait(self.send(CloseConnection(code, reason)))

    def forget_handshake(self) -> None:
        """Give back what only the handshake needed: 8 KB per socket, most of it h11's; a deque's 0.6 KB."""
        del self.handshake
        assert self.connection is not None, "accepted"
        self.connection._events = _FewEvents(self.connection._events)  # type: ignore[assignment]

    async def ping(self) -> bool:
        """Send a ping; True when its pong has come, False when the connection ended first."""
        self._pings_sent += 1
        payload = self._pings_sent.to_bytes(8, "big")
        pong = trio.Event()
        self._pong_awaited = (payload, pong)
        try:
            await self._stream.send_all(ping_frame(payload))
            await pong.wait()
            return self._pong_awaited is None
        finally:
            self._pong_awaited = None

    def end(self) -> None:
        """Nothing more will come: wake whoever waits for a pong."""
        if self._pong_awaited is not None:
            self._pong_awaited[1].set()

    # ------------------------------------------------------------------ what comes in

    def events(self) -> Iterator[Event]:  # type: ignore[override]
        """The events of what has come: whole messages, pings, and one close for whatever ends it."""
        if self.connection is None:
            yield from super().events()
            return
        for event in self.connection.events():
            if isinstance(event, Message):
                outcome = self._take_piece(event)
                if outcome is not None:
                    yield outcome
                    if isinstance(outcome, CloseConnection):
                        return
            elif isinstance(event, CloseConnection):
                if self.state is ConnectionState.OPEN:  # wsproto's way to say that the peer broke a rule
                    event = self._fail(event.code, event.reason or "")
                elif self.state is ConnectionState.REMOTE_CLOSING:
                    self._answer_close(event)
                elif self.state is ConnectionState.CLOSED:
                    self._stream.lingers = False  # both have said goodbye
                yield event
            elif self._is_flood(control=True):
                yield self._fail(_POLICY_VIOLATION, "too many pings and pongs")
                return
            elif isinstance(event, Ping):
                yield event
            elif isinstance(event, Pong):
                self._take_pong(bytes(event.payload))

    def take_short(self, data: bytes, hear: Hear | None) -> bool:
        """Deal with ``data`` if it is one short frame that wsproto need not see; False: nothing was done.

        A pong, or a message that ``hear`` takes. wsproto's way to an event costs 40 µs, and most of what a
        client sends are acknowledgements: one a second.
        """
        frame = short_client_frame(data)
        if frame is None or not self._is_between_frames():
            return False
        opcode, payload = frame
        if opcode == _PONG:
            if self._is_flood(control=True):
                return False  # It counts once more, and over the limit is over the limit.
            self._take_pong(payload)
            return True
        if hear is None or self._is_inside_message():
            return False
        if opcode != _TEXT:
            return opcode == _BINARY and hear(payload)
        try:
            text = payload.decode()
        except UnicodeDecodeError:
            return False
        return hear(text)

    def _is_between_frames(self) -> bool:
        if self.connection is None or self.state is not ConnectionState.OPEN:
            return False
        decoder = self.connection._proto._frame_decoder
        return decoder.header is None and not len(decoder.buffer)

    def _is_inside_message(self) -> bool:
        assert self.connection is not None
        return self.connection._proto._message_decoder.opcode is not None

    def _take_piece(self, event: Message[Any]) -> Event | None:
        """A whole message, a close when a rule was broken, or None while more pieces have to come."""
        data: bytes | str = event.data
        self._fragment_size += len(data)
        if event.frame_finished:
            size, self._fragment_size = self._fragment_size, 0
            if not event.message_finished and size < TINY_FRAGMENT and self._is_flood(control=False):
                return self._fail(_POLICY_VIOLATION, "too many tiny fragments")
        if event.message_finished and self._pieces is None:
            if self._is_too_big(data):
                return self._fail_too_big()
            return event
        if self._pieces is None:
            self._pieces = bytearray()
        self._pieces += data.encode() if isinstance(data, str) else data
        if len(self._pieces) > self._max_message_size:
            return self._fail_too_big()
        if not event.message_finished:
            return None
        whole, self._pieces = self._pieces, None
        if isinstance(event, TextMessage):
            return TextMessage(data=whole.decode())
        return BytesMessage(data=bytes(whole))

    def _is_too_big(self, data: bytes | str) -> bool:
        if isinstance(data, str) and len(data) * 4 > self._max_message_size:
            return len(data.encode()) > self._max_message_size
        return len(data) > self._max_message_size

    def _fail_too_big(self) -> CloseConnection:
        self._pieces = None
        return self._fail(_MESSAGE_TOO_BIG, f"a message may have {self._max_message_size} bytes")

    def _is_flood(self, *, control: bool) -> bool:
        now = trio.current_time()
        if now >= self._window_ends:
            self._window_ends = now + 1.0
            self._control_frames = self._tiny_fragments = 0
        if control:
            self._control_frames += 1
        else:
            self._tiny_fragments += 1
        return (
            self._control_frames > MAX_CONTROL_FRAMES_PER_SECOND
            or self._tiny_fragments > MAX_TINY_FRAGMENTS_PER_SECOND
        )

    def _answer_close(self, event: CloseConnection) -> None:
        """Answer now: trio-websocket would wait first, and may be torn down while it does."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            self._stream.write_nowait(self.send(event.response()))
        self._stream.lingers = self._stream.buffered > 0

    def _take_pong(self, payload: bytes) -> None:
        if self._pong_awaited is not None and self._pong_awaited[0] == payload:
            pong = self._pong_awaited[1]
            self._pong_awaited = None
            pong.set()

    def _fail(self, code: int, reason: str) -> CloseConnection:
        """*Fail the WebSocket connection* (RFC 6455 section 7.1.7): our close frame, then no more of it."""
        self.begin_close(code, reason)
        return CloseConnection(code=code, reason=reason)
