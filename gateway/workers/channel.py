"""The way between the supervisor and one worker: MessagePack, its length first, over a pair of Unix sockets.

That it ends is a message too: the other process is gone, or cannot be understood.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import msgspec
import trio

_LENGTH = struct.Struct("!I")
_READ_BYTES = 65_536
MOST_WAITING = 256
"""Messages for a process that reads none: one that hangs."""


class Setup(msgspec.Struct, frozen=True, tag=True):
    """Supervisor → worker, first: who it is, and its configuration as ``dump_configuration`` has it."""

    number: int
    """From 1."""
    count: int
    configuration: bytes
    sockets: list[int]
    """Descriptors to accept connections on."""
    metrics_sockets: list[int]
    """… and those for ``METRICS_BIND``."""


class Listening(msgspec.Struct, frozen=True, tag=True):
    """Worker → supervisor: it accepts connections."""

    urls: list[str]


class Leaving(msgspec.Struct, frozen=True, tag=True):
    """Worker → supervisor: it was asked to stop and accepts no more."""


class Asking(msgspec.Struct, frozen=True, tag=True):
    """Worker → supervisor: put this to all others."""

    number: int
    question: str
    about: str


class Question(msgspec.Struct, frozen=True, tag=True):
    """Supervisor → worker: another one wants to know."""

    number: int
    question: str
    about: str


class Answer(msgspec.Struct, frozen=True, tag=True):
    """Worker → supervisor; None: nothing known of it here."""

    number: int
    content: bytes | None


class Answers(msgspec.Struct, frozen=True, tag=True):
    """Supervisor → worker: what the others answered, by process; those that did not are not in it."""

    number: int
    contents: dict[str, bytes]


Message = Setup | Listening | Leaving | Asking | Question | Answer | Answers


class Channel:
    """One side of it. ``run`` reads and writes, and closes it; ``post`` may be called before."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._outgoing, self._to_send = trio.open_memory_channel[bytes](math.inf)

    def post(self, message: Message) -> None:
        """Send soon, in order. Never blocks; nothing more is kept for a process that reads nothing."""
        if self._outgoing.statistics().current_buffer_used < MOST_WAITING:
            data = msgspec.msgpack.encode(message)
            self._outgoing.send_nowait(_LENGTH.pack(len(data)) + data)

    async def run(self, take: Callable[[Message], None]) -> None:
        """Send, and call ``take`` with each message that comes, until the other process is gone.

        Or until something comes that is no message.
        """
        async with self._stream, trio.open_nursery() as nursery:
            nursery.start_soon(self._send)
            await self._receive(take)
            nursery.cancel_scope.cancel()

    async def _send(self) -> None:
        try:
            async for data in self._to_send:
                await self._stream.send_all(data)
        except trio.BrokenResourceError:
            await trio.sleep_forever()  # The reading side notices as well, after what was still on its way.

    async def _receive(self, take: Callable[[Message], None]) -> None:
        decoder = msgspec.msgpack.Decoder(Message)
        buffer = bytearray()
        while True:
            try:
                chunk = await self._stream.receive_some(_READ_BYTES)
            except trio.BrokenResourceError:
                return
            if not chunk:
                return
            buffer += chunk
            while len(buffer) >= _LENGTH.size:
                end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
                if len(buffer) < end:
                    break
                try:
                    message = decoder.decode(bytes(buffer[_LENGTH.size : end]))
                except msgspec.DecodeError:
                    return  # The other process is of another version: it was installed since.
                del buffer[:end]
                take(message)
