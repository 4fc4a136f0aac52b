"""What tests of the Redis store share: a store on some Redis, and a network in between that can be cut."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio
from attrs import define, field

from gateway.adapters.stores.redis import RedisStore, open_redis_store
from gateway.adapters.stores.redis_location import parse_redis_url
from gateway.core.errors import StoreUnavailable
from tests.conformance.session_store import RecordingTelemetry


@define
class Place:
    """How to reach a Redis, and what was said about it."""

    url: str
    full_sync: bool = False
    telemetry: RecordingTelemetry = field(factory=RecordingTelemetry)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[RedisStore]:
        """Connect to it."""
        async with open_redis_store(
            parse_redis_url(self.url),
            full_sync=self.full_sync,
            dedupe_window=100.0,
            retention=200.0,
            telemetry=self.telemetry,
        ) as store:
            yield store


async def until_works(store: RedisStore) -> float:
    """Try until the store can be written; returns the seconds that took."""
    started = trio.current_time()
    with trio.fail_after(10):
        while True:
            try:
                await store.check()
            except StoreUnavailable:
                await trio.sleep(0.02)
            else:
                return trio.current_time() - started


class Network:
    """Forwards connections to Redis until it is cut: then nothing goes through, and nobody is told."""

    def __init__(self, port: int) -> None:
        self._target_port = port
        self.port = 0
        self.is_whole = trio.Event()
        self.is_whole.set()

    def lead_to(self, port: int) -> None:
        """Take new connections elsewhere."""
        self._target_port = port

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Forward until cancelled."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = int(listeners[0].socket.getsockname()[1])
        task_status.started()
        await trio.serve_listeners(self._forward, listeners)

    async def _forward(self, client: trio.SocketStream) -> None:
        await self.is_whole.wait()
        server = await trio.open_tcp_stream("127.0.0.1", self._target_port)
        async with server, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, client, server)
            nursery.start_soon(self._pump, server, client)

    async def _pump(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some():
                await self.is_whole.wait()
                await target.send_all(data)
            await target.aclose()
