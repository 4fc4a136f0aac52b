"""A chat completions server on loopback whose answers depend on the messages and nothing else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import trio
from hypercorn.utils import wrap_app

from gateway.reference_agent.llm_messages import CONTINUE, HANDED_OVER
from gateway.reference_agent.server import HttpServer, hypercorn_config

READ_FILE, CREATE_FILE = "Read the file", "Create the file"
"""How the requests of ``gateway check-agent`` begin."""

COUNTED = [f"{number} " for number in range(1, 41)]


class OpenAiServer:
    """Routes changes to the coder, who makes them and reports; reads; counts to 40 for everything else."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.asked: list[str] = []
        """The step each request was for: who was asked, and what had happened since the user spoke."""

        self.given_up = 0
        """Requests whose client left before the end."""

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer one request."""
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        chunks = self._answer(orjson.loads(body))
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def watch(scope: trio.CancelScope) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.given_up += 1
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, nursery.cancel_scope)
            for chunk in [*chunks, b"[DONE]"]:
                await trio.sleep(self.delay)
                await send(
                    {"type": "http.response.body", "body": b"data: " + chunk + b"\n\n", "more_body": True}
                )
            nursery.cancel_scope.cancel()
        await send({"type": "http.response.body", "body": b""})

    def _answer(self, body: dict[str, Any]) -> list[bytes]:
        messages = body["messages"]
        spoken = [
            index
            for index, one in enumerate(messages)
            if one["role"] == "user" and one["content"] not in (CONTINUE, HANDED_OVER)
        ]
        request = messages[spoken[-1]]["content"]
        results = [one["content"] for one in messages[spoken[-1] :] if one["role"] == "tool"]
        agent = next(
            name for name in ("orchestrator", "coder", "") if f"the {name}" in messages[0]["content"]
        )
        said = messages[-2]["content"] if messages[-1]["content"] == CONTINUE else ""
        self.asked.append(f"{request} {agent} {len(results)}")
        if any("rejected" in one for one in results):
            return _text(["I ", "leave ", "it."], said)
        if not request.startswith(("edit", READ_FILE, CREATE_FILE)):
            return _text(COUNTED, said)
        if request.startswith(READ_FILE) and not results:
            return _call("read_file", {"path": "README.md"})
        if agent == "orchestrator" and not results:
            return _call("switch_agent", {"agent": "coder", "reason": "An edit.", "confidence": 0.8})
        if request.startswith(CREATE_FILE) and not results:
            return _call("write_file", {"path": "conformance.txt", "content": "hello"})
        if not request.startswith("edit"):
            return _text(["All ", "done."], said)
        if not results:
            return _text(["I ", "read. "], said, end=None) + _call("read_file", {"path": "a.py"})
        if len(results) == 1:
            return _call("edit_file", {"path": "a.py", "old": "hello", "new": "goodbye"})
        return _text(["All ", "done."], said)


def _chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    return orjson.dumps({"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def _text(words: list[str], said: str, end: str | None = "stop") -> list[bytes]:
    left = "".join(words).removeprefix(said)
    chunks = [_chunk({"content": word + " "}) for word in left.split()] if left else []
    if left and not left.endswith(" "):
        chunks[-1] = _chunk({"content": left.split()[-1]})
    return chunks if end is None else [*chunks, _chunk({}, end)]


def _call(name: str, arguments: dict[str, Any]) -> list[bytes]:
    text = orjson.dumps(arguments).decode()
    first = {"index": 0, "id": f"llm_{name}", "type": "function", "function": {"name": name, "arguments": ""}}
    fragments = [{"index": 0, "function": {"arguments": character}} for character in text]
    return [*(_chunk({"tool_calls": [one]}) for one in (first, *fragments)), _chunk({}, "tool_calls")]


@asynccontextmanager
async def run_openai_server(server: OpenAiServer) -> AsyncIterator[str]:
    """Serve it on a free port; yields the base URL."""
    async with trio.open_nursery() as nursery:
        listeners = list(await trio.open_tcp_listeners(0, host="127.0.0.1"))
        app = wrap_app(server, 1, "asgi")  # type: ignore[arg-type]
        await nursery.start(HttpServer(app, hypercorn_config()).serve, listeners)
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()
