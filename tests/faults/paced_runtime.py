"""An Agent Runtime that says a token at fixed times, whoever listens, and goes on where it is asked to.

Token ``i`` of an answer is due ``i`` paces after its first POST. A POST under the same key with
``Last-Event-ID`` gets at once what has become due meanwhile, and the rest as it comes; so what a client sees
of a cut is how long it lasted. Asyncio's protocols and no more: a token has to cost less here than in a
gateway.
"""

from __future__ import annotations

import asyncio
import re

from attrs import Factory, define

_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-stream-resumable: 1\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)
_DONE = b'event: done\ndata: {"status":"completed"}\n\n'
_END = b"%x\r\n%b\r\n0\r\n\r\n" % (len(_DONE), _DONE)
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_KEY = re.compile(rb"\r\nidempotency-key: *([^\r]+)", re.IGNORECASE)
_LAST = re.compile(rb"\r\nlast-event-id: *(\d+)", re.IGNORECASE)
_SESSION = re.compile(rb'"session_id": ?"([^"]+)"')
SHORT = "be brief"
"""A message with these words is answered with one token."""
CATCH_UP = 500
"""Tokens in one chunk, for who comes back late."""


@define
class Answer:
    """One turn as this runtime knows it."""

    session_id: str
    began: float
    posts: int = 0
    told: int = 0
    """The highest token that was ever sent."""
    fresh_posts: int = 0
    """POSTs without ``Last-Event-ID``: more than one would have a client hear it all twice."""
    is_short: bool = False
    is_over: bool = False


@define
class PacedRuntime:
    """The runtime; ``pace`` is seconds from token to token."""

    pace: float
    answers: dict[str, Answer] = Factory(dict)
    """By idempotency key."""
    is_stopping: bool = False
    """Once set, every answer ends with its next token."""
    port: int = 0
    server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen on loopback."""
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, backlog=4096)
        self.port = self.server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Listen no longer."""
        if self.server is not None:
            self.server.close()

    def answer(self, key: str, session_id: str, now: float) -> Answer:
        """The answer of that key; begun now if there is none."""
        found = self.answers.get(key)
        if found is None:
            found = self.answers[key] = Answer(session_id, now)
        return found


class _Connection(asyncio.Protocol):
    """One connection of a gateway's."""

    def __init__(self, runtime: PacedRuntime) -> None:
        self._runtime = runtime
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._received = b""
        self._answer: Answer | None = None
        self._next = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, _error: Exception | None) -> None:
        """Called by asyncio."""
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self._received += data
        head, end, rest = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head + b"\r\n")
        if self._answer is not None or not end or (length and len(rest) < int(length[1])):
            return
        self._received = b""
        key, last, session = _KEY.search(head), _LAST.search(head + b"\r\n"), _SESSION.search(rest)
        assert key is not None
        assert session is not None
        answer = self._runtime.answer(key[1].decode(), session[1].decode(), self._loop.time())
        answer.is_short |= SHORT.encode() in rest
        answer.posts += 1
        answer.fresh_posts += last is None
        self._answer, self._next = answer, 0 if last is None else int(last[1]) + 1
        self._transport.write(_HEAD)
        self._tick()

    def _tick(self) -> None:
        answer, runtime = self._answer, self._runtime
        assert answer is not None
        self._timer = None
        due = answer.told if answer.is_over else int((self._loop.time() - answer.began) / runtime.pace)
        chunks: list[bytes] = []
        while self._next <= due and len(chunks) < CATCH_UP:
            answer.is_over |= (runtime.is_stopping or answer.is_short) and self._next >= answer.told
            chunks.append(_token(self._next, is_final=answer.is_over and self._next >= answer.told))
            answer.told = max(answer.told, self._next)
            self._next += 1
            if answer.is_over:
                due = answer.told
        if chunks:
            data = b"".join(chunks)
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        if answer.is_over and self._next > answer.told:
            self._transport.write(_END)
            self._answer = None
            return
        wait = 0.0 if self._next <= due else answer.began + self._next * runtime.pace - self._loop.time()
        self._timer = self._loop.call_later(wait, self._tick)


def _token(number: int, *, is_final: bool) -> bytes:
    return (
        b'id: %d\nevent: message\ndata: {"type": "assistant_message", "token": "%d ", "is_final": %b}\n\n'
        % (number, number, b"true" if is_final else b"false")
    )
