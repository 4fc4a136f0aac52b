"""What the tests of the Agent Runtime adapter share: the adapter, connected to a scripted runtime."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from gateway.adapters.sse_agent import Send, SseAgentRuntime, agent_client
from gateway.adapters.streaming_transport import StreamingTransport
from gateway.core.sse import ServerSentEvent
from gateway.ports import Telemetry, TurnRequest
from tests.adapters.agent_harness import (
    MemoryAgent,
    memory_agent,
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


def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take proxies out of the environment."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def runtime_with(send: Send, url: str, telemetry: Telemetry | None = None, key: str = KEY) -> SseAgentRuntime:
    """The adapter under test, with deadlines of 5 and 30 s and waits of half their limit."""
    return SseAgentRuntime(
        send=send,
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
    async with agent_client(url, transport or StreamingTransport(), verify=verify) as send:
        yield runtime_with(send, url, telemetry)


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
