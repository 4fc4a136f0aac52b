"""Failures of the Agent Runtime under REST calls, and the limit on calls at once."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import trio
from quart import Response
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.adapters.rest import upstream
from gateway.adapters.rest.upstream import is_json
from tests.adapters.rest.harness import Rest


async def _code(response: Response) -> str:
    code: str = (await response.get_json())["error"]["code"]
    return code


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (httpx.ConnectError("refused"), 502, "AGENT_UNAVAILABLE"),
        (httpx.ConnectTimeout("slow"), 502, "AGENT_UNAVAILABLE"),
        (httpx.UnsupportedProtocol("x"), 502, "AGENT_UNAVAILABLE"),
        (httpx.ReadError("reset"), 502, "AGENT_STREAM_INTERRUPTED"),
        (httpx.RemoteProtocolError("cut"), 502, "AGENT_STREAM_INTERRUPTED"),
    ],
)
async def test_failures_have_one_name_each(error: Exception, status: int, code: str) -> None:
    """Every way of not answering is a 502 that a client may try again, logged with its cause."""

    def answer(_request: httpx.Request) -> httpx.Response:
        raise error

    rest = Rest(answer)
    response = await rest.get("/api/v1/agents")

    assert (response.status_code, await _code(response)) == (status, code)
    assert (await response.get_json())["error"]["retryable"] is True
    refusals = [fields for _, event, fields in rest.telemetry.lines if event == "rest_request_refused"]
    assert [fields["reason"] for fields in refusals] == [type(error).__name__]
    assert "agent:8001" not in str(await response.get_json())


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>", headers={"Content-Type": "text/html"}),
        httpx.Response(200, content=b"{}"),
        httpx.Response(502, text="bad gateway", headers={"Content-Type": "text/plain"}),
        httpx.Response(
            200, content=b"x", headers={"Content-Type": "application/json", "Content-Encoding": "x"}
        ),
        httpx.Response(307, headers={"Location": "http://evil.example/"}),
        httpx.Response(302, json={}),
    ],
)
async def test_only_json_passes(answer: httpx.Response) -> None:
    """Another type, an encoding nobody asked for, or a redirect is a protocol error; none is followed."""
    rest = Rest(lambda _: answer)
    response = await rest.get("/api/v1/agents")

    assert (response.status_code, await _code(response)) == (502, "AGENT_PROTOCOL_ERROR")
    assert len(rest.seen) == 1
    assert "Location" not in response.headers


@pytest.mark.parametrize("status", [204, 304, 404])
async def test_an_answer_may_be_empty(status: int) -> None:
    """An answer without a body needs no type."""
    response = await Rest(lambda _: httpx.Response(status)).get("/api/v1/agents")

    assert response.status_code == status
    assert await response.get_data() == b""


async def test_an_answer_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading stops at the limit: an endless answer does not fill the memory."""
    monkeypatch.setattr(upstream, "MAX_REST_ANSWER_BYTES", 1_000)

    response = await Rest(lambda _: httpx.Response(200, json=["x" * 4_000])).get("/api/v1/agents")

    assert await _code(response) == "AGENT_PROTOCOL_ERROR"


async def test_an_endless_answer_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit the connection is closed, though the runtime would go on sending."""
    monkeypatch.setattr(upstream, "MAX_REST_ANSWER_BYTES", 1_000)
    sent = 0

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            nonlocal sent
            while sent < 1_000_000:
                sent += 100
                yield b" " * 100
                await trio.lowlevel.checkpoint()

    head = {"Content-Type": "application/json"}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, headers=head, stream=Endless()))
    async with httpx.AsyncClient(base_url="http://agent:8001", transport=transport) as client:
        response = await Rest(client=client).get("/api/v1/agents")

    assert await _code(response) == "AGENT_PROTOCOL_ERROR"
    assert sent == 1_100


async def test_a_slow_answer_times_out(autojump_clock: MockClock) -> None:
    """After exactly REQUEST_TIMEOUT the caller gets 504."""

    async def answer(_request: httpx.Request) -> httpx.Response:
        await trio.sleep_forever()
        raise AssertionError

    started = trio.current_time()
    response = await Rest(answer, {"request_timeout": 30}).get("/api/v1/agents")

    assert trio.current_time() - started == pytest.approx(30)
    assert (response.status_code, await _code(response)) == (504, "AGENT_TIMEOUT")


async def test_a_get_is_asked_again_when_its_connection_was_stale() -> None:
    """A kept connection that the runtime just closed costs a GET nothing; a POST is never sent twice."""

    def answer(request: httpx.Request) -> httpx.Response:
        if len(rest.seen) == 1:
            raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
        return httpx.Response(200, json={})

    rest = Rest(answer)
    assert (await rest.get("/api/v1/agents")).status_code == 200
    assert len(rest.seen) == 2

    rest = Rest(answer)
    assert (await rest.post("/api/v1/sessions", {})).status_code == 502
    assert len(rest.seen) == 1


async def test_over_the_limit_is_told_to_come_back() -> None:
    """With all places taken a call is refused at once; a place is free again when a call is over."""
    release = trio.Event()

    async def answer(_request: httpx.Request) -> httpx.Response:
        await release.wait()
        return httpx.Response(200, json={})

    rest = Rest(answer, {"max_concurrent_requests": 2})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rest.get, "/api/v1/agents")
        nursery.start_soon(rest.get, "/api/v1/agents")
        await wait_all_tasks_blocked()

        refused = await rest.get("/api/v1/agents")
        assert (refused.status_code, await _code(refused)) == (503, "OVERLOADED")
        assert refused.headers["Retry-After"] == "1"
        release.set()

    assert (await rest.get("/api/v1/agents")).status_code == 200


async def test_a_cancelled_call_gives_its_place_back() -> None:
    """However many callers go away while they wait, the next one is served."""

    async def answer(_request: httpx.Request) -> httpx.Response:
        if not patient:
            await trio.sleep_forever()
        return httpx.Response(200, json={})

    patient = False
    rest = Rest(answer, {"max_concurrent_requests": 1})
    for _ in range(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rest.get, "/api/v1/agents")
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    patient = True
    assert (await rest.get("/api/v1/agents")).status_code == 200


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/problem+json", True),
        ("text/json", False),
        ("application/jsonp", False),
        ("", False),
    ],
)
def test_knows_json_by_its_type(content_type: str, expected: bool) -> None:
    """application/json and the +json types of RFC 6839 are JSON."""
    assert is_json(content_type) is expected
