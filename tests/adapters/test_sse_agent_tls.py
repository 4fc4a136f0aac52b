"""The Agent Runtime adapter over TLS and proxies, which are httpx's own transport's."""

from __future__ import annotations

import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import trio.testing
import trustme

from gateway.adapters.sse_agent import SseAgentRuntime, agent_client
from gateway.adapters.streaming_transport import StreamingTransport
from gateway.core.errors import (
    AgentStreamInterrupted,
    AgentUnavailable,
)
from tests.adapters.agent_harness import (
    END,
    HEAD,
    chunk,
    loopback_agent,
    open_files,
    read_request,
)
from tests.adapters.runtime_harness import (
    REQUEST,
    TOKEN,
    TOKEN_EVENT,
    collect,
    runtime_at,
    runtime_with,
    without_proxies,
)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    without_proxies(monkeypatch)


# ------------------------------------------------------------------ TLS and proxies: httpx's own transport


async def stream_tokens(stream: trio.abc.Stream) -> None:
    """Answer every request with two tokens and a proper end."""
    while await read_request(stream):
        await stream.send_all(HEAD + chunk(TOKEN))
        await trio.lowlevel.checkpoint()
        await stream.send_all(chunk(TOKEN) + END)


@asynccontextmanager
async def tls_agent(
    handle: Callable[[trio.abc.Stream], Awaitable[None]],
) -> AsyncIterator[tuple[str, ssl.SSLContext]]:
    """A runtime behind TLS, and a context that trusts it."""
    authority = trustme.CA()
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server_context)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)

    async def serve(stream: trio.SocketStream) -> None:
        await handle(trio.SSLStream(stream, server_context, server_side=True, https_compatible=True))

    async with loopback_agent(serve) as port:
        yield f"https://127.0.0.1:{port}", client_context


async def test_a_runtime_behind_tls() -> None:
    """Events, an early leave, and a turn after it."""
    async with (
        tls_agent(stream_tokens) as (url, context),
        runtime_at(url, verify=context) as runtime,
    ):
        assert await collect(runtime) == [TOKEN_EVENT, TOKEN_EVENT]
        async with runtime.open_stream(REQUEST) as stream:
            assert (await stream.receive())[0] == TOKEN_EVENT
        assert await collect(runtime) == [TOKEN_EVENT, TOKEN_EVENT]


async def test_a_certificate_that_nobody_vouches_for_makes_the_runtime_unavailable() -> None:
    """TLS failures count as connect failures: nothing was sent."""
    async with tls_agent(stream_tokens) as (url, _), runtime_at(url) as runtime:
        with pytest.raises(AgentUnavailable):
            await collect(runtime)


async def test_leaving_a_tls_stream_early_closes_it_without_waiting() -> None:
    """Also in a cancelled scope; the runtime sees the end, and no generator is left over."""
    gone = trio.Event()

    async def answer(stream: trio.abc.Stream) -> None:
        await read_request(stream)
        await stream.send_all(HEAD + chunk(TOKEN))
        try:
            await stream.receive_some()
        finally:
            gone.set()

    async with tls_agent(answer) as (url, context), runtime_at(url, verify=context) as runtime:
        for cancelled in (False, True):
            with trio.fail_after(5), trio.CancelScope() as scope:
                async with runtime.open_stream(REQUEST) as stream:
                    await stream.receive()
                    if cancelled:
                        scope.cancel()
            with trio.fail_after(5):
                await gone.wait()
            gone = trio.Event()


async def test_a_tls_stream_that_is_cut_is_an_interruption() -> None:
    """httpcore's words for it, before the head and in the body."""
    answers = [b"", HEAD + chunk(TOKEN)]

    async def answer(stream: trio.abc.Stream) -> None:
        await read_request(stream)
        await stream.send_all(answers.pop(0))
        await stream.aclose()

    async with tls_agent(answer) as (url, context), runtime_at(url, verify=context) as runtime:
        for _ in range(2):
            with pytest.raises(AgentStreamInterrupted):
                await collect(runtime)


@pytest.mark.filterwarnings("ignore:Async generator 'httpx._content:ResourceWarning")  # its request body
async def test_a_thousand_random_cancels_do_not_exhaust_httpx() -> None:
    """Cancelled while waiting for, opening or using a connection: the runtime stays within reach.

    httpcore loses a place when a request is cancelled as it is given one; with 20 places, this test lost
    15. Where the pool has no bound nobody waits for a place, and 120 streams at once find theirs.
    """
    chance = random.Random(6)

    async def cancel_soon(scope: trio.CancelScope) -> None:
        for _ in range(chance.randrange(14)):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    async def turn(runtime: SseAgentRuntime) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel_soon, scope)
                await collect(runtime)
                nursery.cancel_scope.cancel()

    files = open_files()
    async with (
        loopback_agent(stream_tokens) as port,
        # A client made for TLS, used without it: the pool is the same, and so is the leak.
        agent_client(f"https://127.0.0.1:{port}", StreamingTransport()) as send,
    ):
        runtime = runtime_with(send, f"http://127.0.0.1:{port}")
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(turn, runtime)
        with trio.fail_after(5):
            async with AsyncExitStack() as streams:
                for _ in range(120):
                    await streams.enter_async_context(runtime.open_stream(REQUEST))
            assert await collect(runtime) == [TOKEN_EVENT, TOKEN_EVENT]
    assert open_files() == files


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_runtime_on_this_machine_is_asked_straight(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """Whatever proxy the environment names: the runtime would not be there for it."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    transport = StreamingTransport()
    async with (
        loopback_agent(stream_tokens) as port,
        runtime_at(f"http://{host}:{port}", transport) as runtime,
    ):
        assert await collect(runtime) == [TOKEN_EVENT, TOKEN_EVENT]
        assert transport.open_connections == 1
    async with (
        tls_agent(stream_tokens) as (url, context),
        runtime_at(url, verify=context) as runtime,
    ):
        assert await collect(runtime) == [TOKEN_EVENT, TOKEN_EVENT]


async def test_a_proxy_from_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain HTTP goes through it, unless ``NO_PROXY`` says otherwise."""
    seen: list[bytes] = []

    async def proxy(stream: trio.SocketStream) -> None:
        seen.append(await read_request(stream))
        await stream.send_all(HEAD + chunk(TOKEN) + END)

    async with loopback_agent(proxy) as proxy_port, loopback_agent(stream_tokens) as agent_port:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy_port}")
        async with runtime_at("http://agent.test:8001") as runtime:
            assert await collect(runtime) == [TOKEN_EVENT]
        assert seen[0].startswith(b"POST http://agent.test:8001/agent/message/stream HTTP/1.1\r\n")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        transport = StreamingTransport()
        async with runtime_at(f"http://127.0.0.1:{agent_port}", transport) as runtime:
            assert await collect(runtime) == [TOKEN_EVENT, TOKEN_EVENT]
            assert transport.open_connections == 1
        assert len(seen) == 1
