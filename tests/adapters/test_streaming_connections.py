"""What becomes of the transport's connections: reuse, expiry, death, early leaves, cancellation."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
import trio
import trio.testing

from gateway.adapters.streaming_transport import RECEIVE_BODY, StreamingTransport
from gateway.adapters.tcp_stream import TcpStream
from tests.adapters.agent_harness import (
    END,
    HEAD,
    chunk,
    loopback_agent,
    memory_agent,
    open_files,
    read_request,
)
from tests.adapters.transport_harness import WHOLE, answer_whole, post, read_all

# ------------------------------------------------------------------ keep-alive


async def test_a_connection_read_to_its_end_is_used_again() -> None:
    """Ten requests one after the other take one connection."""
    async with memory_agent(answer_whole) as agent:
        transport = StreamingTransport(connect=agent.connect)
        for _ in range(10):
            async with post(transport) as receive:
                assert await read_all(receive) == b"abc"
                assert (transport.open_connections, transport.idle_connections) == (1, 1)
        assert (len(agent.connects), len(agent.requests)) == (1, 10)


async def test_a_connection_goes_only_to_its_own_origin() -> None:
    """Another host or port gets another connection."""
    async with memory_agent(answer_whole) as agent:
        transport = StreamingTransport(connect=agent.connect)
        for url in ("http://a/", "http://b/", "http://a:81/", "http://a/"):
            async with post(transport, url) as receive:
                await read_all(receive)
        assert agent.connects == [("a", 80), ("b", 80), ("a", 81)]


async def test_idle_connections_expire(autojump_clock: trio.testing.MockClock) -> None:
    """The newest is used first, so that after a peak the others run out and are closed."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(HEAD)
        await trio.sleep(1)
        await stream.send_all(END)

    async with memory_agent(answer) as agent:
        transport = StreamingTransport(connect=agent.connect, idle_expiry=30)

        async def once() -> None:
            async with post(transport) as receive:
                await read_all(receive)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(once)
        assert transport.idle_connections == 3
        await trio.sleep(20)
        await once()
        await trio.sleep(20)
        await once()
        assert (transport.open_connections, len(agent.connects)) == (1, 3)
        await trio.sleep(31)
        await once()
        assert (transport.open_connections, len(agent.connects)) == (1, 4)


async def test_idle_connections_are_bounded() -> None:
    """After a peak of 100 streams no more than 64 connections are kept."""
    go_on = trio.Event()

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await go_on.wait()
        await stream.send_all(WHOLE)

    async with memory_agent(answer) as agent:
        transport = StreamingTransport(connect=agent.connect)

        async def once() -> None:
            async with post(transport) as receive:
                await read_all(receive)

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(once)
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        assert (transport.open_connections, transport.idle_connections) == (64, 64)
        await transport.aclose()
        assert (transport.open_connections, transport.idle_connections) == (0, 0)


@pytest.mark.parametrize("last_words", [b"", b"HTTP/1.1 408 Request Timeout\r\n\r\n"])
async def test_a_connection_that_died_while_idle_is_not_used(last_words: bytes) -> None:
    """The end of the connection, or anything said out of turn, is seen before a byte is sent on it."""
    connections = 0
    requests = 0
    died = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        nonlocal connections, requests
        connections += 1
        await read_request(stream)
        requests += 1
        await stream.send_all(WHOLE)
        await trio.testing.wait_all_tasks_blocked()
        if last_words:
            await stream.send_all(last_words)
        await stream.send_eof()
        died.set()
        requests += bool(await stream.receive_some())

    files = open_files()
    async with loopback_agent(answer) as port:
        transport = StreamingTransport()
        for _ in range(2):
            async with post(transport, f"http://127.0.0.1:{port}/") as receive:
                assert await read_all(receive) == b"abc"
            await died.wait()
            died = trio.Event()
        await transport.aclose()
        assert (connections, requests) == (2, 2)
    assert open_files() == files


async def test_bytes_after_a_response_are_not_taken_for_the_next_one() -> None:
    """A connection on which more came than was asked for is closed."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(WHOLE + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")

    async with memory_agent(answer) as agent:
        transport = StreamingTransport(connect=agent.connect)
        for _ in range(2):
            async with post(transport) as receive:
                assert await read_all(receive) == b"abc"
        assert (len(agent.connects), transport.open_connections) == (2, 0)


class DiesUnseen(TcpStream):
    """A connection that the peer closes just after it was looked at."""

    def has_input(self) -> bool:
        """Nothing to see yet."""
        return False


def dead_connection() -> trio.abc.Stream:
    """A connection whose peer is gone."""
    ours, theirs = socket.socketpair()
    theirs.close()
    return DiesUnseen(ours)


async def test_a_request_of_which_no_byte_left_is_sent_on_a_new_connection() -> None:
    """The kernel refused all of it, so nobody can have seen it: sending it again is safe."""
    pairs: list[socket.socket] = []

    async def connect(host: str, port: int) -> trio.abc.Stream:
        ours, theirs = socket.socketpair()
        theirs.sendall(WHOLE)
        pairs.append(theirs)
        return DiesUnseen(ours)

    transport = StreamingTransport(connect=connect)
    async with post(transport) as receive:
        await read_all(receive)
    pairs[0].close()
    async with post(transport) as receive:
        assert await read_all(receive) == b"abc"
    assert (len(pairs), transport.open_connections) == (2, 1)
    await transport.aclose()
    pairs[1].close()


async def test_a_new_connection_that_takes_no_byte_is_a_connect_error() -> None:
    """Nothing was sent, which the caller may count on."""

    async def connect(host: str, port: int) -> trio.abc.Stream:
        return dead_connection()

    transport = StreamingTransport(connect=connect)
    with pytest.raises(httpx.ConnectError):
        async with post(transport):
            pass
    assert transport.open_connections == 0


async def test_a_request_that_may_have_been_seen_is_never_sent_again() -> None:
    """A reused connection that is closed instead of answered is a read error, and the POST stays one."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        if len(agent.requests) == 2:
            await stream.aclose()
        else:
            await stream.send_all(WHOLE)

    async with memory_agent(answer) as agent:
        transport = StreamingTransport(connect=agent.connect)
        async with post(transport) as receive:
            await read_all(receive)
        with pytest.raises(httpx.ReadError):
            async with post(transport):
                pass
        assert (len(agent.connects), len(agent.requests), transport.open_connections) == (1, 2, 0)


async def test_leaving_before_the_end_closes_the_connection_at_once() -> None:
    """In a cancelled scope too: the runtime sees it without anybody waiting for anything."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(HEAD + chunk(b"abc"))
        await trio.sleep_forever()

    async with memory_agent(answer) as agent:
        transport = StreamingTransport(connect=agent.connect)
        async with post(transport) as receive:
            assert await receive() == b"abc"
        assert transport.open_connections == 0
        with trio.CancelScope() as scope:
            async with post(transport) as receive:
                assert await receive() == b"abc"
                scope.cancel()
        assert transport.open_connections == 0


async def test_the_runtime_sees_a_cancel_at_once() -> None:
    """On a real socket: its next read returns, however busy it was."""
    gone = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(HEAD + chunk(b"abc"))
        try:
            assert await stream.receive_some() == b""
        finally:
            gone.set()

    async with loopback_agent(answer) as port:
        with trio.CancelScope() as scope:
            async with post(StreamingTransport(), f"http://127.0.0.1:{port}/") as receive:
                await receive()
                scope.cancel()
                await receive()
        assert scope.cancelled_caught
        await gone.wait()


async def test_an_end_that_has_already_arrived_saves_the_connection() -> None:
    """Leaving between the last event and the end of the body does not cost the next turn a connect."""

    async def answer(stream: trio.SocketStream) -> None:
        while await read_request(stream):
            await stream.send_all(HEAD + chunk(b"last event"))
            await read_on.wait()
            await stream.send_all(END)
            sent.set()

    async with loopback_agent(answer) as port:
        transport = StreamingTransport()
        for _ in range(2):
            read_on, sent = trio.Event(), trio.Event()
            async with post(transport, f"http://127.0.0.1:{port}/") as receive:
                await receive()
                read_on.set()
                await sent.wait()
            assert (transport.open_connections, transport.idle_connections) == (1, 1)
        await transport.aclose()


# ------------------------------------------------------------------ cancellation


@pytest.mark.parametrize("delay", [0.5, 1.5, 2.5, 3.5])
async def test_cancelling_at_any_wait_closes_the_connection(
    delay: float, autojump_clock: trio.testing.MockClock
) -> None:
    """While connecting, while sending, before the head and in the body: nothing stays open."""
    servers: list[trio.abc.Stream] = []

    async def connect(host: str, port: int) -> trio.abc.Stream:
        await trio.sleep(1)
        client, server = trio.testing.lockstep_stream_pair()
        servers.append(server)
        nursery.start_soon(serve, server)
        return client

    async def serve(server: trio.abc.Stream) -> None:
        await trio.sleep(1)
        await read_request(server)
        await trio.sleep(1)
        try:
            await server.send_all(HEAD)
        except trio.BrokenResourceError:
            return

    async with trio.open_nursery() as nursery:
        transport = StreamingTransport(connect=connect)
        with trio.move_on_after(delay) as scope:
            async with post(transport) as receive:
                await receive()
        assert scope.cancelled_caught
        assert trio.current_time() == delay
        assert (transport.open_connections, transport.idle_connections) == (0, 0)
        for server in servers:
            with trio.fail_after(0), pytest.raises(trio.BrokenResourceError):
                await server.send_all(b"x")
        nursery.cancel_scope.cancel()


class SlowToClose(trio.abc.ReceiveStream):
    """A stream that says a long goodbye, as TLS may."""

    def __init__(self) -> None:
        self.is_closed = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """A response that goes on."""
        await trio.lowlevel.checkpoint()
        return HEAD

    async def aclose(self) -> None:
        """Wait for something that does not come."""
        try:
            await trio.sleep(60)
        finally:
            self.is_closed = True


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_closing_never_waits(is_cancelled: bool, autojump_clock: trio.testing.MockClock) -> None:
    """Whatever the stream would like to do at its end."""
    arriving = SlowToClose()

    async def connect(host: str, port: int) -> trio.abc.Stream:
        return trio.StapledStream(trio.testing.MemorySendStream(), arriving)

    transport = StreamingTransport(connect=connect)
    with trio.CancelScope() as scope:
        async with post(transport):
            if is_cancelled:
                scope.cancel()
    assert (trio.current_time(), transport.open_connections, arriving.is_closed) == (0, 0, True)


async def test_a_thousand_random_cancels_leave_nothing_open() -> None:
    """On loopback, with reuse going on: every file descriptor comes back and the transport still works."""
    chance = random.Random(4)
    cancelled = finished = 0

    async def answer(stream: trio.SocketStream) -> None:
        while await read_request(stream):
            await stream.send_all(HEAD + chunk(b"a"))
            await trio.lowlevel.checkpoint()
            await stream.send_all(chunk(b"b"))
            await trio.lowlevel.checkpoint()
            await stream.send_all(END)

    async def cancel_soon(scope: trio.CancelScope, passes: int) -> None:
        for _ in range(passes):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    async def request() -> None:
        nonlocal cancelled, finished
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel_soon, scope, chance.randrange(20))
                async with transport_post() as response:
                    await read_all(response)
                    finished += 1
                nursery.cancel_scope.cancel()
        cancelled += scope.cancelled_caught

    files = open_files()
    async with loopback_agent(answer) as port:
        transport = StreamingTransport()
        client = httpx.AsyncClient(transport=transport)

        @asynccontextmanager
        async def transport_post() -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
            async with client.stream("POST", f"http://127.0.0.1:{port}/", content=b"x") as response:
                yield response.extensions[RECEIVE_BODY]

        for _ in range(40):
            async with trio.open_nursery() as nursery:
                for _ in range(25):
                    nursery.start_soon(request)
        assert transport.open_connections == transport.idle_connections
        async with transport_post() as receive:
            assert await read_all(receive) == b"ab"
        await client.aclose()
    assert open_files() == files
    assert cancelled > 300
    assert finished > 30


async def test_closing_the_transport_ends_streams_that_are_being_read() -> None:
    """They fail as cut, those that wait and those that ask later."""

    async def answer(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(HEAD)
        await trio.sleep_forever()

    async with loopback_agent(answer) as port:
        transport = StreamingTransport()
        async with post(transport, f"http://127.0.0.1:{port}/") as receive, trio.open_nursery() as nursery:

            async def wait_for_the_cut() -> None:
                with pytest.raises(httpx.ReadError):
                    await receive()

            nursery.start_soon(wait_for_the_cut)
            await trio.testing.wait_all_tasks_blocked()
            await transport.aclose()
        async with post(transport, f"http://127.0.0.1:{port}/") as receive:
            await transport.aclose()
            with pytest.raises(httpx.ReadError):
                await receive()
        assert transport.open_connections == 0
