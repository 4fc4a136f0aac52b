"""Bytes written without waiting: nothing lost, repeated, reordered or cut by another's bytes."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from gateway.adapters.direct_stream import LINGER_SECONDS, DirectStream
from gateway.adapters.readiness import HAS_EPOLL, Readiness


@asynccontextmanager
async def socket_pair() -> AsyncIterator[tuple[DirectStream, trio.SocketStream]]:
    """A direct stream and its peer, connected by a socket with a small buffer."""
    ours, theirs = trio.socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    stream, peer = DirectStream(trio.SocketStream(ours)), trio.SocketStream(theirs)
    try:
        yield stream, peer
    finally:
        stream.close_nowait()
        await trio.aclose_forcefully(peer)


async def receive_exactly(peer: trio.abc.ReceiveStream, count: int) -> bytes:
    """That many bytes from the peer's side."""
    data = b""
    while len(data) < count:
        chunk = await peer.receive_some(count - len(data))
        assert chunk, "ended early"
        data += chunk
    return data


async def test_what_the_kernel_takes_is_not_waited_for() -> None:
    """A small write is on its way before anything is awaited."""
    async with socket_pair() as (stream, peer):
        assert stream.write_nowait(b"hello")
        assert (stream.written, stream.buffered) == (5, 0)
        assert await receive_exactly(peer, 5) == b"hello"


async def test_what_the_kernel_refuses_is_kept_to_the_byte() -> None:
    """``written`` and ``buffered`` add up to what was given, and the peer gets exactly that."""
    async with socket_pair() as (stream, peer):
        data = random.Random(1).randbytes(100_000)
        assert not stream.write_nowait(data)
        assert 0 < stream.written < len(data)
        assert stream.written + stream.buffered == len(data)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.flush)
            assert await receive_exactly(peer, len(data)) == data
        assert (stream.written, stream.buffered) == (len(data), 0)


async def test_a_cancelled_flush_loses_and_repeats_nothing() -> None:
    """However often waiting is cancelled, the bytes arrive once and in order."""
    async with socket_pair() as (stream, peer):
        data = random.Random(2).randbytes(300_000)
        received = b""
        stream.write_nowait(data[:150_000])
        stream.write_nowait(data[150_000:])
        while len(received) < len(data):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.flush)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            received += await peer.receive_some(20_000)
        assert received == data


async def test_a_cancelled_send_leaves_its_frame_whole_and_in_its_place() -> None:
    """A pong whose sender gave up goes out between the frames it was written between."""
    async with socket_pair() as (stream, peer):
        before, after = b"b" * 50_000, b"a" * 50_000
        stream.write_nowait(before)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, b"pong")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert not stream.write_nowait(after)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.flush)
            assert await receive_exactly(peer, 100_004) == before + b"pong" + after


async def test_several_tasks_flush_at_once_and_one_may_give_up() -> None:
    """When the task that waits for the kernel is cancelled, another takes its place."""
    async with socket_pair() as (stream, peer):
        stream.write_nowait(b"x" * 100_000)
        done: list[int] = []

        async def flush(number: int, scope: trio.CancelScope) -> None:
            with scope:
                await stream.flush()
                done.append(number)

        first = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flush, 1, first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(flush, 2, trio.CancelScope())
            nursery.start_soon(flush, 3, trio.CancelScope())
            await trio.testing.wait_all_tasks_blocked()
            first.cancel()
            await receive_exactly(peer, 100_000)
        assert sorted(done) == [2, 3]


async def test_a_lost_connection_is_told_and_the_count_stays() -> None:
    """After a reset, writing, flushing and reading raise; ``written`` still says how far it came."""
    async with socket_pair() as (stream, peer):
        stream.write_nowait(b"x" * 100_000)
        written = stream.written
        await peer.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await stream.flush()
        with pytest.raises(trio.BrokenResourceError):
            stream.write_nowait(b"y")
        assert stream.written == written


async def test_closing_wakes_readers_and_flushers() -> None:
    """Whoever waits on the stream when it is closed gets ClosedResourceError, not silence."""
    async with socket_pair() as (stream, _peer):
        stream.write_nowait(b"x" * 100_000)

        async def expect_closed(operation: str) -> None:
            with pytest.raises(trio.ClosedResourceError):
                await (stream.flush() if operation == "flush" else stream.receive_some())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_closed, "flush")
            nursery.start_soon(expect_closed, "flush")
            nursery.start_soon(expect_closed, "receive")
            await trio.testing.wait_all_tasks_blocked()
            stream.close_nowait()
        with pytest.raises(trio.ClosedResourceError):
            stream.write_nowait(b"y")


async def test_bytes_put_back_come_first() -> None:
    """What was read too far is read again, in pieces as asked for."""
    async with socket_pair() as (stream, peer):
        stream.unread(b"abc")
        await peer.send_all(b"def")
        assert await stream.receive_some(2) == b"ab"
        assert await stream.receive_some() == b"c"
        assert await stream.receive_some() == b"def"


async def test_lingering_gives_up_in_time(autojump_clock: trio.testing.MockClock) -> None:
    """A peer that neither reads to the end nor leaves holds the descriptor for LINGER_SECONDS only."""
    async with socket_pair() as (stream, _peer):
        stream.write_nowait(b"bye")
        stream.lingers = True
        await stream.aclose()
        start = trio.current_time()
        await stream.release()
        assert trio.current_time() - start == LINGER_SECONDS


async def test_lingering_ends_with_the_peer() -> None:
    """Once the peer has read our last bytes and left, nothing is waited for."""
    async with socket_pair() as (stream, peer):
        stream.write_nowait(b"x" * 100_000 + b"bye")
        stream.lingers = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.release)
            assert (await receive_exactly(peer, 100_003)).endswith(b"bye")
            assert await peer.receive_some() == b""
            await peer.aclose()


@pytest.mark.parametrize("lockstep", [False, True])
async def test_it_works_over_streams_without_a_socket(lockstep: bool) -> None:
    """Over a memory stream everything is buffered, and ``flush`` hands it over."""
    near: trio.abc.Stream
    far: trio.abc.Stream
    near, far = trio.testing.lockstep_stream_pair() if lockstep else trio.testing.memory_stream_pair()
    stream = DirectStream(near)
    assert not stream.write_nowait(b"abc")
    assert not stream.write_nowait(b"def")
    assert (stream.written, stream.buffered) == (0, 6)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.flush)
        assert await receive_exactly(far, 6) == b"abcdef"
    assert (stream.written, stream.buffered) == (6, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(far.send_all, b"back")
        assert await stream.receive_some() == b"back"
    await stream.release()
    assert await far.receive_some() == b""


@pytest.mark.skipif(not HAS_EPOLL, reason="needs epoll, which Linux has")
async def test_what_is_taken_as_it_comes_is_not_received() -> None:
    """And the rest is, in order, up to the end of the stream."""
    async with socket_pair() as (stream, peer):
        shown: list[bytes] = []

        def take(data: bytes) -> bool:
            shown.append(data)
            return data.startswith(b"ack")

        stream.take_each(Readiness(), take)
        received: list[bytes] = []

        async def receive() -> None:
            while data := await stream.receive_some():
                received.append(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            for data in (b"ack 1", b"a", b"ack 2", b"ack 3", b"b"):
                await trio.testing.wait_all_tasks_blocked()
                await peer.send_all(data)
            await trio.testing.wait_all_tasks_blocked()
            await peer.send_eof()
        assert received == [b"a", b"b"]
        assert shown == [b"ack 1", b"a", b"ack 2", b"ack 3", b"b"]


@pytest.mark.skipif(not HAS_EPOLL, reason="needs epoll, which Linux has")
async def test_closing_ends_a_wait_by_callback() -> None:
    """Whoever waits for input learns at once that the stream is closed."""
    async with socket_pair() as (stream, _peer), trio.open_nursery() as nursery:
        stream.take_each(Readiness(), lambda _: False)

        async def receive() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some()

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        stream.close_nowait()


@pytest.mark.skipif(not HAS_EPOLL, reason="needs epoll, which Linux has")
async def test_a_cancelled_wait_by_callback_loses_nothing() -> None:
    """What comes afterwards is received, and nothing is shown to who does not wait."""
    async with socket_pair() as (stream, peer):
        shown: list[bytes] = []

        def take(data: bytes) -> bool:
            shown.append(data)
            return False

        stream.take_each(Readiness(), take)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.receive_some)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        await peer.send_all(b"later")
        await trio.testing.wait_all_tasks_blocked()
        assert shown == []
        assert await stream.receive_some() == b"later"


@pytest.mark.skipif(not HAS_EPOLL, reason="needs epoll, which Linux has")
async def test_a_reset_is_told_to_who_waits_by_callback() -> None:
    """As a lost connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    theirs = socket.create_connection(listener.getsockname())
    ours, _ = listener.accept()
    listener.close()
    stream = DirectStream(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
    stream.take_each(Readiness(), lambda _: True)
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
    stream.close_nowait()
