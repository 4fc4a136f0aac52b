"""What a socket deals with as it comes, without wsproto and its tasks, and what it must not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from gateway.adapters.guarded_wsproto import MAX_CONTROL_FRAMES_PER_SECOND
from gateway.adapters.readiness import HAS_EPOLL
from gateway.adapters.websocket import TrioWebSocketConnection, WebSocketSettings
from gateway.ports import ClientConnection, ConnectionClosed
from tests.adapters.socket_harness import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    RawClient,
    RecordingTelemetry,
    ScriptedGate,
    client_frame,
    raw_client,
    upgrade_request,
    websocket_port,
)
from tests.garbage import garbage_of

pytestmark = pytest.mark.skipif(not HAS_EPOLL, reason="needs epoll, which Linux has")


class Listener:
    """The engine's side: hears what begins with "ack", receives the rest."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str | bytes]] = []
        self.may_receive = trio.Event()
        self.may_receive.set()
        self._changed = trio.lowlevel.ParkingLot()

    def hear(self, message: str | bytes) -> bool:
        """Take acknowledgements."""
        is_ack = message[:3] in ("ack", b"ack")
        if is_ack:
            self._note("heard", message)
        return is_ack

    async def have_said(self, count: int) -> None:
        """Wait until that much was said."""
        with trio.fail_after(5):
            while len(self.said) < count:
                await self._changed.park()

    def _note(self, kind: str, message: str | bytes) -> None:
        self.said.append((kind, message))
        self._changed.unpark_all()

    async def serve(self, connection: ClientConnection) -> None:
        """Receive until the peer leaves."""
        try:
            while True:
                await self.may_receive.wait()
                self._note("received", await connection.receive(self.hear))
        except ConnectionClosed as closed:
            self._note("closed", str(closed.code))
            await connection.close(1000)


@asynccontextmanager
async def listening(
    listener: Listener, settings: WebSocketSettings | None = None, request: bytes | None = None
) -> AsyncIterator[RawClient]:
    """A raw client whose socket ``listener`` serves."""
    gate = ScriptedGate(listener.serve)
    async with (
        websocket_port(gate, RecordingTelemetry(), settings) as port,
        raw_client(port, request) as client,
    ):
        await trio.testing.wait_all_tasks_blocked(0.01)
        yield client


async def test_a_short_message_is_heard_while_nothing_else_is_to_be_received() -> None:
    """Text and binary; what is not heard is received as ever."""
    listener = Listener()
    async with listening(listener) as client:
        frames = (client_frame(TEXT, b"ack 1"), client_frame(BINARY, b"ack 2"), client_frame(TEXT, b"hello"))
        for number, frame in enumerate(frames, 1):
            await client.send(frame)
            await listener.have_said(number)
    assert listener.said[:3] == [("heard", "ack 1"), ("heard", b"ack 2"), ("received", "hello")]


async def test_what_came_first_is_dealt_with_first() -> None:
    """An acknowledgement behind a message that nobody has received yet is received after it."""
    listener = Listener()
    async with listening(listener) as client:
        listener.may_receive = trio.Event()
        for number, text in enumerate((b"one", b"two", b"ack 3"), 1):
            await client.send(client_frame(TEXT, text))
            await trio.sleep(0.01)
            if number == 1:
                await listener.have_said(1)
        listener.may_receive.set()
        await listener.have_said(3)
    assert listener.said[:3] == [("received", "one"), ("received", "two"), ("received", "ack 3")]


@pytest.mark.parametrize("passes", range(8))
async def test_what_is_behind_a_backlog_is_not_heard_before_it(passes: int) -> None:
    """Whoever takes messages out of the queue passes through the scheduler for each, and is not waiting."""
    listener = Listener()
    async with listening(listener) as client:
        listener.may_receive = trio.Event()
        await client.send(client_frame(TEXT, b"first"))
        await listener.have_said(1)
        for number in range(10):
            await client.send(client_frame(TEXT, b"m%d" % number))
        await trio.sleep(0.01)
        listener.may_receive.set()
        for _ in range(passes):
            await trio.lowlevel.checkpoint()
        await client.send(client_frame(TEXT, b"ack"))
        await listener.have_said(12)
    assert [message for _, message in listener.said[:12]] == [
        "first",
        *(f"m{number}" for number in range(10)),
        "ack",
    ]


@pytest.mark.parametrize("cut", [1, 2, 5, 6, 7, 8, 9])
async def test_a_frame_that_comes_in_two_reads_is_received(cut: int) -> None:
    """However much its second half looks like a frame of its own."""
    listener = Listener()
    payload = b"xy" + client_frame(TEXT, b"ack 1")
    frame = client_frame(BINARY, payload)
    async with listening(listener) as client:
        await client.send(frame[:cut])
        await trio.sleep(0.01)
        await client.send(frame[cut:])
        await listener.have_said(1)
        await client.send(client_frame(TEXT, b"ack 2"))
        await listener.have_said(2)
    assert listener.said[:2] == [("received", payload), ("heard", "ack 2")]


async def test_the_second_half_of_a_head_is_no_frame() -> None:
    """Its length and mask may look like one."""
    listener = Listener()
    look_alike = client_frame(TEXT, b"ack 1")
    size = int.from_bytes(look_alike[:2], "big")
    payload = look_alike[6:] + bytes(size - 5)
    async with listening(listener) as client:
        await client.send(bytes((0x80 | BINARY, 0x80 | 126)))
        await trio.sleep(0.01)
        await client.send(look_alike)
        await trio.sleep(0.01)
        await client.send(payload[5:])
        await listener.have_said(1)
    assert listener.said[0] == ("received", payload)


async def test_a_pong_in_the_payload_is_payload() -> None:
    """In the middle of a frame every byte belongs to it."""
    listener = Listener()
    payload = b"xy" + client_frame(PONG, b"p") + b"z"
    frame = client_frame(BINARY, payload)
    async with listening(listener) as client:
        for part in (frame[:8], frame[8:-1], frame[-1:]):
            await client.send(part)
            await trio.sleep(0.01)
        await listener.have_said(1)
    assert listener.said[0] == ("received", payload)


async def test_nothing_is_heard_in_the_middle_of_a_message() -> None:
    """A whole text frame between the pieces of another breaks the protocol (RFC 6455 section 5.4)."""
    listener = Listener()
    async with listening(listener) as client:
        await client.send(client_frame(TEXT, b"begun", final=False))
        await trio.sleep(0.01)
        await client.send(client_frame(TEXT, b"ack 1"))
        assert await client.read_close() == 1002
    assert ("heard", "ack 1") not in listener.said


async def test_a_pong_in_the_middle_of_a_message_is_taken() -> None:
    """Control frames may come between the pieces, and the message is whole afterwards."""
    listener = Listener()
    async with listening(listener) as client:
        for frame in (
            client_frame(TEXT, b"be", final=False),
            client_frame(PONG, b"unasked"),
            client_frame(0, b"gun"),
        ):
            await client.send(frame)
            await trio.sleep(0.01)
        await listener.have_said(1)
    assert listener.said[0] == ("received", "begun")


async def test_text_that_is_no_text_ends_the_socket() -> None:
    """With 1007, as ever (RFC 6455 section 8.1)."""
    listener = Listener()
    async with listening(listener) as client:
        await client.send(client_frame(TEXT, b"ack \xff"))
        assert await client.read_close() == 1007
    assert all(kind != "heard" for kind, _ in listener.said)


async def test_a_flood_of_pongs_ends_the_socket() -> None:
    """One by one, each in a read of its own."""
    listener = Listener()
    async with listening(listener) as client:
        for _ in range(MAX_CONTROL_FRAMES_PER_SECOND + 1):
            await client.send(client_frame(PONG))
            await trio.sleep(0.0005)
        assert await client.read_close() == 1008


async def test_a_ping_is_answered() -> None:
    """It is not for this way, and comes to nobody's ears."""
    listener = Listener()
    async with listening(listener) as client:
        await client.send(client_frame(PING, b"p"))
        assert await client.read_frame() == (PONG, b"p")
    assert all(kind == "closed" for kind, _ in listener.said)


async def test_the_pong_of_a_ping_is_told() -> None:
    """Whoever sent the ping gets on."""
    ponged = trio.Event()

    async def serve(connection: ClientConnection) -> None:
        async with trio.open_nursery() as nursery:

            async def ping() -> None:
                await connection.ping()
                ponged.set()

            nursery.start_soon(ping)
            try:
                await connection.receive()
            except ConnectionClosed:
                await connection.close(1000)

    async with (
        websocket_port(ScriptedGate(serve), RecordingTelemetry()) as port,
        raw_client(port) as client,
    ):
        opcode, payload = await client.read_frame()
        assert opcode == PING
        await client.send(client_frame(PONG, payload))
        with trio.fail_after(5):
            await ponged.wait()
        await client.send(client_frame(CLOSE))


async def test_nothing_is_heard_after_the_goodbye() -> None:
    """Once a close frame went out, what the peer still says is not acted upon."""
    listener = Listener()

    async def serve(connection: ClientConnection) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, connection)
            await trio.testing.wait_all_tasks_blocked()
            assert isinstance(connection, TrioWebSocketConnection)
            connection.leave(1001)

    async with (
        websocket_port(ScriptedGate(serve), RecordingTelemetry()) as port,
        raw_client(port) as client,
    ):
        assert await client.read_close() == 1001
        await client.send(client_frame(TEXT, b"ack 1"))
        await trio.sleep(0.01)
        await client.send(client_frame(CLOSE, (1001).to_bytes(2, "big")))
        assert await client.read_to_end() == b""
    assert all(kind != "heard" for kind, _ in listener.said)


async def test_a_short_message_is_heard_on_a_compressed_socket() -> None:
    """A sender may leave any message uncompressed (RFC 7692 section 6)."""
    listener = Listener()
    request = upgrade_request("/ws/s", "Sec-WebSocket-Extensions: permessage-deflate")
    async with listening(listener, WebSocketSettings(compresses=True), request) as client:
        await client.send(client_frame(TEXT, b"ack 1"))
        await listener.have_said(1)
    assert listener.said[0] == ("heard", "ack 1")


@pytest.mark.parametrize("says_goodbye", [True, False])
async def test_a_closed_socket_leaves_nothing_to_the_collector(says_goodbye: bool) -> None:
    """Neither of ours nor of wsproto's, whether the peer closes it or is gone."""
    async with websocket_port(ScriptedGate(), RecordingTelemetry()) as port:
        with garbage_of("gateway", "wsproto", "trio_websocket") as found:
            for _ in range(2):
                async with raw_client(port) as client:
                    await client.send(client_frame(TEXT, b"hello"))
                    assert await client.read_frame() == (TEXT, b"hello")
                    if says_goodbye:
                        await client.send(client_frame(CLOSE, (1000).to_bytes(2, "big")))
                        assert await client.read_close() == 1000
                        assert await client.read_to_end() == b""
                await trio.testing.wait_all_tasks_blocked(0.01)
            del client
        assert found == []
