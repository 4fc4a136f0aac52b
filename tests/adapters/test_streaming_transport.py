"""The transport: framing over connections, exact deadlines, what becomes of a connection, cancellation."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
import trio
import trio.testing

from gateway.adapters.streaming_transport import RECEIVE_BODY, StreamingTransport
from gateway.adapters.tcp_stream import TcpStream, connect_tcp
from tests.adapters.agent_harness import (
    END,
    HEAD,
    chunk,
    loopback_agent,
    memory_agent,
    open_files,
    read_request,
)

WHOLE = HEAD + chunk(b"abc") + END
TIMEOUT = httpx.Timeout(connect=3, read=10, write=7, pool=None)


class Kept(httpx.AsyncBaseTransport):
    """Stands between a transport and a client, which would close it with itself."""

    def __init__(self, transport: StreamingTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Hand on."""
        return await self._transport.handle_async_request(request)


@asynccontextmanager
async def post(
    transport: StreamingTransport, url: str = "http://agent:80/x", timeout: httpx.Timeout = TIMEOUT
) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
    """POST through httpx; give the function that receives the body."""
    async with (
        httpx.AsyncClient(transport=Kept(transport), timeout=timeout) as client,
        client.stream("POST", url, content=b'{"a":1}', headers={"X-A": "b"}) as response,
    ):
        yield response.extensions[RECEIVE_BODY]


async def read_all(receive: Callable[[], Awaitable[bytes]]) -> bytes:
    """The rest of a body."""
    data = b""
    while more := await receive():
        data += more
    return data


async def answer_whole(stream: trio.abc.Stream, _request: bytes) -> None:
    """Answer at once and completely."""
    await stream.send_all(WHOLE)


async def answer_slowly(stream: trio.abc.Stream, _request: bytes) -> None:
    """Nine seconds of silence between two pieces."""
    await trio.sleep(9)
    await stream.send_all(HEAD)
    for data in (b"a", b"b"):
        await trio.sleep(9)
        await stream.send_all(chunk(data))
    await trio.sleep_forever()


async def test_a_request_is_sent_as_one_piece_with_its_headers() -> None:
    """Head and body leave in one call, with a length, and nothing is added but what httpx adds."""
    async with (
        memory_agent(answer_whole) as agent,
        post(StreamingTransport(connect=agent.connect)) as receive,
    ):
        assert await read_all(receive) == b"abc"
    (request,) = agent.requests
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /x HTTP/1.1\r\nHost: agent\r\n")
    assert b"\r\nX-A: b" in head
    assert head.count(b"Content-Length: 7") == 1
    assert body == b'{"a":1}'
    assert agent.connects == [("agent", 80)]


async def test_httpx_can_iterate_the_body_too() -> None:
    """Whoever does not know the short way reads it as with any transport."""
    async with (
        memory_agent(answer_whole) as agent,
        httpx.AsyncClient(transport=StreamingTransport(connect=agent.connect)) as client,
    ):
        assert (await client.post("http://agent/", content=b"x")).content == b"abc"
        assert (await client.get("http://agent/")).content == b"abc"
    assert b"Content-Length: 1" in agent.requests[0]
    assert b"content-length" not in agent.requests[1].lower()


async def test_a_body_without_known_length_is_sent_with_one() -> None:
    """Generators are gathered first: requests are small."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"ab"
        yield b"c"

    async with (
        memory_agent(answer_whole) as agent,
        httpx.AsyncClient(transport=StreamingTransport(connect=agent.connect)) as client,
    ):
        await client.post("http://agent/", content=parts())
    (request,) = agent.requests
    assert request.endswith(b"Content-Length: 3\r\n\r\nabc")
    assert b"ransfer-" not in request


async def test_what_came_in_one_read_is_received_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """Several chunks of one segment are joined, and the end is found with them."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(HEAD + chunk(b"a") + chunk(b"b"))
        await trio.sleep(1)
        await stream.send_all(chunk(b"c") + chunk(b"d") + END)

    async with memory_agent(answer) as agent:
        transport = StreamingTransport(connect=agent.connect)
        async with post(transport) as receive:
            assert [await receive(), await receive()] == [b"ab", b"cd"]
            assert transport.idle_connections == 1
            assert await receive() == b""


# ------------------------------------------------------------------ deadlines


async def test_the_connect_deadline_is_exact(autojump_clock: trio.testing.MockClock) -> None:
    """A connect that takes longer is cancelled and leaves nothing."""

    async def connect(host: str, port: int) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    transport = StreamingTransport(connect=connect)
    with pytest.raises(httpx.ConnectTimeout):
        async with post(transport):
            pass
    assert (trio.current_time(), transport.open_connections) == (3, 0)


async def test_the_write_deadline_is_exact(autojump_clock: trio.testing.MockClock) -> None:
    """A runtime that does not read the request is given up."""

    async def connect(host: str, port: int) -> trio.abc.Stream:
        return trio.testing.lockstep_stream_pair()[0]

    transport = StreamingTransport(connect=connect)
    with pytest.raises(httpx.WriteTimeout):
        async with post(transport):
            pass
    assert (trio.current_time(), transport.open_connections) == (7, 0)


async def test_the_read_deadline_before_the_head_is_exact(autojump_clock: trio.testing.MockClock) -> None:
    """Silence before the head counts from the request."""

    async def stall(stream: trio.abc.Stream, _request: bytes) -> None:
        await trio.sleep_forever()

    async with memory_agent(stall) as agent:
        transport = StreamingTransport(connect=agent.connect)
        with pytest.raises(httpx.ReadTimeout):
            async with post(transport):
                pass
        assert (trio.current_time(), transport.open_connections) == (10, 0)


async def test_the_read_deadline_counts_silence_while_somebody_reads(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Every byte that comes starts it anew, and time spent elsewhere does not count."""
    async with memory_agent(answer_slowly) as agent:
        transport = StreamingTransport(connect=agent.connect)
        async with post(transport) as receive:
            assert (await receive(), trio.current_time()) == (b"a", 18)
            await trio.sleep(1000)
            assert (await receive(), trio.current_time()) == (b"b", 1018)
            await trio.sleep(2.5)
            with pytest.raises(httpx.ReadTimeout):
                await receive()
        assert (trio.current_time(), transport.open_connections) == (1030.5, 0)


async def test_streams_with_different_deadlines_end_each_at_its_own(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The one task that watches them all is never late, whatever order they come in."""
    ended: dict[float, float] = {}

    async def stall(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(HEAD)
        await trio.sleep_forever()

    async with memory_agent(stall) as agent:
        transport = StreamingTransport(connect=agent.connect)

        async def wait(start: float, timeout: float) -> None:
            await trio.sleep(start)
            with pytest.raises(httpx.ReadTimeout):
                async with post(transport, timeout=httpx.Timeout(timeout)) as receive:
                    await receive()
            ended[start] = trio.current_time()

        async with trio.open_nursery() as nursery:
            for start, timeout in ((0, 60), (1, 5), (2, 20), (30, 0.5), (70, 3), (100, 1)):
                nursery.start_soon(wait, start, timeout)
    assert ended == {0: 60, 1: 6, 2: 22, 30: 30.5, 70: 73, 100: 101}


async def test_without_a_deadline_silence_may_last(autojump_clock: trio.testing.MockClock) -> None:
    """A timeout of None is none."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await trio.sleep(80_000)
        await stream.send_all(WHOLE)

    async with (
        memory_agent(answer) as agent,
        post(StreamingTransport(connect=agent.connect), timeout=httpx.Timeout(None)) as receive,
    ):
        assert await read_all(receive) == b"abc"


async def test_no_task_is_left_watching_when_nothing_is_read(autojump_clock: trio.testing.MockClock) -> None:
    """The watch ends with the last stream, so an idle gateway does not wake up."""
    async with (
        memory_agent(answer_whole) as agent,
        post(StreamingTransport(connect=agent.connect)) as receive,
    ):
        await read_all(receive)
    await trio.testing.wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().seconds_to_next_deadline == float("inf")


# ------------------------------------------------------------------ ends and failures


async def test_a_body_delimited_by_the_connection_ends_with_it() -> None:
    """No length and no chunks: the end of the connection is the proper end."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\nabc")
        await stream.aclose()

    async with memory_agent(answer) as agent:
        transport = StreamingTransport(connect=agent.connect)
        async with post(transport) as receive:
            assert await read_all(receive) == b"abc"
        assert transport.open_connections == 0


async def test_a_reset_is_never_a_proper_end() -> None:
    """Not even where the end of the connection would be one."""

    async def answer(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\nabc")
        await go_on.wait()
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    go_on = trio.Event()
    async with loopback_agent(answer) as port:
        transport = StreamingTransport()
        async with post(transport, f"http://127.0.0.1:{port}/") as receive:
            assert await receive() == b"abc"
            go_on.set()
            with pytest.raises(httpx.ReadError):
                await receive()
        assert transport.open_connections == 0


@pytest.mark.parametrize("cut", [1, 20, len(HEAD) - 1])
async def test_a_connection_cut_before_the_end_of_the_head_is_a_read_error(cut: int) -> None:
    """Whether the runtime saw the request cannot be told: it is not sent again."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(HEAD[:cut])
        await stream.aclose()

    async with memory_agent(answer) as agent:
        transport = StreamingTransport(connect=agent.connect)
        with pytest.raises(httpx.ReadError):
            async with post(transport):
                pass
        assert (len(agent.requests), transport.open_connections) == (1, 0)


async def test_what_came_before_a_cut_is_received_first() -> None:
    """The error comes with the next call, and again with every later one."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(HEAD + chunk(b"abc") + b"5\r\nde")
        await stream.aclose()

    async with memory_agent(answer) as agent:
        transport = StreamingTransport(connect=agent.connect)
        async with post(transport) as receive:
            assert await receive() == b"abcde"
            for _ in range(2):
                with pytest.raises(httpx.ReadError):
                    await receive()
        assert transport.open_connections == 0


async def test_what_came_before_a_broken_chunk_is_received_first() -> None:
    """Also when both came in one read."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(HEAD + chunk(b"abc") + b"rubbish\r\n")
        await trio.sleep_forever()

    async with memory_agent(answer) as agent:
        transport = StreamingTransport(connect=agent.connect)
        async with post(transport) as receive:
            assert await receive() == b"abc"
            with pytest.raises(httpx.RemoteProtocolError):
                await receive()
        assert transport.open_connections == 0


@pytest.mark.parametrize("head", [b"220 smtp ready\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000])
async def test_an_answer_that_is_not_http_is_a_protocol_error(head: bytes) -> None:
    """Neither another protocol nor a head without end is waited for."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(head)
        await trio.sleep_forever()

    async with memory_agent(answer) as agent:
        transport = StreamingTransport(connect=agent.connect)
        with pytest.raises(httpx.RemoteProtocolError):
            async with post(transport):
                pass
        assert transport.open_connections == 0


async def test_an_answer_before_the_request_was_read_is_still_received() -> None:
    """A runtime may refuse a request by its head and close; its connection is not used again."""

    class Deaf(trio.abc.SendStream):
        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            raise trio.BrokenResourceError

        async def wait_send_all_might_not_block(self) -> None:
            await trio.lowlevel.checkpoint()

        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    async def connect(host: str, port: int) -> trio.abc.Stream:
        arrived, arriving = trio.testing.memory_stream_one_way_pair()[::-1]
        await arriving.send_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        return trio.StapledStream(Deaf(), arrived)

    transport = StreamingTransport(connect=connect)
    async with httpx.AsyncClient(transport=transport) as client:
        assert (await client.post("http://agent/", content=b"x")).status_code == 413
        assert transport.open_connections == 0


@pytest.mark.parametrize("name", ["X-A", "Idempotency-Key"])
@pytest.mark.parametrize("value", [b"a\r\nX-Evil: 1", b"a\nb", b"a\0b"])
async def test_no_header_can_hold_a_line_end(name: str, value: bytes) -> None:
    """The last line of defence against request splitting: nothing is sent."""
    async with (
        memory_agent(answer_whole) as agent,
        httpx.AsyncClient(transport=StreamingTransport(connect=agent.connect)) as client,
    ):
        with pytest.raises(httpx.LocalProtocolError):
            await client.post("http://agent/", headers=[(name.encode(), value)])
        assert agent.connects == []


@pytest.mark.parametrize(("method", "url"), [("POST", "https://agent/"), ("HEAD", "http://agent/")])
async def test_what_it_is_not_made_for_is_refused(method: str, url: str) -> None:
    """TLS and bodiless answers are httpx's own transport's."""
    async with httpx.AsyncClient(transport=StreamingTransport()) as client:
        with pytest.raises(httpx.UnsupportedProtocol):
            await client.request(method, url)


async def test_nobody_listening_is_a_connect_error() -> None:
    """Refused connections, and names that lead nowhere."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        with pytest.raises(httpx.ConnectError):
            async with post(StreamingTransport(), f"http://127.0.0.1:{reserved.getsockname()[1]}/"):
                pass


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


async def test_connect_tcp_gives_a_stream_that_moves_large_data_both_ways() -> None:
    """More than the socket buffers hold, with the two ends working at once."""

    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async with loopback_agent(echo) as port:
        stream = await connect_tcp("127.0.0.1", port)
        payload = random.Random(5).randbytes(3_000_000)
        received = bytearray()
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, payload)
            while len(received) < len(payload):
                received += await stream.receive_some()
        assert received == payload
        for _ in range(2):
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some()
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(b"x")


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
