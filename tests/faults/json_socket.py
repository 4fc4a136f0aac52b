"""A v2 socket in JSON for clients that are many: objects in, objects out, acknowledgements by themselves.

Asyncio's protocols and no more, so that the machine is left to the gateways.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import msgspec

from gateway.bench.socket_client import masked_frame, whole_frames

ACK_EVENTS = 100
"""protocol.md section 4: an acknowledgement at the latest every 100 events …"""
ACK_SECONDS = 1.0
"""… or every second."""


class Client(Protocol):
    """Whose socket it is."""

    @property
    def last_seq(self) -> int:
        """The newest event it has."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether it wants no more."""
        ...

    def welcome(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """The first object; gives what there is to say."""
        ...

    def take(self, item: dict[str, Any], now: float) -> None:
        """One object after the welcome."""
        ...


class JsonSocket(asyncio.Protocol):
    """One socket. ``closed`` is done with its close code; 1006 without one."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._rest = b""
        self._is_upgraded = False
        self.was_welcome = False
        self.come_back_at: float | None = None
        self.closed: asyncio.Future[int] = self._loop.create_future()
        self.heard_at = self._loop.time()
        self._unacked = 0
        self._ack_timer: asyncio.TimerHandle | None = None

    def open(self, request: bytes) -> None:
        """Ask for the upgrade."""
        self._transport.write(request)

    def say(self, message: dict[str, Any]) -> None:
        """Send one object."""
        if not self._transport.is_closing():
            self._transport.write(masked_frame(msgspec.json.encode(message)))

    def abort(self) -> None:
        """Drop it."""
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, _error: Exception | None) -> None:
        """Called by asyncio."""
        self._over(1006)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        now = self.heard_at = self._loop.time()
        data = self._rest + data
        if not self._is_upgraded:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._rest = head
                return
            if b" 101 " not in head.split(b"\r\n", 1)[0]:
                self._over(1013 if b" 503 " in head else 1006)
                return
            self._is_upgraded = True
        end_of_frames, control = whole_frames(data)
        self._rest = data[end_of_frames:]
        at = 0
        for opcode, start, stop in control:
            head_at = start - (2 if stop - start < 126 else 4)
            self._frames(data[at:head_at], now)
            at = stop
            if opcode == 9:
                self._transport.write(masked_frame(data[start:stop], opcode=10))
            elif opcode == 8:
                self._transport.write(masked_frame(data[start : start + 2], opcode=8))
                self._over(int.from_bytes(data[start : start + 2], "big") or 1005)
        self._frames(data[at:end_of_frames], now)

    def _frames(self, frames: bytes, now: float) -> None:
        at = 0
        while at < len(frames):
            length, start = frames[at + 1] & 127, at + 2
            if length == 126:
                length, start = int.from_bytes(frames[start : start + 2], "big"), start + 2
            elif length == 127:
                length, start = int.from_bytes(frames[start : start + 8], "big"), start + 8
            at = start + length
            value = msgspec.json.decode(frames[start:at])
            for item in value if isinstance(value, list) else [value]:
                self._take(item, now)

    def _take(self, item: dict[str, Any], now: float) -> None:
        client = self._client
        if not self.was_welcome:
            self.was_welcome = True
            for message in client.welcome(item):
                self.say(message)
            return
        if item["type"] == "draining":
            self.come_back_at = now + item["reconnect_after_ms"] / 1000
            # A client leaves by itself then, whether the gateway has closed the socket or not.
            self._loop.call_at(self.come_back_at, self._over, 1012)
            return
        client.take(item, now)
        self._unacked += 1
        if self._unacked >= ACK_EVENTS or item["type"] == "turn_ended":
            self._ack()
        elif self._ack_timer is None:
            self._ack_timer = self._loop.call_later(ACK_SECONDS, self._ack)
        if client.is_done:
            self._over(1000)

    def _ack(self) -> None:
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        self._unacked = 0
        if not self._transport.is_closing():
            self._transport.write(masked_frame(b'{"type":"ack","seq":%d}' % self._client.last_seq))

    def _over(self, code: int) -> None:
        if not self.closed.done():
            self.closed.set_result(code)
