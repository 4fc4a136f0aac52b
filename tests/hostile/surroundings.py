"""A real ``gateway serve`` in JWT mode, with an auth service and an Agent Runtime that the test plays."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import orjson
import trio
from attrs import define, field

from tests.end_to_end.processes import Process, running_gateway
from tests.hostile.servers import Handler, Request, answer, serving
from tests.jwt_material import SigningKey, claims, jwk_set, rsa_key, token

ISSUER = "https://auth.codelab.local"
AUDIENCE = "codelab-api"
INTERNAL_KEY = "internal-key-of-these-tests"


@define
class Issuer:
    """An auth service; it counts how often it is asked for its keys."""

    key: SigningKey = field(factory=rsa_key)
    asked: int = 0

    def token(self, subject: str, *, lifetime: float = 3600.0, **changes: object) -> str:
        """A token that holds for ``lifetime`` seconds, with other claims changed."""
        base = {"iss": ISSUER, "aud": AUDIENCE, "sub": subject, "exp": time.time() + lifetime}
        return token(self.key, claims(**{**base, **changes}))

    async def handle(self, request: Request, stream: trio.SocketStream) -> None:
        """Publish the key."""
        self.asked += 1
        await stream.send_all(answer(jwk_set(self.key)))


def events(*objects: Mapping[str, object]) -> bytes:
    """A whole stream of the dialect that ends with ``done``."""
    lines = [b"data: " + orjson.dumps(one) + b"\n\n" for one in objects]
    body = b"".join([*lines, b'event: done\ndata: {"status":"completed"}\n\n'])
    return answer(body, content_type="text/event-stream")


def saying(text: str) -> bytes:
    """A stream of one token."""
    return events({"type": "assistant_message", "token": text, "is_final": True})


@define
class Surroundings:
    """The gateway and what is around it."""

    gateway: Process
    issuer: Issuer
    requests: list[Request]
    """What came to the Agent Runtime, in order."""

    @property
    def port(self) -> int:
        """The gateway's."""
        return int(self.gateway.address.rpartition(":")[2])

    async def exchange(self, *pieces: bytes, seconds: float = 15.0) -> bytes:
        """Send ``pieces`` and give all that comes back until the gateway closes, or says nothing more."""
        received = b""
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            with trio.move_on_after(seconds):
                try:
                    for piece in pieces:
                        await stream.send_all(piece)
                    async for chunk in stream:
                        received += chunk
                except trio.BrokenResourceError:
                    pass
        return received

    async def call(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> tuple[int, dict[str, str], bytes]:
        """One REST call: status, header fields (names in lower case), body."""
        lines = {"Host": "localhost", "Connection": "close", **(headers or {})}
        if body or method == "POST":
            lines |= {"Content-Length": str(len(body)), "Content-Type": "application/json"}
        fields = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        received = await self.exchange(f"{method} {target} HTTP/1.1\r\n{fields}\r\n".encode() + body)
        head, _, rest = received.partition(b"\r\n\r\n")
        first, *others = head.decode("latin-1").split("\r\n")
        parsed = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in others)}
        return int(first.split(" ")[1]), parsed, rest

    async def metrics(self) -> str:
        """What ``/metrics`` says."""
        status, _, body = await self.call("GET", "/metrics", {"X-Internal-Auth": INTERNAL_KEY})
        assert status == 200
        return body.decode()

    async def crashes(self) -> float:
        """How many exceptions the bulkheads have caught."""
        return total(await self.metrics(), "gateway_bulkhead_catches_total")

    def errors_logged(self) -> list[str]:
        """Lines of the log at level error."""
        lines = self.gateway.log.splitlines()
        return [line for line in lines if '"level":"error"' in line or '"level": "error"' in line]


def total(metrics: str, name: str) -> float:
    """The sum of a metric over all its labels."""
    lines = [line for line in metrics.splitlines() if line.partition("{")[0].partition(" ")[0] == name]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


@asynccontextmanager
async def open_surroundings(folder: Path, agent: Handler, **settings: str) -> AsyncIterator[Surroundings]:
    """Everything started, in ``folder``; everything gone at the end."""
    issuer, requests = Issuer(), list[Request]()

    async def recorded(request: Request, stream: trio.SocketStream) -> None:
        requests.append(request)
        await agent(request, stream)

    async with serving(issuer.handle) as auth_url, serving(recorded) as agent_url:
        base = {
            "USE_JWT_AUTH": "true",
            "AUTH_SERVICE_URL": auth_url,
            "JWT_ISSUER": ISSUER,
            "JWT_AUDIENCE": AUDIENCE,
            "INTERNAL_API_KEY": INTERNAL_KEY,
        }
        with ExitStack() as stack:
            opening = partial(running_gateway, folder, agent_url, **{**base, **settings})
            process = await trio.to_thread.run_sync(lambda: stack.enter_context(opening()))
            try:
                yield Surroundings(process, issuer, requests)
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(stack.close)
