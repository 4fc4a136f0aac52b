"""What is made of an answer, and what an issuer that is broken or hostile can do."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import httpx
import pytest
import trio
import trio.testing

from gateway.adapters.jwks import MAX_DOCUMENT_SIZE, JwksCache, jwks_http_client
from tests.adapters.issuer_fake import RS256, Answer, answering, failing, running, slowly
from tests.jwt_material import RecordingTelemetry, ec_key, jwk_set, rsa_key


def redirecting(request: httpx.Request) -> Awaitable[httpx.Response]:
    """An issuer that points elsewhere, and would answer there."""
    if request.url.host == "auth.test":
        return answering(302, b"", {"Location": "https://elsewhere.test/jwks.json"})(request)
    return answering(200, jwk_set(rsa_key("rsa-2")))(request)


async def raising_strangely(request: httpx.Request) -> httpx.Response:
    """A defect in what we depend on."""
    raise RuntimeError("unforeseen")


@pytest.mark.parametrize(
    "answer",
    [
        answering(404, b"{}"),
        answering(201, jwk_set(rsa_key("rsa-2"))),
        redirecting,
        answering(200, b""),
        answering(200, b"<html></html>"),
        answering(200, b"[]"),
        answering(200, b"{}"),
        answering(200, b'{"keys":{}}'),
        answering(200, b'{"keys":[],"keys":[]}'),
        answering(200, b'{"keys":[NaN]}'),
        answering(200, b'{"keys":' + b"[" * 30_000 + b"]" * 30_000 + b"}"),
        answering(200, jwk_set(rsa_key("rsa-2")) + b" " * MAX_DOCUMENT_SIZE),
        answering(200, jwk_set(rsa_key("rsa-2")), {"Content-Encoding": "br"}),
        failing(lambda: httpx.ReadError("cut")),
        failing(lambda: httpx.RemoteProtocolError("rubbish")),
        slowly(answering(200, jwk_set(rsa_key("rsa-2"))), 6),
        raising_strangely,
    ],
)
async def test_a_bad_answer_replaces_nothing_and_ends_nothing(
    answer: Answer, autojump_clock: trio.testing.MockClock
) -> None:
    """Held keys go on working, it is logged, and the next good answer counts."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = answer
        await trio.sleep(231)
        assert it.cache.known_key("rsa-1") is not None
        assert it.cache.known_key("rsa-2") is None
        assert it.telemetry.counted[1:] == [("gateway_jwks_fetches_total", {"outcome": "failed"})]
        assert [event for _, event, _ in it.telemetry.logged[1:]] == ["jwks_fetch_failed"]
        it.issuer.publish(rsa_key("rsa-3"))
        await trio.sleep(225)
        assert it.cache.known_key("rsa-3") is not None
        assert {request.url.host for request in it.issuer.requests} == {"auth.test"}


class EndlessBody(httpx.AsyncByteStream):
    """A body that never ends."""

    def __init__(self) -> None:
        self.sent = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """More and more."""
        while True:
            await trio.lowlevel.checkpoint()
            self.sent += 1024
            yield b" " * 1024


async def test_reading_stops_at_the_size_bound(autojump_clock: trio.testing.MockClock) -> None:
    """No more is read than one chunk over the bound."""
    body = EndlessBody()

    async def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=body, request=request)

    async with running(answer) as it:
        assert body.sent <= MAX_DOCUMENT_SIZE + 1024
        assert it.telemetry.logged[0][2]["reason"] == f"it is larger than {MAX_DOCUMENT_SIZE} bytes"


async def test_a_body_that_trickles_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    """The time limit is for the whole fetch."""

    class Trickle(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            while True:
                await trio.sleep(1)
                yield b" "

    async def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Trickle(), request=request)

    async with running(answer) as it:
        assert trio.current_time() - it.started_at == 5


async def test_compression_is_not_asked_for(autojump_clock: trio.testing.MockClock) -> None:
    """So that the size bound holds for what is decoded."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        assert it.issuer.requests[0].headers["Accept-Encoding"] == "identity"


async def test_unfit_keys_are_left_out_and_reported(autojump_clock: trio.testing.MockClock) -> None:
    """Those that the rules refuse, and those that only the library finds unsound (a point off the curve)."""
    off_curve = {**ec_key().jwk, "kid": "off", "y": ec_key().jwk["x"]}
    document = {"keys": [rsa_key().jwk, {**rsa_key("rsa-2").jwk, "use": "enc"}, off_curve]}
    algorithms = frozenset({"RS256", "ES256"})
    async with running(answering(200, json.dumps(document).encode()), algorithms=algorithms) as it:
        assert it.cache.known_key("rsa-1") is not None
        assert it.cache.known_key("rsa-2") is None
        assert it.cache.known_key("off") is None
        fields = {"usable": 1, "refused": ["not for signatures", "malformed or weak"]}
        assert it.telemetry.logged == [("warning", "jwks_keys_refused", fields)]


@asynccontextmanager
async def http_server(answer: bytes, repeated: bytes = b"", hang: bool = False) -> AsyncIterator[str]:
    """A server on loopback that sends ``answer`` to each request, then ``repeated`` for ever, or hangs."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                await stream.receive_some()
                await stream.send_all(answer)
                while repeated:
                    await stream.send_all(repeated)
                if hang:
                    await trio.sleep_forever()
            except trio.BrokenResourceError:
                return

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(functools.partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/"
        nursery.cancel_scope.cancel()


async def test_an_endless_document_from_a_real_server_is_given_up() -> None:
    """At the bound, not at the time limit."""
    telemetry = RecordingTelemetry()
    endless = http_server(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n", b" " * 4096)
    async with endless as url, jwks_http_client() as http, trio.open_nursery() as nursery:
        cache = JwksCache(http, url, telemetry, algorithms=RS256)
        await nursery.start(cache.run)
        nursery.cancel_scope.cancel()
    assert telemetry.logged[0][2]["reason"] == f"it is larger than {MAX_DOCUMENT_SIZE} bytes"


async def test_a_fetch_never_waits_for_a_place_in_the_pool() -> None:
    """A request that is cancelled while it waits for one leaks it, so the pool has no bound."""
    silent = http_server(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", hang=True)
    quick = http_server(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    async with jwks_http_client() as http, silent as hanging, quick as url, trio.open_nursery() as nursery:
        for _ in range(101):
            nursery.start_soon(http.get, hanging)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(5):
            assert (await http.get(url)).text == "ok"
        nursery.cancel_scope.cancel()
