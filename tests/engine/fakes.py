"""Fakes of the ports for engine tests: real subclasses of the Protocols, steered by the test."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count
from typing import Any

import orjson
import trio

from gateway.adapters.stores.memory import MemoryStore
from gateway.core.errors import AgentFailure, StoreUnavailable
from gateway.core.identity import Credentials, Identity
from gateway.core.limits import Limits
from gateway.core.rate_limit import RateLimiter
from gateway.core.sse import ServerSentEvent
from gateway.core.storage import SessionCommit
from gateway.core.trace_context import TraceContext
from gateway.core.websocket_protocol import Dialect
from gateway.engine.admission import AdmissionRules, Admissions
from gateway.engine.hub import Hub
from gateway.engine.turn import TurnRunner
from gateway.ports import (
    Admission,
    AgentRuntime,
    AgentStream,
    Authenticator,
    ClientConnection,
    Clock,
    ConnectionClosed,
    Hear,
    ResumePoint,
    SessionStore,
    Telemetry,
    TurnRequest,
)
from gateway.trace_ports import Tracing


class RecordingTelemetry(Telemetry):
    """Keeps every log entry and count."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, dict[str, object]]] = []
        self.counts: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self.observations: list[tuple[str, float]] = []

    def debug(self, event: str, **fields: object) -> None:
        """Keep."""
        self.entries.append(("debug", event, fields))

    def info(self, event: str, **fields: object) -> None:
        """Keep."""
        self.entries.append(("info", event, fields))

    def warning(self, event: str, **fields: object) -> None:
        """Keep."""
        self.entries.append(("warning", event, fields))

    def error(self, event: str, *, cause: BaseException | None = None, **fields: object) -> None:
        """Keep."""
        self.entries.append(("error", event, {**fields, "cause": cause}))

    def count(self, metric: str, amount: float = 1, **labels: str) -> None:
        """Add up."""
        key = (metric, tuple(sorted(labels.items())))
        self.counts[key] = self.counts.get(key, 0) + amount

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Keep."""
        self.observations.append((metric, value))

    def set_gauge(self, metric: str, value: float, **labels: str) -> None:
        """Not looked at."""

    def events(self) -> list[str]:
        """Names of all entries, in order."""
        return [event for _, event, _ in self.entries]

    def errors(self) -> list[dict[str, object]]:
        """Fields of all error entries."""
        return [fields for level, _, fields in self.entries if level == "error"]


class TrioClock(Clock):
    """Wall time that follows Trio's clock."""

    def now(self) -> float:
        """Seconds."""
        return 1_000_000.0 + trio.current_time()


class FakeConnection(ClientConnection):
    """A socket whose other end is the test."""

    def __init__(self, *, pongs: bool = True) -> None:
        self._inbox, self._incoming = trio.open_memory_channel[str | bytes](1000)
        self.frames: list[bytes] = []
        self.arrived = trio.lowlevel.ParkingLot()
        self.closed: tuple[int, str] | None = None
        self.stalled = False
        self.received: list[str | bytes] = []
        """What came in that was not heard at once."""
        self._held: list[bytes] = []
        self._moved = trio.Event()
        self.pongs = pongs
        self.pings = 0
        self.lost: ConnectionClosed | None = None

    # the test's side

    def say(self, message: dict[str, object] | str | bytes) -> None:
        """Have the client send a message."""
        self._inbox.send_nowait(orjson.dumps(message).decode() if isinstance(message, dict) else message)

    def drop(self, code: int = 1006) -> None:
        """Lose the connection."""
        self.lost = ConnectionClosed(code)
        self._inbox.close()
        self._moved.set()

    def unstall(self) -> None:
        """Take what was held, and all that comes."""
        self.stalled = False
        self.frames += self._held
        self._held = []
        self._moved.set()
        self.arrived.unpark_all()

    def objects(self) -> list[dict[str, Any]]:
        """Everything received, decoded; batches unpacked."""
        found: list[dict[str, Any]] = []
        for frame in self.frames:
            value = orjson.loads(frame)
            found.extend(value if isinstance(value, list) else [value])
        return found

    def types(self) -> list[str]:
        """The types of everything received."""
        return [item["type"] for item in self.objects()]

    def text(self) -> str:
        """All tokens received, joined."""
        return "".join(item.get("token", "") for item in self.objects())

    async def wait_for(self, kind: str, times: int = 1) -> dict[str, Any]:
        """Wait until that type has come so many times; returns the last of them."""
        while len(found := [item for item in self.objects() if item["type"] == kind]) < times:
            await self.arrived.park()
        return found[times - 1]

    # ClientConnection

    @property
    def sends_pings(self) -> bool:
        """Yes."""
        return True

    @property
    def unsent(self) -> int:
        """What a stalled peer has not taken."""
        return len(self._held)

    async def receive(self, hear: Hear | None = None) -> str | bytes:
        """The next message that ``hear`` does not take."""
        while True:
            try:
                message = await self._incoming.receive()
            except trio.EndOfChannel:
                raise self._gone() from None
            if hear is None or not hear(message):
                self.received.append(message)
                return message

    def send_nowait(self, payloads: Sequence[bytes]) -> bool:
        """Take, or hold while stalled."""
        if self.lost is not None:
            self._held += payloads
            raise self._gone()
        if self.stalled:
            self._held += payloads
            return False
        self.frames += payloads
        self.arrived.unpark_all()
        return True

    def _gone(self) -> ConnectionClosed:
        """A new one each time: an exception that was raised holds the frames that it passed."""
        return ConnectionClosed(self.lost.code, self.lost.reason) if self.lost else ConnectionClosed(1006)

    async def wait_sent(self) -> None:
        """Wait while stalled."""
        while self._held:
            if self.lost is not None:
                raise self._gone()
            self._moved = trio.Event()
            await self._moved.wait()
        await trio.lowlevel.checkpoint()

    async def ping(self) -> None:
        """Answered at once, or never."""
        self.pings += 1
        if not self.pongs:
            await trio.sleep_forever()

    async def close(self, code: int, reason: str = "") -> None:
        """Remember the first."""
        if self.closed is None:
            self.closed = (code, reason)
            self.arrived.unpark_all()


class FakeStream(AgentStream):
    """One answer of the fake runtime."""

    def __init__(self, request: TurnRequest, *, resumable: bool) -> None:
        self.request = request
        self._resumable = resumable
        self._send, self._receive = trio.open_memory_channel[list[ServerSentEvent] | AgentFailure](10_000)
        self.closed = False
        self.taken = 0

    def emit(self, *events: dict[str, object], event_id: str | None = None) -> None:
        """One read's worth of events."""
        self._send.send_nowait([ServerSentEvent("message", orjson.dumps(e), event_id) for e in events])

    def emit_raw(self, data: bytes) -> None:
        """One event of exactly these bytes."""
        self._send.send_nowait([ServerSentEvent("message", data)])

    def token(self, text: str, *, final: bool = False, event_id: str | None = None) -> None:
        """One token."""
        self.emit({"type": "assistant_message", "token": text, "is_final": final}, event_id=event_id)

    def done(self) -> None:
        """End the stream with its ``done``."""
        self._send.send_nowait([ServerSentEvent("done", b'{"status":"completed"}')])

    def fail(self, failure: AgentFailure) -> None:
        """Break the stream."""
        self._send.send_nowait(failure)

    @property
    def resumable(self) -> bool:
        """As constructed."""
        return self._resumable

    async def receive(self) -> Sequence[ServerSentEvent]:
        """The next read's worth."""
        item = await self._receive.receive()
        self.taken += 1
        if isinstance(item, AgentFailure):
            raise item
        return item


class FakeAgent(AgentRuntime):
    """A runtime whose answers the test writes."""

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []
        self.refusals: list[AgentFailure] = []
        self.resumable = False
        self._opened = trio.lowlevel.ParkingLot()

    async def stream(self, number: int) -> FakeStream:
        """Wait for the stream of that number, from 0."""
        while len(self.streams) <= number:
            await self._opened.park()
        return self.streams[number]

    def open_stream(self, request: TurnRequest) -> AbstractAsyncContextManager[AgentStream]:
        """See the port."""
        return self._open(request)

    @asynccontextmanager
    async def _open(self, request: TurnRequest) -> AsyncIterator[AgentStream]:
        await trio.lowlevel.checkpoint()
        if self.refusals:
            raise self.refusals.pop(0)
        stream = FakeStream(request, resumable=self.resumable)
        self.streams.append(stream)
        self._opened.unpark_all()
        try:
            yield stream
        finally:
            stream.closed = True


class FakeAuthenticator(Authenticator):
    """Tokens are ``subject`` or ``subject@expiry``."""

    async def authenticate(self, credentials: Credentials, *, socket: bool) -> Identity:
        """Parse."""
        subject, _, expiry = (credentials.bearer or "anonymous").partition("@")
        return Identity(subject, expires_at=float(expiry) if expiry else None)


class DurableMemoryStore(MemoryStore):
    """A store that counts as durable, and that the test can make slow or refuse."""

    def __init__(self) -> None:
        super().__init__(dedupe_window=86_400)
        self.at_once = False
        """Whether it commits without waiting."""
        self.latency = 0.0
        self.down = False
        self.commits = 0

    @property
    def is_durable(self) -> bool:
        """Yes, as far as the engine can tell."""
        return True

    async def commit(self, commits: Sequence[SessionCommit]) -> None:
        """After ``latency``."""
        await trio.sleep(self.latency)
        if self.down:
            raise StoreUnavailable("The session store is away. Try again later.")
        super().commit_nowait(commits)
        self.commits += 1

    def commit_nowait(self, commits: Sequence[SessionCommit]) -> bool:
        """When the test says so."""
        if not self.at_once or self.down:
            return False
        self.commits += 1
        return super().commit_nowait(commits)


class Bench:
    """A hub with fakes around it."""

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        limits: Limits | None = None,
        store: SessionStore | None = None,
        agent: FakeAgent | None = None,
        name: str = "id",
        messages_per_minute: int = 0,
        telemetry: Telemetry | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.nursery = nursery
        self.limits = limits or Limits()
        self.telemetry = RecordingTelemetry()
        self.agent = agent or FakeAgent()
        self.store: SessionStore = store or MemoryStore(dedupe_window=86_400)
        self.clock = TrioClock()
        authenticator = FakeAuthenticator()
        ids = count(1)
        self.hub = Hub(
            store=self.store,
            admissions=Admissions(
                rules=AdmissionRules(),
                authenticator=authenticator,
                store=self.store,
                upgrade_rate=RateLimiter(0),
                clock=self.clock,
                fresh_bytes=bytes,
            ),
            authenticator=authenticator,
            run_turn=TurnRunner(
                self.agent,
                limits=self.limits,
                telemetry=telemetry or self.telemetry,
                randomness=random.Random(1),
                tracing=tracing,
            ),
            limits=self.limits,
            telemetry=telemetry or self.telemetry,
            clock=self.clock,
            new_id=lambda: f"{name}{next(ids)}",
            message_rate=RateLimiter(messages_per_minute),
            randomness=random.Random(1),
        )

    async def start(self) -> Bench:
        """Run the hub in the test's nursery."""
        self.nursery.start_soon(_give_up)
        await self.nursery.start(self.hub.run)
        return self

    def connect(
        self,
        session_id: str = "s",
        *,
        dialect: Dialect = Dialect.V1,
        resume: ResumePoint | None = None,
        identity: Identity | None = None,
        connection: FakeConnection | None = None,
        trace: TraceContext | None = None,
    ) -> FakeConnection:
        """Attach a socket."""
        connection = connection or FakeConnection()
        admission = Admission(
            session_id, identity or Identity("anonymous"), dialect, resume, "203.0.113.1", "req", trace
        )
        self.nursery.start_soon(self.hub.serve, connection, admission)
        return connection


async def _give_up() -> None:
    """End a test that waits for what never comes: virtual hours are cheap, a hang is not."""
    await trio.sleep(2 * 3600)
    raise AssertionError("What the test waits for did not come within two virtual hours.")


def user_message(text: str = "hi", **fields: object) -> dict[str, object]:
    """A ``user_message``."""
    return {"type": "user_message", "content": text, **fields}
