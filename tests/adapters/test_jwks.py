"""When keys are fetched, what is made of the answers, and what an issuer that is away or hostile can do."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
import trio
import trio.testing
from attrs import define, field

from gateway.adapters.jwks import MAX_DOCUMENT_SIZE, JwksCache, JwksTiming, jwks_http_client
from tests.jwt_material import RecordingTelemetry, SigningKey, ec_key, jwk_set, rsa_key

URL = "https://auth.test/.well-known/jwks.json"
RS256 = frozenset({"RS256"})

Answer = Callable[[httpx.Request], Awaitable[httpx.Response]]


@define
class Issuer:
    """An auth service: what it answers can be changed, when it was asked is kept."""

    answer: Answer
    asked_at: list[float] = field(factory=list)
    requests: list[httpx.Request] = field(factory=list)

    def publish(self, *keys: SigningKey) -> None:
        """Answer with these keys from now on."""
        self.answer = answering(200, jwk_set(*keys))

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer one request."""
        self.asked_at.append(trio.current_time())
        self.requests.append(request)
        return await self.answer(request)


class Body(httpx.AsyncByteStream):
    """A body in one piece, not read yet, as from a network."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The piece."""
        yield self.content


def answering(status: int, content: bytes, headers: dict[str, str] | None = None) -> Answer:
    """An issuer's answer at once."""

    async def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, stream=Body(content), headers=headers, request=request)

    return answer


def failing(error: Callable[[], Exception]) -> Answer:
    """An issuer that cannot be talked to."""

    async def answer(request: httpx.Request) -> httpx.Response:
        raise error()

    return answer


def slowly(answer: Answer, seconds: float) -> Answer:
    """The same answer later."""

    async def late(request: httpx.Request) -> httpx.Response:
        await trio.sleep(seconds)
        return await answer(request)

    return late


@define
class Running:
    """A cache that is being refreshed."""

    cache: JwksCache
    issuer: Issuer
    telemetry: RecordingTelemetry
    started_at: float

    def elapsed(self) -> list[float]:
        """When the issuer was asked, in seconds since the start."""
        return [moment - self.started_at for moment in self.issuer.asked_at]


@asynccontextmanager
async def running(
    answer: Answer,
    *,
    jitter: float = 0.0,
    timing: JwksTiming | None = None,
    algorithms: frozenset[str] = RS256,
) -> AsyncIterator[Running]:
    """A started cache in front of an issuer that answers so."""
    issuer = Issuer(answer)
    telemetry = RecordingTelemetry()
    async with httpx.AsyncClient(transport=httpx.MockTransport(issuer)) as http:
        cache = JwksCache(http, URL, telemetry, algorithms=algorithms, timing=timing, jitter=lambda: jitter)
        started_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            await nursery.start(cache.run)
            yield Running(cache, issuer, telemetry, started_at)
            nursery.cancel_scope.cancel()


async def test_keys_are_there_once_it_has_started(autojump_clock: trio.testing.MockClock) -> None:
    """Start-up waits for the first fetch, so that the first caller finds its key."""
    async with running(slowly(answering(200, jwk_set(rsa_key())), 1.5)) as it:
        assert trio.current_time() - it.started_at == 1.5
        assert it.cache.known_key("rsa-1") is not None
        assert it.telemetry.counted == [("gateway_jwks_fetches_total", {"outcome": "ok"})]


async def test_starting_without_the_issuer_takes_no_longer_than_a_fetch(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A gateway whose issuer hangs starts all the same."""
    async with running(slowly(answering(200, jwk_set(rsa_key())), math.inf)) as it:
        assert trio.current_time() - it.started_at == 5
        assert it.cache.known_key("rsa-1") is None


async def test_a_known_key_returns_without_a_checkpoint(autojump_clock: trio.testing.MockClock) -> None:
    """Not even while a fetch hangs: it does not touch the scheduler."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = slowly(it.issuer.answer, math.inf)
        await trio.sleep(226)
        assert len(it.issuer.asked_at) == 2
        with trio.testing.assert_no_checkpoints():
            key = await it.cache.key_for("rsa-1")
        assert key is not None
        assert key.algorithm_name == "RS256"


@pytest.mark.parametrize(("jitter", "interval"), [(0.0, 225.0), (1.0, 270.0)])
async def test_keys_are_refreshed_before_the_end_of_their_life(
    jitter: float, interval: float, autojump_clock: trio.testing.MockClock
) -> None:
    """Early enough for a whole fetch within 300 s, and not by all nodes at the same time."""
    async with running(answering(200, jwk_set(rsa_key())), jitter=jitter) as it:
        await trio.sleep(2 * interval + 1)
        assert it.elapsed() == [0, interval, 2 * interval]


async def test_a_key_that_was_taken_back_is_refused_within_the_lifetime(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Revocation by rotation takes effect within 300 s."""
    async with running(answering(200, jwk_set(rsa_key(), rsa_key("rsa-2"))), jitter=1) as it:
        it.issuer.publish(rsa_key("rsa-2"))
        await trio.sleep(300)
        assert it.cache.known_key("rsa-1") is None
        assert it.cache.known_key("rsa-2") is not None


async def test_an_empty_set_takes_all_keys_back(autojump_clock: trio.testing.MockClock) -> None:
    """The issuer is obeyed, and the operator told."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.publish()
        await trio.sleep(300)
        assert it.cache.known_key("rsa-1") is None
        assert ("warning", "jwks_keys_refused", {"usable": 0, "refused": []}) in it.telemetry.logged


async def test_a_new_key_is_fetched_when_a_token_names_it(autojump_clock: trio.testing.MockClock) -> None:
    """Rotation needs no waiting for the schedule."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = slowly(answering(200, jwk_set(rsa_key("rsa-2"))), 1.0)
        await trio.sleep(30)
        assert await it.cache.key_for("rsa-2") is not None
        assert trio.current_time() - it.started_at == 31
        assert it.elapsed() == [0, 30]


async def test_within_the_cooldown_an_unknown_key_is_refused_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """No wait, no checkpoint, no fetch."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        await trio.sleep(math.nextafter(30, 0))
        with trio.testing.assert_no_checkpoints():
            assert await it.cache.key_for("rsa-2") is None
        assert it.elapsed() == [0]


async def test_the_wait_for_an_unknown_key_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    """A slow issuer delays such a caller by 2 s; a later one finds the key."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = slowly(answering(200, jwk_set(rsa_key("rsa-2"))), 3.0)
        await trio.sleep(30)
        assert await it.cache.key_for("rsa-2") is None
        assert trio.current_time() - it.started_at == 32
        assert await it.cache.key_for("rsa-2") is not None
        assert trio.current_time() - it.started_at == 33
        assert it.elapsed() == [0, 30]


async def test_a_flood_of_unknown_keys_costs_one_fetch_per_cooldown(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """10 000 callers in 100 s, each with another key: fetches 30 s apart, known keys not delayed."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = slowly(it.issuer.answer, 0.005)

        async def forged(number: int) -> None:
            assert await it.cache.key_for(f"forged-{number}") is None

        async with trio.open_nursery() as nursery:
            for number in range(10_000):
                nursery.start_soon(forged, number)
                if number % 100 == 99:
                    await trio.sleep(1)
                    with trio.testing.assert_no_checkpoints():
                        assert await it.cache.key_for("rsa-1") is not None
        assert it.elapsed() == [0, 30, 60, 90]


async def test_a_flood_while_the_issuer_fails_costs_one_fetch_per_cooldown(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Failures count for the cooldown, from the very first attempt on."""
    async with running(answering(503, b"")) as it:
        for number in range(10_000):
            assert await it.cache.key_for(f"forged-{number}") is None
            await trio.sleep(0.01)
        assert it.elapsed() == pytest.approx([0, 30, 60, 90], abs=0.02)
        assert all(later - earlier >= 30 for earlier, later in itertools.pairwise(it.elapsed()))


async def test_callers_at_the_same_moment_share_one_fetch(autojump_clock: trio.testing.MockClock) -> None:
    """One fetch at a time, and all of them get its keys."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = slowly(answering(200, jwk_set(rsa_key("rsa-2"))), 1.0)
        await trio.sleep(30)
        found: list[bool] = []

        async def caller() -> None:
            found.append(await it.cache.key_for("rsa-2") is not None)

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(caller)
        assert found == [True] * 100
        assert it.elapsed() == [0, 30]


async def test_a_cancelled_caller_disturbs_no_other(autojump_clock: trio.testing.MockClock) -> None:
    """The fetch is not its own."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = slowly(answering(200, jwk_set(rsa_key("rsa-2"))), 1.0)
        await trio.sleep(30)
        with trio.move_on_after(0.5) as impatient:
            await it.cache.key_for("rsa-2")
        assert impatient.cancelled_caught
        assert await it.cache.key_for("rsa-2") is not None
        assert it.elapsed() == [0, 30]


async def test_stale_keys_work_while_the_issuer_is_down(autojump_clock: trio.testing.MockClock) -> None:
    """For a day beyond their life, and no longer."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = failing(lambda: httpx.ConnectError("refused"))
        await trio.sleep(math.nextafter(300 + 86_400, 0))
        assert it.cache.known_key("rsa-1") is not None
        await trio.sleep(0.001)
        assert it.cache.known_key("rsa-1") is None


async def test_keys_return_with_the_issuer(autojump_clock: trio.testing.MockClock) -> None:
    """What was published meanwhile counts from then on."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = answering(500, b"")
        await trio.sleep(7200)
        it.issuer.publish(rsa_key("rsa-2"))
        await trio.sleep(225)
        assert it.cache.known_key("rsa-1") is None
        assert it.cache.known_key("rsa-2") is not None


@pytest.mark.parametrize(
    ("jitter", "expected"), [(0.0, [0, 30, 90, 210, 360, 510]), (1.0, [0, 45, 135, 315, 540, 765])]
)
async def test_failed_fetches_are_repeated_ever_more_slowly(
    jitter: float, expected: list[float], autojump_clock: trio.testing.MockClock
) -> None:
    """Doubling from the cooldown on, spread, and bounded so that revocation does not wait for hours."""
    async with running(answering(500, b""), jitter=jitter) as it:
        await trio.sleep(expected[-1] + 1)
        assert it.elapsed() == expected


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ConnectTimeout])
async def test_an_issuer_that_is_not_listening_yet_is_found_quickly(
    error: type[httpx.TransportError], autojump_clock: trio.testing.MockClock
) -> None:
    """While there are no keys, failed connects are repeated fast: the issuer has seen nothing of them."""
    async with running(failing(lambda: error("not there")), jitter=1) as it:
        await trio.sleep(2)
        it.issuer.publish(rsa_key())
        await trio.sleep(2)
        assert it.elapsed() == [0, 0.5, 1.5, 3.5]
        assert it.cache.known_key("rsa-1") is not None


async def test_with_keys_held_failed_connects_are_not_repeated_fast(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """There is no hurry then."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = failing(lambda: httpx.ConnectError("refused"))
        await trio.sleep(316)
        assert it.elapsed() == [0, 225, 255, 315]


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


async def test_without_a_refresher_nobody_waits(autojump_clock: trio.testing.MockClock) -> None:
    """Also after it was cancelled; keys that are held go on working."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        pass
    await trio.sleep(100)
    with trio.testing.assert_no_checkpoints():
        assert await it.cache.key_for("rsa-2") is None
        assert await it.cache.key_for("rsa-1") is not None


async def test_only_one_refresher_may_run(autojump_clock: trio.testing.MockClock) -> None:
    """A second one would fetch twice."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        with pytest.raises(RuntimeError, match="already"):
            await it.cache.run()


@pytest.mark.parametrize(
    "changes", [{"cooldown": 0}, {"cooldown": 200}, {"fetch_timeout": 30}, {"fetch_timeout": 0}]
)
def test_timings_that_contradict_each_other_cannot_be_made(changes: dict[str, float]) -> None:
    """A fetch fits between two, and several into a lifetime."""
    with pytest.raises(ValueError, match="JWKS"):
        JwksTiming(**changes)


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


async def test_a_good_answer_ends_the_backing_off(autojump_clock: trio.testing.MockClock) -> None:
    """The schedule is the ordinary one again."""
    async with running(answering(500, b"")) as it:
        await trio.sleep(89)
        it.issuer.publish(rsa_key())
        await trio.sleep(227)
        assert it.elapsed() == [0, 30, 90, 315]
