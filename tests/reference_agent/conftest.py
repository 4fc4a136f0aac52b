"""A running reference agent on loopback, and the simplest client of it."""

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import orjson
import pytest
import trio

from gateway.reference_agent.server import serve_agent
from gateway.reference_agent.settings import AgentSettings


@attrs.frozen
class Answer:
    """One streamed answer."""

    status: int
    headers: httpx.Headers
    events: list[dict[str, Any]]
    """The JSON of the `message` events."""

    ids: list[str]
    ended: bool
    """The `done` event came."""

    @property
    def text(self) -> str:
        """The tokens put together."""
        return "".join(event["token"] for event in self.events if event["type"] == "assistant_message")

    @property
    def types(self) -> list[str]:
        """The types of the events, runs of tokens as one."""
        types: list[str] = []
        for event in self.events:
            if not (types and types[-1] == event["type"] == "assistant_message"):
                types.append(event["type"])
        return types

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The tool calls."""
        return [event for event in self.events if event["type"] == "tool_call"]

    @property
    def error_codes(self) -> list[str]:
        """The codes of the errors."""
        return [event["code"] for event in self.events if event["type"] == "error"]


def parse_answer(response: httpx.Response) -> Answer:
    """Read a whole SSE body the way the runtime writes it."""
    events: list[dict[str, Any]] = []
    ids: list[str] = []
    ended = False
    if response.headers["Content-Type"] != "text/event-stream":
        return Answer(response.status_code, response.headers, events, ids, ended)
    for block in response.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "id" in fields:
            ids.append(fields["id"])
        if fields.get("event") == "done":
            ended = True
        elif "data" in fields:
            events.append(orjson.loads(fields["data"]))
    return Answer(response.status_code, response.headers, events, ids, ended)


class AgentClient:
    """Posts messages of one session and collects the answers."""

    def __init__(self, http: httpx.AsyncClient, session_id: str = "s1") -> None:
        self.http = http
        self.session_id = session_id

    @classmethod
    @asynccontextmanager
    async def at(cls, url: str, **headers: str) -> AsyncIterator["AgentClient"]:
        """A client of a runtime that runs elsewhere."""
        async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=10) as http:
            yield cls(http)

    async def post(self, message: dict[str, Any], **headers: str) -> Answer:
        """Send one message, with headers given as ``idempotency_key="…"``."""
        response = await self.http.post(
            "/agent/message/stream",
            json={"session_id": self.session_id, "message": message},
            headers={name.replace("_", "-"): value for name, value in headers.items()},
        )
        return parse_answer(response)

    async def say(self, content: str, **more: Any) -> Answer:
        """Send a user_message."""
        return await self.post({"type": "user_message", "content": content, **more})

    async def result(self, call_id: str, result: Any) -> Answer:
        """Send a tool_result."""
        return await self.post({"type": "tool_result", "call_id": call_id, "result": result})

    async def decide(self, call_id: str, decision: str, **more: Any) -> Answer:
        """Send a hitl_decision."""
        return await self.post({"type": "hitl_decision", "call_id": call_id, "decision": decision, **more})

    async def get(self, path: str) -> Any:
        """The JSON of a route that must answer 200."""
        response = await self.http.get(path)
        assert response.status_code == 200, response.text
        return response.json()

    async def read_until(self, content: str, marker: bytes, **headers: str) -> bytes:
        """Send a user_message on a raw socket and drop the connection once ``marker`` has come."""
        body = orjson.dumps(
            {"session_id": self.session_id, "message": {"type": "user_message", "content": content}}
        )
        extra = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        url = self.http.base_url
        received = b""
        async with await trio.open_tcp_stream(url.host, url.port or 80) as stream:
            await stream.send_all(
                b"POST /agent/message/stream HTTP/1.1\r\nHost: a\r\n%bContent-Length: %d\r\n\r\n%b"
                % (extra.encode(), len(body), body)
            )
            while marker not in received:
                chunk = await stream.receive_some()
                assert chunk, received
                received += chunk
        return received


RunAgent = Callable[..., AbstractAsyncContextManager[AgentClient]]


@asynccontextmanager
async def run_agent(**settings: Any) -> AsyncIterator[AgentClient]:
    """An agent on a free port, without token delay unless asked for; it ends with the block."""
    chosen = AgentSettings(**{"bind": "127.0.0.1:0", "token_delay": 0.0, **settings})
    async with trio.open_nursery() as nursery:
        url = await nursery.start(serve_agent, chosen)
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=10) as http:
            yield AgentClient(http)
        nursery.cancel_scope.cancel()


@pytest.fixture(name="run_agent")
def run_agent_fixture() -> RunAgent:
    """Starts agents: ``async with run_agent(token_delay=0.1) as client``."""
    return run_agent


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for a unix socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
async def client() -> AsyncIterator[AgentClient]:
    """A client of an agent with default settings."""
    async with run_agent() as running:
        yield running
