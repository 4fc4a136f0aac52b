"""Clients that send or read too slowly, or go away: at the ASGI interface, in virtual time."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.adapters.rest.app import BODY_TIMEOUT, RESPONSE_TIMEOUT, SLOWEST_READER
from tests.adapters.rest.harness import INTERNAL, Rest


class AsgiClient:
    """Plays the server's side of one ASGI request."""

    def __init__(self, rest: Rest, method: str, path: str) -> None:
        self.rest = rest
        self.scope = {
            "type": "http",
            "http_version": "1.1",
            "asgi": {"spec_version": "2.1", "version": "3.0"},
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in INTERNAL.items()],
            "client": ("192.0.2.1", 5),
            "server": ("127.0.0.1", 8000),
            "extensions": {},
        }
        self.to_app, self._from_client = trio.open_memory_channel[dict[str, Any]](math.inf)
        self.sent: list[dict[str, Any]] = []
        self.reads = True

    async def run(self) -> None:
        """The application's part, until it is over."""
        await self.rest.app(self.scope, self._from_client.receive, self._send)

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if not self.reads:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()

    @property
    def status(self) -> int | None:
        """The status that was answered, if any was."""
        return next((message["status"] for message in self.sent if "status" in message), None)


async def test_a_slow_body_is_cut(autojump_clock: MockClock) -> None:
    """A body that does not come whole within BODY_TIMEOUT is answered 408, however it dribbles."""
    rest = Rest()
    client = AsgiClient(rest, "POST", "/api/v1/sessions")

    async def dribble() -> None:
        while True:
            client.to_app.send_nowait({"type": "http.request", "body": b" ", "more_body": True})
            await trio.sleep(1)

    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dribble)
        await client.run()
        nursery.cancel_scope.cancel()

    assert client.status == 408
    assert trio.current_time() - started == pytest.approx(BODY_TIMEOUT)
    assert b'"code":"REQUEST_TIMEOUT"' in client.sent[1]["body"]
    assert rest.seen == []


async def test_a_body_over_the_limit_is_cut_while_it_comes() -> None:
    """Without a Content-Length too, what exceeds the limit is refused before all of it is here."""
    rest = Rest(settings={"max_message_bytes": 1_024})
    client = AsgiClient(rest, "POST", "/api/v1/sessions")
    for _ in range(3):
        client.to_app.send_nowait({"type": "http.request", "body": b" " * 600, "more_body": True})

    with trio.fail_after(1):
        await client.run()

    assert client.status == 413


@pytest.mark.parametrize("size", [10, 4 * SLOWEST_READER])
async def test_a_slow_reader_is_cut(size: int, autojump_clock: MockClock) -> None:
    """A client that takes nothing is let go after RESPONSE_TIMEOUT, and the more the larger the answer is."""
    client = AsgiClient(Rest(lambda _: httpx.Response(200, json="x" * (size - 2))), "GET", "/api/v1/agents")
    client.reads = False

    started = trio.current_time()
    await client.run()

    allowed = RESPONSE_TIMEOUT + size / SLOWEST_READER
    assert trio.current_time() - started == pytest.approx(allowed)


async def test_a_client_that_goes_away_cancels_its_call() -> None:
    """The call to the Agent Runtime ends with the client that made it."""
    ended = trio.Event()

    async def answer(_request: httpx.Request) -> httpx.Response:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()
        raise AssertionError

    client = AsgiClient(Rest(answer), "GET", "/api/v1/agents")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        client.to_app.send_nowait({"type": "http.request", "body": b"", "more_body": False})
        await wait_all_tasks_blocked()
        assert not ended.is_set()
        client.to_app.send_nowait({"type": "http.disconnect"})

    assert ended.is_set()
    assert client.sent == []
