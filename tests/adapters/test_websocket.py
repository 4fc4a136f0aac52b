"""Sockets over trio-websocket on real loopback connections."""

from __future__ import annotations

import json
import socket
import struct
import tracemalloc

import pytest
import trio
import trio.testing
import websockets.sync.client
from wsproto.events import AcceptConnection, Ping

from gateway.adapters.direct_stream import DirectStream
from gateway.adapters.guarded_wsproto import (
    MAX_CONTROL_FRAMES_PER_SECOND,
    MAX_TINY_FRAGMENTS_PER_SECOND,
    GuardedConnection,
)
from gateway.adapters.websocket import WebSocketServer, WebSocketSettings
from gateway.core.errors import GatewayError, InsufficientScope, InvalidToken, NotAuthenticated, Overloaded
from gateway.core.websocket_protocol import Dialect
from gateway.ports import Admission, ClientConnection, ConnectionClosed, UpgradeRequest
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
    read_head_and_serve,
    upgrade_request,
    websocket_port,
)


async def test_the_websockets_package_talks_to_it() -> None:
    """A client that is not ours upgrades, sends, receives, pings and closes."""

    def talk(port: int) -> tuple[object, object, int | None]:
        with websockets.sync.client.connect(f"ws://127.0.0.1:{port}/ws/s", proxy=None) as client:
            client.send("hello")
            short = client.recv()
            client.send("é" * 40_000)
            long = client.recv()
            assert client.ping().wait(5)
            client.close(1000)
            return short, long, client.close_code

    async with websocket_port(ScriptedGate(), RecordingTelemetry()) as port:
        assert await trio.to_thread.run_sync(talk, port) == ("hello", "é" * 40_000, 1000)


async def test_frames_follow_the_dialect() -> None:
    """MessagePack sockets get binary frames, and their subprotocol is echoed."""
    gate = ScriptedGate(dialect=Dialect.V2_MSGPACK)
    request = upgrade_request("/ws/s", "Sec-WebSocket-Protocol: bearer.x, codelab.v2.msgpack")
    async with websocket_port(gate, RecordingTelemetry()) as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            client = RawClient(stream)
            await client.send(request)
            assert b"Sec-WebSocket-Protocol: codelab.v2.msgpack\r\n" in await client.read_head()
            await client.send(client_frame(BINARY, b"\x80"))
            assert await client.read_frame() == (BINARY, b"\x80")


async def test_frames_sent_with_the_handshake_are_not_lost() -> None:
    """A client that does not wait for the 101 has its first message read all the same."""
    request = upgrade_request() + client_frame(TEXT, b"early")
    async with (
        websocket_port(ScriptedGate(), RecordingTelemetry()) as port,
        raw_client(port, request) as client,
    ):
        assert await client.read_frame() == (TEXT, b"early")


@pytest.mark.parametrize(
    ("error", "status", "fields", "body"),
    [
        (
            NotAuthenticated("Present a token."),
            b"401 Unauthorized",
            [b'WWW-Authenticate: Bearer realm="gateway"\r\n'],
            {"error": "unauthorized", "error_description": "Present a token."},
        ),
        (
            InvalidToken("It has expired."),
            b"401 Unauthorized",
            [b'error="invalid_token", error_description="It has expired."'],
            {"error": "invalid_token", "error_description": "It has expired."},
        ),
        (
            InsufficientScope("api:write"),
            b"403 Forbidden",
            [b'error="insufficient_scope"', b'scope="api:write"'],
            {
                "error": "insufficient_scope",
                "error_description": "This needs the scope 'api:write'; get a token that carries it.",
            },
        ),
        (
            Overloaded("Full.", retry_after=1.2),
            b"503 Service Unavailable",
            [b"Retry-After: 2\r\n"],
            {"error": {"code": "OVERLOADED", "message": "Full.", "retryable": True}, "detail": "Full."},
        ),
    ],
)
async def test_a_refusal_is_answered_in_http(
    error: GatewayError, status: bytes, fields: list[bytes], body: object
) -> None:
    """What the gate refuses gets its status, its challenge and its JSON body, and no upgrade."""
    gate = ScriptedGate(refusal=error)
    async with websocket_port(gate, RecordingTelemetry()) as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            client = RawClient(stream)
            await client.send(upgrade_request("/ws/%73?a=b", "X-Extra: 1"))
            head = await client.read_head()
            rest = await client.read_to_end()
    assert head.startswith(b"HTTP/1.1 " + status + b"\r\n")
    for fragment in [*fields, b"Connection: close\r\n"]:
        assert fragment in head
    assert json.loads(rest) == body
    assert gate.ended == []
    (request,) = gate.requests
    assert (request.target, request.header("x-extra"), request.peer) == ("/ws/%73?a=b", "1", "127.0.0.1")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (client_frame(TEXT, b"\xff"), 1007),
        (client_frame(TEXT, b"\xc3", final=False) + client_frame(0, b"\x28"), 1007),
        (client_frame(0x3, b""), 1002),
        (client_frame(0xB, b""), 1002),
        (client_frame(TEXT, b"x", masked=False), 1002),
        (client_frame(0, b"x"), 1002),
        (client_frame(TEXT | 0x40, b"x"), 1002),
        (client_frame(PING, b"x" * 126), 1002),
        (client_frame(PING, b"x", final=False), 1002),
        (client_frame(CLOSE, b"\x03"), 1002),
        (client_frame(CLOSE, b"\x03\xee"), 1002),
        (client_frame(TEXT, b"x" * 1025), 1009),
        (client_frame(TEXT, "é".encode() * 513), 1009),
        (client_frame(TEXT, b"x" * 600, final=False) + client_frame(0, b"x" * 600, final=False), 1009),
        (client_frame(PING) * (MAX_CONTROL_FRAMES_PER_SECOND + 1), 1008),
        (client_frame(PONG) * (MAX_CONTROL_FRAMES_PER_SECOND + 1), 1008),
        (
            client_frame(TEXT, final=False) + client_frame(0, final=False) * MAX_TINY_FRAGMENTS_PER_SECOND,
            1008,
        ),
    ],
)
async def test_a_broken_rule_costs_the_peer_its_socket_and_nobody_else(data: bytes, code: int) -> None:
    """The connection ends with the code of RFC 6455 section 7.4; a bystander does not notice."""
    telemetry = RecordingTelemetry()
    seen: list[int] = []

    async def serve(connection: ClientConnection) -> None:
        try:
            while True:
                connection.send_nowait([str(await connection.receive()).encode()])
        except ConnectionClosed as closed:
            seen.append(closed.code)

    settings = WebSocketSettings(max_message_size=1024)
    async with (
        websocket_port(ScriptedGate(serve), telemetry, settings) as port,
        raw_client(port) as bystander,
        raw_client(port) as client,
    ):
        await client.send(data)
        assert await client.read_close() == code
        assert await client.read_to_end() == b""
        await bystander.send(client_frame(TEXT, b"still here"))
        assert await bystander.read_frame() == (TEXT, b"still here")
    assert seen[0] == code
    assert telemetry.errors == []


async def test_a_close_reaches_a_client_that_goes_on_sending() -> None:
    """The bytes that nobody reads after a 1009 do not turn the close frame into a reset."""
    settings = WebSocketSettings(max_message_size=1024)
    async with (
        websocket_port(ScriptedGate(), RecordingTelemetry(), settings) as port,
        raw_client(port) as client,
    ):
        await client.send(client_frame(TEXT, bytes(4 * 2**20)))
        assert await client.read_close() == 1009


async def test_a_message_in_pieces_arrives_whole() -> None:
    """Fragments and control frames between them make one message, characters cut in two included."""
    async with (
        websocket_port(ScriptedGate(), RecordingTelemetry()) as port,
        raw_client(port) as client,
    ):
        euro = "€".encode()
        await client.send(client_frame(TEXT, b"a" + euro[:1], final=False) + client_frame(PING, b"between"))
        await client.send(client_frame(0, euro[1:], final=False) + client_frame(0, b""))
        assert await client.read_frame() == (PONG, b"between")
        assert await client.read_frame() == (TEXT, b"a" + euro)


async def test_a_ping_during_a_close_that_we_began_is_no_crash() -> None:
    """A peer may still ping before it answers our close frame."""
    telemetry = RecordingTelemetry()

    async def serve(connection: ClientConnection) -> None:
        await connection.close(4401, "expired")

    async with (
        websocket_port(ScriptedGate(serve), telemetry) as port,
        raw_client(port) as client,
    ):
        assert await client.read_frame() == (CLOSE, (4401).to_bytes(2, "big") + b"expired")
        await client.send(client_frame(PING, b"x") + client_frame(CLOSE, (4401).to_bytes(2, "big")))
        assert await client.read_to_end() == b""
    assert telemetry.errors == []


async def _crash(connection: ClientConnection) -> None:
    await connection.receive()
    raise RuntimeError("a bug")


async def test_a_crash_ends_its_own_socket_with_1011_and_is_logged_once() -> None:
    """A bug in the engine closes the socket it happened on; the server lives."""
    telemetry = RecordingTelemetry()
    async with (
        websocket_port(ScriptedGate(_crash), telemetry) as port,
        raw_client(port) as client,
        raw_client(port) as bystander,
    ):
        await client.send(client_frame(TEXT, b"x"))
        assert await client.read_close() == 1011
        await client.send(client_frame(CLOSE))
        assert await client.read_to_end() == b""
        await bystander.send(client_frame(PING, b"y"))
        assert await bystander.read_frame() == (PONG, b"y")
    assert telemetry.errors == ["websocket_crashed"]
    assert isinstance(telemetry.causes[0], RuntimeError)
    assert telemetry.counts == {("gateway_bulkhead_catches_total", (("where", "websocket"),)): 1}


async def test_cancelling_the_server_says_goodbye() -> None:
    """Torn down from above, a socket still gets a close frame, and Cancelled passes the bulkhead."""
    telemetry = RecordingTelemetry()
    async with websocket_port(ScriptedGate(), telemetry) as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        client = RawClient(stream)
        await client.send(upgrade_request())
        await client.read_head()
    async with stream:
        assert await client.read_close() == 1001
    assert telemetry.errors == []


async def test_a_client_that_resets_before_it_is_refused_is_no_crash() -> None:
    """It is owed no answer; nothing is logged as a failure of ours."""
    telemetry = RecordingTelemetry()
    gone = trio.Event()

    class Hesitating(ScriptedGate):
        async def admit(self, request: UpgradeRequest) -> Admission:
            await gone.wait()
            return await super().admit(request)

    gate = Hesitating(refusal=NotAuthenticated("Send a token."))
    async with websocket_port(gate, telemetry) as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(upgrade_request())
        await trio.sleep(0.05)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.aclose()
        await trio.sleep(0.05)
        gone.set()
        await trio.sleep(0.05)
    assert len(gate.requests) == 1
    assert telemetry.causes == []


async def test_an_admission_that_hangs_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    """Nobody waits longer for an upgrade than clients do: the stream is closed, nothing is served."""

    class HangingGate(ScriptedGate):
        async def admit(self, request: UpgradeRequest) -> Admission:
            await trio.sleep_forever()
            raise AssertionError

    telemetry = RecordingTelemetry()
    gate = HangingGate()
    server = WebSocketServer(gate, telemetry, WebSocketSettings(admission_timeout=5))
    near, far = trio.testing.memory_stream_pair()
    await far.send_all(upgrade_request())
    started = trio.current_time()
    await read_head_and_serve(server, near)
    assert trio.current_time() - started == 5
    assert await far.receive_some() == b""
    assert telemetry.events == [("warning", "upgrade_timed_out")]
    assert gate.ended == []


async def test_it_works_over_memory_streams() -> None:
    """Everything of a socket's life, without a socket."""
    server = WebSocketServer(ScriptedGate(), RecordingTelemetry(), WebSocketSettings())
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_head_and_serve, server, near)
        client = RawClient(far)
        await client.send(upgrade_request())
        assert (await client.read_head()).startswith(b"HTTP/1.1 101 ")
        await client.send(client_frame(TEXT, b"hi") + client_frame(PING, b"p") + client_frame(CLOSE))
        frames = {await client.read_frame() for _ in range(3)}
        assert frames == {(TEXT, b"hi"), (PONG, b"p"), (CLOSE, b"")}
        assert await client.read_to_end() == b""


async def test_a_message_in_tiny_pieces_costs_little_more_than_its_bytes() -> None:
    """A message that trickles in two bytes at a time is not kept as one object per trickle."""
    near, _far = trio.testing.memory_stream_pair()
    protocol = GuardedConnection(DirectStream(near), 2**20)
    protocol.receive_data(upgrade_request())
    list(protocol.events())
    protocol.send(AcceptConnection())
    size = 2**15
    protocol.receive_data(client_frame(BINARY, bytes(size))[:8])
    assert list(protocol.events()) == []
    tracemalloc.start()
    for _ in range(size // 2 - 1):
        protocol.receive_data(b"ab")
        assert list(protocol.events()) == []
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 4 * size  # as objects: more than twenty times


async def test_control_frames_at_a_human_rate_are_no_flood(autojump_clock: trio.testing.MockClock) -> None:
    """The count starts anew every second."""
    near, _far = trio.testing.memory_stream_pair()
    protocol = GuardedConnection(DirectStream(near), 2**20)
    protocol.receive_data(upgrade_request())
    list(protocol.events())
    protocol.send(AcceptConnection())
    for _ in range(5):
        protocol.receive_data(client_frame(PING) * MAX_CONTROL_FRAMES_PER_SECOND)
        assert [type(event) for event in protocol.events()] == [Ping] * MAX_CONTROL_FRAMES_PER_SECOND
        await trio.sleep(1)
