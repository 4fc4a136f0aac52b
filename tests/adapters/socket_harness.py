"""What the tests of the socket adapters share: a gate, a telemetry, a client that speaks raw frames."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from gateway.adapters.direct_stream import DirectStream
from gateway.adapters.readiness import HAS_EPOLL, Readiness
from gateway.adapters.websocket import WebSocketServer, WebSocketSettings
from gateway.core.errors import GatewayError
from gateway.core.identity import Identity
from gateway.core.request_head import check_request_head, find_head_end
from gateway.core.websocket_protocol import Dialect
from gateway.ports import (
    Admission,
    ClientConnection,
    ConnectionClosed,
    ConnectionGate,
    Telemetry,
    UpgradeRequest,
)

KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455 section 1.3
TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA


class RecordingTelemetry(Telemetry):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.causes: list[BaseException | None] = []
        self.counted = trio.Event()
        self.counts: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def debug(self, event: str, **fields: object) -> None:
        """Remember."""
        self.events.append(("debug", event))

    def info(self, event: str, **fields: object) -> None:
        """Remember."""
        self.events.append(("info", event))

    def warning(self, event: str, **fields: object) -> None:
        """Remember."""
        self.events.append(("warning", event))

    def error(self, event: str, *, cause: BaseException | None = None, **fields: object) -> None:
        """Remember."""
        self.events.append(("error", event))
        self.causes.append(cause)

    def count(self, metric: str, amount: float = 1, **labels: str) -> None:
        """Add up."""
        key = (metric, tuple(sorted(labels.items())))
        self.counts[key] = self.counts.get(key, 0) + amount
        self.counted.set()

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Nothing here observes."""

    def set_gauge(self, metric: str, value: float, **labels: str) -> None:
        """Nothing here sets a gauge."""

    @property
    def errors(self) -> list[str]:
        """The names of all errors."""
        return [event for level, event in self.events if level == "error"]


Serve = Callable[[ClientConnection], Awaitable[None]]


async def echo(connection: ClientConnection) -> None:
    """Send every message back until the peer leaves."""
    try:
        while True:
            message = await connection.receive()
            payload = message.encode() if isinstance(message, str) else message
            if not connection.send_nowait([payload]):
                await connection.wait_sent()
    except ConnectionClosed:
        await connection.close(1000)


class ScriptedGate(ConnectionGate):
    """Admits everybody, or refuses everybody, and runs one function per socket."""

    def __init__(
        self, serve: Serve = echo, refusal: GatewayError | None = None, dialect: Dialect = Dialect.V1
    ) -> None:
        self._serve = serve
        self._refusal = refusal
        self._dialect = dialect
        self.requests: list[UpgradeRequest] = []
        self.ended: list[str] = []

    async def admit(self, request: UpgradeRequest) -> Admission:
        """Refuse or admit as told."""
        await trio.lowlevel.checkpoint()
        self.requests.append(request)
        if self._refusal is not None:
            raise self._refusal
        return Admission("s", Identity("anonymous"), self._dialect)

    async def serve(self, connection: ClientConnection, admission: Admission) -> None:
        """Run the function."""
        try:
            await self._serve(connection)
        finally:
            self.ended.append(admission.session_id or "")


def upgrade_request(target: str = "/ws/s", *fields: str) -> bytes:
    """A well-formed upgrade with further header fields."""
    lines = [
        f"GET {target} HTTP/1.1",
        "Host: localhost",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {KEY}",
        *fields,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def client_frame(opcode: int, payload: bytes = b"", *, final: bool = True, masked: bool = True) -> bytes:
    """One frame as a client sends it; the mask is all zeros, which is a legal mask."""
    size = len(payload)
    mask_bit = 0x80 if masked else 0
    first = opcode | (0x80 if final else 0)
    if size < 126:
        head = struct.pack("!BB", first, mask_bit | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", first, mask_bit | 126, size)
    else:
        head = struct.pack("!BBQ", first, mask_bit | 127, size)
    return head + (b"\0\0\0\0" if masked else b"") + payload


class RawClient:
    """A client that sees bytes and frames, and may send anything."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._buffer = b""

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        await self.stream.send_all(data)

    async def read_head(self) -> bytes:
        """The head of an HTTP response, with its empty line."""
        while b"\r\n\r\n" not in self._buffer:
            await self._read_more()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n"

    async def read_exactly(self, count: int) -> bytes:
        """That many bytes."""
        while len(self._buffer) < count:
            await self._read_more()
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    async def read_frame(self) -> tuple[int, bytes]:
        """Opcode and payload of the next frame, which has to be final and unmasked."""
        first, size = await self.read_exactly(2)
        assert first & 0x80, "a server frame was not final"
        assert not size & 0x80, "a server frame was masked"
        if size == 126:
            (size,) = struct.unpack("!H", await self.read_exactly(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", await self.read_exactly(8))
        return first & 0x0F, await self.read_exactly(size)

    async def read_close(self) -> int:
        """The code of the close frame that comes next, after any other frames."""
        while True:
            opcode, payload = await self.read_frame()
            if opcode == CLOSE:
                return int.from_bytes(payload[:2], "big")

    async def read_to_end(self) -> bytes:
        """All until the connection ends."""
        data, self._buffer = self._buffer, b""
        while chunk := await self.stream.receive_some(2**16):
            data += chunk
        return data

    async def _read_more(self) -> None:
        chunk = await self.stream.receive_some(2**16)
        if not chunk:
            raise EOFError
        self._buffer += chunk


@asynccontextmanager
async def listening(handle: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
    """A loopback port whose connections are handled by ``handle``; everything is cancelled at the end."""
    async with trio.open_nursery() as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(
            partial(trio.serve_tcp, handle, 0, host="127.0.0.1")
        )
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def read_head_and_serve(server: WebSocketServer, transport: trio.abc.Stream) -> None:
    """What the front door does for a well-behaved client."""
    stream = DirectStream(transport)
    buffer = b""
    while (end := find_head_end(buffer, 2**14)) is None:
        buffer += await stream.receive_some()
    stream.unread(buffer[end:])
    await server.serve(stream, check_request_head(buffer[:end]), "127.0.0.1")


@asynccontextmanager
async def websocket_port(
    gate: ConnectionGate, telemetry: Telemetry, settings: WebSocketSettings | None = None
) -> AsyncIterator[int]:
    """A loopback port that serves WebSockets through ``gate``."""
    readiness = Readiness() if HAS_EPOLL else None
    server = WebSocketServer(gate, telemetry, settings or WebSocketSettings(), readiness)
    async with listening(partial(read_head_and_serve, server)) as port:
        yield port


@asynccontextmanager
async def raw_client(port: int, request: bytes | None = None) -> AsyncIterator[RawClient]:
    """A raw client after its handshake."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        client = RawClient(stream)
        await client.send(upgrade_request() if request is None else request)
        head = await client.read_head()
        assert head.startswith(b"HTTP/1.1 101 "), head
        yield client
