"""A TCP proxy before a gateway that counts what goes over its WebSockets: frames, bytes, messages.

It knows nothing of the gateway but the wire (RFC 6455, uncompressed), and takes everything that the gateway
sends, also for a client that has gone: so its counts are exact.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from typing import Any

import msgspec
import trio
from attrs import define, field

Object = dict[str, Any]


@define
class Direction:
    """What went one way, of data frames."""

    frames: int = 0
    size: int = 0
    objects: list[Object] = field(factory=list)

    def take(self, opcode: int, payload: bytes) -> None:
        """One frame."""
        if opcode not in (1, 2):
            return
        self.frames += 1
        self.size += len(payload)
        try:
            value = json.loads(payload) if opcode == 1 else msgspec.msgpack.decode(payload)
        except ValueError:
            return
        self.objects += value if isinstance(value, list) else [value]

    def types(self) -> Counter[str]:
        """How many objects of each type."""
        return Counter(str(item["type"]) for item in self.objects)


class Frames:
    """The frames of one side of one connection; what comes before the first empty line is HTTP."""

    def __init__(self, direction: Direction) -> None:
        self._direction = direction
        self._rest = b""
        self._is_upgraded = False

    def feed(self, data: bytes) -> None:
        """Bytes in order."""
        self._rest += data
        if not self._is_upgraded:
            _, end, rest = self._rest.partition(b"\r\n\r\n")
            if not end:
                return
            self._is_upgraded, self._rest = True, rest
        while (frame := _first_frame(self._rest)) is not None:
            opcode, payload, stop = frame
            self._rest = self._rest[stop:]
            self._direction.take(opcode, payload)


def _first_frame(data: bytes) -> tuple[int, bytes, int] | None:
    """Opcode, payload and end of a whole frame at the beginning; None while there is none."""
    if len(data) < 2:
        return None
    assert data[0] & 0x80, "nobody here fragments"
    assert not data[0] & 0x70, "nobody here compresses"
    is_masked, length, start = data[1] & 0x80, data[1] & 0x7F, 2
    if length > 125:
        start += 2 if length == 126 else 8
        length = int.from_bytes(data[2:start], "big")
    mask = b""
    if is_masked:
        mask, start = data[start : start + 4], start + 4
    if len(data) < start + length:
        return None
    payload = data[start : start + length]
    if any(mask):
        payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    return data[0] & 15, payload, start + length


class CountingProxy:
    """Passes bytes both ways, and counts."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.port = 0
        self.open = 0
        """Connections."""
        self.down = Direction()
        """From the gateway."""
        self.up = Direction()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve, [listener])

    async def _serve(self, client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream("127.0.0.1", self._target)
        self.open += 1
        try:
            async with server, trio.open_nursery() as nursery:
                nursery.start_soon(_pump, client, server, Frames(self.up))
                await _pump(server, client, Frames(self.down))
                nursery.cancel_scope.cancel()
        finally:
            self.open -= 1


async def _pump(source: trio.SocketStream, sink: trio.SocketStream, frames: Frames) -> None:
    """Until the source has ended; that the sink is gone is no reason not to count."""
    is_sink_there = True
    try:
        while data := await source.receive_some():
            frames.feed(data)
            if is_sink_there:
                try:
                    await sink.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    is_sink_there = False
    except trio.BrokenResourceError:
        pass  # reset, as a client does that is cut off
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await sink.send_eof()
