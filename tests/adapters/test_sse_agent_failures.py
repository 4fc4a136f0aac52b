"""The Agent Runtime adapter: every row of the failure table."""

from __future__ import annotations

import socket
import struct

import pytest
import trio
import trio.testing

from gateway.adapters.streaming_transport import StreamingTransport
from gateway.core.errors import (
    AgentFailure,
    AgentProtocolError,
    AgentRefused,
    AgentStreamInterrupted,
    AgentTimeout,
    AgentUnavailable,
)
from gateway.core.sse import ServerSentEvent
from gateway.ports import Telemetry
from tests.adapters.agent_harness import (
    END,
    HEAD,
    MemoryAgent,
    chunk,
    loopback_agent,
    memory_agent,
    read_request,
)
from tests.adapters.runtime_harness import (
    REQUEST,
    TOKEN,
    TOKEN_EVENT,
    RecordingTelemetry,
    answering,
    collect,
    runtime_answering,
    runtime_at,
    without_proxies,
)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    without_proxies(monkeypatch)


async def failure_of(agent: MemoryAgent, telemetry: Telemetry | None = None) -> tuple[AgentFailure, int]:
    """How one turn fails, and how many events came before; no connection may stay in use."""
    transport = StreamingTransport(connect=agent.connect)
    received: list[ServerSentEvent] = []
    async with runtime_at(transport=transport, telemetry=telemetry) as runtime:
        with pytest.raises(AgentFailure) as failure:
            await collect(runtime, into=received)
        assert transport.open_connections == transport.idle_connections
    return failure.value, len(received)


# ------------------------------------------------------------------ failures


class Refusing:
    """A connector that fails so many times, then leads to the agent."""

    def __init__(self, times: int, agent: MemoryAgent, error: OSError) -> None:
        self.left = times
        self.agent = agent
        self.error = error
        self.tried: list[float] = []

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        """Fail, or connect."""
        self.tried.append(trio.current_time())
        if self.left:
            self.left -= 1
            raise self.error
        return await self.agent.connect(host, port)


ERRORS = [ConnectionRefusedError("refused"), socket.gaierror(socket.EAI_NONAME, "unknown")]


@pytest.mark.parametrize("error", ERRORS)
async def test_connects_that_fail_are_tried_again(
    error: OSError, autojump_clock: trio.testing.MockClock
) -> None:
    """Twice more, after a random part of 0.5 and 1 s: here half. Nothing was sent, so it is safe."""
    telemetry = RecordingTelemetry()
    async with memory_agent(answering(HEAD + chunk(TOKEN) + END)) as agent:
        refusing = Refusing(2, agent, error)
        transport = StreamingTransport(connect=refusing.connect)
        async with runtime_at(transport=transport, telemetry=telemetry) as runtime:
            assert await collect(runtime) == [TOKEN_EVENT]
    assert refusing.tried == [0, 0.25, 0.75]
    assert [name for name, _ in telemetry.logged] == ["agent_connect_retried"] * 2


@pytest.mark.parametrize("error", ERRORS)
async def test_a_runtime_that_stays_away_is_unavailable(
    error: OSError, autojump_clock: trio.testing.MockClock
) -> None:
    """After the third try, with no address in the text."""
    async with memory_agent(answering()) as agent:
        refusing = Refusing(100, agent, error)
        transport = StreamingTransport(connect=refusing.connect)
        async with runtime_at(transport=transport) as runtime:
            with pytest.raises(AgentUnavailable) as failure:
                await collect(runtime)
    assert failure.value.retryable
    assert "8001" not in str(failure.value)
    assert (len(refusing.tried), trio.current_time()) == (3, 0.75)


async def test_a_connect_without_an_answer_is_not_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    """Whoever waited ``connect_timeout`` has waited enough."""

    async def connect(host: str, port: int) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    async with runtime_at(transport=StreamingTransport(connect=connect)) as runtime:
        with pytest.raises(AgentUnavailable):
            await collect(runtime)
    assert trio.current_time() == 5


async def test_silence_before_the_head_times_out(autojump_clock: trio.testing.MockClock) -> None:
    """``stream_timeout`` counts from the request."""
    async with memory_agent(answering()) as agent:
        failure, _ = await failure_of(agent)
    assert (type(failure), trio.current_time()) == (AgentTimeout, 30)


async def test_silence_in_the_stream_times_out(autojump_clock: trio.testing.MockClock) -> None:
    """Counted from the last byte, comments included, and only while the engine asks."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(HEAD + chunk(TOKEN))
        for _ in range(3):
            await trio.sleep(29)
            await stream.send_all(chunk(b": ping\n"))
        await trio.sleep_forever()

    async with memory_agent(answer) as agent:
        transport = StreamingTransport(connect=agent.connect)
        async with runtime_at(transport=transport) as runtime, runtime.open_stream(REQUEST) as stream:
            assert await stream.receive() == [TOKEN_EVENT]
            await trio.sleep(1000)
            with pytest.raises(AgentTimeout):
                await stream.receive()
            assert trio.current_time() == 1030
            assert transport.open_connections == 0


async def test_heartbeats_keep_a_silent_stream_alive(autojump_clock: trio.testing.MockClock) -> None:
    """A comment every 29 s for an hour, then the token."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(HEAD)
        for _ in range(124):
            await trio.sleep(29)
            await stream.send_all(chunk(b": ping\n"))
        await stream.send_all(chunk(TOKEN) + END)

    async with runtime_answering(answer) as (_, runtime):
        assert await collect(runtime) == [TOKEN_EVENT]
    assert trio.current_time() == 124 * 29


@pytest.mark.parametrize(
    ("status", "retryable"), [(400, False), (404, False), (422, False), (500, True), (503, True)]
)
async def test_an_error_status_is_refused(
    status: int, retryable: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """The status is told; the page is logged without what it quotes of the message, and not shown."""
    telemetry = RecordingTelemetry()
    page = b'{"detail":"Field required","input":"top secret plan"}' + b" " * 100_000
    head = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(page))
    async with memory_agent(answering(head + page)) as agent:
        failure, _ = await failure_of(agent, telemetry)
    assert isinstance(failure, AgentRefused)
    assert (failure.status, failure.retryable) == (status, retryable)
    assert "Field" not in str(failure)
    ((name, fields),) = telemetry.logged
    assert (name, fields["status"], fields["turn_id"]) == ("agent_refused", status, "turn-1")
    assert "Field required" in str(fields["answer"])
    assert "secret" not in str(fields)
    assert len(str(fields["answer"])) < 2100


async def test_an_error_page_that_does_not_come_is_not_waited_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Half a second for the log, then the client is told."""
    async with memory_agent(answering(b"HTTP/1.1 500 X\r\nContent-Length: 10\r\n\r\n")) as agent:
        failure, _ = await failure_of(agent)
    assert (type(failure), trio.current_time()) == (AgentRefused, 0.5)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-streams\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\nContent-Type: text/event-stream\r\n\r\n",
        b"HTTP/1.1 307 X\r\nLocation: http://other/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 X\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n",
        HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"),
        b"220 ready\r\n",
    ],
)
async def test_what_is_not_an_event_stream_is_a_protocol_error(head: bytes) -> None:
    """Other types, redirects (which are never followed), compression, other protocols."""
    async with memory_agent(answering(head)) as agent:
        failure, _ = await failure_of(agent)
        assert type(failure) is AgentProtocolError
        assert not failure.retryable
        assert len(agent.connects) == 1


@pytest.mark.parametrize("cut", [0, 1, 30])
async def test_a_connection_cut_before_the_head_is_an_interruption(
    cut: int, autojump_clock: trio.testing.MockClock
) -> None:
    """The runtime may have begun to work: the POST is not repeated."""
    async with memory_agent(answering(HEAD[:cut], hang_up=True)) as agent:
        failure, _ = await failure_of(agent)
        assert (type(failure), len(agent.requests)) == (AgentStreamInterrupted, 1)


@pytest.mark.parametrize("rest", [b"", b"5", b"5\r\nabc", b"rubbish\r\n"])
async def test_a_stream_cut_before_its_end_is_an_interruption(
    rest: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    """Wherever in the framing it happens, what was complete came first."""
    async with memory_agent(answering(HEAD + chunk(TOKEN) + chunk(TOKEN) + rest, hang_up=True)) as agent:
        failure, received = await failure_of(agent)
    assert (type(failure), received) == (AgentStreamInterrupted, 2)


async def test_a_reset_is_an_interruption() -> None:
    """On a real socket, after an event."""

    async def answer(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(HEAD + chunk(TOKEN))
        await go_on.wait()
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    go_on = trio.Event()
    async with (
        loopback_agent(answer) as port,
        runtime_at(f"http://127.0.0.1:{port}") as runtime,
        runtime.open_stream(REQUEST) as stream,
    ):
        assert await stream.receive() == [TOKEN_EVENT]
        go_on.set()
        with pytest.raises(AgentStreamInterrupted):
            await stream.receive()


@pytest.mark.parametrize("size", [1001, 50_000_000])
async def test_an_event_over_the_limit_is_a_protocol_error(size: int) -> None:
    """Found while it is still coming; the events before it are received first."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(HEAD + chunk(TOKEN + b"data: " + b"x" * 1001))
        for _ in range(size // 1_000_000):
            await stream.send_all(chunk(b"x" * 1_000_000))
        await trio.sleep_forever()

    async with memory_agent(answer) as agent:
        failure, received = await failure_of(agent)
    assert (type(failure), received, failure.retryable) == (AgentProtocolError, 1, False)
