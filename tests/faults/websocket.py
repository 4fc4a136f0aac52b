"""A WebSocket client of the harness's own: ``websockets``' protocol code on a Trio socket."""

from __future__ import annotations

import trio
from websockets.client import ClientProtocol
from websockets.exceptions import WebSocketException
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.typing import Subprotocol
from websockets.uri import parse_uri


class SocketLost(Exception):
    """The connection is gone, or was refused with ``status``."""

    def __init__(self, why: str, *, status: int | None = None, close_code: int | None = None) -> None:
        super().__init__(why)
        self.status = status
        self.close_code = close_code


class WebSocket:
    """One connection. ``send`` may be called by several tasks, ``receive`` by one."""

    def __init__(self, stream: trio.SocketStream, protocol: ClientProtocol) -> None:
        self._stream = stream
        self._protocol = protocol
        self._frames: list[Frame] = []
        self._parts: list[bytes] = []
        self._sending = trio.Lock()

    @classmethod
    async def connect(cls, port: int, path: str, subprotocol: str | None) -> WebSocket:
        """Connect and upgrade. Raises ``SocketLost``."""
        try:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
        except OSError as error:
            raise SocketLost("connect refused") from error
        protocol = ClientProtocol(
            parse_uri(f"ws://127.0.0.1:{port}{path}"),
            subprotocols=[Subprotocol(subprotocol)] if subprotocol else None,
            max_size=None,
        )
        socket = cls(stream, protocol)
        try:
            protocol.send_request(protocol.connect())
            await socket._flush()
            response = await socket._response()
            if protocol.handshake_exc is not None:
                raise SocketLost(str(protocol.handshake_exc), status=response.status_code)
        except BaseException:
            socket.abort()
            raise
        return socket

    async def _response(self) -> Response:
        while True:
            events = self._protocol.events_received()
            if events:
                response = events.pop(0)
                assert isinstance(response, Response)
                self._frames = [event for event in events if isinstance(event, Frame)]
                return response
            await self._receive()

    async def receive(self) -> str | bytes:
        """The next message. Raises ``SocketLost``."""
        while True:
            while self._frames:
                frame = self._frames.pop(0)
                if frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                    if frame.opcode is not Opcode.CONT:
                        self._is_text = frame.opcode is Opcode.TEXT
                    self._parts.append(bytes(frame.data))
                    if frame.fin:
                        data, self._parts = b"".join(self._parts), []
                        return data.decode() if self._is_text else data
            if self._protocol.close_rcvd is not None:
                raise SocketLost(
                    f"closed: {self._protocol.close_rcvd}", close_code=self._protocol.close_rcvd.code
                )
            await self._receive()
            self._frames = [event for event in self._protocol.events_received() if isinstance(event, Frame)]

    async def _receive(self) -> None:
        try:
            data = await self._stream.receive_some(65536)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise SocketLost("reset") from error
        if not data:
            raise SocketLost("ended")
        try:
            self._protocol.receive_data(data)
        except WebSocketException as error:
            raise SocketLost(f"not a WebSocket: {error}") from error
        await self._flush()

    async def send(self, data: str | bytes) -> None:
        """Send one message. Raises ``SocketLost``."""
        async with self._sending:
            try:
                if isinstance(data, str):
                    self._protocol.send_text(data.encode())
                else:
                    self._protocol.send_binary(data)
            except WebSocketException as error:
                raise SocketLost("closing") from error
            await self._write()

    async def _flush(self) -> None:
        async with self._sending:
            await self._write()

    async def _write(self) -> None:
        try:
            for data in self._protocol.data_to_send():
                if data:
                    await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise SocketLost("reset") from error

    def abort(self) -> None:
        """Close the connection at once."""
        self._stream.socket.close()
