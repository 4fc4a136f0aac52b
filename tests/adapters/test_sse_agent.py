"""The Agent Runtime adapter: what is sent, what is received, and every row of the failure table."""

from __future__ import annotations

import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import orjson
import pytest
import trio
import trio.testing
import trustme

from gateway.adapters.sse_agent import SseAgentRuntime, agent_client
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
from gateway.ports import Telemetry, TurnRequest
from tests.adapters.agent_harness import (
    END,
    HEAD,
    MemoryAgent,
    chunk,
    loopback_agent,
    memory_agent,
    open_files,
    read_request,
)

KEY = "internal-key-0123456789"
REQUEST = TurnRequest(
    session_id="s1",
    turn_id="turn-1",
    message=b'{"type":"user_message",  "content":"top secret plan"}',
    subject="user-1",
    request_id="request-1",
)
TOKEN = b'event: message\ndata: {"type":"assistant_message","token":"a"}\n\n'
TOKEN_EVENT = ServerSentEvent("message", b'{"type":"assistant_message","token":"a"}')
DONE = b'event: done\ndata: {"status":"completed"}\n\n'


class RecordingTelemetry(Telemetry):
    """Remembers what was logged."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, dict[str, object]]] = []

    def debug(self, event: str, **fields: object) -> None:
        """Remember."""
        self.logged.append((event, fields))

    def info(self, event: str, **fields: object) -> None:
        """Remember."""
        self.logged.append((event, fields))

    def warning(self, event: str, **fields: object) -> None:
        """Remember."""
        self.logged.append((event, fields))

    def error(self, event: str, *, cause: BaseException | None = None, **fields: object) -> None:
        """Remember."""
        self.logged.append((event, fields))

    def count(self, metric: str, amount: float = 1, **labels: str) -> None:
        """Nothing is counted here."""
        raise AssertionError

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Nothing is observed here."""
        raise AssertionError

    def set_gauge(self, metric: str, value: float, **labels: str) -> None:
        """No gauge is set here."""
        raise AssertionError


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def runtime_with(
    client: httpx.AsyncClient, url: str, telemetry: Telemetry | None = None, key: str = KEY
) -> SseAgentRuntime:
    """The adapter under test, with deadlines of 5 and 30 s and waits of half their limit."""
    return SseAgentRuntime(
        client=client,
        agent_url=url,
        internal_key=key,
        connect_timeout=5,
        stream_timeout=30,
        max_event_bytes=1000,
        telemetry=telemetry or RecordingTelemetry(),
        draw=lambda: 0.5,
    )


@asynccontextmanager
async def runtime_at(
    url: str = "http://agent:8001",
    transport: StreamingTransport | None = None,
    telemetry: Telemetry | None = None,
    verify: ssl.SSLContext | bool = True,
) -> AsyncIterator[SseAgentRuntime]:
    """The same, with a client of its own."""
    async with agent_client(url, transport or StreamingTransport(), verify=verify) as client:
        yield runtime_with(client, url, telemetry)


async def collect(
    runtime: SseAgentRuntime, request: TurnRequest = REQUEST, into: list[ServerSentEvent] | None = None
) -> list[ServerSentEvent]:
    """All events of one turn; ``into`` holds them also when it fails."""
    collected = [] if into is None else into
    async with runtime.open_stream(request) as stream:
        while events := await stream.receive():
            collected += events
    return collected


def answering(*pieces: bytes, hang_up: bool = False) -> Callable[[trio.abc.Stream, bytes], Awaitable[None]]:
    """A handler that sends the pieces one second apart, then hangs up or says nothing more."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        for piece in pieces:
            await stream.send_all(piece)
            await trio.sleep(1)
        if hang_up:
            await stream.aclose()
        await trio.sleep_forever()

    return answer


@asynccontextmanager
async def runtime_answering(
    handler: Callable[[trio.abc.Stream, bytes], Awaitable[None]],
) -> AsyncIterator[tuple[MemoryAgent, SseAgentRuntime]]:
    """The adapter, connected to a runtime that answers so."""
    async with (
        memory_agent(handler) as agent,
        runtime_at(transport=StreamingTransport(connect=agent.connect)) as runtime,
    ):
        yield agent, runtime


async def failure_of(agent: MemoryAgent, telemetry: Telemetry | None = None) -> tuple[AgentFailure, int]:
    """How one turn fails, and how many events came before; no connection may stay in use."""
    transport = StreamingTransport(connect=agent.connect)
    received: list[ServerSentEvent] = []
    async with runtime_at(transport=transport, telemetry=telemetry) as runtime:
        with pytest.raises(AgentFailure) as failure:
            await collect(runtime, into=received)
        assert transport.open_connections == transport.idle_connections
    return failure.value, len(received)


# ------------------------------------------------------------------ what is sent


async def test_what_the_runtime_is_sent() -> None:
    """Path, key, ids and the message as it was, and nothing of the client's but these."""
    async with runtime_answering(answering(HEAD + END)) as (agent, runtime):
        await collect(runtime)
    head, _, body = agent.requests[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /agent/message/stream HTTP/1.1"
    headers = dict(line.lower().split(b": ", 1) for line in lines[1:])
    assert headers.pop(b"user-agent").startswith(b"python-httpx")
    assert headers == {
        b"host": b"agent:8001",
        b"connection": b"keep-alive",
        b"accept": b"text/event-stream",
        b"accept-encoding": b"identity",
        b"cache-control": b"no-store",
        b"content-type": b"application/json",
        b"content-length": b"%d" % len(body),
        b"x-internal-auth": KEY.encode(),
        b"x-request-id": b"request-1",
        b"x-user-id": b"user-1",
        b"idempotency-key": b"turn-1",
    }
    assert body == b'{"session_id":"s1","message":' + REQUEST.message + b"}"


async def test_a_continued_turn_says_where_it_stopped() -> None:
    """``Last-Event-ID`` goes out only then."""
    request = TurnRequest(
        session_id="s1",
        turn_id="t",
        message=b"{}",
        subject="u",
        request_id="r",
        last_event_id="17-ж",
    )
    async with runtime_answering(answering(HEAD + END)) as (agent, runtime):
        await collect(runtime, request)
    assert "\r\nLast-Event-ID: 17-ж\r\n".encode() in agent.requests[0]


async def test_nothing_from_a_client_can_become_a_header() -> None:
    """Line ends in a subject, a request id or a turn id stay inside their values."""
    evil = "x\r\nX-Internal-Auth: forged\r\n\r\nж"
    request = TurnRequest(session_id=evil, turn_id=evil, message=b"{}", subject=evil, request_id=evil)
    async with runtime_answering(answering(HEAD + END)) as (agent, runtime):
        await collect(runtime, request)
    (sent,) = agent.requests
    head, _, body = sent.partition(b"\r\n\r\n")
    assert head.lower().count(b"\r\nx-internal-auth:") == 1
    assert head.count(b"x%0D%0AX-Internal-Auth:%20forged%0D%0A%0D%0A%D0%B6") == 3
    assert orjson.loads(body)["session_id"] == evil


async def test_cookies_of_the_runtime_are_not_kept() -> None:
    """A cookie that came with one user's turn does not go out with another's."""
    cookie = HEAD.replace(b"\r\n\r\n", b"\r\nSet-Cookie: who=user-1; Path=/\r\n\r\n")

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(cookie + END)

    async with runtime_answering(answer) as (agent, runtime):
        await collect(runtime)
        await collect(runtime)
    assert b"\r\ncookie:" not in agent.requests[1].lower()


@pytest.mark.parametrize("key", ["a\r\nb", "ключ", "a b"])
async def test_a_key_that_is_no_header_value_is_refused_without_being_shown(key: str) -> None:
    """At once, when the process starts."""
    async with httpx.AsyncClient() as client:
        with pytest.raises(ValueError, match="internal API key") as error:
            runtime_with(client, "http://agent", key=key)
        assert key not in str(error.value)


# ------------------------------------------------------------------ what is received


async def test_events_come_as_they_arrive(autojump_clock: trio.testing.MockClock) -> None:
    """All that one read completed at once; half an event waits for its other half; comments are not seen."""
    answer = answering(
        HEAD + chunk(b"\xef\xbb\xbf" + TOKEN + TOKEN[:10]),
        chunk(TOKEN[10:]),
        chunk(b": ping\n\n"),
        chunk(DONE) + END,
    )
    async with runtime_answering(answer) as (_, runtime), runtime.open_stream(REQUEST) as stream:
        assert not stream.resumable
        times = []
        while events := await stream.receive():
            times.append((trio.current_time(), [event.event for event in events]))
        assert times == [(0, ["message"]), (1, ["message"]), (3, ["done"])]
        assert await stream.receive() == ()


@pytest.mark.parametrize(
    ("value", "resumable"), [(b"1", True), (b" 1 ", True), (b"0", False), (b"true", False)]
)
async def test_a_resumable_stream_says_so(value: bytes, resumable: bool) -> None:
    """``X-Stream-Resumable: 1`` and nothing else."""
    head = HEAD.replace(b"\r\n\r\n", b"\r\nX-Stream-Resumable: " + value + b"\r\n\r\n")
    async with runtime_answering(answering(head)) as (_, runtime), runtime.open_stream(REQUEST) as stream:
        assert stream.resumable is resumable


@pytest.mark.parametrize("content_type", [b"text/event-stream; charset=utf-8", b"TEXT/Event-Stream"])
async def test_spellings_of_the_content_type(content_type: bytes) -> None:
    """Parameters and letter case do not matter."""
    async with runtime_answering(answering(HEAD.replace(b"text/event-stream", content_type) + END)) as (
        _agent,
        runtime,
    ):
        assert await collect(runtime) == []


async def test_a_stream_that_ends_with_the_connection_ends_properly() -> None:
    """A body without length or chunks has no other end; an unterminated event at it is dropped."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(head + TOKEN + TOKEN[:-1])
        await stream.aclose()

    async with runtime_answering(answer) as (_, runtime):
        assert await collect(runtime) == [TOKEN_EVENT]


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\v", "\f"])
async def test_line_separators_inside_tokens_survive(separator: str) -> None:
    """Only CR and LF end a line of an event stream."""
    data = f'{{"token":"a{separator}b"}}'.encode()
    async with runtime_answering(answering(HEAD + chunk(b"data: " + data + b"\n\n") + END)) as (
        _agent,
        runtime,
    ):
        assert [event.data for event in await collect(runtime)] == [data]


async def test_broken_utf8_is_replaced_and_the_stream_goes_on() -> None:
    """A runtime that cuts characters in two does not end the turn."""
    async with runtime_answering(answering(HEAD + chunk(b"data: \xff\xe2\n\n" + TOKEN) + END)) as (
        _agent,
        runtime,
    ):
        assert await collect(runtime) == [
            ServerSentEvent("message", "\ufffd\ufffd".encode()),
            TOKEN_EVENT,
        ]


async def test_turns_one_after_the_other_share_a_connection() -> None:
    """Also when the engine stops at ``done``: the end of the body came with it."""

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.send_all(HEAD + chunk(TOKEN) + chunk(DONE) + END)

    async with runtime_answering(answer) as (agent, runtime):
        for _ in range(5):
            async with runtime.open_stream(REQUEST) as stream:
                assert [event.event for event in await stream.receive()] == ["message", "done"]
    assert len(agent.connects) == 1


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


# ------------------------------------------------------------------ cancellation


async def test_cancelling_closes_the_connection_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """In a wait between tries, in a connect, before the head and in the stream."""

    async def connect(host: str, port: int) -> trio.abc.Stream:
        if trio.current_time() < 0.25:
            raise ConnectionRefusedError
        await trio.sleep(1)
        return await agent.connect(host, port)

    async def answer(stream: trio.abc.Stream, _request: bytes) -> None:
        await trio.sleep(1)
        await stream.send_all(HEAD)
        await trio.sleep(1)
        await stream.send_all(chunk(TOKEN))
        await trio.sleep_forever()

    async with memory_agent(answer) as agent:
        for when in (0.1, 1, 2, 3, 4):
            start = trio.current_time() if when > 0.1 else 0
            transport = StreamingTransport(connect=connect)
            async with runtime_at(transport=transport) as runtime:
                with trio.move_on_after(when) as scope:
                    await collect(runtime)
                assert scope.cancelled_caught
                assert trio.current_time() == start + when
                assert transport.open_connections == 0


async def test_an_error_in_the_block_closes_the_connection_and_comes_out_alone() -> None:
    """Not wrapped in a group: whoever catches it finds what was raised."""
    async with memory_agent(answering(HEAD + chunk(TOKEN))) as agent:
        transport = StreamingTransport(connect=agent.connect)
        async with runtime_at(transport=transport) as runtime:
            with pytest.raises(LookupError):
                async with runtime.open_stream(REQUEST):
                    raise LookupError
            assert transport.open_connections == 0


# ------------------------------------------------------------------ TLS and proxies: httpx's own transport


async def stream_tokens(stream: trio.abc.Stream) -> None:
    """Answer every request with two tokens and a proper end."""
    while await read_request(stream):
        await stream.send_all(HEAD + chunk(TOKEN))
        await trio.lowlevel.checkpoint()
        await stream.send_all(chunk(TOKEN) + END)


@asynccontextmanager
async def tls_agent(
    handle: Callable[[trio.abc.Stream], Awaitable[None]],
) -> AsyncIterator[tuple[str, ssl.SSLContext]]:
    """A runtime behind TLS, and a context that trusts it."""
    authority = trustme.CA()
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server_context)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)

    async def serve(stream: trio.SocketStream) -> None:
        await handle(trio.SSLStream(stream, server_context, server_side=True, https_compatible=True))

    async with loopback_agent(serve) as port:
        yield f"https://127.0.0.1:{port}", client_context


async def test_a_runtime_behind_tls() -> None:
    """Events, an early leave, and a turn after it."""
    async with (
        tls_agent(stream_tokens) as (url, context),
        runtime_at(url, verify=context) as runtime,
    ):
        assert await collect(runtime) == [TOKEN_EVENT, TOKEN_EVENT]
        async with runtime.open_stream(REQUEST) as stream:
            assert (await stream.receive())[0] == TOKEN_EVENT
        assert await collect(runtime) == [TOKEN_EVENT, TOKEN_EVENT]


async def test_a_certificate_that_nobody_vouches_for_makes_the_runtime_unavailable() -> None:
    """TLS failures count as connect failures: nothing was sent."""
    async with tls_agent(stream_tokens) as (url, _), runtime_at(url) as runtime:
        with pytest.raises(AgentUnavailable):
            await collect(runtime)


async def test_leaving_a_tls_stream_early_closes_it_without_waiting() -> None:
    """Also in a cancelled scope; the runtime sees the end, and no generator is left over."""
    gone = trio.Event()

    async def answer(stream: trio.abc.Stream) -> None:
        await read_request(stream)
        await stream.send_all(HEAD + chunk(TOKEN))
        try:
            await stream.receive_some()
        finally:
            gone.set()

    async with tls_agent(answer) as (url, context), runtime_at(url, verify=context) as runtime:
        for cancelled in (False, True):
            with trio.fail_after(5), trio.CancelScope() as scope:
                async with runtime.open_stream(REQUEST) as stream:
                    await stream.receive()
                    if cancelled:
                        scope.cancel()
            with trio.fail_after(5):
                await gone.wait()
            gone = trio.Event()


async def test_a_tls_stream_that_is_cut_is_an_interruption() -> None:
    """httpcore's words for it, before the head and in the body."""
    answers = [b"", HEAD + chunk(TOKEN)]

    async def answer(stream: trio.abc.Stream) -> None:
        await read_request(stream)
        await stream.send_all(answers.pop(0))
        await stream.aclose()

    async with tls_agent(answer) as (url, context), runtime_at(url, verify=context) as runtime:
        for _ in range(2):
            with pytest.raises(AgentStreamInterrupted):
                await collect(runtime)


@pytest.mark.filterwarnings("ignore:Async generator 'httpx._content:ResourceWarning")  # its request body
async def test_a_thousand_random_cancels_do_not_exhaust_httpx() -> None:
    """Cancelled while waiting for, opening or using a connection: the runtime stays within reach.

    httpcore loses a place when a request is cancelled as it is given one; with 20 places, this test lost
    15. Where the pool has no bound nobody waits for a place, and 120 streams at once find theirs.
    """
    chance = random.Random(6)

    async def cancel_soon(scope: trio.CancelScope) -> None:
        for _ in range(chance.randrange(14)):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    async def turn(runtime: SseAgentRuntime) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel_soon, scope)
                await collect(runtime)
                nursery.cancel_scope.cancel()

    files = open_files()
    async with (
        loopback_agent(stream_tokens) as port,
        # A client made for TLS, used without it: the pool is the same, and so is the leak.
        agent_client(f"https://127.0.0.1:{port}", StreamingTransport()) as client,
    ):
        runtime = runtime_with(client, f"http://127.0.0.1:{port}")
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(turn, runtime)
        with trio.fail_after(5):
            async with AsyncExitStack() as streams:
                for _ in range(120):
                    await streams.enter_async_context(runtime.open_stream(REQUEST))
            assert await collect(runtime) == [TOKEN_EVENT, TOKEN_EVENT]
    assert open_files() == files


async def test_a_proxy_from_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain HTTP goes through it, unless ``NO_PROXY`` says otherwise."""
    seen: list[bytes] = []

    async def proxy(stream: trio.SocketStream) -> None:
        seen.append(await read_request(stream))
        await stream.send_all(HEAD + chunk(TOKEN) + END)

    async with loopback_agent(proxy) as proxy_port, loopback_agent(stream_tokens) as agent_port:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy_port}")
        async with runtime_at("http://agent.test:8001") as runtime:
            assert await collect(runtime) == [TOKEN_EVENT]
        assert seen[0].startswith(b"POST http://agent.test:8001/agent/message/stream HTTP/1.1\r\n")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        transport = StreamingTransport()
        async with runtime_at(f"http://127.0.0.1:{agent_port}", transport) as runtime:
            assert await collect(runtime) == [TOKEN_EVENT, TOKEN_EVENT]
            assert transport.open_connections == 1
        assert len(seen) == 1
