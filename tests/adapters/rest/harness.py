"""A REST application with an Agent Runtime that answers from a function, and fakes of the other ports."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import httpx
import trio
from attrs import define, field
from quart import Response

from gateway.adapters.rest import create_app
from gateway.adapters.stores.memory import MemoryStore
from gateway.core.errors import InvalidToken, NotAuthenticated
from gateway.core.identity import (
    INTERNAL_SUBJECT,
    SCOPE_ADMIN,
    SCOPE_READ,
    SCOPE_WRITE,
    Credentials,
    Identity,
)
from gateway.ports import Authenticator, Clock, Telemetry
from gateway.settings import Settings
from gateway.trace_ports import Tracing

KEY = "k-internal"
INTERNAL = {"X-Internal-Auth": KEY}


def bearer(subject: str, *scopes: str) -> dict[str, str]:
    """The headers of a user; the token of these tests is the subject and its scopes."""
    return {"Authorization": f"Bearer {'+'.join((subject, *(scopes or (SCOPE_READ, SCOPE_WRITE))))}"}


ADMIN = bearer("root", SCOPE_READ, SCOPE_ADMIN)


class TokenIsSubject(Authenticator):
    """Believes every token but ``bad``."""

    async def authenticate(self, credentials: Credentials, *, socket: bool) -> Identity:
        """See ``ports.Authenticator``."""
        assert not socket
        if credentials.internal_key == KEY:
            return Identity(INTERNAL_SUBJECT, sees_all=True)
        if not credentials.bearer:
            raise NotAuthenticated("Send a token.")
        if credentials.bearer == "bad":
            raise InvalidToken("The token has expired; get a new one.")
        subject, *scopes = credentials.bearer.split("+")
        return Identity(subject, scopes=frozenset(scopes))


class FixedClock(Clock):
    """It is always the same second."""

    def now(self) -> float:
        """See ``ports.Clock``."""
        return 1_700_000_000.0


class RecordingTelemetry(Telemetry):
    """Keeps what was logged and counted."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, object]]] = []
        self.counts: Counter[tuple[str, ...]] = Counter()

    def debug(self, event: str, **fields: object) -> None:
        """See ``ports.Telemetry``."""
        self.lines.append(("debug", event, fields))

    def info(self, event: str, **fields: object) -> None:
        """See ``ports.Telemetry``."""
        self.lines.append(("info", event, fields))

    def warning(self, event: str, **fields: object) -> None:
        """See ``ports.Telemetry``."""
        self.lines.append(("warning", event, fields))

    def error(self, event: str, *, cause: BaseException | None = None, **fields: object) -> None:
        """See ``ports.Telemetry``."""
        self.lines.append(("error", event, {**fields, "cause": cause}))

    def count(self, metric: str, amount: float = 1, **labels: str) -> None:
        """See ``ports.Telemetry``."""
        self.counts[(metric, *labels.values())] += int(amount)

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """See ``ports.Telemetry``."""

    def set_gauge(self, metric: str, value: float, **labels: str) -> None:
        """See ``ports.Telemetry``."""


async def _ready() -> None:
    """Nothing is wrong."""


def _empty_answer(_request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={})


class _Body(httpx.AsyncByteStream):
    """A body that comes in two parts, as from a network."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        middle = len(self._content) // 2
        yield self._content[:middle]
        await trio.lowlevel.checkpoint()
        yield self._content[middle:]


async def _metrics() -> bytes:
    await trio.lowlevel.checkpoint()
    return b"# metrics\n"


@define
class Rest:
    """The application and everything around it."""

    answer: Callable[[httpx.Request], httpx.Response | Awaitable[httpx.Response]] = _empty_answer
    """What the Agent Runtime answers."""
    settings: Mapping[str, Any] = field(factory=dict)
    check_ready: Callable[[], Awaitable[None]] = _ready
    client: httpx.AsyncClient | None = None
    store: MemoryStore = field(factory=lambda: MemoryStore(dedupe_window=60))
    telemetry: RecordingTelemetry = field(factory=RecordingTelemetry)
    tracing: Tracing | None = None
    seen: list[httpx.Request] = field(factory=list)
    app: Any = field(init=False)

    def __attrs_post_init__(self) -> None:
        """Make the application."""
        transport = httpx.MockTransport(self._handle)
        settings = Settings(
            **{"internal_api_key": "agent-key", "agent_url": "http://agent:8001/base", **self.settings}
        )
        self.app = create_app(
            settings,
            authenticator=TokenIsSubject(),
            store=self.store,
            telemetry=self.telemetry,
            clock=FixedClock(),
            agent=self.client or httpx.AsyncClient(base_url=settings.agent_url, transport=transport),
            render_metrics=_metrics,
            check_ready=self.check_ready,
            tracing=self.tracing,
        )

    async def _handle(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        answer = self.answer(request)
        response = answer if isinstance(answer, httpx.Response) else await answer
        return httpx.Response(response.status_code, headers=response.headers, stream=_Body(response.content))

    async def call(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] = INTERNAL,
        body: bytes | str = b"",
        *,
        raw_path: str | None = None,
        query: bytes | None = None,
        peer: str = "192.0.2.1",
    ) -> Response:
        """One request; ``raw_path`` is what stands on the wire when it is not ``path``."""
        scope: dict[str, Any] = {"client": (peer, 5)}
        if raw_path is not None:
            scope["raw_path"] = raw_path.encode()
        if query is not None:
            scope["query_string"] = query
        if body and "Content-Type" not in headers:
            headers = {**headers, "Content-Type": "application/json"}
        response: Response = await self.app.test_client().open(
            path, method=method, headers=dict(headers), data=body, scope_base=scope
        )
        return response

    async def get(self, path: str, headers: Mapping[str, str] = INTERNAL, **options: Any) -> Response:
        """A GET."""
        return await self.call("GET", path, headers, **options)

    async def post(
        self, path: str, value: object = None, headers: Mapping[str, str] = INTERNAL, **options: Any
    ) -> Response:
        """A POST of JSON."""
        return await self.call("POST", path, headers, b"" if value is None else json.dumps(value), **options)
