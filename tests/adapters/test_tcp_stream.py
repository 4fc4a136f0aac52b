"""The TCP stream under the transport: what moves, what ends, and whether anything was sent."""

from __future__ import annotations

import random
import socket

import pytest
import trio
import trio.testing

from gateway.adapters.tcp_stream import NothingSent, TcpStream, connect_tcp
from tests.adapters.agent_harness import loopback_agent, open_files


def stream_pair() -> tuple[TcpStream, socket.socket]:
    """A stream and the other end of its connection."""
    ours, theirs = socket.socketpair()
    return TcpStream(ours), theirs


async def test_large_data_moves_both_ways() -> None:
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


async def test_the_end_of_the_peer_is_an_empty_read() -> None:
    """What came before it is read first, in pieces of the size asked for."""
    stream, peer = stream_pair()
    with peer:
        peer.sendall(b"abc")
    async with stream:
        assert [await stream.receive_some(2) for _ in range(3)] == [b"ab", b"c", b""]


async def test_a_cancelled_read_loses_nothing() -> None:
    """What comes later is there for the next read."""
    stream, peer = stream_pair()
    with peer:
        async with stream:
            with trio.move_on_after(0):
                await stream.receive_some()
            peer.sendall(b"abc")
            assert await stream.receive_some() == b"abc"


async def test_closing_wakes_who_waits() -> None:
    """A read in another task fails at once, and so does everything afterwards."""
    stream, peer = stream_pair()

    async def read() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()

    with peer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            stream.close()
        for _ in range(2):
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some()
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(b"x")


async def test_sending_to_a_peer_that_is_gone_says_that_nothing_was_sent() -> None:
    """The kernel takes no byte of it."""
    stream, peer = stream_pair()
    peer.close()
    async with stream:
        with pytest.raises(NothingSent):
            await stream.send_all(b"x")


async def test_sending_that_fails_half_way_does_not_say_so() -> None:
    """The peer may have seen the first part: what was sent must not be sent again."""
    stream, peer = stream_pair()

    async def send() -> None:
        with pytest.raises(trio.BrokenResourceError) as error:
            await stream.send_all(bytes(10_000_000))
        assert not isinstance(error.value, NothingSent)

    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        peer.close()


async def test_input_is_seen_without_being_taken() -> None:
    """Nothing yet, something, and the end."""
    stream, peer = stream_pair()
    async with stream:
        assert not stream.has_input()
        assert stream.receive_nowait() == b""
        peer.sendall(b"a")
        assert stream.has_input()
        assert stream.receive_nowait() == b"a"
        assert not stream.has_input()
        peer.close()
        assert stream.has_input()
        assert stream.receive_nowait() == b""


async def test_a_connect_that_is_cancelled_leaves_no_socket() -> None:
    """At whatever point of it: every descriptor comes back."""

    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some()

    async def connect() -> None:
        stream = await connect_tcp("127.0.0.1", port)
        await stream.aclose()

    files = open_files()
    async with loopback_agent(serve) as port:
        for passes in range(12):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect)
                for _ in range(passes):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
    assert open_files() == files
