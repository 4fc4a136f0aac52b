"""The Agent Runtime adapter: what is sent, what is received, and what a cancel leaves."""

from __future__ import annotations

import orjson
import pytest
import trio
import trio.testing

from gateway.adapters.sse_agent import agent_client
from gateway.adapters.streaming_transport import StreamingTransport
from gateway.core.sse import ServerSentEvent
from gateway.ports import TurnRequest
from tests.adapters.agent_harness import (
    END,
    HEAD,
    chunk,
    memory_agent,
)
from tests.adapters.runtime_harness import (
    DONE,
    KEY,
    REQUEST,
    TOKEN,
    TOKEN_EVENT,
    answering,
    collect,
    runtime_answering,
    runtime_at,
    runtime_with,
    without_proxies,
)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    without_proxies(monkeypatch)


# ------------------------------------------------------------------ what is sent


async def test_what_the_runtime_is_sent() -> None:
    """Path, key, ids and the message as it was, and nothing of the client's but these."""
    async with runtime_answering(answering(HEAD + END)) as (agent, runtime):
        await collect(runtime)
    head, _, body = agent.requests[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /agent/message/stream HTTP/1.1"
    headers = dict(line.lower().split(b": ", 1) for line in lines[1:])
    assert headers.pop(b"user-agent") == b"codelab-gateway"
    assert headers == {
        b"host": b"agent:8001",
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
    async with agent_client("http://agent", StreamingTransport()) as send:
        with pytest.raises(ValueError, match="internal API key") as error:
            runtime_with(send, "http://agent", key=key)
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
