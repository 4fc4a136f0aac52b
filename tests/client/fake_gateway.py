"""A scripted gateway on loopback, so that a test says what each socket of a client meets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import orjson
import trio
import trio_websocket

from tests.client.test_session_state import welcome

Fields = dict[str, Any]


class Peer:
    """One accepted socket, from the gateway's side."""

    def __init__(self, websocket: trio_websocket.WebSocketConnection, request: Fields) -> None:
        self._websocket = websocket
        self.path: str = request["path"]
        self.headers: dict[str, str] = request["headers"]
        self._is_binary = websocket.subprotocol == "codelab.v2.msgpack"

    async def welcome(self, **fields: object) -> None:
        """Say welcome."""
        await self.send(welcome(**fields))

    async def send(self, *frames: Fields | list[Fields]) -> None:
        """Send each as a frame."""
        for frame in frames:
            encoded = msgspec.msgpack.encode(frame) if self._is_binary else orjson.dumps(frame).decode()
            await self._websocket.send_message(encoded)

    async def send_raw(self, frame: str | bytes) -> None:
        """Send what may be no message at all."""
        await self._websocket.send_message(frame)

    async def receive(self) -> Fields:
        """The next message of the client."""
        frame = await self._websocket.get_message()
        message = msgspec.msgpack.decode(frame) if isinstance(frame, bytes) else orjson.loads(frame)
        assert isinstance(message, dict)
        return message

    async def close(self, code: int, reason: str = "because") -> None:
        """Close, and wait for the client."""
        await self._websocket.aclose(code, reason)

    async def reset(self) -> None:
        """Drop the connection without a close frame."""
        await trio.aclose_forcefully(self._websocket._stream)

    async def closed_with(self) -> int:
        """Wait until the client has closed; returns its code."""
        while True:
            try:
                await self._websocket.get_message()
            except trio_websocket.ConnectionClosed as closed:
                reason = closed.reason
                return 1006 if reason is None else reason.code


Script = Callable[[Peer], Awaitable[None]]


class FakeGateway:
    """Gives each connection to the next of ``scripts``; the last goes for all further ones."""

    def __init__(self, *scripts: Script | int) -> None:
        self._scripts = scripts
        self.requests: list[Fields] = []
        self.times: list[float] = []
        self.url = ""
        self.refusal_headers: list[tuple[bytes, bytes]] = []

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            server = await nursery.start(trio_websocket.serve_websocket, self._handle, "127.0.0.1", 0, None)
            self.url = f"http://127.0.0.1:{server.port}"
            task_status.started()

    async def _handle(self, request: trio_websocket.WebSocketRequest) -> None:
        index = len(self.requests)
        described = {
            "path": request.path,
            "headers": {name.decode().lower(): value.decode() for name, value in request.headers},
        }
        self.requests.append(described)
        self.times.append(trio.current_time())
        script = self._scripts[min(index, len(self._scripts) - 1)]
        if isinstance(script, int):
            await request.reject(script, extra_headers=self.refusal_headers, body=b'{"detail":"go away"}')
            return
        websocket = await request.accept(subprotocol=request.proposed_subprotocols[0])
        try:
            await script(Peer(websocket, described))
        except trio_websocket.ConnectionClosed:
            return


@asynccontextmanager
async def fake_gateway(*scripts: Script | int) -> AsyncIterator[FakeGateway]:
    """A fake gateway inside the block."""
    gateway = FakeGateway(*scripts)
    async with trio.open_nursery() as nursery:
        await nursery.start(gateway.run)
        yield gateway
        nursery.cancel_scope.cancel()
