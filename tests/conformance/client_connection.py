"""What every ``ClientConnection`` has to do, whatever serves it; ``test_client_connection`` runs it on each.

The client is raw bytes over a loopback connection, so that frames are seen as they are on the wire.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import ClassVar

import pytest
import trio
import trio.testing

from gateway.core.websocket_protocol import Dialect
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
    Serve,
    client_frame,
    raw_client,
    upgrade_request,
)

CLOSE_TIMEOUT = 0.2
LARGE = 2**16


def numbered(count: int, size: int = LARGE) -> list[bytes]:
    """Payloads that cannot be mistaken for each other."""
    return [b"%08d" % number + b"x" * (size - 8) for number in range(count)]


class ClientConnectionContract(ABC):
    """Subclass it once per adapter; each test function of it runs there."""

    tells_close_codes: ClassVar[bool]
    """Whether the adapter learns the code of the peer's close frame."""

    @abstractmethod
    def port(self, gate: ScriptedGate, telemetry: RecordingTelemetry) -> AsyncIterator[int]:
        """Serve on a loopback port with ``CLOSE_TIMEOUT``; an async context manager."""

    @asynccontextmanager
    async def connected(self, serve: Serve, dialect: Dialect = Dialect.V1) -> AsyncIterator[RawClient]:
        """A client of a server that runs ``serve``; fails the test when the server logged an error."""
        telemetry = RecordingTelemetry()
        gate = ScriptedGate(serve, dialect=dialect)
        request = (
            upgrade_request("/ws/s", f"Sec-WebSocket-Protocol: {dialect.value}")
            if dialect.is_v2
            else upgrade_request()
        )
        with trio.fail_after(10):
            async with (
                asynccontextmanager(self.port)(gate, telemetry) as port,
                raw_client(port, request) as client,
            ):
                yield client
        assert telemetry.errors == []

    @asynccontextmanager
    async def handed_over(
        self, dialect: Dialect = Dialect.V1
    ) -> AsyncIterator[tuple[ClientConnection, RawClient]]:
        """The connection itself and its client; the server's ``serve`` lasts as long as the block."""
        send, receive = trio.open_memory_channel[ClientConnection](1)
        over = trio.Event()

        async def serve(connection: ClientConnection) -> None:
            await send.send(connection)
            await over.wait()

        async with self.connected(serve, dialect) as client:
            try:
                yield await receive.receive(), client
            finally:
                over.set()

    # ------------------------------------------------------------------ messages

    async def test_text_goes_both_ways(self) -> None:
        """A text frame is a str; each payload is one text frame, in order."""
        async with self.handed_over() as (connection, client):
            await client.send(client_frame(TEXT, "gr\u00fc\u00df".encode()) + client_frame(TEXT, b""))
            assert await connection.receive() == "gr\u00fc\u00df"
            assert await connection.receive() == ""
            if not connection.send_nowait([b"one", b"", "\u20ac".encode() * 50_000]):
                await connection.wait_sent()
            for expected in (b"one", b"", "\u20ac".encode() * 50_000):
                assert await client.read_frame() == (TEXT, expected)
            assert connection.unsent == 0

    async def test_binary_goes_both_ways(self) -> None:
        """In the MessagePack dialect payloads are binary frames; received binary is bytes, if empty too."""
        async with self.handed_over(Dialect.V2_MSGPACK) as (connection, client):
            await client.send(client_frame(BINARY, b"\x80") + client_frame(BINARY, b""))
            assert await connection.receive() == b"\x80"
            assert await connection.receive() == b""
            if not connection.send_nowait([b"\x80\xff", b""]):
                await connection.wait_sent()
            assert await client.read_frame() == (BINARY, b"\x80\xff")
            assert await client.read_frame() == (BINARY, b"")

    async def test_cancelling_receive_loses_no_message(self) -> None:
        """A receive given up, again and again, leaves the next message for the next."""
        async with self.handed_over() as (connection, client):
            for number in range(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._receive_nothing, connection)
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel()
                await client.send(client_frame(TEXT, b"%d" % number))
                assert await connection.receive() == str(number)

    @staticmethod
    async def _receive_nothing(connection: ClientConnection) -> None:
        raise AssertionError(await connection.receive())

    # ------------------------------------------------------------------ backpressure

    async def test_what_the_kernel_refuses_is_counted_kept_and_sent_in_order(self) -> None:
        """``unsent`` counts from the newest; one call more is safe; all arrives once, whole, in order."""
        payloads = numbered(200)
        async with self.handed_over() as (connection, client):
            assert not connection.send_nowait(payloads)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert 0 < connection.unsent < len(payloads)
            before = connection.unsent
            assert not connection.send_nowait([b"control"])
            assert connection.unsent == before + 1
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.wait_sent)
                for payload in [*payloads, b"control"]:
                    assert await client.read_frame() == (TEXT, payload)
            assert connection.unsent == 0

    async def test_cancelling_wait_sent_loses_and_repeats_nothing(self) -> None:
        """Given up after every frame that the client read, the rest still arrives exactly once."""
        payloads = numbered(60)
        async with self.handed_over() as (connection, client):
            connection.send_nowait(payloads)
            for payload in payloads:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(connection.wait_sent)
                    assert await client.read_frame() == (TEXT, payload)
                    nursery.cancel_scope.cancel()
            await connection.wait_sent()
            assert connection.unsent == 0

    async def test_pongs_stand_between_frames(self) -> None:
        """A client that pings into a backlog gets whole frames and its pongs, none inside the other."""
        payloads = numbered(60)
        async with self.handed_over() as (connection, client):
            connection.send_nowait(payloads)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.wait_sent)
                pongs: list[bytes] = []
                for number, payload in enumerate(payloads):
                    if number < 10:
                        await client.send(client_frame(PING, b"%d" % number))
                    while (frame := await client.read_frame())[0] == PONG:
                        pongs.append(frame[1])
                    assert frame == (TEXT, payload)
            while len(pongs) < 10:
                opcode, payload = await client.read_frame()
                assert opcode == PONG
                pongs.append(payload)
            assert pongs == [b"%d" % number for number in range(10)]

    # ------------------------------------------------------------------ endings

    async def test_the_peers_close_ends_everything(self) -> None:
        """What came before it is still received; then every operation raises ConnectionClosed."""
        async with self.handed_over() as (connection, client):
            await client.send(
                client_frame(TEXT, b"last") + client_frame(CLOSE, (1001).to_bytes(2, "big") + b"bye")
            )
            assert await connection.receive() == "last"
            with pytest.raises(ConnectionClosed) as caught:
                await connection.receive()
            assert caught.value.code == (1001 if self.tells_close_codes else 1006)
            with pytest.raises(ConnectionClosed):
                connection.send_nowait([b"x"])
            assert connection.unsent == 1
            if connection.sends_pings:
                with pytest.raises(ConnectionClosed):
                    await connection.ping()
            assert await client.read_close() == 1001
            await connection.close(1000)

    async def test_the_peers_close_is_answered_in_the_middle_of_sending(self) -> None:
        """Also when ``serve`` learns of it from a send, and returns at once."""

        async def serve(connection: ClientConnection) -> None:
            with suppress(ConnectionClosed):
                while True:
                    if not connection.send_nowait([b"token"]):
                        await connection.wait_sent()
                    await trio.lowlevel.checkpoint()

        for _ in range(10):
            async with self.connected(serve) as client:
                await client.read_frame()
                await client.send(client_frame(CLOSE, (1000).to_bytes(2, "big")))
                assert await client.read_close() == 1000

    async def test_a_peer_that_leaves_cancels_nothing(self) -> None:
        """``serve`` learns it from ConnectionClosed and finishes its work; it is not cancelled."""
        steps: list[str] = []
        finished = trio.Event()

        async def serve(connection: ClientConnection) -> None:
            try:
                with suppress(ConnectionClosed):
                    await connection.receive()
                steps.append("closed")
                await trio.testing.wait_all_tasks_blocked(0.01)
                steps.append("stored")
            finally:
                finished.set()

        async with self.connected(serve) as client:
            await client.stream.aclose()
            await finished.wait()
        assert steps == ["closed", "stored"]

    async def test_a_lost_connection_reads_as_1006_and_unsent_stays_readable(self) -> None:
        """After a reset the engine still learns what cannot have arrived."""
        async with self.handed_over() as (connection, client):
            connection.send_nowait(numbered(200))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._expect_closed, connection, "receive", 1006)
                nursery.start_soon(self._expect_closed, connection, "wait_sent", 1006)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert isinstance(client.stream, trio.SocketStream)
                client.stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                await client.stream.aclose()
            assert 0 < connection.unsent < 200

    @staticmethod
    async def _expect_closed(connection: ClientConnection, operation: str, code: int) -> None:
        with pytest.raises(ConnectionClosed) as caught:
            await getattr(connection, operation)()
        assert caught.value.code == code

    async def test_close_sends_code_and_reason_behind_what_is_buffered_and_waits(self) -> None:
        """The close frame is the last one; receive ends with it; a second close does nothing."""
        payloads = numbered(40)
        async with self.handed_over() as (connection, client):
            connection.send_nowait(payloads)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._expect_closed, connection, "receive", 4413)
                await trio.testing.wait_all_tasks_blocked(0.01)
                nursery.start_soon(connection.close, 4413, "too slow")
                for payload in payloads:
                    assert await client.read_frame() == (TEXT, payload)
                assert await client.read_frame() == (CLOSE, (4413).to_bytes(2, "big") + b"too slow")
                await client.send(client_frame(CLOSE, (4413).to_bytes(2, "big")))
            await connection.close(1000)
            with pytest.raises(ConnectionClosed):
                connection.send_nowait([b"x"])
            assert await client.read_to_end() == b""

    async def test_close_waits_no_longer_than_its_timeout_for_a_peer_that_does_not_answer(self) -> None:
        """Neither for its close frame nor for it to read what is buffered."""
        for payloads in ([b"short"], numbered(200)):
            async with self.handed_over() as (connection, _client):
                connection.send_nowait(payloads)
                started = trio.current_time()
                await connection.close(4408)
                assert trio.current_time() - started < CLOSE_TIMEOUT + 1.5

    async def test_close_in_a_cancelled_scope_still_tells_the_code(self) -> None:
        """It does not wait for an answer, but the peer learns why."""
        closing = trio.Event()

        async def serve(connection: ClientConnection) -> None:
            with trio.CancelScope() as scope:
                scope.cancel()
                await connection.close(1012, "restart")
            closing.set()

        async with self.connected(serve) as client:
            assert await client.read_frame() == (CLOSE, (1012).to_bytes(2, "big") + b"restart")
            with trio.fail_after(CLOSE_TIMEOUT):
                await closing.wait()

    async def test_a_serve_that_returns_without_closing_is_closed_after(self) -> None:
        """The adapter tears the socket down when ``serve`` is over."""

        async def serve(connection: ClientConnection) -> None:
            await connection.receive()

        async with self.connected(serve) as client:
            await client.send(client_frame(TEXT, b"x"))
            assert await client.read_close() == 1000
            await client.send(client_frame(CLOSE, (1000).to_bytes(2, "big")))
            with suppress(trio.BrokenResourceError):
                assert await client.read_to_end() == b""

    # ------------------------------------------------------------------ pings

    async def test_a_ping_returns_with_its_pong(self) -> None:
        """Pongs to nothing are ignored; a ping given up leaves nothing behind; a lost peer ends it."""
        async with self.handed_over() as (connection, client):
            if not connection.sends_pings:
                with pytest.raises(RuntimeError):
                    await connection.ping()
                return
            for _ in range(3):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(connection.ping)
                    opcode, payload = await client.read_frame()
                    assert opcode == PING
                    await client.send(client_frame(PONG, b"unknown"))
                    await trio.testing.wait_all_tasks_blocked()
                    assert nursery.child_tasks
                    await client.send(client_frame(PONG, payload))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(connection.ping)
                    _, payload = await client.read_frame()
                    nursery.cancel_scope.cancel()
                await client.send(client_frame(PONG, payload))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._expect_closed, connection, "ping", 1006)
                await client.read_frame()
                await client.stream.aclose()
