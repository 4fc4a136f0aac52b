"""One port for WebSockets and REST: what gets in, what is turned away, what is cut, how it stops."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from quart import request
from quart_trio import QuartTrio

from gateway.adapters.front_door import FrontDoor, FrontDoorLimits
from gateway.adapters.hypercorn_connection import HttpLimits
from gateway.adapters.websocket import WebSocketSettings
from tests.adapters.socket_harness import (
    CLOSE,
    TEXT,
    RawClient,
    RecordingTelemetry,
    ScriptedGate,
    client_frame,
    upgrade_request,
)

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def echo_app(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application that answers with what it was sent; ``/large`` answers with 8 MiB."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    body = b""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
        more = message["more_body"]
    if scope["path"] == "/slow":
        await trio.sleep(0.3)
    if scope["path"] == "/crash":
        raise RuntimeError("a bug")
    answer = bytes(8 * 2**20) if scope["path"] == "/large" else scope["path"].encode() + b" " + body
    headers = [(b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


def quiet_config() -> Config:
    """hypercorn without its log on stderr."""
    config = Config()
    config.errorlog = None
    return config


@asynccontextmanager
async def open_door(
    *,
    gate: ScriptedGate | None = None,
    telemetry: RecordingTelemetry | None = None,
    limits: FrontDoorLimits | None = None,
    app: Callable[[Any, Any, Any], Awaitable[None]] = echo_app,
    config: Config | None = None,
) -> AsyncIterator[tuple[FrontDoor, Callable[[], Awaitable[RawClient]]]]:
    """A front door on a loopback port, and how to connect to it; everything is cancelled at the end."""
    door = FrontDoor(
        gate or ScriptedGate(),
        telemetry or RecordingTelemetry(),
        app,
        config or quiet_config(),
        limits or FrontDoorLimits(),
        WebSocketSettings(),
    )
    clients: list[trio.SocketStream] = []

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        await nursery.start(partial(door.serve, listeners))

        async def connect() -> RawClient:
            clients.append(await trio.open_tcp_stream("127.0.0.1", port))
            return RawClient(clients[-1])

        try:
            yield door, connect
        finally:
            for client in clients:
                await trio.aclose_forcefully(client)
            nursery.cancel_scope.cancel()


async def read_response(client: RawClient) -> tuple[int, bytes]:
    """Status and body of the next response, which has to state its length."""
    head = await client.read_head()
    status = int(head.split(b" ")[1])
    if status == 100:
        return await read_response(client)
    (length,) = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return status, await client.read_exactly(int(length.partition(b":")[2]))


async def test_rest_and_websockets_share_a_port() -> None:
    """A GET is answered by the application, an upgrade by the gate."""
    async with open_door() as (_, connect):
        rest = await connect()
        await rest.send(GET)
        assert await read_response(rest) == (200, b"/health ")
        socket = await connect()
        await socket.send(upgrade_request())
        assert (await socket.read_head()).startswith(b"HTTP/1.1 101 ")
        await socket.send(client_frame(TEXT, b"hi"))
        assert await socket.read_frame() == (TEXT, b"hi")


async def test_a_connection_is_kept_alive_for_further_requests() -> None:
    """Requests with and without bodies follow each other on one connection."""
    async with open_door() as (_, connect):
        client = await connect()
        for _ in range(3):
            await client.send(GET)
            assert await read_response(client) == (200, b"/health ")
            await client.send(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhel")
            await client.send(b"lo")
            assert await read_response(client) == (200, b"/a hello")
            await client.send(
                b"POST /b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
            )
            await client.send(b"2\r\nde\r\n0\r\n\r\n")
            assert await read_response(client) == (200, b"/b abcde")


async def test_pipelined_requests_are_answered_in_order() -> None:
    """Requests sent in one go, split anywhere, get their answers one after the other."""
    request = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi" + GET
    async with open_door() as (_, connect):
        client = await connect()
        for cut in range(1, 2 * len(request), 7):
            data = request * 2
            await client.send(data[:cut])
            await trio.testing.wait_all_tasks_blocked()
            await client.send(data[cut:])
            for expected in (b"/a hi", b"/health ") * 2:
                assert await read_response(client) == (200, expected)


async def test_a_kept_alive_connection_may_become_a_websocket() -> None:
    """Proxies reuse connections: an upgrade as the second request reaches the gate, not hypercorn."""
    gate = ScriptedGate()
    async with open_door(gate=gate) as (_, connect):
        client = await connect()
        await client.send(GET)
        assert await read_response(client) == (200, b"/health ")
        await client.send(upgrade_request("/ws/second") + client_frame(TEXT, b"hi"))
        assert (await client.read_head()).startswith(b"HTTP/1.1 101 ")
        assert await client.read_frame() == (TEXT, b"hi")
    assert [request.target for request in gate.requests] == ["/ws/second"]


BAD_HEADS = [
    (400, b"GET / HTTP/1.1\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    (400, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n"),
    (400, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"),
    (400, b"GET / HTTP/1.1\nHost: a\n\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: \xe9\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n"),
    (400, b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"\x16\x03\x01\x02\x00"),
    (400, upgrade_request().replace(b"HTTP/1.1", b"HTTP/1.0")),
    (400, upgrade_request().replace(b"Host: localhost", b"Host: xn--")),
    (426, upgrade_request().replace(b"Version: 13", b"Version: 8")),
    (431, b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 2**14 + b"\r\n\r\n"),
    (501, b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"),
    (501, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"),
    (501, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"),
    (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
]


@pytest.mark.parametrize(("status", "request_bytes"), BAD_HEADS)
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
async def test_a_bad_head_is_refused_wherever_it_comes(
    status: int, request_bytes: bytes, first: bool
) -> None:
    """One plain response and the end, for the first request of a connection and for a later one."""
    telemetry = RecordingTelemetry()
    async with open_door(telemetry=telemetry) as (_, connect):
        client = await connect()
        if not first:
            await client.send(GET)
            assert await read_response(client) == (200, b"/health ")
        await client.send(request_bytes)
        head = await client.read_head()
        assert int(head.split(b" ")[1]) == status
        assert b"\r\nConnection: close\r\n" in head
        assert json.loads(await client.read_to_end())["error"]["code"] == "HANDSHAKE_REFUSED"
        other = await connect()
        await other.send(GET)
        assert await read_response(other) == (200, b"/health ")
    assert telemetry.errors == []
    assert sum(telemetry.counts.values()) == 1


async def test_malformed_chunks_are_refused() -> None:
    """A body whose chunks two parsers could read differently ends the connection."""
    async with open_door() as (_, connect):
        client = await connect()
        await client.send(
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n"
        )
        assert (await read_response(client))[0] == 400
        assert await client.read_to_end() == b""


async def test_a_refused_request_does_not_cut_the_response_before_it() -> None:
    """Pipelined behind a good request, a bad one is answered after it."""
    async with open_door() as (_, connect):
        client = await connect()
        await client.send(GET + b"\x00")
        assert await read_response(client) == (200, b"/health ")
        assert (await read_response(client))[0] == 400


async def test_a_bug_in_the_application_costs_one_response() -> None:
    """The application's exception is a 500, and the port lives on."""
    async with open_door() as (_, connect):
        client = await connect()
        await client.send(GET.replace(b"/health", b"/crash"))
        assert (await read_response(client))[0] == 500
        other = await connect()
        await other.send(GET)
        assert await read_response(other) == (200, b"/health ")


IMPATIENT = FrontDoorLimits(http=HttpLimits(head_timeout=0.2, progress_timeout=0.2))


@pytest.mark.parametrize("head_start", [b"GET / HTTP/1.1\r\nHost:", b"G", b"GET / HTTP/1.1\r\nHost: x\r\n\r"])
async def test_a_slow_head_is_cut(head_start: bytes) -> None:
    """A head that does not end in time is answered 408; its first bytes cost no CPU meanwhile."""

    class CountPasses(trio.abc.Instrument):
        passes = 0

        def before_io_wait(self, timeout: float) -> None:
            self.passes += 1

    async with open_door(limits=IMPATIENT) as (_, connect):
        client = await connect()
        await client.send(head_start)
        await trio.testing.wait_all_tasks_blocked()
        counter = CountPasses()
        trio.lowlevel.add_instrument(counter)
        with trio.fail_after(2):
            assert (await read_response(client))[0] == 408
        trio.lowlevel.remove_instrument(counter)
        assert counter.passes < 20


async def test_a_silent_connection_is_closed_without_a_word() -> None:
    """Browsers open connections ahead of need: one that says nothing is closed, and not answered."""
    async with open_door(limits=IMPATIENT) as (_, connect):
        client = await connect()
        with trio.fail_after(2):
            assert await client.read_to_end() == b""


async def test_a_slow_second_head_is_cut() -> None:
    """The deadline of a head counts from its first byte on kept-alive connections too."""
    async with open_door(limits=IMPATIENT) as (_, connect):
        client = await connect()
        await client.send(GET)
        assert await read_response(client) == (200, b"/health ")
        await client.send(b"GET / HT")
        with trio.fail_after(2):
            assert (await read_response(client))[0] == 408


@pytest.mark.parametrize("framing", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
async def test_a_slow_body_is_cut(framing: bytes) -> None:
    """A body that trickles is answered 408, however regular its bytes are."""
    async with open_door(limits=IMPATIENT) as (_, connect):
        client = await connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n")

        async def trickle() -> None:
            while True:
                await client.send(b"1\r\nx\r\n" if b"chunked" in framing else b"x")
                await trio.sleep(0.02)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            with trio.fail_after(3):
                assert (await read_response(client))[0] == 408
            nursery.cancel_scope.cancel()


async def test_a_slow_reader_is_cut() -> None:
    """A client that does not read its response loses its connection, hypercorn's shield or not."""
    telemetry = RecordingTelemetry()
    async with open_door(limits=IMPATIENT, telemetry=telemetry) as (_, connect):
        client = await connect()
        await client.send(GET.replace(b"/health", b"/large"))
        with trio.fail_after(3):
            await telemetry.counted.wait()
    assert telemetry.counts == {("gateway_front_door_refusals_total", (("reason", "slow_reader"),)): 1}


async def test_too_many_unfinished_heads_push_out_the_oldest() -> None:
    """Slow heads cannot fill the door: a newcomer is let in and the one that took longest goes."""
    async with open_door(limits=FrontDoorLimits(heads_at_once=2)) as (_, connect):
        slow = [await connect() for _ in range(2)]
        for client in slow:
            await client.send(b"GET /")
            await trio.testing.wait_all_tasks_blocked()
        quick = await connect()
        await quick.send(GET)
        assert await read_response(quick) == (200, b"/health ")
        assert (await read_response(slow[0]))[0] == 408
        await slow[1].send(GET[5:])
        assert (await read_response(slow[1]))[0] == 200


async def test_stopping_lets_requests_finish_and_takes_no_new_ones() -> None:
    """A request in flight is answered, idle connections go, the port refuses, and serve returns."""
    telemetry = RecordingTelemetry()
    door = FrontDoor(
        ScriptedGate(), telemetry, echo_app, quiet_config(), FrontDoorLimits(), WebSocketSettings()
    )
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(door.serve, listeners))
        idle = RawClient(await trio.open_tcp_stream("127.0.0.1", port))
        await idle.send(GET)
        assert await read_response(idle) == (200, b"/health ")
        busy = RawClient(await trio.open_tcp_stream("127.0.0.1", port))
        await busy.send(GET.replace(b"/health", b"/slow"))
        await trio.testing.wait_all_tasks_blocked(0.05)
        door.stop_accepting()
        with trio.fail_after(1):
            assert await idle.read_to_end() == b""
        with pytest.raises(OSError, match="connect"):
            await trio.open_tcp_stream("127.0.0.1", port)
        assert await read_response(busy) == (200, b"/slow ")
        assert await busy.read_to_end() == b""
    await idle.stream.aclose()
    await busy.stream.aclose()


async def test_stopping_cuts_requests_after_their_grace() -> None:
    """A request that takes longer than the grace is cut; serve returns."""
    door = FrontDoor(
        ScriptedGate(),
        RecordingTelemetry(),
        echo_app,
        quiet_config(),
        FrontDoorLimits(rest_grace=0.1),
        WebSocketSettings(),
    )
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    stream = await trio.open_tcp_stream("127.0.0.1", listeners[0].socket.getsockname()[1])
    async with stream, trio.open_nursery() as nursery:
        await nursery.start(partial(door.serve, listeners))
        await stream.send_all(GET.replace(b"/health", b"/slow"))
        await trio.testing.wait_all_tasks_blocked(0.05)
        door.stop_accepting()
        with trio.fail_after(1):
            assert await stream.receive_some() == b""


async def test_stopping_leaves_websockets_to_the_gate() -> None:
    """A socket lives on after the listeners are closed, and serve waits for it."""
    gate = ScriptedGate()
    async with open_door(gate=gate, limits=FrontDoorLimits(rest_grace=0)) as (door, connect):
        client = await connect()
        await client.send(upgrade_request())
        await client.read_head()
        door.stop_accepting()
        await trio.sleep(0.05)
        await client.send(client_frame(TEXT, b"on"))
        assert await client.read_frame() == (TEXT, b"on")
        await client.send(client_frame(CLOSE))
        assert await client.read_close() == 0
    assert gate.ended == ["s"]


async def test_the_door_survives_running_out_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """EMFILE is logged once per spell and waited out; the next client is served."""
    telemetry = RecordingTelemetry()
    original = trio.SocketListener.accept
    failures = iter(range(3))

    async def accept(listener: trio.SocketListener) -> trio.SocketStream:
        stream = await original(listener)
        if next(failures, None) is not None:
            await stream.aclose()
            raise OSError(errno.EMFILE, "Too many open files")
        return stream

    monkeypatch.setattr(trio.SocketListener, "accept", accept)
    async with open_door(telemetry=telemetry) as (_, connect):
        for _ in range(3):
            assert await (await connect()).read_to_end() == b""
        client = await connect()
        await client.send(GET)
        assert await read_response(client) == (200, b"/health ")
    assert telemetry.errors == ["accept_failed"]


async def test_a_connection_that_crashes_ends_alone() -> None:
    """Even a bug in handing a connection over costs only that connection, logged and counted."""

    class BrokenGate(ScriptedGate):
        async def admit(self, request: Any) -> Any:
            raise BaseExceptionGroup("bugs", [ValueError("one"), KeyError("two")])

    telemetry = RecordingTelemetry()
    async with open_door(gate=BrokenGate(), telemetry=telemetry) as (_, connect):
        client = await connect()
        await client.send(upgrade_request())
        assert await client.read_to_end() == b""
        other = await connect()
        await other.send(GET)
        assert await read_response(other) == (200, b"/health ")
    assert telemetry.errors == ["websocket_crashed"]


async def test_a_crash_in_hypercorn_costs_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception out of hypercorn's server is logged and counted; the port lives on."""
    original = TCPServer._read_data
    crashes = iter(range(1))

    async def read_data(server: TCPServer) -> None:
        if next(crashes, None) is not None:
            raise UnicodeDecodeError("ascii", b"\xe9", 0, 1, "as from a header")
        await original(server)

    monkeypatch.setattr(TCPServer, "_read_data", read_data)
    telemetry = RecordingTelemetry()
    async with open_door(telemetry=telemetry) as (_, connect):
        client = await connect()
        await client.send(GET)
        assert await client.read_to_end() == b""
        other = await connect()
        await other.send(GET)
        assert await read_response(other) == (200, b"/health ")
    assert telemetry.errors == ["front_door_crashed"]
    assert telemetry.counts == {("gateway_bulkhead_catches_total", (("where", "front_door"),)): 1}


async def test_a_quart_application_is_served_with_its_lifespan() -> None:
    """Start-up runs before the first request, shutdown after the last; "Connection: close" is honoured."""
    app = QuartTrio("test")
    steps: list[str] = []
    app.before_serving(lambda: steps.append("start"))
    app.after_serving(lambda: steps.append("stop"))

    @app.post("/sum")
    async def total() -> str:
        return str(sum((await request.get_json())["numbers"]))

    door = FrontDoor(
        ScriptedGate(), RecordingTelemetry(), app, quiet_config(), FrontDoorLimits(), WebSocketSettings()
    )
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(door.serve, listeners))
        assert steps == ["start"]
        stream = await trio.open_tcp_stream("127.0.0.1", listeners[0].socket.getsockname()[1])
        async with stream:
            client = RawClient(stream)
            body = b'{"numbers": [1, 2]}'
            fields = b"Content-Type: application/json\r\nContent-Length: %d" % len(body)
            for last in (b"", b"Connection: close\r\n"):
                await client.send(b"POST /sum HTTP/1.1\r\nHost: a\r\n" + last + fields + b"\r\n\r\n" + body)
                assert await read_response(client) == (200, b"3")
            assert await client.read_to_end() == b""
        door.stop_accepting()
    assert steps == ["start", "stop"]


async def test_an_idle_connection_is_closed_after_each_of_its_requests() -> None:
    """The keep-alive timeout is armed again after a request to a Quart application."""
    app = QuartTrio("test")
    app.add_url_rule("/health", "health", lambda: "healthy")
    config = quiet_config()
    config.keep_alive_timeout = 0.1
    async with open_door(app=app, config=config) as (_, connect):
        client = await connect()
        for _ in range(2):
            await client.send(GET)
            assert await read_response(client) == (200, b"healthy")
        with trio.fail_after(2):
            assert await client.read_to_end() == b""
