"""A chat completions server that plays prepared answers, as an httpx transport."""

from collections.abc import AsyncIterator
from typing import Any

import attrs
import httpx
import orjson
import trio


@attrs.define
class Reply:
    """One prepared answer: its chunks, after a delay each; ``cut`` breaks the connection at the end."""

    chunks: list[bytes] = attrs.field(factory=list)
    status: int = 200
    headers: dict[str, str] = attrs.field(factory=lambda: {"Content-Type": "text/event-stream"})
    delay: float = 0.0
    cut: bool = False
    refuse: bool = False


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> bytes:
    """One streamed chunk."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: " + orjson.dumps({"choices": choices, **more}) + b"\n\n"


def call_chunk(
    index: int | None, arguments: str, call_id: str | None = None, name: str | None = None
) -> bytes:
    """A fragment of a tool call."""
    function = {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
    fragment: dict[str, Any] = {"function": function, "type": "function"}
    if index is not None:
        fragment["index"] = index
    if call_id is not None:
        fragment["id"] = call_id
    return chunk({"tool_calls": [fragment]})


DONE = b"data: [DONE]\n\n"


def says(*words: str) -> Reply:
    """Text, streamed word by word, with usage."""
    usage = {"prompt_tokens": 10, "completion_tokens": len(words)}
    body = [chunk({"content": word}) for word in words]
    return Reply(
        [chunk({"role": "assistant", "content": ""}), *body, chunk({}, "stop"), chunk(usage=usage), DONE]
    )


def calls(name: str, arguments: dict[str, Any], call_id: str = "c1") -> Reply:
    """One tool call, its arguments in two fragments."""
    text = orjson.dumps(arguments).decode()
    half = len(text) // 2
    return Reply(
        [
            call_chunk(0, "", call_id, name),
            call_chunk(0, text[:half]),
            call_chunk(0, text[half:]),
            chunk({}, "tool_calls"),
            DONE,
        ]
    )


class _Stream(httpx.AsyncByteStream):
    def __init__(self, reply: Reply, closed: list[str]) -> None:
        self._reply = reply
        self._closed = closed
        self._position = 0

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await trio.sleep(self._reply.delay)
        if self._position == len(self._reply.chunks):
            if self._reply.cut:
                raise httpx.ReadError("cut")
            raise StopAsyncIteration
        self._position += 1
        return self._reply.chunks[self._position - 1]

    async def aclose(self) -> None:
        self._closed.append("closed")


class FakeLlm(httpx.AsyncBaseTransport):
    """Plays its replies in order, and keeps the requests."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.requests: list[httpx.Request] = []
        self.closed: list[str] = []

    @property
    def bodies(self) -> list[Any]:
        """The JSON of the requests."""
        return [orjson.loads(request.content) for request in self.requests]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The next reply."""
        self.requests.append(request)
        await trio.lowlevel.checkpoint()
        reply = self.replies.pop(0)
        if reply.refuse:
            raise httpx.ConnectError("refused")
        return httpx.Response(reply.status, headers=reply.headers, stream=_Stream(reply, self.closed))
