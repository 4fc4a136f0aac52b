"""A deterministic Agent Runtime that remembers everything it was asked and everything it answered.

What a message is answered with is written in the message: ``plan`` in a ``user_message``, else it follows
from the call that is settled. Every event carries a mark that no other event has, ``⟦execution.index⟧``:
in a token's text, so that merged tokens can be told apart, and as field ``mark`` in other events.

Sessions whose id begins with ``r`` are resumable by the contract of ``docs/agent-runtime.md``; in others
an answer dies with its connection, and the same message posted twice is done twice.
"""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import trio

WORDS = (
    "alpha ",
    "βeta ",
    "gämma ",
    "d\\elta ",
    '"eps" ',
    "\n",
    "ζ🙂 ",
    "eta\t",
    "theta theta theta ",
    "</i>",
)


class Post(NamedTuple):
    """One request as it came in."""

    session_id: str
    key: str
    last_event_id: str | None
    message: dict[str, Any]
    time: float
    execution: int
    """Which piece of work it started, or continued."""


class Execution:
    """One piece of work: what it emits, and how far it has come."""

    def __init__(self, number: int, session_id: str, key: str, events: list[dict[str, Any]]) -> None:
        self.number = number
        self.session_id = session_id
        self.key = key
        self.events = events
        """All that it will emit, in order."""
        self.is_unpaced = False
        self.revealed = 0
        self.finished = False
        """All of it was emitted. Whether it was also heard is another matter."""
        self.news = trio.lowlevel.ParkingLot()


class AgentRuntime:
    """The runtime and its record."""

    def __init__(
        self,
        randomness: random.Random,
        notify: Callable[[str], None],
    ) -> None:
        self._random = randomness
        self._notify = notify
        self._nursery: trio.Nursery | None = None
        self._by_key: dict[tuple[str, str], Execution] = {}
        self.posts: dict[str, list[Post]] = {}
        """By session, in the order they came in."""
        self.executions: list[Execution] = []
        self.port = 0

    async def serve(
        self, *, task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Answer until cancelled."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = int(listeners[0].socket.getsockname()[1])
        async with trio.open_nursery() as self._nursery:
            await trio.serve_listeners(self._connection, listeners, task_status=task_status)

    # ------------------------------------------------------------------ HTTP

    async def _connection(self, stream: trio.SocketStream) -> None:
        try:
            await self._requests(stream)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # Cut, or killed.
        finally:
            stream.socket.close()

    async def _requests(self, stream: trio.SocketStream) -> None:
        buffer = b""
        while True:
            while b"\r\n\r\n" not in buffer:
                data = await stream.receive_some(65536)
                if not data:
                    return
                buffer += data
            head, buffer = buffer.split(b"\r\n\r\n", 1)
            headers = {
                name.strip().lower(): value.strip()
                for name, _, value in (line.partition(":") for line in head.decode().split("\r\n")[1:])
            }
            length = int(headers["content-length"])
            while len(buffer) < length:
                data = await stream.receive_some(65536)
                if not data:
                    return
                buffer += data
            body, buffer = buffer[:length], buffer[length:]
            await self._answer(stream, headers, json.loads(body))

    async def _answer(
        self, stream: trio.SocketStream, headers: dict[str, str], request: dict[str, Any]
    ) -> None:
        session_id, message = request["session_id"], request["message"]
        key, last_event_id = headers["idempotency-key"], headers.get("last-event-id")
        is_resumable = session_id.startswith("r")
        execution = self._by_key.get((session_id, key)) if is_resumable else None
        is_new = execution is None
        if execution is None:
            execution = self._begin(session_id, key, message)
        self.posts.setdefault(session_id, []).append(
            Post(session_id, key, last_event_id, message, trio.current_time(), execution.number)
        )
        self._notify("post")
        if message.get("plan", {}).get("refuse") and is_new:
            execution.finished = True
            await stream.send_all(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                b'Content-Length: 16\r\n\r\n{"detail": "no"}'
            )
            return
        assert self._nursery is not None
        if is_new and is_resumable:
            self._nursery.start_soon(self._work, execution)
        after = 0 if last_event_id is None else int(last_event_id.removeprefix("n"))
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
        if is_resumable:
            head += "X-Stream-Resumable: 1\r\n"
        await stream.send_all(f"{head}\r\n".encode())
        async with trio.open_nursery() as nursery:
            if is_new and not is_resumable:
                nursery.start_soon(self._work, execution)

            hearing = trio.CancelScope()

            async def hear_close() -> None:
                # Looked at, not taken: after the answer's end it may be the next request.
                with hearing:
                    await trio.lowlevel.wait_readable(stream.socket)
                    with suppress(OSError):
                        if await stream.socket.recv(1, socket.MSG_PEEK):
                            return
                    nursery.cancel_scope.cancel()

            nursery.start_soon(hear_close)
            await self._tell(stream, execution, after, is_resumable)
            hearing.cancel()

    async def _tell(
        self, stream: trio.SocketStream, execution: Execution, after: int, is_resumable: bool
    ) -> None:
        dialect = execution.number % 3
        while True:
            if after < execution.revealed:
                parts = []
                for index in range(after, execution.revealed):
                    data = json.dumps(execution.events[index], ensure_ascii=index % 2 == 0)
                    name = "event: message\n" if dialect == 0 else ""
                    number = f"id: n{index + 1}\n" if is_resumable else ""
                    parts.append(f"{number}{name}data: {data}\n\n")
                after = execution.revealed
                await stream.send_all(_chunk("".join(parts)))
            elif execution.finished:
                if dialect == 0:
                    await stream.send_all(_chunk('event: done\ndata: {"status":"completed"}\n\n'))
                elif dialect == 1:
                    await stream.send_all(_chunk("data: [DONE]\n\n"))
                await stream.send_all(b"0\r\n\r\n")
                return
            else:
                await execution.news.park()

    # ------------------------------------------------------------------ the work

    def _begin(self, session_id: str, key: str, message: dict[str, Any]) -> Execution:
        number = len(self.executions)
        execution = Execution(number, session_id, key, compose(number, message))
        execution.is_unpaced = message.get("plan", {}).get("unpaced", False)
        self.executions.append(execution)
        self._by_key[session_id, key] = execution
        return execution

    async def _work(self, execution: Execution) -> None:
        randomness = random.Random(execution.number)
        pace = 0.0 if execution.is_unpaced else randomness.choice((0.0, 0.0, 0.002, 0.008, 0.03))
        while execution.revealed < len(execution.events):
            burst = randomness.choice((1, 1, 1, 2, 7, 40))
            execution.revealed = min(execution.revealed + burst, len(execution.events))
            execution.news.unpark_all()
            self._notify("token")
            await trio.sleep(pace * randomness.random() * 2)
        execution.finished = True
        execution.news.unpark_all()


def compose(number: int, message: dict[str, Any]) -> list[dict[str, Any]]:
    """What work ``number`` on this message emits."""
    randomness = random.Random(number)
    kind = message["type"]
    plan: dict[str, Any] = message.get("plan", {})
    if kind == "user_message":
        tokens = int(plan.get("tokens", 0))
    elif kind == "hitl_decision" and message["decision"] != "reject":
        return []
    else:
        tokens = 4
    events: list[dict[str, Any]] = []

    def mark() -> str:
        return f"⟦{number}.{len(events)}⟧"

    if kind == "user_message" and randomness.random() < 0.2:
        events.append(
            {
                "type": "agent_switched",
                "from_agent": "orchestrator",
                "to_agent": "coder",
                "reason": "it is code",
                "mark": mark(),
            }
        )
    for index in range(tokens):
        token = {"type": "assistant_message", "token": mark() + randomness.choice(WORDS), "is_final": False}
        if index % 50 > 40:
            token["agent"] = "coder"
        events.append(token)
        if randomness.random() < 0.02:
            events.append({"type": "plan_update", "steps": [1, None, 2.50], "mark": mark()})
    events += [
        {"type": "plan_update", "steps": ["read", "write"], "mark": f"⟦{number}.{index}⟧"}
        for index in range(len(events), len(events) + plan.get("updates", 0))
    ]
    calls: list[str] = plan.get("calls", [])
    events += [
        {
            "type": "tool_call",
            "call_id": call,
            "tool_name": "write_file",
            "arguments": {"path": "a.py", "content": None, "n": 9007199254740993},
            "requires_approval": call.startswith("approve"),
            "mark": f"⟦{number}.{index}⟧",
        }
        for index, call in enumerate(calls, len(events))
    ]
    if not calls:
        if plan.get("error"):
            events.append(
                {"type": "error", "error": "It failed.", "code": "SCRIPTED_FAILURE", "mark": mark()}
            )
        events.append({"type": "assistant_message", "token": "", "is_final": True, "mark": mark()})
    return events


def _chunk(text: str) -> bytes:
    data = text.encode()
    return b"%x\r\n%b\r\n" % (len(data), data)
