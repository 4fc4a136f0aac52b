"""The conformance driver: it passes ours, and names the right faults in runtimes broken on purpose."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import trio
from hypercorn.utils import wrap_app

from gateway.reference_agent.approvals import load_policy
from gateway.reference_agent.conformance import (
    FAILED,
    PASSED,
    SKIPPED,
    AgentUnreachableError,
    CheckResult,
    check_agent,
    summarize,
)
from gateway.reference_agent.conformance_checks import CHECKS
from gateway.reference_agent.memory_state import MemoryState
from gateway.reference_agent.routes import create_app
from gateway.reference_agent.runtime import Runtime
from gateway.reference_agent.scripted_brain import ScriptedBrain
from gateway.reference_agent.server import HttpServer, hypercorn_config
from gateway.reference_agent.settings import AgentSettings

from .conftest import RunAgent
from .openai_server import OpenAiServer, run_openai_server
from .runtime_process import spool_pid, wait_spool_ended

Send = Callable[[dict[str, Any]], Awaitable[None]]


class Breakage:
    """An ASGI layer over the real runtime; subclasses break one thing."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        """Pass everything through `changed`."""

        async def send_changed(message: dict[str, Any]) -> None:
            await send(self.changed(scope, message))

        await self.app(scope, receive, send_changed)

    def changed(self, scope: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
        """The message as it is sent."""
        return message


class BodyBreakage(Breakage):
    """Breaks the bytes of streams."""

    def changed(self, scope: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
        """Change the body of streams only."""
        if scope["path"] == "/agent/message/stream" and message.get("body"):
            return {**message, "body": self.changed_body(message["body"])}
        return message

    def changed_body(self, body: bytes) -> bytes:
        """The bytes as they are sent."""
        return body


class PlainText(Breakage):
    """Streams under the wrong type."""

    def changed(self, scope: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
        """text/plain instead of text/event-stream."""
        headers = [
            (name, value.replace(b"text/event-stream", b"text/plain"))
            for name, value in message.get("headers", [])
        ]
        return {**message, "headers": headers} if "headers" in message else message


class ArgumentsAsText(BodyBreakage):
    """Sends a tool call's arguments as the LLM gave them: JSON within JSON."""

    def changed_body(self, body: bytes) -> bytes:
        """Arguments become a string."""
        blocks = body.split(b"\n\n")
        for number, block in enumerate(blocks):
            head, mark, data = block.partition(b"data: ")
            if b'"tool_call"' in data:
                event = orjson.loads(data)
                event["arguments"] = orjson.dumps(event["arguments"]).decode()
                blocks[number] = head + mark + orjson.dumps(event)
        return b"\n\n".join(blocks)


class TalksOn(BodyBreakage):
    """Goes on talking after a tool call."""

    def changed_body(self, body: bytes) -> bytes:
        """A token behind each call."""
        end = body.find(b"\n\n", body.find(b'"tool_call"')) + 2
        if b'"type":"tool_call"' not in body:
            return body
        more = b'event: message\ndata: {"type":"assistant_message","token":"!","is_final":false}\n\n'
        return body[:end] + more + body[end:]


class BareData(BodyBreakage):
    """Another dialect, and no fault: no event names, no ids, no `done`, switches told under `metadata`."""

    def changed_body(self, body: bytes) -> bytes:
        """Bare data lines only."""
        blocks = []
        for block in body.split(b"\n\n"):
            data = block.partition(b"data: ")[2]
            if data and b"event: done" not in block:
                event = orjson.loads(data)
                if event["type"] == "agent_switched":
                    kind = event.pop("type")
                    event = {"type": kind, "metadata": event}
                blocks.append(b"data: " + orjson.dumps(event) + b"\r\n\r\n")
        return b"".join(blocks)


class NoFinal(BodyBreakage):
    """Never says that an answer is complete."""

    def changed_body(self, body: bytes) -> bytes:
        """is_final is never true."""
        return body.replace(b'"is_final":true', b'"is_final":false')


class ForgetsErrors(BodyBreakage):
    """Swallows its refusals."""

    def changed_body(self, body: bytes) -> bytes:
        """Drop events of the type error."""
        blocks = body.split(b"\n\n")
        return b"\n\n".join(block for block in blocks if b'"type":"error"' not in block)


class RepeatsAfterCut(Breakage):
    """Claims to be resumable, and begins from the front each time."""

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        """Lose the Last-Event-ID."""
        headers = [pair for pair in scope["headers"] if pair[0] != b"last-event-id"]
        await self.app({**scope, "headers": headers}, receive, send)


class LosesSessions(Breakage):
    """Answers for sessions that are not there as if they were."""

    def changed(self, scope: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
        """200 instead of 404."""
        return {**message, "status": 200} if message.get("status") == 404 else message


@asynccontextmanager
async def broken(breakage: Callable[[Any], Any]) -> AsyncIterator[str]:
    """The real runtime behind a breakage, on a free port."""
    settings = AgentSettings(token_delay=0.001)
    async with trio.open_nursery() as nursery:
        brain = ScriptedBrain(settings.token_delay)
        runtime = Runtime(settings, brain, load_policy(None), MemoryState(), nursery)
        app = wrap_app(breakage(create_app(runtime, settings)), 1, "asgi")
        listeners = list(await trio.open_tcp_listeners(0, host="127.0.0.1"))
        await nursery.start(HttpServer(app, hypercorn_config()).serve, listeners)
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


def failed(results: list[CheckResult]) -> set[str]:
    """The names of the checks that failed."""
    return {result.name for result in results if result.outcome == FAILED}


async def test_ours_passes_every_check(run_agent: RunAgent) -> None:
    """With a key, so that nothing is skipped; each result is heard of as it is made."""
    heard: list[CheckResult] = []
    async with run_agent(internal_key="secret", token_delay=0.001) as client:
        results = await check_agent(str(client.http.base_url), key="secret", on_result=heard.append)
    assert [str(result) for result in results if result.outcome != PASSED] == []
    assert (len(results), heard) == (len(CHECKS), results)
    assert summarize(results) == f"{len(CHECKS)} passed, 0 failed, 0 skipped"


@pytest.mark.parametrize("keep", [0.0, 60.0])
async def test_ours_passes_with_an_llm(run_agent: RunAgent, short_folder: Path, keep: float) -> None:
    """Which is asked by the runtime, or by its spool."""
    db = short_folder / "agent.db"
    async with (
        run_openai_server(OpenAiServer(delay=0.01)) as llm_url,
        run_agent(internal_key="secret", llm="openai", llm_url=llm_url, db=str(db), llm_keep=keep) as client,
    ):
        results = await check_agent(str(client.http.base_url), key="secret")
        assert (spool_pid(db) is None) == (keep == 0)
    assert [str(result) for result in results if result.outcome != PASSED] == []
    await wait_spool_ended(db, 5)


@pytest.mark.parametrize(
    ("breakage", "expected", "says"),
    [
        (ArgumentsAsText, {"tool-result", "approve"}, "tool_call needs `arguments` (dict)"),
        (TalksOn, {"tool-call-ends-stream"}, "went on talking after a tool_call"),
        (NoFinal, {"stream", "tool-result", "approve", "reject"}, "No assistant_message has `is_final` true"),
        (
            ForgetsErrors,
            {"second-decision", "unknown-call", "bad-messages"},
            "must be answered with an error",
        ),
        (RepeatsAfterCut, {"resume"}, "repeats events that came before Last-Event-ID"),
        (LosesSessions, {"routes"}, "answers 200, not 404"),
    ],
)
async def test_what_is_broken_is_named(breakage: type[Breakage], expected: set[str], says: str) -> None:
    """The checks concerned fail, with words that lead to the fault; others pass."""
    untouched = {"sessions-apart", "cancel"}
    names = sorted({*expected, *untouched})
    async with broken(breakage) as url:
        results = await check_agent(url, only=names)
    assert failed(results) == expected
    assert any(says in result.detail for result in results), [str(result) for result in results]


async def test_another_dialect_is_no_fault() -> None:
    """The contract allows several; only resuming needs ids."""
    async with broken(BareData) as url:
        results = await check_agent(url)
    assert failed(results) == {"resume"}


async def test_a_wrong_content_type_fails_everything_that_streams() -> None:
    """And the first line says which type came."""
    async with broken(PlainText) as url:
        results = await check_agent(url, only=["stream", "cancel"])
    assert failed(results) == {"stream", "cancel"}
    assert "got text/plain" in results[0].detail


async def test_what_cannot_be_checked_is_skipped_with_a_reason(run_agent: RunAgent) -> None:
    """No key given, and nobody knows whether the lock holds."""
    async with run_agent() as client:
        results = await check_agent(str(client.http.base_url), only=["key"])
    assert [(one.outcome, one.detail) for one in results] == [(SKIPPED, "No key was given.")]


async def test_an_address_where_nothing_answers_is_told_apart(run_agent: RunAgent) -> None:
    """From a runtime that answers wrongly."""
    async with run_agent() as client:
        url = str(client.http.base_url)
    with pytest.raises(AgentUnreachableError, match="Is it running there"):
        await check_agent(url)
    with pytest.raises(ValueError, match="http://"):
        await check_agent("localhost:8001")
    with pytest.raises(ValueError, match="There is no check nonsense"):
        await check_agent(url, only=["nonsense"])


async def test_a_runtime_that_hangs_fails_in_time() -> None:
    """The check ends with the timeout it was given."""

    async def hangs(scope: dict[str, Any], receive: Any, send: Send) -> None:
        if scope["path"] == "/agent/message/stream":
            await trio.sleep(60)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": orjson.dumps({})})

    async with broken(lambda _: hangs) as url:
        results = await check_agent(url, only=["stream"], timeout=0.3)
    assert "did not end within 0.3 s" in results[0].detail
