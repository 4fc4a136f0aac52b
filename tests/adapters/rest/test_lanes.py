"""Connections to the Agent Runtime on a real loopback: kept, dropped, and never lost."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
import trio

from gateway.adapters.rest.lanes import agent_client
from gateway.adapters.rest.upstream import AgentAnswer, AgentApi
from gateway.core.errors import AgentStreamInterrupted, AgentUnavailable

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
CALLS = 1_000


class Server:
    """Answers every request head with ``answer``, in pieces with ``pause`` between them."""

    def __init__(self, answer: bytes = ANSWER, *, pause: float = 0, close_after: bool = False) -> None:
        self.answer = answer
        self.pause = pause
        self.close_after = close_after
        self.connections = 0
        self.open_connections = 0
        self.heads: list[bytes] = []
        self.listener = trio.socket.socket()
        self._changed = trio.Event()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until ``condition`` holds after a head came or a connection opened or closed; 5 s at most."""
        with trio.fail_after(5):
            while not condition():
                await self._changed.wait()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def bind(self, backlog: int = 128) -> str:
        """Listen, without accepting yet; the URL."""
        await self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(backlog)
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    async def serve(self) -> None:
        """Accept and answer until cancelled."""
        await trio.serve_listeners(self._talk, [trio.SocketListener(self.listener)])

    async def _talk(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        self.open_connections += 1
        self._change()
        try:
            async with stream:
                await self._answer_all(stream)
        except trio.BrokenResourceError:
            return
        finally:
            self.open_connections -= 1
            self._change()

    async def _answer_all(self, stream: trio.SocketStream) -> None:
        received = b""
        while chunk := await stream.receive_some():
            received += chunk
            while b"\r\n\r\n" in received:
                head, _, received = received.partition(b"\r\n\r\n")
                self.heads.append(head)
                self._change()
                middle = len(self.answer) // 2
                for part in (self.answer[:middle], self.answer[middle:]):
                    if self.pause:
                        await trio.sleep(self.pause)
                    await stream.send_all(part)
                if self.close_after:
                    return


@asynccontextmanager
async def _running(server: Server) -> AsyncIterator[tuple[str, trio.Nursery]]:
    async with trio.open_nursery() as nursery:
        url = await server.bind()
        nursery.start_soon(server.serve)
        yield url, nursery
        nursery.cancel_scope.cancel()


def _api(client: httpx.AsyncClient, limit: int = 100) -> AgentApi:
    return AgentApi(client, internal_key="k", max_concurrent=limit, connect_timeout=5, timeout=10)


async def _get(api: AgentApi) -> AgentAnswer:
    return await api.call("GET", "/agents", b"", {}, b"")


async def _cancelled_calls(api: AgentApi, within: float, seed: int) -> None:
    """CALLS calls, ten at a time, each cancelled at a random moment before ``within`` seconds."""
    moments = random.Random(seed)

    async def one() -> None:
        with trio.move_on_after(moments.uniform(0, within)):
            await _get(api)

    for _ in range(CALLS // 10):
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_connection_is_used_again() -> None:
    """Calls after each other share a connection."""
    server = Server()
    async with _running(server) as (url, _), agent_client(url) as client:
        for _ in range(5):
            assert (await _get(_api(client))).body == b"{}"

    assert server.connections == 1


async def test_calls_at_once_have_a_connection_each() -> None:
    """No call waits for another's connection."""
    server = Server(pause=0.01)
    async with _running(server) as (url, _), agent_client(url) as client:
        api = _api(client)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(_get, api)

    assert server.connections == 5


async def test_a_thousand_calls_cancelled_while_connecting_cost_nothing() -> None:
    """Against a runtime that accepts nobody, then does: the next call is served at once, no file is open."""
    server = Server()
    url = await server.bind(backlog=0)
    # The kernel completes a connection or two by itself; with these its queue is full, and others hang.
    fillers = [socket.socket() for _ in range(4)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(server.listener.getsockname())
    async with agent_client(url) as client:
        api = _api(client, limit=10)
        before = _open_files()

        await _cancelled_calls(api, 0.003, seed=1)

        assert _open_files() == before
        for filler in fillers:
            filler.close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve)
            with trio.fail_after(5):
                assert (await _get(api)).status == 200
            nursery.cancel_scope.cancel()


async def test_a_thousand_calls_cancelled_at_any_moment_cost_nothing() -> None:
    """Cancelled while connecting, before the head, within the body or between calls: nothing stays behind."""
    server = Server(pause=0.001)
    async with _running(server) as (url, _), agent_client(url) as client:
        api = _api(client, limit=10)
        before = _open_files()

        await _cancelled_calls(api, 0.006, seed=2)

        assert (await _get(api)).status == 200
        await server.wait_for(lambda: server.open_connections <= 10)
        # Up to ten idle connections, each with two ends in this process.
        assert _open_files() <= before + 20


@pytest.mark.parametrize(
    "step",
    [
        "connection.connect_tcp.started",
        "connection.connect_tcp.complete",
        "http11.send_request_headers.complete",
        "http11.receive_response_headers.started",
        "http11.receive_response_headers.complete",
        "http11.receive_response_body.started",
        "http11.receive_response_body.complete",
    ],
)
async def test_a_call_cancelled_at_any_step_leaves_nothing(step: str) -> None:
    """Cancelled exactly between two steps of httpcore, a hundred times: the next call is served at once.

    httpcore's own pool keeps a connection that was cancelled between connecting and sending for good.
    """
    server = Server()
    scope = trio.CancelScope()

    async def trace(event: str, _info: dict[str, object]) -> None:
        if event == step:
            scope.cancel()

    async def add_trace(request: httpx.Request) -> None:
        request.extensions["trace"] = trace

    async with _running(server) as (url, _), agent_client(url) as client:
        api = _api(client, limit=1)
        before = _open_files()
        client.event_hooks["request"] = [add_trace]
        for _ in range(100):
            scope = trio.CancelScope()
            with scope:
                await _get(api)
        client.event_hooks["request"] = []

        with trio.fail_after(1):
            assert (await _get(api)).status == 200
        await server.wait_for(lambda: server.open_connections <= 1)
        assert _open_files() <= before + 2


async def test_cancelling_is_seen_by_the_agent() -> None:
    """A caller that goes away closes the connection that its call was on."""
    server = Server(pause=60)
    async with _running(server) as (url, nursery), agent_client(url) as client:
        with trio.CancelScope() as scope:
            nursery.start_soon(_cancel_once_open, server, scope)
            await _get(_api(client))
        assert scope.cancelled_caught


async def _cancel_once_open(server: Server, scope: trio.CancelScope) -> None:
    await server.wait_for(lambda: bool(server.heads))
    scope.cancel()


async def test_a_connection_that_the_agent_closes_between_calls_is_not_noticed() -> None:
    """A runtime that closes after each answer without saying so costs no call."""
    server = Server(close_after=True)
    async with _running(server) as (url, _), agent_client(url) as client:
        for _ in range(20):
            assert (await _get(_api(client))).status == 200


async def test_nobody_listening_is_unavailable() -> None:
    """A refused connection has its own error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        async with agent_client(url) as client:
            with pytest.raises(AgentUnavailable):
                await _get(_api(client))


async def test_a_cut_answer_is_interrupted() -> None:
    """An answer that ends before its length is never passed on as if it were whole."""
    server = Server(ANSWER[:-1], close_after=True)
    async with _running(server) as (url, _), agent_client(url) as client:
        with pytest.raises(AgentStreamInterrupted):
            await _get(_api(client))


async def test_the_environments_proxy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Agent Runtime's address is what the settings say and nothing else."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    server = Server()
    async with _running(server) as (url, _), agent_client(url) as client:
        assert (await _get(_api(client))).status == 200


async def test_the_request_line_is_byte_exact() -> None:
    """The query goes out on the wire as it came in."""
    server = Server()
    async with _running(server) as (url, _), agent_client(f"{url}/base") as client:
        await _api(client).call("GET", "/sessions/a:b/history", b"q='%41|{}\"&&", {}, b"")

    assert server.heads[0].startswith(b"GET /base/sessions/a:b/history?q='%41|{}\"&& HTTP/1.1\r\n")


async def test_closing_the_client_closes_what_is_idle() -> None:
    """After the client is closed no connection is left."""
    server = Server()
    async with _running(server) as (url, _):
        async with agent_client(url) as client:
            await _get(_api(client))
        await server.wait_for(lambda: not server.open_connections)
