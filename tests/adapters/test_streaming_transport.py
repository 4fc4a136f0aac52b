"""The transport: what is sent, exact deadlines, ends and failures."""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import AsyncIterator

import httpx
import pytest
import trio
import trio.testing

from gateway.adapters.streaming_transport import StreamingTransport
from tests.adapters.agent_harness import (
    END,
    HEAD,
    chunk,
    loopback_agent,
    memory_agent,
    read_request,
)
from tests.adapters.transport_harness import WHOLE, answer_whole, post, read_all


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
    """The watch ends with the last stream, however that ended, so an idle gateway does not wake up."""

    async def stall(stream: trio.abc.Stream, _request: bytes) -> None:
        await trio.sleep_forever()

    async def connect_to_nobody(host: str, port: int) -> trio.abc.Stream:
        return trio.testing.lockstep_stream_pair()[0]

    async def nothing_is_watched() -> bool:
        await trio.testing.wait_all_tasks_blocked()
        return trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf

    async with memory_agent(answer_whole) as agent:
        async with post(StreamingTransport(connect=agent.connect)) as receive:
            assert await receive() == b"abc"
        assert await nothing_is_watched()
    async with memory_agent(stall) as agent:
        with trio.move_on_after(1):
            async with post(StreamingTransport(connect=agent.connect)):
                pass
        assert await nothing_is_watched()
        with pytest.raises(httpx.ReadTimeout):
            async with post(StreamingTransport(connect=agent.connect)):
                pass
        assert await nothing_is_watched()
    with pytest.raises(httpx.WriteTimeout):
        async with post(StreamingTransport(connect=connect_to_nobody)):
            pass
    assert await nothing_is_watched()


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
