"""An auth service whose answers a test decides, and a key cache in front of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import trio
import trio.testing
from attrs import define, field

from gateway.adapters.jwks import JwksCache, JwksTiming
from tests.jwt_material import RecordingTelemetry, SigningKey, jwk_set

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
